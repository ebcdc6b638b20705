"""From nobody leaves early to everybody leaves at once: a one-parameter path of thresholds, fitted on `tune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import norm
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.cost import Stream, row_tokens
from project.exits.policies import leave
from project.exits.risks import auc_gap
from project.exits.search import Floats, Member, Search, threshold_grid


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


class BudgetNotKept(ConfigError):
    """No step of a path keeps the budget."""


def pick_budget(
    path: Path,
    max_auc_drop: float | None = None,
    max_cost: float | None = None,
    bounds: Sequence[float] | None = None,
) -> int:
    """Index of the step to use: the fastest that keeps the AUC, or the best that keeps the cost.

    Args:
        path: From `threshold_path`.
        max_auc_drop: Largest drop from full depth on `tune`, at least 0; the AUC by labels and the expected AUC
            must both keep it. By labels alone the fastest step is the one with the luckiest labels.
        max_cost: Largest share of full depth's token-layers, in (0, 1]. With `max_auc_drop` too, the fastest step
            that keeps both; alone, the first step that costs no more, as AUC falls along the path.
        bounds: Upper bound of each step's drop, see `drop_bounds`: it must keep `max_auc_drop` too.

    Raises:
        ConfigError: No budget, or one out of range.
        BudgetNotKept: One that no step keeps.
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
        for i, step in enumerate(path)
        if (max_cost is None or step.cost <= max_cost)
        and (
            max_auc_drop is None
            or max(
                step.auc_drop,
                path[0].expected_auc - step.expected_auc,
                -np.inf if bounds is None else bounds[i],
            )
            <= max_auc_drop
        )
    ]
    if not kept:
        raise BudgetNotKept(
            f"no exit policy keeps exits.max_cost {max_cost} and exits.max_auc_drop {max_auc_drop}: the fastest costs "
            f"{path[-1].cost:.3f} of full depth and drops {path[-1].auc_drop:.4f} of AUC; raise one of them"
        )
    return kept[0] if max_auc_drop is None else kept[-1]


def drop_bounds(
    path: Path, safety: Tensor, scores: Tensor, labels: ArrayLike, users: ArrayLike, doubt: float
) -> list[float]:
    """Upper bound of each step's AUC drop: estimate and so many standard errors, users as units (`auc_gap`).

    It bounds one step. The fastest of many that keep a budget is still a little luckier than it will be.

    Args:
        path: From `threshold_path`.
        safety: (n, K) that the path was made with.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1, both at least twice.
        users: (n,).
        doubt: Chance that a drop is above its bound, normal approximation.
    """
    rows, full, z = torch.arange(len(scores)), scores[:, -1], float(norm.ppf(1.0 - doubt))
    bounds = []
    for step in path:
        adaptive = scores[rows, leave(safety, step.thresholds)]
        gap, error = auc_gap(adaptive.numpy(), full.numpy(), labels, users)
        bounds.append(gap + z * error)
    return bounds


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
