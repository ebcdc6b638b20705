"""From nobody leaves early to everybody leaves at once: a one-parameter path of thresholds, fitted on `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from scipy.stats import t as student
from torch import Tensor

from project.errors import DataError
from project.exits.cost import Stream, row_tokens
from project.exits.policies import leave
from project.exits.search import Floats, Ints, Member, Search, threshold_grid


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
    depths, tokens = np.asarray(layers, dtype=np.float64), row_tokens(target_tokens, stream_tokens, stream)
    known = safety.detach().double().cpu()
    search = Search(known, _numbers(scores), np.asarray(labels, dtype=np.float64), depths, _numbers(tokens))
    grids = [threshold_grid(known[:, head].numpy(), steps) for head in range(len(layers) - 1)]
    return _pruned([*search.greedy(grids), *search.static(grids)], search, depths)


def _numbers(values: Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found


def _check(safety: Tensor, labels: ArrayLike, layers: Sequence[int]) -> None:
    if safety.isnan().any():
        head = int(safety.isnan().any(dim=0).int().argmax())
        raise DataError(
            f"the criterion's safety is NaN at the exit at layer {layers[head]} on rows of the fold tune, expected a "
            "number, or -inf where it cannot decide: its inputs are NaN, so train again with a lower "
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
    path: Path, safety: Tensor, scores: Tensor, labels: ArrayLike, users: ArrayLike
) -> Floats:
    """Every user's part in the error of what the steps lose, (S, U); the parts of a step sum to 0.

    By structural components (DeLong et al. 1988) summed by user (Obuchowski 1997): in a sample where user u comes m_u
    times, the AUC drops are about auc_drop + influence @ m.

    Args:
        path: S steps, from `threshold_path`.
        safety: (n, K) that the path was made with.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1.
        users: (n,), U of them.
    """
    positive, (_, user) = np.asarray(labels) == 1, np.unique(np.asarray(users), return_inverse=True)
    pairs = np.where(positive, positive.sum(), (~positive).sum())
    full, found = _components(_numbers(scores[:, -1]), positive), list[Floats]()
    for step in path:
        adaptive = scores.gather(1, leave(safety, step.thresholds)[:, None]).squeeze(1)
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
