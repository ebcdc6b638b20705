"""What the verb `rank` asks: how many requests, how long the list, what the certificate promises.

Unusual here: it is part of the command line, so it loads nothing that scores or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from project.data.workloads import Workload, catalogue_requests, labelled_requests
from project.errors import ConfigError
from project.exits.certificate import CertificateSettings

if TYPE_CHECKING:
    from project.datamodule import InteractionData

REPORTED = ("tune", "test")
"""Parts that policies are chosen and reported on."""


@dataclass
class RankSettings:
    """How ranking requests are made and judged.

    Args:
        requests: Catalogue requests of the tune fold, and as many of test.
        candidates: Candidates of a request.
        certify: Catalogue requests of the certify fold behind the certificate, whose users are counted, not the
            requests: those of one user are alike; 0 makes none.
        lists: Lengths k of the list that is wanted.
        overlap: Least mean overlap@k with full depth on `tune` of the policies that are chosen.
        epsilon: Certificate: largest loss of overlap, as a mean over users, each counting once.
        delta: Certificate: chance that any of its promises, one for each k, may be broken.
        labelled_minimum: Users with so many rated items in a part are asked about these, for precision and GAUC.
    """

    requests: int = 100
    candidates: int = 64
    certify: int = 100
    lists: list[int] = field(default_factory=lambda: [5, 10])
    overlap: float = 0.97
    epsilon: float = 0.05
    delta: float = 0.1
    labelled_minimum: int = 20

    def check(self) -> None:
        """Raise `ConfigError` for a value that cannot work; needs no data."""
        if not self.lists or min(self.lists) < 1 or len(set(self.lists)) < len(self.lists):
            raise ConfigError(f"ranking.lists is {self.lists}; expected lengths of 1 or more, each once.")
        longest = max(self.lists)
        for key, value, least in (
            ("candidates", self.candidates, longest + 1),
            ("labelled_minimum", self.labelled_minimum, longest + 1),
            ("requests", self.requests, 1),
            ("certify", self.certify, 0),
        ):
            if value < least:
                raise ConfigError(
                    f"ranking.{key} is {value}; expected at least {least} for lists of {self.lists}."
                )
        for key, share, most, within in (
            ("overlap", self.overlap, "at most 1", self.overlap <= 1),
            ("epsilon", self.epsilon, "below 1", self.epsilon < 1),
            ("delta", self.delta, "at most 0.5", self.delta <= 0.5),
        ):
            if not (share > 0 and within):
                raise ConfigError(f"ranking.{key} is {share}; expected a number above 0 and {most}.")

    def certificate(self) -> CertificateSettings:
        """What is promised of each list: delta is shared out among them, so that all promises hold together."""
        return CertificateSettings(
            risk="overlap_loss", epsilon=self.epsilon, delta=self.delta / len(self.lists)
        )

    def workloads(self, data: InteractionData) -> dict[str, Workload]:
        """Requests by part: catalogue/tune, labelled/test and so on."""
        split, seed = data.split, data.seed
        found = {}
        for part in REPORTED:
            found[f"catalogue/{part}"] = catalogue_requests(split, part, self.requests, self.candidates, seed)
            found[f"labelled/{part}"] = labelled_requests(split, part, self.candidates, self.labelled_minimum)
        if self.certify:
            drawn = catalogue_requests(split, "certify", self.certify, self.candidates, seed)
            found["catalogue/certify"] = drawn
        return found
