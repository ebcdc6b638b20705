"""The search for thresholds: the path from full depth to the cheapest policy, and what each step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from scipy.stats import t as student
from torch import Tensor

from project.arrays import F64, Bool
from project.exits.criteria import HeadOutputs
from project.exits.policy import leave
from project.metrics import auc, probabilities
from project.results import Point

SHARES = 20  # thresholds of a head's grid; they are denser where few rows leave
# how many thresholds a head may move at once; greedy by single ones gets stuck
STEPS = (1, 2, 4)
TEACHER_DEVIATION = 0.2
"""Prior deviation of the weight of an earlier head in the teacher: 0 is the last head alone."""
FREE = 1e-7  # AUC losses below this are no loss, and the larger saving wins
ORACLE_TOLERANCES = (
    0.0,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.12,
    0.2,
    1.0,
)
STATIC_TOLERANCE = 0.002


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a path, as measured on the fold tune: thresholds (K,) and what they do.

    `cost` is token-layers relative to full depth, `auc_drop` the AUC of full depth minus `auc`, `expected_auc` the AUC
    if labels were drawn from the teacher's probabilities. It falls from step to step, but for the first one: leaving
    early can be better than full depth.
    """

    thresholds: Tensor
    cost: float
    mean_depth: float
    auc: float
    auc_drop: float
    expected_auc: float

    def point(self) -> Point:
        """The step as a point of a Pareto curve in a result file."""
        return {
            "cost": self.cost,
            "mean_depth": self.mean_depth,
            "auc": self.auc,
            "auc_drop": self.auc_drop,
        }


ThresholdPath = tuple[Step, ...]
"""Steps of falling cost; the first is full depth, where nobody leaves early."""


class _Tried(NamedTuple):
    cost: float
    expected_auc: float
    thresholds: Tensor


def threshold_path(
    confidence: Tensor,
    scores: Tensor,
    labels: ArrayLike,
    layers: Sequence[int],
    tokens: Tensor,
) -> ThresholdPath:
    """Greedy by cost saved per expected AUC lost, then pruned to what nothing cheaper and better dominates.

    `confidence` and the calibrated logits `scores` are (n, K) of the rows of tune, confidence out-of-fold where the
    criterion learns; `tokens` (n,) run in every layer, see `row_tokens`.
    """
    known = confidence.detach().double().cpu()  # (n, K)
    logits = scores.double().numpy()  # (n, K)
    truth = np.asarray(labels, dtype=np.float64)  # (n,)
    depths = np.asarray(layers, dtype=np.float64)  # (K,)
    rows = np.arange(len(logits))
    likes = _teacher(logits, truth)  # (n,) chances that a row is liked
    weights = tokens.double().numpy()  # (n,)
    # (n, K) what a row costs at each head, as a share of all rows at full depth
    cost = weights[:, None] * depths / (float(weights.sum() * depths[-1]) or 1.0)

    def tried(
        thresholds: Tensor, head: int | None = None, threshold: float = 0.0
    ) -> _Tried:
        """These thresholds, one of them replaced."""
        if head is not None:
            thresholds = thresholds.clone()
            thresholds[head] = threshold
        # (n,) the head at which each row leaves
        exits = leave(known, thresholds).numpy()
        # expected AUC: share of pairs in order where row i is liked with probability q_i,
        # ties in order of rows
        liked = likes[logits[rows, exits].argsort(kind="stable")]
        # (n,) in ascending order of the emitted score, as `liked`
        disliked = 1.0 - liked
        below = disliked.cumsum() - disliked  # a row makes no pair with itself
        pairs = liked.sum() * disliked.sum() - liked @ disliked
        return _Tried(
            float(cost[rows, exits].sum()), float(liked @ below / pairs), thresholds
        )

    # 1. nobody leaves early
    # a list of falling thresholds for every head but the last
    grids = [threshold_grid(known[:, head].numpy()) for head in range(len(layers) - 1)]
    # (K,)
    nobody = torch.tensor([torch.inf] * len(grids) + [-torch.inf], dtype=torch.float64)
    full = here = tried(nobody)
    found = list[_Tried]()
    place = [0] * len(grids)  # where every head stands on its grid
    # 2. every move from here: one head, a few thresholds further or to its last; rows only
    # ever leave earlier
    while moves := [
        (head, to)
        for head, grid in enumerate(grids)
        for to in {*(place[head] + step for step in STEPS), len(grid) - 1}
        if place[head] < to < len(grid)
    ]:
        options = [tried(here.thresholds, head, grids[head][to]) for head, to in moves]
        # 3. take the one that saves most for the expected AUC it loses
        rates = [
            (here.cost - o.cost) / max(here.expected_auc - o.expected_auc, FREE)
            for o in options
        ]
        # the first of equals
        best = int(np.argmax(rates))
        if rates[best] <= 0:  # a head that no row reaches saves nothing
            break
        head, to = moves[best]
        place[head] = to
        here = options[best]
        found.append(here)
    # 4. everyone leaves at k, for every k at which the criterion can decide
    found += [tried(nobody, k, -torch.inf) for k, grid in enumerate(grids) if len(grid) > 1]
    # 5. by falling cost, keep what has more expected AUC than all that is cheaper
    kept = list[_Tried]()
    most = -np.inf  # expected AUC of the best that is cheaper
    for option in sorted(found, key=lambda o: (o.cost, -o.expected_auc)):
        if option.cost < full.cost and option.expected_auc > most:
            kept.append(option)
            most = option.expected_auc
    # 6. measure by labels
    path = list[Step]()
    for option in (full, *reversed(kept)):
        exits = leave(known, option.thresholds).numpy()
        value = auc(logits[rows, exits], truth)
        depth = float(depths[exits].mean())
        assert value is not None  # calibration has refused rows of one class
        drop = path[0].auc - value if path else 0.0
        path.append(
            Step(option.thresholds, option.cost, depth, value, drop, option.expected_auc)
        )
    return tuple(path)


