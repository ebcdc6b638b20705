"""Intervals by resampling users: rows of one user are correlated, so resampled rows give too narrow intervals."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from project.arrays import F64
from project.metrics import Pairs, auc, checked, head_metrics, probabilities, row_log_loss
from project.results import Estimate, Metrics

CHUNK_ELEMENTS = 2_000_000  # rows times draws held at once: 16 MB an array
LEVEL = 0.95  # coverage of every interval
UNDEFINED: Estimate = {"value": None, "interval": None}


class UserBootstrap:
    """Percentile intervals from resampled users (Efron 1979): all rows of a drawn user come along.

    `users` (n,) is the user of each row; every later score array has these rows in this order. The draws are made
    once, so differences of scores on the same rows are paired. AUCs of scores seen before are kept: one baseline is
    resampled once, whatever the number of heads it is compared with. Intervals of few users cover less than 95 % where
    a few of them differ much; BCa and bootstrap-t do not mend that (research/intervals.py), so `few_users` says it.
    """

    def __init__(self, users: ArrayLike, draws: int = 1000, seed: int = 0) -> None:
        found, self._user = np.unique(users, return_inverse=True)
        count = max(found.size, 1)
        drawn = np.random.default_rng(seed).multinomial(
            count, np.full(count, 1.0 / count), size=draws
        )
        # (draws, users): how often each user was drawn
        self._times = drawn[:, : found.size].astype(np.float32)
        # digest of scores and labels -> their AUC in every draw
        self._known: dict[bytes, F64] = {}

    def metrics(self, logits: ArrayLike, labels: ArrayLike) -> Metrics:
        """`head_metrics` of logits (n,), and the interval of the AUC."""
        found = head_metrics(logits, labels, self._user)
        drawn = self.auc_interval(logits, labels) if len(self._times) else None
        return {**found, "auc_interval": drawn}

    def auc_interval(self, scores: ArrayLike, labels: ArrayLike) -> list[float] | None:
        """[low, high] of the AUC, None where it is undefined; draws with one class are left out."""
        return (
            None
            if auc(scores, labels) is None
            else _percentiles(self._auc_draws(scores, labels))
        )

    def difference_interval(
        self, scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike
    ) -> Estimate:
        """AUC of a minus AUC of b: {`value`, `interval` [low, high]}, both None where undefined."""
        value_a, value_b = auc(scores_a, labels), auc(scores_b, labels)
        if value_a is None or value_b is None:
            return UNDEFINED
        drawn = self._auc_draws(scores_a, labels) - self._auc_draws(scores_b, labels)
        return {"value": value_a - value_b, "interval": _percentiles(drawn)}

    def log_loss_difference_interval(
        self, logits_a: ArrayLike, logits_b: ArrayLike, labels: ArrayLike
    ) -> Estimate:
        """Log loss of a minus log loss of b, of clipped `probabilities`: {`value`, `interval`}."""
        probability_a, positive = checked(probabilities(logits_a), labels)
        probability_b, _ = checked(probabilities(logits_b), labels)
        self._same_rows(probability_a)
        if not probability_a.size:
            return UNDEFINED
        gap = row_log_loss(probability_a, positive) - row_log_loss(probability_b, positive)
        sums, rows = np.bincount(self._user, weights=gap), np.bincount(self._user)
        drawn = (self._times @ sums) / (self._times @ rows)
        return {"value": float(gap.mean()), "interval": _percentiles(drawn)}

    def ratio_interval(self, numerator: ArrayLike, denominator: ArrayLike) -> Estimate:
        """Sum of one cost (n,) over the sum of another, as a speed-up is; None where the denominator is 0."""
        above, below = (np.asarray(x, dtype=np.float64) for x in (numerator, denominator))
        self._same_rows(above)
        if not below.sum() > 0:
            return UNDEFINED
        up, down = (np.bincount(self._user, weights=x) for x in (above, below))
        spent = self._times @ down
        drawn = np.divide(
            self._times @ up, spent, out=np.full(spent.shape, np.nan), where=spent > 0
        )
        return {"value": float(above.sum() / below.sum()), "interval": _percentiles(drawn)}

    def _auc_draws(self, scores: ArrayLike, labels: ArrayLike) -> F64:
        """Shape (draws,): AUC with rows weighing as often as their user was drawn, NaN where undefined."""
        values, positive = checked(scores, labels)
        self._same_rows(values)
        digest = hashlib.sha256(values.tobytes() + positive.tobytes()).digest()
        if digest not in self._known:
            pairs = Pairs(values, positive)
            step = max(1, CHUNK_ELEMENTS // max(values.size, 1))
            self._known[digest] = np.concatenate(
                [
                    pairs.weighted_auc(self._times[i : i + step][:, self._user])
                    for i in range(0, len(self._times), step)
                ]
            )
        return self._known[digest]

    def _same_rows(self, values: F64) -> None:
        if values.size != self._user.size:
            raise ValueError(
                f"the bootstrap was made for {self._user.size} rows, found {values.size} scores"
            )


def _percentiles(drawn: F64) -> list[float] | None:
    kept = drawn[~np.isnan(drawn)]
    if not kept.size:
        return None
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
