"""From nobody leaves early to everybody leaves at once: a one-parameter path of thresholds, fitted on `tune`.

Unusual here: what is saved is counted in the currency of real requests where there are any. A shared stream runs until
the last candidate of its request has left, so thresholds that pay for requests of one candidate leave most of the work
of a request of 64 where it was; given the candidates of such requests, the search pays for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.stats import norm
from torch import Tensor

from project.errors import ConfigError, DataError
from project.evaluation.metrics import auc_gap
from project.exits.cost import Stream, row_tokens
from project.exits.policies import leave
from project.exits.search import (
    FAR_JUMPS,
    Bill,
    Floats,
    Judge,
    Member,
    Search,
    request_bill,
    request_ladder,
    row_bill,
    row_ladder,
)


@dataclass(frozen=True, eq=False)
class Step:
    """One member of the path, as measured on `tune`.

    Attributes:
        thresholds: (K,) float64, last one -inf.
        cost: Token-layers relative to full depth, in [0, 1]: of the candidates asked for, else of the rows.
        mean_depth: Mean layer at which these candidates, or rows, leave.
        auc: AUC by labels.
        auc_drop: AUC of full depth minus `auc`.
        expected_auc: AUC if labels were drawn from the teacher's probabilities; it falls from step to step, but
            for the first step: leaving early can be better than full depth. Where candidates are asked for, the
            worse of the changes of `auc` and of this falls instead.
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


@dataclass(frozen=True, eq=False)
class Asked:
    """Candidates of real requests: what a policy is paid for. They need no labels.

    Attributes:
        safety: (m, K) safety of the candidates.
        request: (m,) request of each, any integers.
        target_tokens: (m,) tokens of a candidate's own.
        stream_tokens: (m,) tokens of its request's stream.
    """

    safety: Tensor
    request: Tensor
    target_tokens: Tensor
    stream_tokens: Tensor


def threshold_path(
    safety: Tensor,
    scores: Tensor,
    labels: ArrayLike,
    layers: Sequence[int],
    target_tokens: Tensor,
    stream_tokens: Tensor,
    stream: Stream = "cold",
    steps: int = 20,
    asked: Asked | None = None,
) -> Path:
    """Greedy by cost saved per expected AUC lost, then pruned to what nothing cheaper and better dominates.

    A move opens one head further: to one of its next shares of safest rows, or to everybody. Rows of one move
    only ever leave earlier. "Everyone leaves at k" competes for every k at which the criterion can decide.

    With `asked` the cost is that of whole requests (`request_cost`). Heads then also open to what lets a share of the
    requests go as a whole, and "everyone leaves at k" is added to every member found: nothing else stops a cold
    stream for certain. Members of the path of one-candidate requests compete too, and what is pruned is judged as
    `pick_budget` judges it, so that path's pick is never cheaper at the same budget.

    Args:
        safety: (n, K) safety of the rows of `tune`, out-of-fold where the criterion learns.
        scores: (n, K) calibrated logits.
        labels: (n,) 0 or 1.
        layers: (K,) layer of each head.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        stream: Whether the stream's tokens are paid for ("cold").
        steps: Shares per head; they are denser where few rows leave.
        asked: Candidates that are paid for instead of the rows; None pays for the rows as requests of one candidate.

    Returns:
        Steps of falling cost, the first of which is full depth (nobody leaves early).

    Raises:
        DataError: One class, or safety that is NaN.
    """
    _check(safety, labels, layers)
    known, depths = _numbers(safety), np.asarray(layers, dtype=np.float64)
    judge = Judge(known, _numbers(scores), np.asarray(labels, dtype=np.float64))
    bill = row_bill(known, depths, _numbers(row_tokens(target_tokens, stream_tokens, stream)))
    ladders = [row_ladder(known[:, head], steps) for head in range(len(layers) - 1)]
    search = Search(judge, bill)
    members = [*search.greedy(ladders), *search.static(ladders)]
    if asked is None:
        return _pruned(members, judge, depths)
    _check(asked.safety, labels, layers)
    bill, request = _request_bill(asked, depths, stream), asked.request.cpu().numpy()
    search = Search(judge, bill)
    wider = [
        request_ladder(ladder, bill.safety[:, head], request, steps) for head, ladder in enumerate(ladders)
    ]
    members = [*search.greedy(wider, FAR_JUMPS), *(search.member(m.thresholds) for m in members)]
    return _pruned([*members, *search.capped(members, ladders)], judge, depths, as_budgets_do=True)


def _numbers(values: Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found


def _request_bill(asked: Asked, layers: Floats, stream: Stream) -> Bill:
    shared = _numbers(asked.stream_tokens) * (stream == "cold")
    request = asked.request.cpu().numpy()
    return request_bill(_numbers(asked.safety), layers, request, _numbers(asked.target_tokens), shared)


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
        for i, step in enumerate(path.steps)
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
    for step in path.steps:
        adaptive = scores[rows, leave(safety, step.thresholds)]
        gap, error = auc_gap(adaptive.numpy(), full.numpy(), labels, users)
        bounds.append(gap + z * error)
    return bounds


def _pruned(members: list[Member], judge: Judge, layers: Floats, as_budgets_do: bool = False) -> Path:
    """Full depth, then by falling cost what loses less AUC than everything cheaper.

    Args:
        members: The first is full depth.
        judge: Of the rows.
        layers: (K,).
        as_budgets_do: The loss is the larger of the losses of AUC by labels and of expected AUC, not the latter alone.
    """
    full = members[0]
    best = judge.auc(full.exits)

    def step(member: Member, value: float) -> Step:
        thresholds = torch.from_numpy(np.append(member.thresholds, -np.inf))
        depth = float(layers[member.paid].mean())
        return Step(thresholds, member.cost, depth, value, best - value, member.expected_auc)

    kept, least = list[Step](), np.inf
    for member in sorted(members[1:], key=lambda m: (m.cost, -m.expected_auc)):
        loss = full.expected_auc - member.expected_auc
        if member.cost >= full.cost or loss >= least:
            continue
        value = judge.auc(member.exits)
        loss = max(loss, best - value) if as_budgets_do else loss
        if loss < least:
            kept.append(step(member, value))
            least = loss
    return Path((step(full, best), *reversed(kept)))
