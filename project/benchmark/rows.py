"""Rows of the engine's benchmark: what each side needed, as numbers of a result file.

Unusual here: a unit's time is the median of its rounds, and ratios are of sums of such medians, with an interval from
resampling requests; the spread beside them is of whole rounds, so it is wider. Only FLOPs that the exits need count as
achieved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from project.benchmark.sides import Side, Unit
from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]

DRAWS = 2000  # resamples of requests behind an interval


@dataclass(frozen=True)
class Against:
    """What a side is compared with, all measured in the same run.

    Attributes:
        full: Packed full depth with the run's own weights, which speed is compared with.
        same: Packed full depth with weights of the side's own type, which efficiency is over.
        rival: The honest rival.
        ceiling: GFLOP/s of a matrix product with weights of the side's own type.
    """

    full: Side
    same: Side
    rival: Side
    ceiling: float


def matmul_gflops(model: ExitRecommender, tokens: int = 1024) -> float:
    """GFLOP/s of the trunk's widest linear layer, alone: the ceiling of this minute, of the type its weights have.

    With int8 weights it scales its activations as well, which no forward pass can leave out.

    Args:
        model: The run, with the weights that the ceiling is for.
        tokens: Rows of the product. Few rows are bound by reading the weights, many by arithmetic.
    """
    assert model.trunk is not None
    layer: Any = next(part for name, part in model.trunk.named_modules() if name.endswith("up_proj"))
    layer = getattr(layer, "base_layer", layer)  # without adapters
    like = model.trunk.embed_tokens.weight
    x = torch.ones(tokens, layer.in_features, dtype=like.dtype, device=like.device)
    start = time.perf_counter()
    with torch.inference_mode():
        float(layer(x)[0, 0])  # waits for the device
    return float(2e-9 * tokens * layer.in_features * layer.out_features) / (time.perf_counter() - start)


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> float:
    """FLOPs that a request's exits need: linear layers, and the scores that queries may see.

    At the layer where a candidate leaves, its tokens owe keys and values alone and its answer slot the rest; the same
    holds for the stream at the request's deepest exit.

    Args:
        scored: Its exits and token-layers.
        request: Its tokens.
        model: Its trunk.
    """
    assert model.trunk is not None
    config, layer = model.trunk.config, model.trunk.layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.ndim == 2}
    whole, owed = (
        sum(sizes.values()),
        sum(n for name, n in sizes.items() if "k_proj" in name or "v_proj" in name),
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    entered = own[depth > 0]
    before = np.maximum(depth - 1, 0)
    tokens, read = float((before * own).sum()), float(entered.sum())
    seen = float((before * (own * s + own * (own + 1) / 2) + (depth > 0) * (s + own)).sum())
    if scored.token_layers > (depth * own).sum():  # the stream ran
        deepest = float(depth.max()) - 1
        tokens, read = tokens + deepest * s, read + s
        seen += deepest * s * (s + 1) / 2
    linear = whole * tokens + owed * read + (whole - owed) * len(entered)
    flops: float = 2.0 * linear + 4.0 * config.num_attention_heads * width * seen
    return flops


def ratio_interval(slow: Floats, fast: Floats, seed: int = 0) -> dict[str, Any]:
    """How many times faster, {`value`, `interval`}: a ratio of sums, 95 % by resampling units, paired.

    Args:
        slow: (units,) seconds.
        fast: (units,) seconds of the same units.
        seed: Of the resamples.
    """
    drawn = np.random.default_rng(seed).integers(0, len(slow), (DRAWS, len(slow)))
    ratios = slow[drawn].sum(axis=1) / fast[drawn].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"value": float(slow.sum() / fast.sum()), "interval": [float(low), float(high)]}


def side_row(
    side: Side,
    against: Against,
    units: list[Unit],
    model: ExitRecommender,
    prepare_ms: float,
) -> dict[str, Any]:
    """One row of a result file.

    Args:
        side: What is described.
        against: What it is compared with.
        units: The sample.
        model: The run.
        prepare_ms: What a request needs before it can be scored: history, evidence, exit 0 and token ids.
    """
    assert model.trunk is not None
    own = str(model.trunk.embed_tokens.weight.dtype).removeprefix("torch.")
    asked = [request for unit in units[: side.units] for request in unit]
    wall, each = side.typical("wall"), np.array(side.wall).ravel() * 1e3
    rates = len(asked) / side.totals("wall")
    found = {s.request_id: s for s in side.scored}
    flops = sum(useful_flops(found[r.request_id], r, model) for r in asked)
    depths = np.concatenate([s.exit_layers for s in side.scored])
    return {
        "engine": side.engine,
        "policy": side.policy,
        "requests": len(asked),
        "at_once": len(units[0]),
        "rounds": len(side.wall),
        "dtype": side.weights or own,
        "requests_per_s": len(asked) / float(wall.sum()),
        "candidates_per_s": len(depths) / float(wall.sum()),
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": float(np.percentile(each, p)) for p in (50, 95, 99)},
        "auc": None,
        "auc_drop": None,
        **side.worth,
        "mean_depth": float(depths.mean()),
        "token_layers": side.token_layers(),
        **_ratios(side, against, len(asked), prepare_ms),
        "gflops": flops / float(side.typical("trunk").sum()) / 1e9,
        "gflops_ceiling": against.ceiling,
    }


def _ratios(side: Side, against: Against, requests: int, prepare_ms: float) -> dict[str, Any]:
    """A side against full depth and the rival, on the requests that it scored itself."""
    n, wall, trunk, full = side.units, side.typical("wall"), side.typical("trunk"), against.full
    whole = full.typical("wall", n)
    mine, theirs = (prepare_ms * requests / 1e3 + float(seconds.sum()) for seconds in (wall, whole))
    spent = side.token_layers()
    saved = full.token_layers(requests) / spent if spent else None
    measured = ratio_interval(whole, wall)
    return {
        "measured_speedup": measured["value"],
        "measured_speedup_interval": measured["interval"],
        "speedup_over_rival": ratio_interval(against.rival.typical("wall", n), wall),
        "prepare_ms": prepare_ms,
        "request_ms": mine / requests * 1e3,
        "request_speedup": theirs / mine,
        "trunk_speedup": float(full.typical("trunk", n).sum() / trunk.sum()),
        "token_layer_speedup": saved,
        **_efficiency(side, against.same, saved),
    }


def _efficiency(side: Side, same: Side, saved: float | None) -> dict[str, Any]:
    """Trunk time saved over token-layers saved: what other weights win is not what leaving early won."""
    if not saved:
        return {"efficiency": None, "efficiency_spread": None}
    n = side.units
    typical = float(same.typical("trunk", n).sum() / side.typical("trunk").sum())
    rounds = same.totals("trunk", n)[: len(side.wall)] / side.totals("trunk")
    spread = [float(ratio) / saved for ratio in (rounds.min(), rounds.max())]
    return {"efficiency": typical / saved, "efficiency_spread": spread}
