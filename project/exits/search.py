"""The search behind a threshold path: what a vector of thresholds costs and loses, and which vectors are tried.

Unusual here: AUC is judged without drawing on single labels. Each row counts as positive with the probability that a
*teacher* gives it: the last head, corrected by earlier heads as far as labels insist. Label noise is then gone from the
search. Greedy on raw AUC follows that noise and loses on fresh rows, and judging by the last head alone loses where
heads err independently (both shown in tests/exits/test_path.py). What is paid for need not be what is judged: labelled
rows say what is lost, and the candidates of whole requests, without labels, what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from project.evaluation.metrics import auc, probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Heads = NDArray[np.int16]  # many vectors are held at once

JUMPS = (1, 2, 4)  # how many shares a head may move at once; greedy by single shares gets stuck
FAR_JUMPS = (
    1,
    2,
    4,
    8,
    16,
)  # a cold stream stops only when whole requests have left: small moves save little
TEACHER_DEVIATION = 0.2
"""Prior deviation of the weight of an earlier head in the teacher: 0 is the last head alone."""
FREE = 1e-7  # AUC losses below this are no loss, and the larger saving wins


class Judge:
    """What leaving early does to the AUC of labelled rows.

    Args:
        safety: (n, K).
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1, both there.
    """

    def __init__(self, safety: Floats, scores: Floats, labels: Floats) -> None:
        self.safety, self._scores, self._labels = safety, scores, labels
        self._rows: Ints = np.arange(scores.shape[0])
        self._positive = _teacher(scores, labels)

    def auc(self, exits: Heads) -> float:
        """AUC by labels of rows that leave at heads `exits` (n,)."""
        value = auc(self._scores[self._rows, exits], self._labels)
        if value is None:
            raise AssertionError("threshold_path has looked that both classes are there")
        return value

    def expected_auc(self, exits: Heads) -> float:
        """Share of pairs in order where row i is positive with probability q_i, ties in order of rows."""
        scores = self._scores[self._rows, exits]
        positive = self._positive[scores.argsort(kind="stable")]
        negative = 1.0 - positive
        below = negative.cumsum() - negative  # a row makes no pair with itself
        pairs = positive.sum() * negative.sum() - positive @ negative
        return float(positive @ below / pairs)


@dataclass(frozen=True, eq=False)
class Bill:
    """What leaving early costs, on whatever candidates are paid for.

    Attributes:
        safety: (m, K) of these candidates.
        cost: Heads (m,) they leave at -> token-layers relative to full depth, in [0, 1].
    """

    safety: Floats
    cost: Callable[[Heads], float]


def row_bill(safety: Floats, layers: Floats, tokens: Floats) -> Bill:
    """Every row is a request of its own.

    Args:
        safety: (n, K).
        layers: (K,).
        tokens: (n,) that run in every layer.
    """
    rows, full = np.arange(safety.shape[0]), tokens.sum() * layers[-1]
    price = tokens[:, None] * layers / (full if full > 0 else 1.0)
    return Bill(safety, lambda exits: float(price[rows, exits].sum()))


def request_bill(safety: Floats, layers: Floats, request: Ints, own: Floats, shared: Floats) -> Bill:
    """Candidates of requests: own tokens as deep as each goes, the stream's as deep as the deepest of its request.

    `project.exits.cost.request_cost`, summed; sorted once, since a search asks thousands of times.

    Args:
        safety: (m, K).
        layers: (K,).
        request: (m,) request of each candidate.
        own: (m,) tokens of each candidate.
        shared: (m,) tokens of the stream, the same for all candidates of a request; zeros where it is cached.
    """
    order = np.argsort(request, kind="stable")
    _, starts = np.unique(request[order], return_index=True)
    own, stream = own[order], np.maximum.reduceat(shared[order], starts)
    full = float((own.sum() + stream.sum()) * layers[-1])

    def cost(exits: Heads) -> float:
        depth = layers[exits[order]]
        return float(depth @ own + np.maximum.reduceat(depth, starts) @ stream) / (full or 1.0)

    return Bill(safety, cost)


@dataclass(frozen=True, eq=False)
class Member:
    """A vector of thresholds and what it does.

    Attributes:
        thresholds: (K - 1,) of all heads but the last.
        cost: By the bill.
        expected_auc: By the judge's teacher.
        exits: (n,) heads at which the judge's rows leave.
        paid: (m,) heads at which the bill's candidates leave.
    """

    thresholds: Floats
    cost: float
    expected_auc: float
    exits: Heads
    paid: Heads


class Search:
    """Vectors of thresholds, tried against a judge and a bill.

    Args:
        judge: Labelled rows.
        bill: What is paid.
    """

    def __init__(self, judge: Judge, bill: Bill) -> None:
        self._judge, self._bill = judge, bill
        self._alike = judge.safety is bill.safety

    def member(self, thresholds: Floats) -> Member:
        """What these (K - 1,) thresholds do."""
        exits = _exits(self._judge.safety, thresholds)
        paid = exits if self._alike else _exits(self._bill.safety, thresholds)
        return self._measured(thresholds, exits, paid)

    def greedy(self, ladders: list[list[float]], jumps: Sequence[int] = JUMPS) -> list[Member]:
        """From nobody leaves early, always the move with the most cost saved per expected AUC lost.

        A move opens one head further: by some rungs of its ladder, or to everybody. Rows of one move only ever leave
        earlier, so a move is measured from where rows stand.

        Args:
            ladders: Falling thresholds of every head but the last.
            jumps: Rungs that a move may take.
        """
        place = [0] * len(ladders)
        here = self.member(np.array([ladder[0] for ladder in ladders]))
        found = [here]
        while True:
            moves = [
                (head, rung)
                for head, ladder in enumerate(ladders)
                for rung in {*(place[head] + jump for jump in jumps), len(ladder) - 1}
                if place[head] < rung < len(ladder)
            ]
            tried = [self._moved(here, head, ladders[head][rung]) for head, rung in moves]
            rates = [(here.cost - m.cost) / max(here.expected_auc - m.expected_auc, FREE) for m in tried]
            best = int(np.argmax(rates)) if rates else 0
            # a head that no row reaches saves nothing: such moves end the search, nothing is left to save
            if not rates or rates[best] <= 0:
                return found
            place[moves[best][0]] = moves[best][1]
            here = tried[best]
            found.append(here)

    def static(self, ladders: list[list[float]]) -> list[Member]:
        """Everyone leaves at k, for every k at which the criterion can decide."""
        decides = [k for k, ladder in enumerate(ladders) if len(ladder) > 1]
        nobody = np.full(len(ladders), np.inf)
        return [self.member(np.where(np.arange(len(ladders)) == k, -np.inf, nobody)) for k in decides]

    def capped(self, members: Sequence[Member], ladders: list[list[float]]) -> list[Member]:
        """Every member with "and everyone leaves at k" added, for every k: what stops a shared stream for good."""
        decides = [k for k, ladder in enumerate(ladders) if len(ladder) > 1]
        return [
            self._moved(member, k, -np.inf)
            for member in members
            for k in decides
            if not np.isneginf(member.thresholds[: k + 1]).any()
        ]

    def _moved(self, start: Member, head: int, threshold: float) -> Member:
        """The member with this head opened further."""
        thresholds = start.thresholds.copy()
        thresholds[head] = threshold
        exits = _opened(start.exits, self._judge.safety, head, threshold)
        paid = exits if self._alike else _opened(start.paid, self._bill.safety, head, threshold)
        return self._measured(thresholds, exits, paid)

    def _measured(self, thresholds: Floats, exits: Heads, paid: Heads) -> Member:
        return Member(thresholds, self._bill.cost(paid), self._judge.expected_auc(exits), exits, paid)


def row_ladder(safety: Floats, steps: int) -> list[float]:
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


def request_ladder(rungs: list[float], safety: Floats, request: Ints, steps: int) -> list[float]:
    """The rungs, and thresholds at which a rising share of requests is done as a whole.

    Args:
        rungs: From `row_ladder`.
        safety: (m,) of the requests' candidates at this head.
        request: (m,) request of each.
        steps: Shares.
    """
    order = np.argsort(request, kind="stable")
    _, starts = np.unique(request[order], return_index=True)
    least = np.minimum.reduceat(safety[order], starts)
    whole = row_ladder(least, steps)
    return sorted({*rungs, *whole}, reverse=True) if len(rungs) > 1 else rungs


def _exits(safety: Floats, thresholds: Floats) -> Heads:
    exits: Heads = (safety >= np.append(thresholds, -np.inf)).argmax(axis=1).astype(np.int16)
    return exits


def _opened(exits: Heads, safety: Floats, head: int, threshold: float) -> Heads:
    return np.where((exits > head) & (safety[:, head] >= threshold), np.int16(head), exits)


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
