"""What a run wants of its exits: which criterion, at what price, with which promise. Fixed before `certify` is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from project.errors import ConfigError
from project.exits.certificate import CertificateSettings
from project.exits.cost import Stream
from project.exits.criteria import Consistency, Criterion, ItemCount, Ratio, RatioConsistency, try_out
from project.exits.learned import Learned

Prior = Literal["counting", "none"]
Mode = Literal["budget", "risk"]


def all_criteria() -> list[Criterion]:
    """One of each criterion, unfitted."""
    return [Ratio(), Consistency(), RatioConsistency(), Learned(), ItemCount()]


@dataclass
class ExitSettings:
    """How exits are calibrated.

    Args:
        criterion: The criterion that decides; None takes the best of `compare` on `tune`.
        compare: Criteria whose curves are drawn; None compares all there are.
        prior: counting lets candidates leave before the first layer and enters every head's calibration; none does not.
        mode: budget takes the fastest step within the budget on `tune`; risk takes the last certified step.
        max_auc_drop: Budget: AUC on `tune` that may be lost against full depth.
        alpha: Budget: chance that the AUC drop is above max_auc_drop after all, in (0, 0.5]; less is slower.
        max_cost: Budget: share of full depth's token-layers that may be spent; None sets no limit.
        stream: Whether a request's history runs with it (cold) or is cached (warm): what a token costs.
        certificate: What is promised, and tested on the `certify` fold; None makes no certificate, so not in risk mode.
    """

    criterion: Criterion | None = None
    compare: list[Criterion] | None = None
    prior: Prior = "counting"
    mode: Mode = "budget"
    max_auc_drop: float | None = 0.002
    alpha: float = 0.1
    max_cost: float | None = None
    stream: Stream = "cold"
    certificate: CertificateSettings | None = field(default_factory=CertificateSettings)

    def __post_init__(self) -> None:
        if self.max_auc_drop is None and self.max_cost is None:
            raise ConfigError(
                "exits.max_auc_drop and exits.max_cost are both null; expected at least one: without a limit the "
                "fastest policy is no model at all. Set exits.max_auc_drop, for example to 0.002."
            )
        if self.certificate is not None and self.certificate.risk == "overlap_loss":
            raise ConfigError(
                "exits.certificate.risk: overlap_loss is a risk of `rank`, not of score requests"
            )
        if self.mode == "risk" and self.certificate is None:
            raise ConfigError(
                "exits.certificate is null in mode risk, where it decides; set it, or mode to budget."
            )
        if self.max_auc_drop is not None and not 0 <= self.max_auc_drop < math.inf:
            raise ConfigError(
                f"exits.max_auc_drop is {self.max_auc_drop}; expected a number from 0 on, or null."
            )
        if not 0 < self.alpha <= 0.5:
            raise ConfigError(f"exits.alpha is {self.alpha}; expected a chance above 0 and at most 0.5.")
        if self.max_cost is not None and not 0 < self.max_cost <= 1:
            raise ConfigError(f"exits.max_cost is {self.max_cost}; expected a share above 0 and at most 1.")
        for criterion in filter(None, [self.criterion, *(self.compare or [])]):
            try_out(criterion, prior=self.prior == "counting")

    def criteria(self) -> list[Criterion]:
        """The criteria to compare, the deciding one first if it is set."""
        compared = all_criteria() if self.compare is None else list(self.compare)
        if self.criterion is None:
            if not compared:
                raise ConfigError(
                    "exits.compare is empty and exits.criterion null; expected at least one criterion."
                )
            return compared
        same = [c for c in compared if type(c) is not type(self.criterion)]
        return [self.criterion, *same]
