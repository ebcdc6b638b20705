"""What is promised about exits, and the tests that can keep the promise: settings and certifiers.

Unusual here: a test looks at one step of a path at a time and only when asked, so a walk that stops early has read
nothing of the steps behind; units are shuffled with a seed, since bets must not follow time or labels.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from project.errors import ConfigError
from project.exits import betting
from project.exits.risks import Floats, Risk, auc_gap, find_risk, pair_losses, row_pairings, user_pairings

Unit = Literal["users", "rows"]
CERTIFIERS = {"rows": ("wsr", "hoeffding_bentkus"), "pairs": ("averaged_e_values", "delong")}
"""Certifiers by what the losses are of, the default first; losses of requests take those of rows."""
UNITS = {"rows": ("users", "rows"), "pairs": ("users", "rows"), "requests": ("users",)}


@dataclass(frozen=True)
class CertificateSettings:
    """What is promised, fixed before the `certify` fold is read.

    Args:
        risk: score_drift, score_drift_squared, disagreement, log_loss_gap, brier_gap, auc_gap or overlap_loss.
        epsilon: Largest risk allowed, above 0 and below the risk's highest value.
        delta: Chance that the promise may be broken, above 0 and at most 0.5.
        unit: users (each user one loss: the safe one) or rows (assumes independent rows; not for overlap_loss).
        certifier: wsr or hoeffding_bentkus; averaged_e_values or delong (asymptotic) for auc_gap. None: the first.
        pairings: Random pairings that averaged_e_values averages over.
        seed: Seed of the order of the units and of the pairings.

    Raises:
        ConfigError: A value that cannot work; names its key exits.<key>.
    """

    risk: str = "score_drift"
    epsilon: float = 0.05
    delta: float = 0.1
    unit: Unit = "users"
    certifier: str | None = None
    pairings: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        risk = find_risk(self.risk)
        known = CERTIFIERS["pairs" if risk.over == "pairs" else "rows"]
        if not 0 < self.epsilon < risk.high:
            raise ConfigError(
                f"exits.certificate.epsilon: found {self.epsilon}, expected a number above 0 and below "
                f"{risk.high:.4g}, the largest {self.risk} there can be"
            )
        if not 0 < self.delta <= 0.5:
            raise ConfigError(
                f"exits.certificate.delta: found {self.delta}, expected a number above 0 and at most 0.5"
            )
        if self.unit not in UNITS[risk.over]:
            raise ConfigError(
                f"exits.certificate.unit: found {self.unit!r}, expected {' or '.join(UNITS[risk.over])} for {self.risk}"
            )
        if self.certifier is None:
            object.__setattr__(self, "certifier", known[0])
        if self.certifier not in known:
            raise ConfigError(
                f"exits.certificate.certifier: found {self.certifier!r}, expected {' or '.join(known)} for {self.risk}"
            )
        if self.pairings < 1:
            raise ConfigError(f"exits.certificate.pairings: found {self.pairings}, expected 1 or more")

    @property
    def estimand(self) -> str:
        """What exactly is promised to be at most epsilon."""
        if self.risk != "auc_gap":
            return f"mean {self.risk} over {self.unit}" + (", each counting once" * (self.unit == "users"))
        if self.certifier == "delong" or self.unit == "rows":
            return "pooled AUC gap"
        return "AUC gap of a random positive row of a random user and a random negative row of another"


class Test(Protocol):
    """One certifier on one fold, asked about one step at a time."""

    def p_value(self, step: int) -> float:
        """P-value of "the step's risk is above epsilon"."""

    def bound(self, step: int) -> float:
        """Upper bound of the step's risk at level delta, at most epsilon exactly where the test rejects."""

    def estimate(self, step: int) -> float | None:
        """Mean loss of the step, None without data."""

    def needed(self, step: int) -> int | None:
        """About how many units would do at this step, None where no number would."""


