"""From nobody leaves early to everybody leaves at once: a one-parameter path of thresholds, fitted on `tune`.

Unusual here: AUC along the path is judged without drawing on single labels. Each row counts as positive with
the probability that a *teacher* gives it: the last head, corrected by earlier heads as far as labels insist.
Label noise is then gone from the search. Greedy on raw AUC follows that noise and loses on fresh rows, and
judging by the last head alone loses where heads err independently (both shown in tests/exits/test_path.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.cost import Stream, row_tokens
from project.metrics import auc, probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

JUMPS = (1, 2, 4)  # how many shares a head may move at once; greedy by single shares gets stuck
TEACHER_DEVIATION = 0.2
"""Prior deviation of the weight of an earlier head in the teacher: 0 is the last head alone."""
FREE = 1e-7  # AUC losses below this are no loss, and the larger saving wins


@dataclass(frozen=True, eq=False)
class Step:
    """One member of the path, as measured on `tune`.

    Attributes:
        thresholds: (K,) float64, last one -inf.
        cost: Token-layers relative to full depth, in [0, 1].
        mean_depth: Mean layer at which rows leave.
        auc: AUC by labels.
        auc_drop: AUC of full depth minus `auc`.
        expected_auc: AUC if labels were drawn from the teacher's probabilities; it falls from step to step, but
            for the first step: leaving early can be better than full depth.
    """

    thresholds: Tensor
    cost: float
    mean_depth: float
    auc: float
    auc_drop: float
    expected_auc: float

    def point(self) -> dict[str, float]:
        """What a Pareto curve in a result file says."""
        return {"cost": self.cost, "mean_depth": self.mean_depth, "auc": self.auc, "auc_drop": self.auc_drop}


@dataclass(frozen=True, eq=False)
class Path:
    """Steps of falling cost; the first is full depth, where nobody leaves early."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]


def threshold_path(
    safety: Tensor,
    scores: Tensor,
    labels: ArrayLike,
    layers: Sequence[int],
    target_tokens: Tensor,
    stream_tokens: Tensor,
    stream: Stream = "cold",
    steps: int = 20,
) -> Path:
    """Greedy by cost saved per expected AUC lost, then pruned to what nothing cheaper and better dominates.

    A move opens one head further: to one of its next shares of safest rows, or to everybody. Rows of one move
    only ever leave earlier. "Everyone leaves at k" competes for every k at which the criterion can decide.

    Args:
        safety: (n, K) safety of the rows of `tune`, out-of-fold where the criterion learns.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1.
        layers: (K,) layer of each head.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        stream: Whether the stream's tokens are paid for ("cold").
        steps: Shares per head; they are denser where few rows leave.

    Returns:
        Steps of falling cost, the first of which is full depth (nobody leaves early).

    Raises:
        DataError: One class, or safety that is NaN.
    """
    _check(safety, labels, layers)
    search = _Search(
        safety.detach().double().cpu().numpy(),
        scores.detach().double().cpu().numpy(),
        np.asarray(labels, dtype=np.float64),
        np.asarray(layers, dtype=np.float64),
        row_tokens(target_tokens, stream_tokens, stream).double().cpu().numpy(),
    )
    ladders = [search.ladder(head, steps) for head in range(len(layers) - 1)]
    return _pruned([*search.greedy(ladders), *search.static(ladders)])


def _check(safety: Tensor, labels: ArrayLike, layers: Sequence[int]) -> None:
    if safety.isnan().any():
        head = int(safety.isnan().any(dim=0).int().argmax())
        raise DataError(
            f"the criterion's safety is NaN at the exit at layer {layers[head]} on rows of the fold tune: its inputs "
            "are NaN; train again with a lower model.learning_rate"
        )
    if np.unique(np.asarray(labels)).size < 2:
        raise DataError(
            "thresholds need both classes in the fold tune, found one: use more validation data or another "
            "data.protocol.label"
        )


def pick_budget(path: Path, max_auc_drop: float | None = None, max_cost: float | None = None) -> int:
    """Index of the step to use: the fastest that keeps the AUC, or the best that keeps the cost.

    Args:
        path: From `threshold_path`.
        max_auc_drop: Largest drop from full depth on `tune`, at least 0; the AUC by labels and the expected AUC
            must both keep it. By labels alone the fastest step is the one with the luckiest labels.
        max_cost: Largest share of full depth's token-layers, in (0, 1]. With `max_auc_drop` too, the fastest step
            that keeps both; alone, the first step that costs no more, as AUC falls along the path.

    Raises:
        ConfigError: No budget, one out of range, or one that no step keeps.
    """
    if max_auc_drop is None and max_cost is None:
        raise ConfigError(
            "exits.max_auc_drop and exits.max_cost are both null; set one, for example max_auc_drop: 0.002"
        )
    if max_auc_drop is not None and not max_auc_drop >= 0:
        raise ConfigError(f"exits.max_auc_drop is {max_auc_drop}; expected a drop of AUC of 0 or more")
    if max_cost is not None and not 0 < max_cost <= 1:
        raise ConfigError(f"exits.max_cost is {max_cost}; expected a share of full depth above 0, at most 1")
    kept = [
        i
        for i, step in enumerate(path.steps)
        if (max_cost is None or step.cost <= max_cost)
        and (
            max_auc_drop is None
            or max(step.auc_drop, path[0].expected_auc - step.expected_auc) <= max_auc_drop
        )
    ]
    if not kept:
        raise ConfigError(
            f"no exit policy keeps exits.max_cost {max_cost} and exits.max_auc_drop {max_auc_drop}: the fastest costs "
            f"{path[-1].cost:.3f} of full depth and drops {path[-1].auc_drop:.4f} of AUC; raise one of them"
        )
    return kept[0] if max_auc_drop is None else kept[-1]


