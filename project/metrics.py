"""What a list of scores is worth: AUC, log loss, Brier, calibration error, user-AUCs.

Unusual here: every AUC is exact, ties count half; what is undefined (one class, no rows) is `None`, never 0,
.5 or NaN; three user-AUCs carry three names because published "GAUC" numbers use all of them; their intervals are
made in bootstrap.py. AUCs take scores of any scale; log loss, Brier and ECE take probabilities, which
`probabilities` makes of logits (clipped).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

SMALLEST_PROBABILITY = (
    1e-3  # emitted probabilities stay this far from 0 and 1: a row's log loss is at most 6.91
)


@dataclass(frozen=True)
class UserAUC:
    """A mean of per-user AUCs over the users that have both classes.

    Args:
        value: The (weighted) mean, None where no user has both classes.
        users: Users scored.
        rows: Rows of these users.
    """

    value: float | None
    users: int
    rows: int


def probabilities(logits: ArrayLike) -> Floats:
    """Sigmoid of logits (n,) without overflow, clipped to [.001, .999]: what is emitted and judged."""
    values = _scores(logits)
    small = np.exp(-np.abs(values))
    sigmoid = np.where(values >= 0, 1.0, small) / (1.0 + small)
    return np.clip(sigmoid, SMALLEST_PROBABILITY, 1.0 - SMALLEST_PROBABILITY)


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties half; None where a class is missing.

    Args:
        scores: Shape (n,), any monotone scale.
        labels: Shape (n,), 0 or 1.
        weights: Shape (n,), row weights >= 0; a pair weighs the product. None: every row 1.
    """
    values, positive = checked(scores, labels)
    weight = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != values.shape or not np.all(weight >= 0):
        raise ValueError(f"weights must be {values.shape[0]} numbers >= 0, found shape {weight.shape}")
    value = float(Pairs(values, positive).weighted_auc(weight[None, :])[0])
    return None if np.isnan(value) else value