class MeanTest:
    """Tests of a mean over units, rescaled to [0, 1] and shuffled: wsr and hoeffding_bentkus."""

    def __init__(self, losses: Floats, risk: Risk, settings: CertificateSettings) -> None:
        order = np.random.default_rng(settings.seed).permutation(losses.shape[1])
        self._losses = np.clip(risk.rescale(losses[:, order]), 0.0, 1.0)
        self._risk, self._delta = risk, settings.delta
        self._epsilon = float(risk.rescale(settings.epsilon))
        self._betting = settings.certifier == "wsr"

    def p_value(self, step: int) -> float:
        """P-value of "the step's risk is above epsilon"."""
        x = self._losses[step]
        if self._betting:
            return float(betting.wsr_p_value(x, self._epsilon, self._delta))
        return float(betting.hoeffding_bentkus_p_value(x.mean(), x.size, self._epsilon)) if x.size else 1.0

    def bound(self, step: int) -> float:
        """Upper bound of the step's risk at level delta."""
        x = self._losses[step]
        if not x.size:
            return self._risk.high
        if self._betting:
            return float(self._risk.restore(betting.wsr_upper_bound(x, self._epsilon, self._delta)))
        return float(self._risk.restore(betting.hoeffding_bentkus_upper_bound(x.mean(), x.size, self._delta)))

    def estimate(self, step: int) -> float | None:
        """Mean loss of the step."""
        x = self._losses[step]
        return float(self._risk.restore(x.mean())) if x.size else None

    def needed(self, step: int) -> int | None:
        """About how many units the step would need."""
        x = self._losses[step] if self._losses.shape[1] else self._risk.rescale([0.0])
        if self._betting:
            return betting.losses_needed(x, self._epsilon, self._delta)
        if x.mean() >= self._epsilon:
            return None
        return math.ceil(math.log(1 / self._delta) / float(betting.coin_entropy(x.mean(), self._epsilon)))


class PairTest:
    """Averaged e-values of the pairwise AUC gap."""

    def __init__(
        self, path: Floats, full: Floats, labels: ArrayLike, users: ArrayLike, settings: CertificateSettings
    ) -> None:
        pairings, seed = settings.pairings, settings.seed
        self._positives, self._negatives, self._counts = (
            user_pairings(labels, users, pairings, seed)
            if settings.unit == "users"
            else row_pairings(labels, pairings, seed)
        )
        self._real = np.arange(self._positives.shape[1]) < self._counts[:, None]
        self._units = int(np.unique(np.asarray(users)).size) if settings.unit == "users" else full.size
        self._path, self._full, self._delta = path, full, settings.delta
        self._epsilon = (settings.epsilon + 1) / 2

    def _losses(self, step: int) -> Floats:
        return (pair_losses(self._path[step], self._full, self._positives, self._negatives) + 1) / 2

    def p_value(self, step: int) -> float:
        """P-value of "the step's risk is above epsilon"."""
        return float(betting.averaged_p_value(self._losses(step), self._epsilon, self._delta, self._counts))

    def bound(self, step: int) -> float:
        """Upper bound of the step's risk at level delta."""
        found = betting.averaged_upper_bound(self._losses(step), self._epsilon, self._delta, self._counts)
        return 2 * float(found) - 1

    def estimate(self, step: int) -> float | None:
        """Mean loss of the step."""
        real = self._losses(step)[self._real]
        return 2 * float(real.mean()) - 1 if real.size else None

    def needed(self, step: int) -> int | None:
        """About how many units the step would need."""
        losses, estimate = self._losses(step), self.estimate(step)
        if estimate is None:  # not one pair: what pairs that never differ would need, two units each
            return 2 * (betting.losses_needed([0.5], self._epsilon, self._delta) or 0)
        growth = betting.averaged_growth(losses, self._epsilon, self._counts)
        if growth <= 1e-9 or 2 * self._epsilon - 1 <= estimate:
            return None
        return math.ceil(self._units * math.log(1 / self._delta) / growth)


class DeLongTest:
    """Asymptotic non-inferiority of the pooled AUC: gap + z * standard error <= epsilon."""

    def __init__(
        self, path: Floats, full: Floats, labels: ArrayLike, users: ArrayLike, settings: CertificateSettings
    ) -> None:
        self._data = full, labels, users if settings.unit == "users" else None
        self._path, self._epsilon, self._z = path, settings.epsilon, float(norm.ppf(1 - settings.delta))
        self._units = int(np.unique(np.asarray(users)).size) if settings.unit == "users" else full.size

    def p_value(self, step: int) -> float:
        """P-value of "the step's risk is above epsilon"."""
        gap, error = auc_gap(self._path[step], *self._data)
        return float(norm.cdf((gap - self._epsilon) / error)) if error else float(gap >= self._epsilon)

    def bound(self, step: int) -> float:
        """Upper bound of the step's risk at level delta."""
        gap, error = auc_gap(self._path[step], *self._data)
        return gap + self._z * error

    def estimate(self, step: int) -> float | None:
        """Mean loss of the step."""
        return auc_gap(self._path[step], *self._data)[0]

    def needed(self, step: int) -> int | None:
        """About how many units the step would need."""
        gap, error = auc_gap(self._path[step], *self._data)
        if gap >= self._epsilon:
            return None
        return math.ceil(self._units * (self._z * error / (self._epsilon - gap)) ** 2)
