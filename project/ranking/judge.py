"""Ranking requests scored at every depth: who leaves where, which list comes out, what that loses and what it costs.

Unusual here: no model and no file. A policy is judged on cached scores of all heads, against the list of full depth on
the same candidates, so every policy sees the same requests.
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

from project.artefacts import exit_layers_of
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import gauc_impressions
from project.exits.calibration import Calibration
from project.exits.cost import Stream, request_cost
from project.exits.criteria import (
    Consistency,
    Criterion,
    Ratio,
    RatioConsistency,
    name,
    safety_table,
)
from project.exits.outputs import HeadOutputs
from project.exits.plan import raw_outputs
from project.exits.policies import leave
from project.exits.top_k import TopK, fit_margins, overlap_at_k, precision_at_k

Floats = NDArray[np.float64]

LEVELS = (
    1.0,
    0.998,
    0.995,
    0.99,
    0.98,
    0.97,
    0.95,
    0.925,
    0.9,
    0.85,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.1,
    0.0,
)
"""Values of the one parameter of a policy, from safest to fastest: quantiles."""
DRAWS = 1000  # resamples of users behind an interval


@dataclass(frozen=True, eq=False)
class ScoredRequests:
    """r requests with n candidates in all, and what every head said about them.

    Attributes:
        request: (n,) number of the request, 0..r-1.
        user: (r,) user of each request.
        outputs: n rows, K heads.
        target_tokens: (n,) each candidate's own tokens.
        stream_tokens: (n,) tokens of the request's history.
        label: (n,) 0, 1, or -1 where unknown.
    """

    request: Tensor
    user: NDArray[Any]
    outputs: HeadOutputs
    target_tokens: Tensor
    stream_tokens: Tensor
    label: NDArray[np.int8]

    @classmethod
    def of(cls, scores: pl.DataFrame, calibration: Calibration | None = None) -> ScoredRequests:
        """From a score table of candidates.

        Args:
            scores: Columns request_id, user, label (null where unknown), tokens and logits; the candidates of
                a request in order.
            calibration: The run's; None: raw logits, and exit 0 is the first head.
        """
        prior = calibration is None or 0 in calibration.layers
        raw = raw_outputs(scores, np.zeros((len(scores), 0)), exit_layers_of(scores), prior)
        logits = calibration.apply(raw.logits) if calibration else raw.logits
        number = scores["request_id"].rle_id().to_numpy().astype(np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        target, stream = (
            torch.from_numpy(scores[f"{x}_tokens"].to_numpy().copy()) for x in ("target", "stream")
        )
        return cls(
            torch.from_numpy(number),
            scores["user"].to_numpy()[starts],
            HeadOutputs(raw.layers, logits, raw.evidence),
            target,
            stream,
            scores["label"].fill_null(-1).to_numpy().astype(np.int8),
        )


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a policy made of requests: the head at which each candidate left, (n,), and what it is sorted by, (n,)."""

    exits: Tensor
    keys: Tensor


@dataclass(frozen=True)
class RankPolicy:
    """A fitted policy for ranking requests.

    Attributes:
        name: In tables: top_k, a criterion, full_depth, fixed_depth_<layer>.
        parameter: Its one parameter, null where it has none.
        decide: Ranks requests.
    """

    name: str
    parameter: float | None
    decide: Callable[[ScoredRequests], Ranking]


def fixed_depth(layers: Sequence[int], index: int) -> RankPolicy:
    """Everyone leaves at one head, that is a static model of that depth."""
    label = "full_depth" if index == len(layers) - 1 else f"fixed_depth_{layers[index]}"

    def decide(asked: ScoredRequests) -> Ranking:
        return _emitted(asked, torch.full_like(asked.request, index))

    return RankPolicy(label, None, decide)


def by_row(criterion: Criterion, threshold: float) -> RankPolicy:
    """Each candidate leaves by itself, at the first head where the criterion's safety reaches one threshold."""

    def decide(asked: ScoredRequests) -> Ranking:
        thresholds = torch.full((asked.outputs.heads,), threshold, dtype=torch.float64)
        return _emitted(asked, leave(safety_table(criterion, asked.outputs), thresholds))

    return RankPolicy(name(criterion), threshold, decide)


def by_margin(policy: TopK, level: float) -> RankPolicy:
    """Candidates leave when they can no longer reach the list; who stays longer stands above who left."""

    def decide(asked: ScoredRequests) -> Ranking:
        exits = policy.exits(asked.request, asked.outputs)
        kept = _emitted(asked, exits)
        reach = 1.0 + float(asked.outputs.logits.max() - asked.outputs.logits.min())
        return Ranking(exits, kept.keys + reach * exits)

    return RankPolicy("top_k", level, decide)