def log_loss(probability: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean of -log(probability of what happened), natural logarithm; None without rows.

    A probability of exactly 0 or 1 that is wrong gives infinity: clip with `probabilities` first.

    Args:
        probability: Shape (n,), probabilities of label 1.
        labels: Shape (n,), 0 or 1.
    """
    values, positive = checked(probability, labels, probability=True)
    return float(row_log_loss(values, positive).mean()) if values.size else None


def brier(probability: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean squared distance of probability and label (Brier 1950, one column); arguments as in `log_loss`."""
    values, positive = checked(probability, labels, probability=True)
    return float(((values - positive) ** 2).mean()) if values.size else None


def ece(probability: ArrayLike, labels: ArrayLike, bins: int = 15) -> float | None:
    """Expected calibration error with equal-mass bins; None without rows.

    ECE = sum over bins b of (n_b / n) * |mean probability in b - mean label in b|. Rows are sorted by
    probability and cut into `bins` runs whose sizes differ by at most one. Rows of equal probability first
    share their mean label, so the order of the input does not matter even where a tie crosses a cut.

    Args:
        probability: Shape (n,), probabilities of label 1.
        labels: Shape (n,), 0 or 1.
        bins: Number of bins; fewer rows than bins make one bin a row.
    """
    values, positive = checked(probability, labels, probability=True)
    if not values.size:
        return None
    level, code, size = np.unique(values, return_inverse=True, return_counts=True)
    shared = np.repeat(np.bincount(code, weights=positive) / size, size)
    gaps = np.array_split(np.repeat(level, size) - shared, min(bins, values.size))
    return float(sum(abs(gap.sum()) for gap in gaps) / values.size)


def uauc(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> UserAUC:
    """User-AUC, every user with both classes counting once (CoLLM's uAUC); arguments of shape (n,)."""
    values, rows, _ = _auc_by_user(scores, labels, users)
    return _weighted_user_auc(values, rows, np.ones_like(values))


def gauc_impressions(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> UserAUC:
    """User-AUC weighted by the user's rows (FuxiCTR's gAUC; Zhu et al. 2017). Arguments as in `uauc`."""
    values, rows, _ = _auc_by_user(scores, labels, users)
    return _weighted_user_auc(values, rows, rows)


def gauc_positives(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> UserAUC:
    """User-AUC weighted by the user's positive rows (RecBole's GAUC). Arguments as in `uauc`."""
    values, rows, positives = _auc_by_user(scores, labels, users)
    return _weighted_user_auc(values, rows, positives)


def head_metrics(logits: ArrayLike, labels: ArrayLike, users: ArrayLike) -> dict[str, Any]:
    """Everything a result file says about one head's or baseline's scores (JSON values; None = undefined).

    Args:
        logits: Shape (n,), log-odds of label 1.
        labels: Shape (n,), 0 or 1.
        users: Shape (n,), the user of each row.

    Returns:
        `n`, `auc`, `log_loss`, `brier`, `ece` and, as {`value`, `users`, `rows`}, the three user-AUCs.
    """
    probability = probabilities(logits)
    values, rows, positives = _auc_by_user(logits, labels, users)
    by_user = {"uauc": np.ones_like(values), "gauc_impressions": rows, "gauc_positives": positives}
    return {
        "n": int(probability.size),
        "auc": auc(logits, labels),
        "log_loss": log_loss(probability, labels),
        "brier": brier(probability, labels),
        "ece": ece(probability, labels),
        **{name: asdict(_weighted_user_auc(values, rows, weight)) for name, weight in by_user.items()},
    }


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


class Pairs:
    """Scores sorted once: where each positive stands among the negatives, ties as [first, last)."""

    def __init__(self, scores: Floats, positive: Floats) -> None:
        self._positives: Ints = np.flatnonzero(positive)
        negatives = np.flatnonzero(positive == 0)
        self._negatives: Ints = negatives[np.argsort(scores[negatives], kind="stable")]
        ordered = scores[self._negatives]
        self._first: Ints = np.searchsorted(ordered, scores[self._positives], side="left")
        self._last: Ints = np.searchsorted(ordered, scores[self._positives], side="right")

    def weighted_auc(self, weights: NDArray[np.floating[Any]]) -> Floats:
        """Weights (draws, n) -> AUC (draws,), NaN where a class weighs nothing."""
        below = np.zeros((weights.shape[0], self._negatives.size + 1))
        np.cumsum(weights[:, self._negatives], axis=1, dtype=np.float64, out=below[:, 1:])
        own = weights[:, self._positives].astype(np.float64)
        won = np.einsum("dp,dp->d", own, below[:, self._first] + below[:, self._last]) / 2
        all_pairs = own.sum(axis=1) * below[:, -1]
        share: Floats = np.divide(won, all_pairs, out=np.full(won.shape, np.nan), where=all_pairs > 0)
        return share


def _auc_by_user(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """AUC, rows and positives of each user with both classes, from the rank sum (Mann and Whitney 1947)."""
    values, positive = checked(scores, labels)
    codes = np.unique(np.asarray(users), return_inverse=True)[1].reshape(-1)
    if codes.size != values.size:
        raise ValueError(f"{values.size} scores but {codes.size} users")
    if not values.size:
        return values, values, values
    order = np.lexsort((values, codes))
    code, value, hit = codes[order], values[order], positive[order]
    rows = np.bincount(code).astype(np.float64)
    new = np.r_[True, (code[1:] != code[:-1]) | (value[1:] != value[:-1])]
    start = np.flatnonzero(new)
    size = np.diff(np.r_[start, value.size])
    middle = np.repeat(start + (size + 1) / 2, size)  # mean 1-based rank of a run of ties, over all rows
    rank = middle - (np.cumsum(rows) - rows)[code]
    positives = np.bincount(code, weights=hit).astype(np.float64)
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    won = np.bincount(code, weights=rank * hit) - positives * (positives + 1) / 2
    return won[both] / (positives * negatives)[both], rows[both], positives[both]


def _components(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, share of positives above each negative, ties half."""
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) == 1
    rank = rankdata(values)
    ups, downs = values[positive], values[~positive]
    below = (rank[positive] - rankdata(ups)) / downs.size
    above = 1.0 - (rank[~positive] - rankdata(downs)) / ups.size
    return below, above


def _weighted_user_auc(values: Floats, rows: Floats, weights: Floats) -> UserAUC:
    value = float(np.average(values, weights=weights)) if values.size else None
    return UserAUC(value, int(values.size), int(rows.sum()))


def row_log_loss(probability: Floats, positive: Floats) -> Floats:
    """Minus log probability of what happened, (n,); infinity for a certain mistake."""
    with np.errstate(divide="ignore"):  # infinity is the right answer for a certain mistake
        loss: Floats = -np.log(np.where(positive == 1, probability, 1.0 - probability))
    return loss


def _scores(scores: ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"expected scores of shape (n,), found {values.shape}")
    missing = int(np.isnan(values).sum())
    if missing:
        raise ValueError(f"{missing} of {values.size} scores are NaN: a model that diverged has no metrics")
    return values


def checked(scores: ArrayLike, labels: ArrayLike, probability: bool = False) -> tuple[Floats, Floats]:
    """Scores and labels as float64 (n,), or a ValueError that says what is wrong with them."""
    values, positive = _scores(scores), np.asarray(labels, dtype=np.float64)
    if positive.shape != values.shape:
        raise ValueError(f"{values.size} scores but labels of shape {positive.shape}")
    if not np.all((positive == 0) | (positive == 1)):
        raise ValueError(f"labels must be 0 or 1, found {np.unique(positive)[:5].tolist()}")
    if probability and values.size and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"expected probabilities, found {values.min():.4g} to {values.max():.4g}: are these logits?"
        )
    return values, positive
