"""What can be promised about exits: losses with a declared range, their unit, and the AUC gap of pairs.

Unusual here: every loss compares the adaptive score with the full model's, so full depth itself has risk 0; gaps
are signed, because rows that gain pay for rows that lose; the AUC gap is no mean over rows, so it is promised over
random disjoint (positive, negative) pairs, or asymptotically by DeLong's variance (Obuchowski's for users).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from project.errors import ConfigError, DataError
from project.evaluation.metrics import PROBABILITY_FLOOR, row_log_loss

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Loss = Callable[[Floats, Floats, Floats], Floats]

WIDEST = 1.0 - 2 * PROBABILITY_FLOOR  # largest distance of two emitted probabilities
LOG_ODDS = math.log((1 - PROBABILITY_FLOOR) / PROBABILITY_FLOOR)  # largest difference of two log losses


@dataclass(frozen=True)
class Risk:
    """A risk: the mean of a loss of the adaptive model beside the full one.

    Args:
        name: Its name in YAML and result files.
        low: Smallest loss possible.
        high: Largest loss possible.
        over: What a loss is of: "rows", "pairs" (the AUC gap) or "requests" (made by whoever ranks).
        loss: (p_adaptive, p_full, labels) -> losses, for risks over rows.
        labelled: Whether the loss reads labels.
    """

    name: str
    low: float
    high: float
    over: Literal["rows", "pairs", "requests"] = "rows"
    loss: Loss | None = None
    labelled: bool = False

    def losses(self, p_adaptive: ArrayLike, p_full: ArrayLike, labels: ArrayLike | None = None) -> Floats:
        """Loss of each row, inside [low, high].

        Args:
            p_adaptive: Shape (..., n), emitted probabilities, in [.001, .999].
            p_full: Shape (n,), the full model's.
            labels: Shape (n,), 0 or 1; needed where `labelled`.

        Raises:
            DataError: Labels are needed and missing.
            ValueError: Probabilities outside [.001, .999], or a risk that is not over rows.
        """
        if self.loss is None:
            raise ValueError(f"{self.name} is a risk over {self.over}, not over rows")
        adaptive, full = np.asarray(p_adaptive, dtype=np.float64), np.asarray(p_full, dtype=np.float64)
        for values in (adaptive, full):
            inside = (values >= PROBABILITY_FLOOR) & (values <= 1 - PROBABILITY_FLOOR)
            if not inside.all():
                raise ValueError(
                    f"{self.name} takes `probabilities` (clipped), found {values[~inside][0]:.4g}"
                )
        if self.labelled and labels is None:
            raise DataError(
                f"exits.certificate.risk: {self.name} needs labels, these rows have none; use score_drift"
            )
        truth = np.zeros_like(full) if labels is None else np.asarray(labels, dtype=np.float64)
        return np.clip(self.loss(adaptive, full, truth), self.low, self.high)

    def rescale(self, values: ArrayLike) -> Floats:
        """[low, high] -> [0, 1]."""
        return (np.asarray(values, dtype=np.float64) - self.low) / (self.high - self.low)

    def restore(self, values: ArrayLike) -> Floats:
        """[0, 1] -> [low, high]: the inverse of `rescale`."""
        return self.low + np.asarray(values, dtype=np.float64) * (self.high - self.low)


RISKS: dict[str, Risk] = {
    risk.name: risk
    for risk in (
        Risk("score_drift", 0.0, WIDEST, loss=lambda a, f, y: np.abs(a - f)),
        Risk("score_drift_squared", 0.0, WIDEST**2, loss=lambda a, f, y: (a - f) ** 2),
        Risk("disagreement", 0.0, 1.0, loss=lambda a, f, y: ((a >= 0.5) != (f >= 0.5)).astype(np.float64)),
        Risk(
            "log_loss_gap",
            -LOG_ODDS,
            LOG_ODDS,
            loss=lambda a, f, y: row_log_loss(a, y) - row_log_loss(f, y),
            labelled=True,
        ),
        Risk("brier_gap", -WIDEST, WIDEST, loss=lambda a, f, y: (a - y) ** 2 - (f - y) ** 2, labelled=True),
        Risk("auc_gap", -1.0, 1.0, over="pairs", labelled=True),
        Risk("overlap_loss", 0.0, 1.0, over="requests"),
    )
}
"""Every risk by name. `overlap_loss` is 1 - overlap@k of a ranking request, given to `certify_losses`."""


def find_risk(name: str) -> Risk:
    """The risk of this name; ConfigError naming exits.certificate.risk where there is none."""
    if name not in RISKS:
        raise ConfigError(f"exits.certificate.risk: found {name!r}, expected one of {', '.join(RISKS)}")
    return RISKS[name]


def user_means(losses: ArrayLike, users: ArrayLike) -> Floats:
    """One loss a user: the mean over the user's rows. Shape (..., n) -> (..., users).

    The risk is then the mean over users, each counting once, however many rows they have.
    """
    values = np.asarray(losses, dtype=np.float64)
    found, code = np.unique(np.asarray(users), return_inverse=True)
    order = np.argsort(code.reshape(-1), kind="stable")
    sizes = np.bincount(code.reshape(-1), minlength=found.size)
    starts = np.r_[0, np.cumsum(sizes)[:-1]].astype(np.intp) if found.size else np.zeros(0, np.intp)
    if not found.size:
        return np.zeros((*values.shape[:-1], 0))
    return np.asarray(np.add.reduceat(values[..., order], starts, axis=-1) / sizes, dtype=np.float64)


def pair_losses(adaptive: ArrayLike, full: ArrayLike, positives: Ints, negatives: Ints) -> Floats:
    """[full orders the pair right] - [adaptive does], ties half: in [-1, 1], mean = AUC full - AUC adaptive.

    Args:
        adaptive: Shape (n,), scores of any scale.
        full: Shape (n,), scores of any scale.
        positives: Shape (...), row of each pair's positive.
        negatives: Shape (...), row of each pair's negative.
    """
    a, f = np.asarray(adaptive, dtype=np.float64), np.asarray(full, dtype=np.float64)
    gap = np.sign(f[positives] - f[negatives]) - np.sign(a[positives] - a[negatives])
    return np.asarray(gap / 2, dtype=np.float64)


def row_pairings(labels: ArrayLike, pairings: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """Random disjoint pairs, drawn anew for each pairing: every row of the rarer class is in one pair.

    Their loss has the pooled AUC gap as mean; independent rows make the pairs of one pairing independent.

    Args:
        labels: Shape (n,), 0 or 1.
        pairings: How many pairings.
        seed: Seed of the draws.

    Returns:
        Rows of the positives and of the negatives (pairings, m) and the pairs of each pairing (pairings,).
    """
    truth = np.asarray(labels)
    rng = np.random.default_rng(seed)
    positives, negatives = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    m = min(positives.size, negatives.size)
    drawn = [
        np.stack([rng.permutation(rows)[:m] for _ in range(pairings)]).astype(np.intp)
        for rows in (positives, negatives)
    ]
    return drawn[0], drawn[1], np.full(pairings, m, dtype=np.intp)


def user_pairings(labels: ArrayLike, users: ArrayLike, pairings: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """Random disjoint pairs of users: the first gives a random positive row, the second a random negative.

    Pairs of users where the first has no positive or the second no negative are left out. What is estimated
    is then not the pooled AUC gap but the gap of a random positive of a random user against a random negative
    of another random user: each user counts once, and pairs within a user do not count.

    Args:
        labels: Shape (n,), 0 or 1.
        users: Shape (n,).
        pairings: How many pairings.
        seed: Seed of the draws.

    Returns:
        As `row_pairings`; pairings differ in length, so the end of a line may be padding (row 0).
    """
    truth = np.asarray(labels)
    found, code = np.unique(np.asarray(users), return_inverse=True)
    order = [np.lexsort((code, truth != label)) for label in (1, 0)]  # rows of this label first, by user
    counts = [np.bincount(code[truth == label], minlength=found.size) for label in (1, 0)]
    starts = [np.cumsum(count) - count for count in counts]
    rng, half = np.random.default_rng(seed), found.size // 2
    rows = np.zeros((2, pairings, half), dtype=np.intp)
    sizes = np.zeros(pairings, dtype=np.intp)
    for i in range(pairings):
        mixed = rng.permutation(found.size)
        first, second = mixed[:half], mixed[half : 2 * half]
        usable = (counts[0][first] > 0) & (counts[1][second] > 0)
        sizes[i] = usable.sum()
        for side, chosen in enumerate((first[usable], second[usable])):
            picked = starts[side][chosen] + np.floor(rng.random(chosen.size) * counts[side][chosen])
            rows[side, i, : chosen.size] = order[side][picked.astype(np.intp)]
    return rows[0], rows[1], sizes


def auc_gap(
    adaptive: ArrayLike, full: ArrayLike, labels: ArrayLike, users: ArrayLike | None = None
) -> tuple[float, float]:
    """AUC full - AUC adaptive and its standard error, by structural components (DeLong et al. 1988).

    Components come from mid-ranks (Sun and Xu 2014). With `users`, components are summed by user before they
    are squared (Obuchowski 1997, equation 3): rows of one user may then depend on each other in any way.

    Args:
        adaptive: Shape (n,), scores of any scale.
        full: Shape (n,), scores of any scale.
        labels: Shape (n,), both classes at least twice.
        users: Shape (n,); None: rows are independent.

    Returns:
        (gap, standard error); the error is 0 where both order every pair alike.
    """
    truth = np.asarray(labels)
    (f_positive, f_negative), (a_positive, a_negative) = (
        _components(full, truth),
        _components(adaptive, truth),
    )
    positive, negative = f_positive - a_positive, f_negative - a_negative
    gap, sizes = float(positive.mean()), (positive.size, negative.size)
    away = (positive - gap) / sizes[0], (negative - gap) / sizes[1]
    if users is None:
        variance = sum(float(part @ part) * size / (size - 1) for part, size in zip(away, sizes, strict=True))
        return gap, math.sqrt(variance)
    found, code = np.unique(np.asarray(users), return_inverse=True)
    parts = [
        np.bincount(code[truth == label], weights=part, minlength=found.size)
        for label, part in zip((1, 0), away, strict=True)
    ]
    total = parts[0] + parts[1]
    return gap, math.sqrt(float(total @ total) * found.size / max(found.size - 1, 1))


def _components(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, share of positives above each negative, ties half."""
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    rank = rankdata(values)
    ups, downs = values[positive], values[~positive]
    below = (rank[positive] - rankdata(ups)) / downs.size
    above = 1.0 - (rank[~positive] - rankdata(downs)) / ups.size
    return below, above
