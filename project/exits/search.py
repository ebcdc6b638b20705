"""The search for thresholds: the path from full depth to the cheapest policy, and what each step costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from scipy.stats import t as student
from torch import Tensor

from project.errors import DataError
from project.exits.cost import mean_depth, row_cost, row_tokens
from project.exits.criteria import HeadOutputs
from project.exits.policy import FixedDepth, Oracle, RandomExit, leave
from project.metrics import auc, probabilities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Heads = NDArray[np.int16]  # many vectors are held at once

JUMPS = (1, 2, 4)  # how many shares a head may move at once; greedy by single shares gets stuck
TEACHER_DEVIATION = 0.2
"""exit 0 deviation of the weight of an earlier head in the teacher: 0 is the last head alone."""
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
        confidence: (n, K).
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1, both there.
        layers: (K,).
        tokens: (n,) that run in every layer.
    """

    def __init__(
        self, confidence: Tensor, scores: Floats, labels: Floats, layers: Floats, tokens: Floats
    ) -> None:
        self._confidence, self._scores, self._labels = confidence, scores, labels
        self._rows: Ints = np.arange(len(scores))
        self._positive = _teacher(scores, labels)
        self._cost = tokens[:, None] * layers / (float(tokens.sum() * layers[-1]) or 1.0)

    def member(self, thresholds: Tensor) -> Member:
        """What these (K,) thresholds do."""
        exits: Heads = leave(self._confidence, thresholds).numpy().astype(np.int16)
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


def threshold_grid(confidence: Floats, steps: int) -> list[float]:
    """Thresholds of a head: +inf, then such that a rising share of all rows is safe, at last -inf.

    Args:
        confidence: (n,) at this head.
        steps: Shares; they are denser where few rows leave.
    """
    ordered = np.sort(confidence)[::-1]
    ordered = ordered[ordered > -np.inf]
    if not ordered.size:
        return [np.inf]  # the criterion cannot decide here
    last = np.round(confidence.size * (np.arange(1, steps) / steps) ** 1.5).astype(np.int64)
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


Path = tuple[Step, ...]
"""Steps of falling cost; the first is full depth, where nobody leaves early."""


def threshold_path(
    confidence: Tensor,
    scores: Tensor,
    labels: ArrayLike,
    layers: Sequence[int],
    target_tokens: Tensor,
    stream_tokens: Tensor,
    prefix_cached: bool = False,
    steps: int = 20,
) -> Path:
    """Greedy by cost saved per expected AUC lost, then pruned to what nothing cheaper and better dominates.

    A move opens one head further: to one of its next shares of safest rows, or to everybody. Rows of one move
    only ever leave earlier. "Everyone leaves at k" competes for every k at which the criterion can decide.

    Args:
        confidence: (n, K) confidence of the rows of `tune`, out-of-fold where the criterion learns.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1.
        layers: (K,) layer of each head.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        prefix_cached: Whether the history's tokens cost nothing.
        steps: Shares per head; they are denser where few rows leave.

    Returns:
        Steps of falling cost, the first of which is full depth (nobody leaves early).

    Raises:
        DataError: One class, or confidence that is NaN.
    """
    _check(confidence, labels, layers)
    depths, tokens = (
        np.asarray(layers, dtype=np.float64),
        row_tokens(target_tokens, stream_tokens, prefix_cached),
    )
    known = confidence.detach().double().cpu()
    search = Search(known, _numbers(scores), np.asarray(labels, dtype=np.float64), depths, _numbers(tokens))
    grids = [threshold_grid(known[:, head].numpy(), steps) for head in range(len(layers) - 1)]
    return _pruned([*search.greedy(grids), *search.static(grids)], search, depths)


