"""Computes metrics of scores: AUC, log loss, Brier score, calibration error and user-AUCs.

Every AUC is exact and counts a tie half. What is undefined (one class, no rows) is None. AUCs take scores of any scale;
log loss, Brier and ECE take probabilities, which `probabilities` makes of logits. Arrays have shape (n,), labels are 0
or 1.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from project.arrays import F64, I64
from project.results import HeadMetrics, Losses, SessionMetrics

# of labels, probabilities and users, (n,) each
OwnMetric = Callable[[Any, Any, Any], float | None]

# emitted probabilities stay this far from 0 and 1: a row's log loss is at most 6.91
SMALLEST_PROBABILITY = 1e-3
SESSION_ROWS = 10  # of a session, the first of which NDCG and hits look at


def probabilities(logits: ArrayLike) -> F64:
    """Sigmoid of logits without overflow, clipped to [.001, .999]: what is emitted and measured."""
    values = _scores(logits)
    # the exponent is never positive, so nothing overflows
    small = np.exp(-np.abs(values))
    sigmoid = np.where(values >= 0, 1.0, small) / (1.0 + small)
    return np.clip(sigmoid, SMALLEST_PROBABILITY, 1.0 - SMALLEST_PROBABILITY)


def auc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Share of (positive, negative) pairs in the right order, ties half; None where a class is missing."""
    values, positive = checked(scores, labels)
    positives = positive.sum()
    pairs = positives * (positive.size - positives)
    # pairs in the right order, by the rank sum (Mann and Whitney 1947)
    won = rankdata(values) @ positive - positives * (positives + 1) / 2
    return float(won / pairs) if pairs else None