def threshold_grid(confidence: F64) -> list[float]:
    """Thresholds of a head by its confidence (n,): +inf, then ever more rows leave, at last -inf."""
    # (n,) most confident first
    ordered = np.sort(confidence)[::-1]
    ordered = ordered[ordered > -np.inf]
    if not ordered.size:
        return [np.inf]  # the criterion cannot decide here
    if ordered[0] == ordered[-1] and ordered.size == confidence.size:
        return [np.inf, -np.inf]  # all alike
    # how many rows leave at each threshold: few at first, then ever larger steps
    last = np.round(confidence.size * (np.arange(1, SHARES) / SHARES) ** 1.5).astype(
        np.int64
    )
    last = last[(last > 0) & (last < ordered.size)]
    # between two values, so that rounding moves no row across
    middle = (ordered[last - 1] + ordered[last]) / 2
    return [np.inf, *np.unique(middle)[::-1].tolist(), -np.inf]


def _teacher(scores: F64, labels: F64) -> F64:
    """P(label = 1) from all heads: logit_K + sum of w_k (logit_k - logit_K), w_k ~ N(0, .2^2), Newton.

    Where earlier heads add nothing to the last one, w stays near 0. Where the heads' errors are independent, their mean
    is better than the last head alone.
    """
    # (n, K - 1)
    design = scores[:, :-1] - scores[:, -1:]
    # the prior's precision
    ridge = np.eye(design.shape[1]) / TEACHER_DEVIATION**2
    weights = np.zeros(design.shape[1])
    for _ in range(8):
        chance = probabilities(scores[:, -1] + design @ weights)
        gradient = design.T @ (chance - labels) + ridge @ weights
        weights -= np.linalg.solve(
            (design.T * (chance * (1 - chance))) @ design + ridge, gradient
        )
    return probabilities(scores[:, -1] + design @ weights)


def budget_step(path: ThresholdPath, drops: F64, max_auc_drop: float) -> int:
    """The step that a budget chooses by the AUC drops (S,) of a path, or upper bounds of them.

    The path is walked from full depth on, and the first step whose drop or expected drop is larger ends the walk,
    whatever the steps behind it lose.
    """
    # (S,) drops if labels were drawn from the teacher's probabilities
    expected = path[0].expected_auc - np.array([step.expected_auc for step in path])
    broken = np.maximum(drops, expected) > max_auc_drop
    broken[0] = False  # full depth loses nothing
    # where every step keeps the budget, the last one is taken
    return int(broken.argmax() if broken.any() else len(path)) - 1


def user_influences(
    path: ThresholdPath,
    confidence: Tensor,
    scores: Tensor,
    labels: ArrayLike,
    users: ArrayLike,
) -> F64:
    """Every user's part in the error of the steps' AUC drops, (S, U); the parts of a step sum to 0.

    By structural components (DeLong et al. 1988) summed by user (Obuchowski 1997): in a sample where user u comes m_u
    times, the AUC drops are about auc_drop + influence @ m. `confidence` and `scores` are (n, K), as the path was made
    with.
    """
    positive = np.asarray(labels) == 1  # (n,)
    user = np.unique(users, return_inverse=True)[1]  # (n,) 0 to U - 1
    # the AUC is the mean of a class's components, so a row weighs 1 / rows of its class
    pairs = np.where(positive, positive.sum(), (~positive).sum())
    logits = scores.double().numpy()
    full = auc_components(logits[:, -1], positive)  # (n,)
    rows = np.arange(len(logits))
    found = list[F64]()  # (U,) of each step
    for step in path:
        adaptive = logits[rows, leave(confidence, step.thresholds).numpy()]  # (n,)
        # (n,) how far a row's component lies from the step's mean drop
        away = full - auc_components(adaptive, positive) - step.auc_drop
        found.append(np.bincount(user, weights=away / pairs).astype(np.float64))
    return np.stack(found)


