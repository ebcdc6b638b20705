"""Policies for requests that want the best k of their candidates: who leaves at which head, what a list is sorted by.

A policy is a rule for rows, a rule for lists, or one head for all. `rank` simulates policies on cached scores; the
engine's decisions (`project.engine.decisions`) leave by the same code, `leave` and `TopK.stays`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.arrays import F64, I8
from project.exits.calibration import Calibration
from project.exits.cost import request_cost
from project.exits.criteria import (
    Consistency,
    Criterion,
    HeadOutputs,
    Ratio,
    RatioConsistency,
    confidence_table,
    name,
)
from project.exits.plan import raw_outputs
from project.exits.policy import leave
from project.exits.top_k import TopK, fit_margins, overlap_at_k
from project.run import exit_layers_of

LEVELS = (
    1.0, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip
"""Values of the one parameter of a policy, from slowest to fastest: quantiles."""
LISTS = (5, 10)  # lengths k of the list that is wanted; the field reports at 5 and 10


@dataclass(frozen=True, eq=False)
class ScoredRequests:
    """r requests with n candidates in all, scored at every head."""

    request: Tensor  # (n,) number of each candidate's request, 0..r-1
    user: NDArray[Any]  # (r,) each request's user
    outputs: HeadOutputs  # of the n candidates
    target_tokens: Tensor  # (n,) the candidate's own tokens
    stream_tokens: Tensor  # (n,) its history's tokens
    label: I8  # (n,) -1 where unknown

    @classmethod
    def of(
        cls, scores: pl.DataFrame, calibration: Calibration | None = None
    ) -> ScoredRequests:
        """From a score table of candidates, those of a request in order; without a calibration by raw logits."""
        exit_0 = calibration is None or 0 in calibration.layers
        no_features = np.zeros((len(scores), 0))
        raw = raw_outputs(scores, no_features, exit_layers_of(scores), exit_0)
        logits = calibration.apply(raw.logits) if calibration else raw.logits
        number = scores["request_id"].rle_id().to_numpy().astype(np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        return cls(
            torch.from_numpy(number),
            scores["user"].to_numpy()[starts],
            HeadOutputs(raw.layers, logits, raw.retrieved),
            scores["target_tokens"].to_torch(),
            scores["stream_tokens"].to_torch(),
            scores["label"].fill_null(-1).to_numpy().astype(np.int8),
        )


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a policy made of n candidates."""

    exits: Tensor  # (n,) head at which each candidate left
    keys: Tensor  # (n,) what its request's list is sorted by, descending


@dataclass(frozen=True)
class RankPolicy:
    """A fitted policy."""

    name: str  # top_k, a criterion, full_depth or fixed_depth_<layer>
    parameter: float | None  # its one parameter, if any
    decide: Callable[[ScoredRequests], Ranking]
    top_k: TopK | None = None  # what an engine's `ListExits` leaves by, where lists decide


def emitted(outputs: HeadOutputs, exits: Tensor) -> Tensor:
    """(n,) logits that candidates leave with at these heads (n,)."""
    return outputs.logits.gather(1, exits[:, None]).squeeze(1).double()


def fixed_depth(layers: Sequence[int], index: int) -> RankPolicy:
    """Everyone leaves at one head: a static exit."""
    label = "full_depth" if index == len(layers) - 1 else f"fixed_depth_{layers[index]}"

    def decide(scored: ScoredRequests) -> Ranking:
        exits = torch.full_like(scored.request, index)
        return Ranking(exits, emitted(scored.outputs, exits))

    return RankPolicy(label, None, decide)


def by_row(criterion: Criterion, threshold: float) -> RankPolicy:
    """Each candidate leaves by itself, at the first head where the criterion's confidence reaches one threshold."""

    def decide(scored: ScoredRequests) -> Ranking:
        thresholds = torch.full((scored.outputs.heads,), threshold, dtype=torch.float64)
        exits = leave(confidence_table(criterion, scored.outputs), thresholds)
        return Ranking(exits, emitted(scored.outputs, exits))

    return RankPolicy(name(criterion), threshold, decide)


def by_margin(policy: TopK, level: float) -> RankPolicy:
    """Candidates leave when they can no longer reach the list; those that stay longer are listed above them."""

    def decide(scored: ScoredRequests) -> Ranking:
        exits = policy.exits(scored.request, scored.outputs)
        # further than any two logits are apart
        reach = 1.0 + float(scored.outputs.logits.max() - scored.outputs.logits.min())
        return Ranking(exits, emitted(scored.outputs, exits) + reach * exits)

    return RankPolicy("top_k", level, decide, policy)


def margin_policies(tune: ScoredRequests, k: int) -> list[RankPolicy]:
    """`top_k` with margins of every level, fitted on tune, from slowest to fastest."""
    found = []
    for level in LEVELS:
        margins = fit_margins(tune.request, tune.outputs, level)
        found.append(by_margin(TopK(k, margins), level))
    return found


def policies(tune: ScoredRequests, k: int, overlap: float) -> list[RankPolicy]:
    """Full depth, `top_k`, row policies and every static exit for lists of k.

    Of policies with a parameter these are the fastest that keep this mean overlap@k with full depth on tune.
    """
    layers = tune.outputs.layers
    full = fixed_depth(layers, len(layers) - 1)
    found = [full, fastest(margin_policies(tune, k), full, tune, k, overlap)]
    criteria: list[Criterion] = [Consistency(), Ratio(), RatioConsistency()]
    for criterion in criteria:
        criterion.fit(tune.outputs)
        confidence = confidence_table(criterion, tune.outputs)[:, :-1]
        spread = confidence[confidence.isfinite()].double()
        if spread.numel():
            thresholds = torch.quantile(
                spread, torch.tensor(LEVELS, dtype=torch.float64)
            ).tolist()
            found.append(
                fastest([by_row(criterion, t) for t in thresholds], full, tune, k, overlap)
            )
    return [
        *found,
        *(fixed_depth(layers, index) for index in reversed(range(len(layers) - 1))),
    ]


def fastest(
    path: Sequence[RankPolicy],
    full: RankPolicy,
    tune: ScoredRequests,
    k: int,
    overlap: float,
) -> RankPolicy:
    """The cheapest policy, prefix cached, with enough mean overlap@k; full depth under its name where none is."""
    whole = full.decide(tune)
    best = RankPolicy(path[0].name, None, full.decide)
    least = float(costs(tune, whole, True).sum())
    for policy in path:
        ranking = policy.decide(tune)
        spent = float(costs(tune, ranking, True).sum())
        if spent < least and overlaps(tune, ranking, whole, k).mean() >= overlap:
            best = policy
            least = spent
    return best


def overlaps(scored: ScoredRequests, ranking: Ranking, full: Ranking, k: int) -> F64:
    """Share of full depth's best k that are in the ranking's best k, (r,)."""
    found: F64 = overlap_at_k(scored.request, ranking.keys, full.keys, k).numpy()
    return found


def costs(scored: ScoredRequests, ranking: Ranking, prefix_cached: bool) -> Tensor:
    """Token-layers of each request, (r,)."""
    layer = torch.tensor(scored.outputs.layers)[ranking.exits]
    return request_cost(
        scored.request, layer, scored.target_tokens, scored.stream_tokens, prefix_cached
    )