class _Search:
    """Rows of `tune` as arrays, and what a vector of thresholds does to them."""

    def __init__(
        self, safety: Floats, scores: Floats, labels: Floats, layers: Floats, tokens: Floats
    ) -> None:
        self._safety, self._scores, self._labels, self._layers = safety, scores, labels, layers
        self._rows: Ints = np.arange(scores.shape[0])
        full = tokens.sum() * layers[-1]
        self._price = tokens[:, None] * layers / (full if full > 0 else 1.0)
        self._positive = _teacher(scores, labels)

    def ladder(self, head: int, steps: int) -> list[float]:
        """Thresholds of a head: +inf, then such that a rising share of all rows is safe, at last -inf."""
        ordered = np.sort(self._safety[:, head])[::-1]
        ordered = ordered[ordered > -np.inf]
        if not ordered.size:
            return [np.inf]  # the criterion cannot decide here
        last = np.round(self._rows.size * (np.arange(1, steps) / steps) ** 1.5).astype(np.int64)
        last = last[(last > 0) & (last < ordered.size)]
        middle = (ordered[last - 1] + ordered[last]) / 2
        return [np.inf, *np.unique(middle)[::-1].tolist(), -np.inf]

    def greedy(self, ladders: list[list[float]]) -> list[Step]:
        place = [0] * len(ladders)
        step = self.step(ladders, place)
        found = [step]
        while True:
            moves = [
                (head, rung)
                for head, ladder in enumerate(ladders)
                for rung in {*(place[head] + jump for jump in JUMPS), len(ladder) - 1}
                if place[head] < rung < len(ladder)
            ]
            tried = [self.measure(ladders, [*place[:h], rung, *place[h + 1 :]]) for h, rung in moves]
            rates = [(step.cost - c) / max(step.expected_auc - a, FREE) for c, a in tried]
            best = int(np.argmax(rates)) if rates else 0
            # a head that no row reaches saves nothing: such moves end the search, nothing is left to save
            if not rates or rates[best] <= 0:
                return found
            place[moves[best][0]] = moves[best][1]
            step = self.step(ladders, place)
            found.append(step)

    def static(self, ladders: list[list[float]]) -> list[Step]:
        """Everyone leaves at k, for every k at which the criterion can decide."""
        places = [
            [len(ladder) - 1 if head == k else 0 for head in range(len(ladders))]
            for k, ladder in enumerate(ladders)
        ]
        return [self.step(ladders, place) for k, place in enumerate(places) if len(ladders[k]) > 1]

    def measure(self, ladders: list[list[float]], place: list[int]) -> tuple[float, float]:
        """Cost and expected AUC."""
        exits = self._exits(ladders, place)
        scores = self._scores[self._rows, exits]
        return float(self._price[self._rows, exits].sum()), self._expected_auc(scores)

    def step(self, ladders: list[list[float]], place: list[int]) -> Step:
        exits = self._exits(ladders, place)
        cost, expected = self.measure(ladders, place)
        full, value = (auc(self._scores[self._rows, e], self._labels) for e in (-1, exits))
        if full is None or value is None:
            raise AssertionError("threshold_path has looked that both classes are there")
        return Step(
            thresholds=torch.tensor([*_chosen(ladders, place), -np.inf], dtype=torch.float64),
            cost=cost,
            mean_depth=float(self._layers[exits].mean()),
            auc=value,
            auc_drop=full - value,
            expected_auc=expected,
        )

    def _exits(self, ladders: list[list[float]], place: list[int]) -> Ints:
        leaves = self._safety >= np.array([*_chosen(ladders, place), -np.inf])
        exits: Ints = leaves.argmax(axis=1)
        return exits

    def _expected_auc(self, scores: Floats) -> float:
        """Share of pairs in order where row i is positive with probability q_i, ties in order of rows."""
        positive = self._positive[scores.argsort(kind="stable")]
        negative = 1.0 - positive
        below = negative.cumsum() - negative  # a row makes no pair with itself
        pairs = positive.sum() * negative.sum() - positive @ negative
        return float(positive @ below / pairs)


def _chosen(ladders: list[list[float]], place: list[int]) -> list[float]:
    return [ladder[rung] for ladder, rung in zip(ladders, place, strict=True)]


def _pruned(members: list[Step]) -> Path:
    """Full depth, then by falling cost what has more expected AUC than everything cheaper."""
    full = members[0]
    kept: list[Step] = []
    for step in sorted(members[1:], key=lambda step: (step.cost, -step.expected_auc)):
        if step.cost < full.cost and (not kept or step.expected_auc > kept[-1].expected_auc):
            kept.append(step)
    return Path((full, *reversed(kept)))


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