def policies(tune: ScoredRequests, k: int, overlap: float) -> list[RankPolicy]:
    """Full depth, every static depth, `top_k` and row policies, each the fastest that keeps the overlap on `tune`.

    Args:
        tune: Requests of the tune fold.
        k: Length of the list.
        overlap: Least mean overlap@k with full depth that a policy with a parameter must have.

    Returns:
        full_depth first, then top_k.
    """
    layers = tune.outputs.layers
    full = fixed_depth(layers, len(layers) - 1)
    margins = [by_margin(TopK(k, fit_margins(tune.request, tune.outputs, q)), q) for q in LEVELS]
    found = [full, fastest(margins, full, tune, k, overlap)]
    criteria: list[Criterion] = [Consistency(), Ratio(), RatioConsistency()]
    for criterion in criteria:
        criterion.fit(tune.outputs)
        safety = safety_table(criterion, tune.outputs)[:, :-1]
        spread = safety[safety.isfinite()].double()
        if spread.numel():
            thresholds = torch.quantile(spread, torch.tensor(LEVELS, dtype=torch.float64)).tolist()
            found.append(fastest([by_row(criterion, t) for t in thresholds], full, tune, k, overlap))
    return [*found, *(fixed_depth(layers, index) for index in reversed(range(len(layers) - 1)))]


def fastest(
    path: Sequence[RankPolicy], full: RankPolicy, tune: ScoredRequests, k: int, overlap: float
) -> RankPolicy:
    """The cheapest policy, stream cached, whose mean overlap@k is enough; full depth under its name where none is.

    Args:
        path: At least one policy, all of one name.
        full: Full depth.
        tune: Requests to choose on.
        k: Length of the list.
        overlap: Least mean overlap@k.
    """
    whole = full.decide(tune)
    best, least = RankPolicy(path[0].name, None, full.decide), float(costs(tune, whole, "warm").sum())
    for policy in path:
        ranking = policy.decide(tune)
        spent = float(costs(tune, ranking, "warm").sum())
        if spent < least and overlaps(tune, ranking, whole, k).mean() >= overlap:
            best, least = policy, spent
    return best


def overlaps(asked: ScoredRequests, ranking: Ranking, full: Ranking, k: int) -> Floats:
    """Shape (r,), share of full depth's best k that are in the ranking's best k."""
    found: Floats = overlap_at_k(asked.request, ranking.keys, full.keys, k).numpy()
    return found


def costs(asked: ScoredRequests, ranking: Ranking, stream: Stream) -> Tensor:
    """Shape (r,), token-layers of each request."""
    layer = torch.tensor(asked.outputs.layers)[ranking.exits]
    return request_cost(asked.request, layer, asked.target_tokens, asked.stream_tokens, stream)


def policy_row(
    policy: RankPolicy, full: RankPolicy, catalogue: ScoredRequests, labelled: ScoredRequests | None, k: int
) -> dict[str, Any]:
    """One policy's row of `requests` in results/rank.json.

    Args:
        policy: Who is judged.
        full: Full depth.
        catalogue: Requests for overlap, depth and cost, which need no labels.
        labelled: Requests whose candidates all have labels, for precision@k and GAUC; None: there are none.
        k: Length of the list.

    Returns:
        policy, parameter, k, candidates (fewest and most of a request: a small catalogue cannot fill them all), overlap
        and its interval (users resampled), mean_depth in layers and as a share of full
        depth, cost_cold and cost_warm as shares of full depth's token-layers, precision, gauc (mean AUC inside a
        request, weighted by its candidates), n_requests, n_labelled.
    """
    ranking, whole = policy.decide(catalogue), full.decide(catalogue)
    overlap, counts = overlaps(catalogue, ranking, whole, k), torch.bincount(catalogue.request)
    interval = UserBootstrap(catalogue.user, DRAWS).ratio_interval(overlap, np.ones_like(overlap))["interval"]
    depth = float(torch.tensor(catalogue.outputs.layers)[ranking.exits].double().mean())
    cost = {
        f"cost_{stream}": float(
            costs(catalogue, ranking, stream).sum() / costs(catalogue, whole, stream).sum()
        )
        for stream in ("cold", "warm")
    }
    return {
        "policy": policy.name,
        "parameter": policy.parameter,
        "k": k,
        "candidates": [int(counts.min()), int(counts.max())],
        "overlap": float(overlap.mean()),
        "overlap_interval": interval,
        "mean_depth": depth,
        "depth_share": depth / catalogue.outputs.layers[-1],
        **cost,
        **_by_labels(policy, labelled, k),
        "n_requests": len(catalogue.user),
        "n_labelled": 0 if labelled is None else len(labelled.user),
    }


def _by_labels(policy: RankPolicy, labelled: ScoredRequests | None, k: int) -> dict[str, float | None]:
    if labelled is None:
        return {"precision": None, "gauc": None}
    judged = policy.decide(labelled)
    precision = precision_at_k(labelled.request, judged.keys, torch.from_numpy(labelled.label), k)
    gauc = gauc_impressions(judged.keys.numpy(), labelled.label, labelled.request.numpy()).value
    return {"precision": float(precision.double().mean()), "gauc": gauc}


def _emitted(asked: ScoredRequests, exits: Tensor) -> Ranking:
    return Ranking(exits, asked.outputs.logits.gather(1, exits[:, None]).squeeze(1).double())