def log_loss(probability: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean of -log(probability of what happened), natural logarithm; None without rows."""
    values, positive = checked(probability, labels)
    return float(row_log_loss(values, positive).mean()) if values.size else None


def brier(probability: ArrayLike, labels: ArrayLike) -> float | None:
    """Mean squared distance of probability and label (Brier 1950, one column); None without rows."""
    values, positive = checked(probability, labels)
    return float(((values - positive) ** 2).mean()) if values.size else None


def ece(probability: ArrayLike, labels: ArrayLike, bins: int = 15) -> float | None:
    """Expected calibration error with equal-mass bins; None without rows.

    ECE = sum over bins b of (n_b / n) * |mean probability in b - mean label in b|. Rows are sorted by probability and
    cut into `bins` runs whose sizes differ by at most one. Rows of equal probability first share their mean label, so
    the order of the input does not matter even where a tie crosses a cut.
    """
    values, positive = checked(probability, labels)
    # levels of probability, each row's level, and rows of each level
    level, code, size = np.unique(values, return_inverse=True, return_counts=True)
    # (n,) each row's level's mean label, in the order of probabilities
    shared = np.repeat(
        np.bincount(code, weights=positive, minlength=size.size) / size, size
    )
    # sizes that differ by at most one
    parts = np.array_split(np.stack([np.repeat(level, size), shared]), max(1, bins), axis=1)
    # of each bin, its rows times how far its two means are apart
    apart = [abs(np.subtract(*part.sum(axis=1))) for part in parts]
    return float(sum(apart) / values.size) if values.size else None


def aucs_by_user(scores: ArrayLike, labels: ArrayLike, users: ArrayLike) -> tuple[F64, F64]:
    """AUCs and rows of the users with both classes, (u,) each, users ascending."""
    values, positive = checked(scores, labels)
    code = np.unique(users, return_inverse=True)[1]
    rows = np.bincount(code).astype(np.float64)
    # ranks inside each user, by the rank sum (Mann and Whitney 1947): users apart, then
    # levels of the score
    level = np.unique(values, return_inverse=True)[1]
    rank = rankdata(code * values.size + level) - (np.cumsum(rows) - rows)[code]
    positives = np.bincount(code, weights=positive)
    # by user, pairs in the right order, ties half
    won = np.bincount(code, weights=rank * positive) - positives * (positives + 1) / 2
    # users with both classes; the others have no AUC
    both = (positives > 0) & (positives < rows)
    pairs = positives * (rows - positives)
    return won[both] / pairs[both], rows[both]


def session_metrics(
    scores: ArrayLike, labels: ArrayLike, sessions: ArrayLike
) -> SessionMetrics:
    """Means over the sessions with both labels; a tie counts half, as everywhere.

    NDCG of the first `SESSION_ROWS` (rows of one score share their mean label, as scikit-learn has it), the reciprocal
    rank of the first positive, the share of sessions with one among the first `SESSION_ROWS`, and the AUC inside
    sessions, weighted by rows.
    """
    values, positive = checked(scores, labels)
    code = np.unique(sessions, return_inverse=True)[1]
    # 1. rows of sessions with both labels, by session, then best first
    rows = np.bincount(code)
    likes = np.bincount(code, weights=positive)
    both = (likes > 0) & (likes < rows)
    order = np.lexsort((-values, code))
    order = order[both[code[order]]]
    code = np.unique(code[order], return_inverse=True)[1]  # from 0 again
    values, positive = values[order], positive[order]
    count = int(both.sum())
    if not count:
        return {"sessions": 0, "ndcg": None, "mrr": None, "hits": None, "gauc": None}
    aucs = aucs_by_user(values, positive, code)
    first = np.flatnonzero(np.diff(code, prepend=-1))  # (sessions,) where each begins
    place = np.arange(code.size) - first[code]  # (n,) from 0
    # 2. ties: neighbours of one session and score share their mean label
    new = (np.diff(code, prepend=-1) != 0) | (np.diff(values, prepend=np.nan) != 0)
    tie = np.cumsum(new) - 1
    size = np.bincount(tie)
    tied_likes = np.bincount(tie, weights=positive)
    gain = (tied_likes / size)[tie]
    discount = np.where(place < SESSION_ROWS, 1 / np.log2(place + 2), 0)
    ideal = np.cumsum(np.append(0, 1 / np.log2(np.arange(SESSION_ROWS) + 2)))
    best = ideal[np.minimum(likes[both].astype(np.int64), SESSION_ROWS)]
    ndcg = np.bincount(code, weights=gain * discount) / best
    # 3. the first tie with a positive: half of its negatives stand before that
    start = np.flatnonzero(new)  # (ties,)
    found = np.flatnonzero(tied_likes > 0)
    found = found[np.flatnonzero(np.diff(code[start[found]], prepend=-1))]  # (sessions,)
    rank = 1 + place[start[found]] + (size[found] - tied_likes[found]) / 2
    return {
        "sessions": count,
        "ndcg": float(ndcg.mean()),
        "mrr": float((1 / rank).mean()),
        "hits": float((rank <= SESSION_ROWS).mean()),
        "gauc": float(np.average(aucs[0], weights=aucs[1])),
    }


def losses(logits: ArrayLike, labels: ArrayLike) -> Losses:
    """Of the probabilities that logits (n,) make."""
    chance = probabilities(logits)
    return {
        "log_loss": log_loss(chance, labels),
        "brier": brier(chance, labels),
        "ece": ece(chance, labels),
    }


def head_metrics(logits: ArrayLike, labels: ArrayLike, users: ArrayLike) -> HeadMetrics:
    """All metrics of one head's or baseline's logits in a result file (JSON values; None = undefined)."""
    inside = aucs_by_user(logits, labels, users)[0]
    return {
        "n": np.asarray(logits).size,
        "auc": auc(logits, labels),
        **losses(logits, labels),
        "uauc": {
            "value": float(inside.mean()) if inside.size else None,
            "users": inside.size,
        },
    }


class Pairs:
    """Scores sorted once: each positive's place among the negatives, ties as [first, last)."""

    def __init__(self, scores: F64, positive: F64) -> None:
        self._positives: I64 = np.flatnonzero(positive)
        # sorted once; draws of a bootstrap only reweigh them
        negatives = np.flatnonzero(positive == 0)
        self._negatives: I64 = negatives[np.argsort(scores[negatives], kind="stable")]
        ordered = scores[self._negatives]
        self._first: I64 = np.searchsorted(ordered, scores[self._positives], side="left")
        self._last: I64 = np.searchsorted(ordered, scores[self._positives], side="right")

    def weighted_auc(self, weights: NDArray[np.floating[Any]]) -> F64:
        """Row weights (draws, n) -> AUC (draws,), NaN where a class weighs nothing; a pair weighs the product."""
        # (draws, negatives + 1) weight of the first k negatives
        below = np.zeros((weights.shape[0], self._negatives.size + 1))
        np.cumsum(weights[:, self._negatives], axis=1, dtype=np.float64, out=below[:, 1:])
        # (draws, positives)
        own = weights[:, self._positives].astype(np.float64)
        # mean of the weight strictly below and of that up to the ties: a tie counts half
        won = np.einsum("dp,dp->d", own, below[:, self._first] + below[:, self._last]) / 2
        all_pairs = own.sum(axis=1) * below[:, -1]
        share: F64 = np.divide(
            won, all_pairs, out=np.full(won.shape, np.nan), where=all_pairs > 0
        )
        return share


def row_log_loss(probability: F64, positive: F64) -> F64:
    """Minus log probability of what happened; infinity for a certain mistake."""
    with np.errstate(divide="ignore"):  # log(0)
        loss: F64 = -np.log(np.where(positive == 1, probability, 1.0 - probability))
    return loss


def _scores(scores: ArrayLike) -> F64:
    values = np.asarray(scores, dtype=np.float64)
    missing = int(np.isnan(values).sum())
    if missing:
        raise ValueError(
            f"{missing} of {values.size} scores are NaN: a model that diverged has no metrics"
        )
    return values


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[F64, F64]:
    """Scores and labels as float64, or a ValueError that says what is wrong with them."""
    values, positive = _scores(scores), np.asarray(labels, dtype=np.float64)
    if positive.shape != values.shape:
        raise ValueError(f"{values.size} scores but labels of shape {positive.shape}")
    if not np.all((positive == 0) | (positive == 1)):
        raise ValueError(f"labels must be 0 or 1, found {np.unique(positive)[:5].tolist()}")
    return values, positive
