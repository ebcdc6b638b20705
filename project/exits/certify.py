"""Certificates: which step of a path from safe to fast keeps a risk below epsilon with confidence 1 - delta.

Unusual here: step 0 of every path is "nobody leaves": it is full depth itself, its risk is 0 and it takes no test.
Steps 1, 2, ... are tested in that order until the first failure, and the answer is the last step that *passed*
(fixed-sequence Learn-then-Test, Angelopoulos et al. 2021); `None` where step 1 fails. A fold is worth one
certificate: see `ledger`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from project.errors import ConfigError, DataError
from project.evaluation.metrics import probabilities
from project.exits.certifiers import CertificateSettings, DeLongTest, MeanTest, PairTest, Test, Unit
from project.exits.risks import Floats, find_risk, user_means


@dataclass(frozen=True)
class Certificate:
    """What was promised and whether it holds.

    Args:
        risk: Name of the risk.
        epsilon: Largest risk allowed.
        delta: Chance that a step is returned whose risk is above epsilon.
        n: Units (users, rows or requests) it rests on.
        unit: What a unit is.
        kind: "finite-sample" or "asymptotic".
        certifier: Name of the test.
        bound: Upper bound at level delta of the risk of the returned step; of step 1, the first that failed,
            where nothing passed. Passed, the promise is epsilon: a bound below it is that step's alone and
            does not pay for having been chosen.
        estimate: The same step's mean loss on these units, None without any.
        estimand: What the promise is about, in words.
        path_step: Index on the path of the last step that passed. 0: the path holds nothing but "nobody
            leaves", so no exit is certified. None: nothing passed, so nobody may leave.
        passed: Whether `path_step` is a step.
        rows_needed: Nothing passed: about how many units step 1 would need (betting: from the growth rate of
            the best constant bet; the others: from their own formula at this estimate). None: it passed, or
            its estimated risk is not below epsilon, which more data would not cure.
    """

    risk: str
    epsilon: float
    delta: float
    n: int
    unit: Unit
    kind: Literal["finite-sample", "asymptotic"]
    certifier: str
    bound: float
    estimate: float | None
    estimand: str
    path_step: int | None
    passed: bool
    rows_needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the names above: `certificate` of results/calibrate.json."""
        return asdict(self)

    def in_words(self) -> str:
        """One or two sentences for a report."""
        units = f"{self.n:,} {self.unit}" + (", assumed independent" if self.unit == "rows" else "")
        basis = f"{units}; {self.certifier}, {self.kind}"
        estimate = "unknown" if self.estimate is None else f"{self.estimate:.4g}"
        if self.path_step == 0:
            return f"No exit certified: the path holds nothing but full depth ({basis})."
        if self.passed:
            return (
                f"With {1 - self.delta:.0%} confidence the {self.estimand} is at most {self.epsilon:g} "
                f"(estimate {estimate}, this step's own bound {self.bound:.4g}; {basis})."
            )
        need = (
            "its estimate is not below epsilon, which more data would not cure"
            if self.rows_needed is None
            else f"about {self.rows_needed:,} {self.unit} would be needed"
        )
        return (
            f"No exit certified at n = {units}: the {self.estimand} was to be at most {self.epsilon:g}; the first "
            f"step has estimate {estimate} and bound {self.bound:.4g}; {need} ({self.certifier}, {self.kind})."
        )


def last_that_passed(p_values: Iterable[float], delta: float, first: int = 0) -> int | None:
    """Walk p-values from the safe end and stop at the first above delta: index of the one before, or None.

    Args:
        p_values: Of the steps in testing order; read no further than the first failure.
        delta: Level of every single test: a fixed sequence needs no correction.
        first: Index of the first p-value's step.
    """
    last = None
    for step, p in enumerate(p_values, start=first):
        if not p <= delta:  # also stops at NaN
            break
        last = step
    return last