def bound_margins(influences: F64, alpha: float) -> F64:
    """What is added to the drops (S,) so that each is an upper bound but for a chance of alpha: t over users.

    Few users who are badly served make losses skewed to the right, where t alone is too low: Johnson (1978, Modified t
    tests and confidence intervals for asymmetrical populations) adds skewness (1 + 2 t^2) / (6 sqrt(U)) errors.
    """
    users = influences.shape[1]
    if users < 2:
        return np.where((influences**2).sum(axis=1) > 0, np.inf, 0.0)
    # (S,) influences of a step sum to 0, so this is their variance
    variance = (influences**2).mean(axis=1)
    third = (influences**3).mean(axis=1)
    skewness = np.divide(third, variance**1.5, out=np.zeros_like(third), where=variance > 0)
    quantile = float(student.ppf(1.0 - alpha, users - 1))
    # standard errors of the drops: U users, divided by U - 1
    errors = np.sqrt(variance * users * users / (users - 1))
    margins: F64 = errors * (
        quantile + skewness * (1 + 2 * quantile**2) / (6 * np.sqrt(users))
    )
    return margins


def auc_components(scores: F64, positive: Bool) -> F64:
    """(n,) of a positive the share of negatives below it, of a negative the share of positives above it, ties half."""
    below = rankdata(scores)  # of either class, less those of the own class
    # ranks among all minus ranks inside the class: how many of the other class lie below
    below[positive] -= rankdata(scores[positive])
    below[~positive] -= rankdata(scores[~positive])
    found: F64 = np.where(positive, below / (~positive).sum(), 1.0 - below / positive.sum())
    return found


def point(outputs: HeadOutputs, labels: ArrayLike, tokens: Tensor, exits: Tensor) -> Point:
    """Point of a Pareto curve for n rows that leave at these heads (n,): `cost`, `mean_depth`, `auc`, `auc_drop`."""
    layers = torch.tensor(outputs.layers)
    # token-layers of full depth
    whole = float((layers[-1] * tokens).sum())
    adaptive = outputs.logits.gather(1, exits[:, None]).squeeze(1)
    best, value = (auc(x.cpu(), labels) for x in (outputs.logits[:, -1], adaptive))
    return {
        "cost": float((layers[exits] * tokens).sum()) / whole if whole else 1.0,
        "mean_depth": float(layers[exits].double().mean()),
        "auc": value,
        "auc_drop": None if best is None or value is None else best - value,
    }


def equal_accuracy_exit(static: Sequence[Point]) -> Point:
    """The static exit of equal accuracy: the shallowest point whose AUC is near the best one's."""
    best = max(p["auc"] or 0.0 for p in static)
    # 1e-12: a head that is exactly the tolerance below counts, whatever the rounding
    return next(p for p in static if (p["auc"] or 0.0) >= best - STATIC_TOLERANCE - 1e-12)


def control_curves(
    outputs: HeadOutputs, labels: ArrayLike, tokens: Tensor
) -> dict[str, list[Point]]:
    """Curves of the controls that every policy is compared with, by name, on n labelled rows.

    `fixed_depth` are the static exits, shallow first, each with its `layer`. Under the `oracle` rows leave at the first
    head whose probability is near the last head's, from strict to lax: an upper bound for criteria that predict drift,
    since no policy knows the last head. It reads no labels, so it is none for accuracy.
    """
    everybody = torch.ones(len(tokens), dtype=torch.int64)
    heads = (outputs.heads,)
    # (n, K) 0 at the last head
    drift = (outputs.probabilities - outputs.probabilities[:, -1:]).abs()
    return {
        "fixed_depth": [
            point(outputs, labels, tokens, everybody * head) | {"layer": layer}
            for head, layer in enumerate(outputs.layers)
        ],
        "oracle": [
            point(outputs, labels, tokens, leave(-drift, drift.new_full(heads, -tolerance)))
            for tolerance in ORACLE_TOLERANCES
        ],
    }
