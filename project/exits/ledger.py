"""One certificate a fold: trying several settings on it voids delta, so the second is refused.

The ledger is a list in the run's own result file, handed in as it is and handed back with the new entry. A fold is
known by its protocol, not by its scores: with other weights, or scored once more, it has been read all the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from project.errors import ConfigError
from project.exits.criteria import Criterion, name
from project.exits.plan import specification
from project.exits.settings import ExitSettings


def asked_of_fold(settings: ExitSettings) -> dict[str, Any]:
    """By YAML key, what is promised and what decides which policies are tested for it, in which order.

    Budget and prior choose these policies on `tune`: with others, another policy asks the same fold. What has no part
    in the choice is left out.

    Args:
        settings: A run's.
    """
    compared = settings.criteria() if settings.criterion is None else [settings.criterion]
    found: dict[str, Any] = {
        "criterion": [_in_short(criterion) for criterion in compared],
        **{key: getattr(settings, key) for key in ("mode", "prior", "stream")},
    }
    if (
        settings.mode == "budget" or len(compared) > 1
    ):  # risk walks the whole path of a criterion that is given
        found |= {key: getattr(settings, key) for key in ("max_auc_drop", "alpha", "max_cost")}
    if settings.certificate is not None:
        found |= {f"certificate.{key}": value for key, value in asdict(settings.certificate).items()}
    return {f"exits.{key}": value for key, value in found.items()}


def admit(
    issued: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], protocol_hash: str
) -> list[dict[str, Any]]:
    """The ledger with one more certificate; the identical one is recorded once.

    Args:
        issued: `ledger` of the run's result file.
        settings: All that decides what is tested, by YAML key. Keys that an issued certificate does not have are not
            held against it.
        protocol_hash: Hash of the protocol whose `certify` fold is read.

    Raises:
        ConfigError: A certificate with other settings was issued on the fold.
    """
    new = {"protocol_hash": protocol_hash, "settings": dict(settings)}
    ledger: list[dict[str, Any]] = []
    for record in (*issued, new):
        if record not in ledger:
            ledger.append(dict(record))
        if record["protocol_hash"] != protocol_hash:
            continue
        was = record["settings"]
        changed = [k for k, value in settings.items() if k in was and was[k] != value]
        if changed:
            said = ", ".join(f"{key} {was[key]!r} -> {settings[key]!r}" for key in changed)
            raise ConfigError(
                f"a certificate was already issued on this certify fold with other settings ({said}): asking twice "
                "voids delta. Keep the settings, or train a new run and fix them before the fold is read"
            )
    return ledger


def _in_short(criterion: Criterion) -> str:
    """Such as consistency(heads=2)."""
    arguments = specification(criterion)["init_args"]
    return f"{name(criterion)}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
