"""One certificate a fold: trying several settings on the same scores voids delta, so the second is refused.

Unusual here: nothing is read or written. The ledger is a list in the run's own results/calibrate.json, handed in
as it is and handed back with the new entry.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from project.errors import ConfigError
from project.exits.certifiers import CertificateSettings


def scores_digest(*columns: ArrayLike) -> str:
    """SHA-256 of what a certificate was computed on: the fold's row ids, labels, users and the heads' logits."""
    digest = hashlib.sha256()
    for column in columns:
        values = np.ascontiguousarray(column)
        values = values.astype(str) if values.dtype == object else values  # not the pointers
        digest.update(f"{values.dtype}{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


class CertificateLedger:
    """Certificates that were issued, so that a fold is not asked twice (trying several voids delta).

    Args:
        previous: The run's results/calibrate.json as it is, or None: its `ledger` is read.
    """

    def __init__(self, previous: Mapping[str, Any] | None) -> None:
        self._issued: Sequence[Mapping[str, Any]] = (previous or {}).get("ledger", [])

    def admit(
        self, settings: CertificateSettings, criterion: Any, mode: str, protocol_hash: str, scores: str
    ) -> list[dict[str, Any]]:
        """The ledger to write into the new result file; the identical certificate is recorded once.

        Args:
            settings: What is promised; seed and pairings count, a lucky order is a second try too.
            criterion: Name of the criterion, or its JSON configuration.
            mode: budget or risk.
            protocol_hash: Hash of the protocol whose `certify` fold is read.
            scores: `scores_digest` of that fold.

        Raises:
            ConfigError: A certificate with other settings was issued on the same scores.
        """
        new = {**asdict(settings), "criterion": criterion, "mode": mode}
        for record in self._issued:
            if (record["protocol_hash"], record["scores"]) != (protocol_hash, scores):
                continue
            changed = [key for key, value in new.items() if record["settings"].get(key) != value]
            if changed:
                where = {"criterion": "exits", "mode": "exits"}
                was = ", ".join(
                    f"{where.get(key, 'exits.certificate')}.{key} {record['settings'].get(key)!r} -> {new[key]!r}"
                    for key in changed
                )
                raise ConfigError(
                    f"a certificate was already issued on this certify fold with other settings ({was}): asking "
                    "twice voids delta. Keep the settings, or train a new run and fix them before it is read"
                )
            return [dict(known) for known in self._issued]
        entry = {"protocol_hash": protocol_hash, "scores": scores, "settings": new}
        return [*(dict(known) for known in self._issued), entry]