def _numbers(values: Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found


def _check(confidence: Tensor, labels: ArrayLike, layers: Sequence[int]) -> None:
    if confidence.isnan().any():
        head = int(confidence.isnan().any(dim=0).int().argmax())
        raise DataError(
            f"the criterion's confidence is NaN at the exit at layer {layers[head]} on rows of the fold tune, expected "
            "a number, or -inf where it cannot decide: its inputs are NaN, so train again with a lower "
            "model.optim.learning_rate, or a criterion of your own makes it so"
        )
    if np.unique(np.asarray(labels)).size < 2:
        raise DataError(
            "thresholds need both classes in the fold tune, found one: use more validation data or another "
            "data.protocol.label"
        )


def budget_steps(path: Path, drops: Floats, max_auc_drop: float | None, max_cost: float | None) -> Ints:
    """The step that a budget chooses, for each of D opinions on what the steps lose; -1 where none keeps it.

    With `max_auc_drop` the path is walked from its safe end, and the first step whose drop or expected drop is larger
    ends the walk: a luckier one behind it does not count. The last step before must keep `max_cost`, if there is one.
    With `max_cost` alone it is the first step that costs no more, as AUC falls along the path.

    Args:
        path: From `threshold_path`.
        drops: (D, S) AUC drop of the S steps, or an upper bound of it.
        max_auc_drop: Largest drop of AUC, at least 0.
        max_cost: Largest share of full depth's token-layers.

    Returns:
        (D,).
    """
    cost = np.array([step.cost for step in path])
    if max_auc_drop is None:
        affordable = np.flatnonzero(cost <= max_cost)
        return np.full(len(drops), affordable[0] if affordable.size else -1)
    expected = path[0].expected_auc - np.array([step.expected_auc for step in path])
    broken = np.maximum(drops, expected) > max_auc_drop
    broken[:, 0] = False  # full depth loses nothing
    last: Ints = np.where(broken.any(axis=1), broken.argmax(axis=1), len(path)) - 1
    return last if max_cost is None else np.where(cost[last] <= max_cost, last, -1)


def user_influences(
    path: Path, confidence: Tensor, scores: Tensor, labels: ArrayLike, users: ArrayLike
) -> Floats:
    """Every user's part in the error of what the steps lose, (S, U); the parts of a step sum to 0.

    By structural components (DeLong et al. 1988) summed by user (Obuchowski 1997): in a sample where user u comes m_u
    times, the AUC drops are about auc_drop + influence @ m.

    Args:
        path: S steps, from `threshold_path`.
        confidence: (n, K) that the path was made with.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1.
        users: (n,), U of them.
    """
    positive, (_, user) = np.asarray(labels) == 1, np.unique(np.asarray(users), return_inverse=True)
    pairs = np.where(positive, positive.sum(), (~positive).sum())
    full, found = _components(_numbers(scores[:, -1]), positive), list[Floats]()
    for step in path:
        adaptive = scores.gather(1, leave(confidence, step.thresholds)[:, None]).squeeze(1)
        away = full - _components(_numbers(adaptive), positive) - step.auc_drop
        found.append(np.bincount(user, weights=away / pairs).astype(np.float64))
    return np.stack(found)


def bound_margins(influences: Floats, alpha: float) -> Floats:
    """What is added to the drops (S,) so that each is an upper bound but for a chance of alpha: t over users.

    Few users who are badly served make losses skewed to the right, where t alone is too low: Johnson (1978, Modified t
    tests and confidence intervals for asymmetrical populations) adds skewness (1 + 2 t^2) / (6 sqrt(U)) errors.

    Args:
        influences: (S, U) from `user_influences`.
        alpha: In (0, .5].
    """
    users = influences.shape[1]
    if users < 2:
        return np.where((influences**2).sum(axis=1) > 0, np.inf, 0.0)
    variance = (influences**2).mean(axis=1)
    third = (influences**3).mean(axis=1)
    skewness = np.divide(third, variance**1.5, out=np.zeros_like(third), where=variance > 0)
    quantile = float(student.ppf(1.0 - alpha, users - 1))
    errors = np.sqrt(variance * users * users / (users - 1))
    margins: Floats = errors * (quantile + skewness * (1 + 2 * quantile**2) / (6 * np.sqrt(users)))
    return margins


def _components(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    """(n,) of a positive the share of negatives below it, of a negative the share of positives above it, ties half."""
    below = rankdata(scores)  # of either class, less those of the own class
    below[positive] -= rankdata(scores[positive])
    below[~positive] -= rankdata(scores[~positive])
    found: Floats = np.where(positive, below / (~positive).sum(), 1.0 - below / positive.sum())
    return found


def _pruned(members: list[Member], search: Search, layers: Floats) -> Path:
    """Full depth, the first member, then by falling cost what has more expected AUC than all that is cheaper."""
    full = members[0]
    best = search.auc(full)

    def step(member: Member) -> Step:
        value, depth = search.auc(member), float(layers[member.exits].mean())
        return Step(member.thresholds, member.cost, depth, value, best - value, member.expected_auc)

    kept, most = list[Step](), -np.inf
    for member in sorted(members[1:], key=lambda m: (m.cost, -m.expected_auc)):
        if member.cost < full.cost and member.expected_auc > most:
            kept.append(step(member))
            most = member.expected_auc
    return (step(full), *reversed(kept))


ORACLE_TOLERANCES = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 1.0)
RANDOM_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
STATIC_TOLERANCE = 0.002


class Leaves(Protocol):
    """A policy or a control."""

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """Index of the head at which each row leaves, (n,) int64."""
        ...


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """n rows with what it takes to judge a policy on them.

    Attributes:
        outputs: Calibrated outputs of all K heads.
        labels: (n,) 0 or 1.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        prefix_cached: Whether the history's tokens cost nothing.
    """

    outputs: HeadOutputs
    labels: ArrayLike
    target_tokens: Tensor
    stream_tokens: Tensor
    prefix_cached: bool = False

    def scores(self, exits: Tensor) -> Tensor:
        """(n,) the calibrated logit each row leaves with."""
        return self.outputs.logits.gather(1, exits[:, None]).squeeze(1)

    def depth(self, exits: Tensor) -> Tensor:
        """(n,) the layer each row leaves at."""
        return torch.tensor(self.outputs.layers, device=exits.device)[exits]

    def token_layers(self, exits: Tensor) -> Tensor:
        """(n,) what each row costs as a request of its own."""
        return row_cost(self.depth(exits), self.target_tokens, self.stream_tokens, self.prefix_cached)


def point(rows: ScoredRows, exits: Tensor) -> dict[str, Any]:
    """One point of a curve.

    Args:
        rows: The n rows.
        exits: (n,) index of the head at which each leaves.

    Returns:
        `cost` (token-layers relative to full depth), `mean_depth`, `auc` and `auc_drop` from full depth, the
        last two None where a class is missing.
    """
    last = torch.full_like(exits, rows.outputs.heads - 1)
    whole = float(rows.token_layers(last).sum())
    labels = np.asarray(rows.labels)
    best, value = (auc(rows.scores(e).cpu().numpy(), labels) for e in (last, exits))
    return {
        "cost": float(rows.token_layers(exits).sum()) / whole if whole else 1.0,
        "mean_depth": mean_depth(rows.depth(exits)),
        "auc": value,
        "auc_drop": None if best is None or value is None else best - value,
    }


def curve(rows: ScoredRows, policies: Iterable[Leaves]) -> list[dict[str, Any]]:
    """Points of policies or controls, in their order."""
    return [point(rows, policy.exits(rows.outputs)) for policy in policies]


def control_curves(
    outputs: HeadOutputs,
    labels: ArrayLike,
    target_tokens: Tensor,
    stream_tokens: Tensor,
    prefix_cached: bool = False,
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Curves of the controls every policy is held against.

    Args:
        outputs: Calibrated outputs of n rows.
        labels: (n,) 0 or 1.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        prefix_cached: Whether the history's tokens cost nothing.
        only: Name of the one control wanted; None: all.

    Returns:
        {`name`, `pareto`} of `fixed_depth` (one point per head, shallow first, each with its `layer`), `random`
        (from nobody to everybody by lot) and `oracle` (from strict to lax).
    """
    rows = ScoredRows(outputs, labels, target_tokens, stream_tokens, prefix_cached)
    controls: dict[str, list[Leaves]] = {
        "fixed_depth": [FixedDepth(k) for k in range(outputs.heads)],
        "random": [RandomExit(share) for share in RANDOM_SHARES],
        "oracle": [Oracle(tolerance) for tolerance in ORACLE_TOLERANCES],
    }
    found = {name: curve(rows, policies) for name, policies in controls.items() if only in (None, name)}
    for layer, static in zip(outputs.layers, found.get("fixed_depth", []), strict=False):
        static["layer"] = layer
    return [{"name": name, "pareto": points} for name, points in found.items()]


def cost_matched_auc(curve: Sequence[dict[str, Any]], cost: float) -> float | None:
    """AUC of a curve at this cost, linear between its points and flat outside; None where one is undefined.

    Between two static depths it is what sending a share of requests to either would score, about.
    """
    known = sorted((p["cost"], p["auc"]) for p in curve if p["auc"] is not None)
    if not known or len(known) < len(curve):
        return None
    costs, values = zip(*known, strict=True)
    return float(np.interp(cost, costs, values))


def equal_accuracy_depth(scores: Tensor, labels: ArrayLike, tolerance: float = STATIC_TOLERANCE) -> int:
    """Index of the honest static exit: the shallowest static head whose AUC is near the best head's.

    Args:
        scores: (n, K) logits of every head.
        labels: (n,) 0 or 1.
        tolerance: Largest AUC below the best.

    Raises:
        DataError: One class.
    """
    values = [auc(column.cpu().numpy(), np.asarray(labels)) for column in scores.unbind(dim=1)]
    known = [value for value in values if value is not None]
    if not known:
        raise DataError(
            f"the best static depth needs labels of both classes, found one class in {scores.shape[0]} rows; use "
            "more validation data or another data.protocol.label"
        )
    # 1e-12: a head that is exactly `tolerance` below stays in, whatever the last bits say
    return next(k for k, value in enumerate(known) if value >= max(known) - tolerance - 1e-12)
