"""The search behind a threshold path: what a vector of thresholds costs and loses, and which vectors are tried.

AUC is judged without drawing on single labels. Each row counts as positive with the probability that a *teacher* gives
it: the last head, corrected by earlier heads as far as labels insist. Label noise is then gone from the search. Greedy
on raw AUC follows that noise and loses on fresh rows, and judging by the last head alone loses where heads err
independently (both shown in tests/exits/test_path.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.evaluation.metrics import auc, probabilities
from project.exits.policies import leave

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Heads = NDArray[np.int16]  # many vectors are held at once

JUMPS = (1, 2, 4)  # how many shares a head may move at once; greedy by single shares gets stuck
TEACHER_DEVIATION = 0.2
"""Prior deviation of the weight of an earlier head in the teacher: 0 is the last head alone."""
FREE = 1e-7  # AUC losses below this are no loss, and the larger saving wins


@dataclass(frozen=True, eq=False)
class Member:
    """A vector of thresholds and what it does.

    Attributes:
        thresholds: (K,), the last -inf.
        cost: Token-layers relative to full depth, in [0, 1].
        expected_auc: By the teacher.
        exits: (n,) heads at which the rows leave.
    """

    thresholds: Tensor
    cost: float
    expected_auc: float
    exits: Heads


class Search:
    """Vectors of thresholds, tried on labelled rows.

    Args:
        safety: (n, K).
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1, both there.
        layers: (K,).
        tokens: (n,) that run in every layer.
    """

    def __init__(
        self, safety: Tensor, scores: Floats, labels: Floats, layers: Floats, tokens: Floats
    ) -> None:
        self._safety, self._scores, self._labels = safety, scores, labels
        self._rows: Ints = np.arange(len(scores))
        self._positive = _teacher(scores, labels)
        self._cost = tokens[:, None] * layers / (float(tokens.sum() * layers[-1]) or 1.0)

    def member(self, thresholds: Tensor) -> Member:
        """What these (K,) thresholds do."""
        exits: Heads = leave(self._safety, thresholds).numpy().astype(np.int16)
        return Member(
            thresholds, float(self._cost[self._rows, exits].sum()), self._expected_auc(exits), exits
        )

    def auc(self, member: Member) -> float:
        """AUC by labels."""
        value = auc(self._scores[self._rows, member.exits], self._labels)
        if value is None:
            raise AssertionError("threshold_path has looked that both classes are there")
        return value

    def greedy(self, grids: list[list[float]]) -> list[Member]:
        """From nobody leaves early, always the move with the most cost saved per expected AUC lost.

        A move opens one head further: by some thresholds of its grid, or to everybody. Rows only ever leave earlier.

        Args:
            grids: Falling thresholds of every head but the last.
        """
        # 1. nobody leaves early
        place = [0] * len(grids)
        here = self.member(torch.tensor([*(grid[0] for grid in grids), -torch.inf], dtype=torch.float64))
        found = [here]
        while True:
            # 2. every move from here: one head, a few thresholds further or to its last
            moves = [
                (head, rung)
                for head, grid in enumerate(grids)
                for rung in {*(place[head] + jump for jump in JUMPS), len(grid) - 1}
                if place[head] < rung < len(grid)
            ]
            tried = [self._moved(here, head, grids[head][rung]) for head, rung in moves]
            # 3. the one that saves most for what it loses
            rates = [(here.cost - m.cost) / max(here.expected_auc - m.expected_auc, FREE) for m in tried]
            best = int(np.argmax(rates)) if rates else 0
            # 4. a head that no row reaches saves nothing: such moves end the search, nothing is left to save
            if not rates or rates[best] <= 0:
                return found
            place[moves[best][0]] = moves[best][1]
            here = tried[best]
            found.append(here)

    def static(self, grids: list[list[float]]) -> list[Member]:
        """Everyone leaves at k, for every k at which the criterion can decide."""
        nobody = torch.tensor([torch.inf] * len(grids) + [-torch.inf], dtype=torch.float64)
        return [self.member(_opened(nobody, k, -torch.inf)) for k, grid in enumerate(grids) if len(grid) > 1]

    def _moved(self, start: Member, head: int, threshold: float) -> Member:
        return self.member(_opened(start.thresholds, head, threshold))

    def _expected_auc(self, exits: Heads) -> float:
        """Share of pairs in order where row i is positive with probability q_i, ties in order of rows."""
        scores = self._scores[self._rows, exits]
        positive = self._positive[scores.argsort(kind="stable")]
        negative = 1.0 - positive
        below = negative.cumsum() - negative  # a row makes no pair with itself
        pairs = positive.sum() * negative.sum() - positive @ negative
        return float(positive @ below / pairs)


def _opened(thresholds: Tensor, head: int, threshold: float) -> Tensor:
    found = thresholds.clone()
    found[head] = threshold
    return found


def threshold_grid(safety: Floats, steps: int) -> list[float]:
    """Thresholds of a head: +inf, then such that a rising share of all rows is safe, at last -inf.

    Args:
        safety: (n,) at this head.
        steps: Shares; they are denser where few rows leave.
    """
    ordered = np.sort(safety)[::-1]
    ordered = ordered[ordered > -np.inf]
    if not ordered.size:
        return [np.inf]  # the criterion cannot decide here
    last = np.round(safety.size * (np.arange(1, steps) / steps) ** 1.5).astype(np.int64)
    last = last[(last > 0) & (last < ordered.size)]
    middle = (ordered[last - 1] + ordered[last]) / 2
    return [np.inf, *np.unique(middle)[::-1].tolist(), -np.inf]


def _teacher(scores: Floats, labels: Floats) -> Floats:
    """P(label = 1) from all heads: logit_K + sum of w_k (logit_k - logit_K), w_k ~ N(0, .2^2), Newton.

    Where the last head says all there is to say, w stays near 0; where heads err independently, their mean is
    the better judge, and judging by the last head alone would call every other opinion an error.
    """
    design = scores[:, :-1] - scores[:, -1:]
    ridge = np.eye(design.shape[1]) / TEACHER_DEVIATION**2
    weights = np.zeros(design.shape[1])
    for _ in range(8):
        chance = probabilities(scores[:, -1] + design @ weights)
        gradient = design.T @ (chance - labels) + ridge @ weights
        weights -= np.linalg.solve((design.T * (chance * (1 - chance))) @ design + ridge, gradient)
    return probabilities(scores[:, -1] + design @ weights)