def certify(
    path: ArrayLike,
    full: ArrayLike,
    labels: ArrayLike | None,
    users: ArrayLike,
    settings: CertificateSettings,
) -> Certificate:
    """Certify a path of policies on the rows of the `certify` fold.

    A single policy (mode budget) is the path [full depth, policy].

    Args:
        path: Shape (steps, n), calibrated logits that each step emits; step 0, nobody leaves, equals `full`.
        full: Shape (n,), calibrated logits of the last head.
        labels: Shape (n,), 0 or 1; None for risks that read none.
        users: Shape (n,), the user of each row.
        settings: What is promised.

    Raises:
        DataError: NaN logits, shapes that differ, step 0 is not full depth, labels missing or of one class.
    """
    risk = find_risk(settings.risk)
    if risk.over == "requests":
        raise ConfigError(
            f"exits.certificate.risk: {risk.name} is a risk of ranking requests, not of score requests"
        )
    scores, last = np.asarray(path, dtype=np.float64), np.asarray(full, dtype=np.float64)
    owners = np.asarray(users)
    _check_path(scores, last, owners)
    if risk.over == "rows":
        losses = risk.losses(
            probabilities(scores.reshape(-1)).reshape(scores.shape), probabilities(last), labels
        )
        return certify_losses(user_means(losses, owners) if settings.unit == "users" else losses, settings)
    if labels is None or min(np.sum(np.asarray(labels) == c) for c in (0, 1)) < 2:
        raise DataError(
            "exits.certificate.risk: auc_gap needs two positives and two negatives in the certify fold"
        )
    truth = np.asarray(labels)
    n = int(np.unique(owners).size) if settings.unit == "users" else last.size
    test: Test = (DeLongTest if settings.certifier == "delong" else PairTest)(
        scores, last, truth, owners, settings
    )
    return _walk(test, scores.shape[0], n, settings)


def certify_losses(losses: ArrayLike, settings: CertificateSettings) -> Certificate:
    """Certify a path from the losses of its units, for risks over rows or requests.

    Args:
        losses: Shape (steps, units), in the risk's range; step 0 (nobody leaves) all 0.
        settings: What is promised.

    Raises:
        DataError: Losses outside the range, NaN, or not 0 at step 0.
    """
    risk, values = find_risk(settings.risk), np.asarray(losses, dtype=np.float64)
    if values.ndim != 2 or not values.shape[0]:
        raise DataError(f"a path is (steps, units) losses with at least step 0, found shape {values.shape}")
    outside = ~((values >= risk.low - 1e-9) & (values <= risk.high + 1e-9))
    if outside.any():
        raise DataError(
            f"{risk.name}: {outside.sum()} losses outside [{risk.low:.4g}, {risk.high:.4g}], first {values[outside][0]}"
        )
    if np.any(values[0] != 0):
        raise DataError("step 0 of a path must be full depth, where nobody leaves and every loss is 0")
    return _walk(MeanTest(values, risk, settings), values.shape[0], values.shape[1], settings)


def _check_path(scores: Floats, full: Floats, users: np.ndarray[Any, Any]) -> None:
    if scores.ndim != 2 or not scores.shape[0] or scores.shape[1:] != full.shape or users.shape != full.shape:
        raise DataError(
            f"certify: path {scores.shape}, full {full.shape}, users {users.shape} do not fit together"
        )
    if np.isnan(scores).any() or np.isnan(full).any():
        raise DataError(f"certify: {int(np.isnan(scores).sum() + np.isnan(full).sum())} logits are NaN")
    if not np.array_equal(scores[0], full):
        raise DataError("step 0 of a path must be full depth, where nobody leaves: it differs from `full`")


def _walk(test: Test, steps: int, n: int, settings: CertificateSettings) -> Certificate:
    found = last_that_passed((test.p_value(k) for k in range(1, steps)), settings.delta, first=1)
    step = 0 if steps == 1 else found
    shown = 1 if step is None else step
    return Certificate(
        risk=settings.risk,
        epsilon=settings.epsilon,
        delta=settings.delta,
        n=n,
        unit=settings.unit,
        kind="asymptotic" if settings.certifier == "delong" else "finite-sample",
        certifier=str(settings.certifier),
        bound=test.bound(shown) if shown else 0.0,
        estimate=test.estimate(shown) if shown else 0.0,
        estimand=settings.estimand,
        path_step=step,
        passed=step is not None,
        rows_needed=test.needed(1) if step is None else None,
    )
