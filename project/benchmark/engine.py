"""The engine benchmark: every contender on the same requests, in turns, as ratios."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from project.benchmark.contenders import AskedRequests, Bench, Case, RunWorth, Side, Unit, cases, run_rounds
from project.data.requests import catalogue_requests
from project.engine.cache import StreamCache
from project.engine.predict import load_run
from project.engine.requests import PreparedRequest, Scored, prepare_requests
from project.errors import ConfigError, NotFittedError
from project.exits.plan import ExitSettings
from project.report.tables import render, shown
from project.run import result_head, write_json

if TYPE_CHECKING:
    from project.data.protocol import SplitInteractions
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Ceilings, measured.

    Attributes:
        gflops: GFLOP/s of a matrix product of many rows.
        gbytes: GB/s at which the linear layers' weights are read for a single row.
        layer_bytes: Bytes of the linear layers' weights of one decoder layer.
    """

    gflops: float
    gbytes: float
    layer_bytes: float

    @classmethod
    def measure(cls, model: ExitRecommender, tokens: int = 1024) -> Limits:
        """Of this moment, about as long as a small request.

        Args:
            model: The run.
            tokens: Rows of the product. Few rows are bound by reading the weights, many by arithmetic.
        """
        assert model.backbone is not None
        layers: Any = model.backbone.layers
        own = [part for part in layers.modules() if isinstance(part, nn.Linear)]
        widest: Any = next(part for name, part in layers.named_modules() if name.endswith("up_proj"))
        widest = getattr(widest, "base_layer", widest)  # without adapters
        like = model.backbone.embed_tokens.weight
        size = sum(w.nbytes for part in own for w in part.parameters(recurse=False))
        flops = 2 * tokens * widest.in_features * widest.out_features
        reading = _seconds(own, 1, like)
        return cls(flops / _seconds([widest], tokens, like) / 1e9, size / reading / 1e9, size / len(layers))

    @classmethod
    def median(cls, measured: Sequence[Limits]) -> Limits:
        """Of each ceiling.

        Args:
            measured: At least one.
        """
        names = [field.name for field in fields(cls)]
        return cls(*(float(np.median([getattr(limits, name) for limits in measured])) for name in names))

    def least_seconds(self, flops: Sequence[Floats]) -> float:
        """Seconds below which the backbone cannot do this; a layer's weights are read once for all.

        Args:
            flops: Per request that runs together with the others, `useful_flops` by layer.
        """
        every = np.zeros(max((len(own) for own in flops), default=0))
        for own in flops:
            every[: len(own)] += own
        return float(np.maximum(every / self.gflops, self.layer_bytes / self.gbytes).sum()) / 1e9


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> Floats:
    """FLOPs that a request's exits need by layer, (deepest exit,): linear layers, and the scores that queries may see.

    At the layer where a candidate leaves, its tokens owe keys and values alone and its answer slot the rest; the same
    holds for the stream at the request's deepest exit.

    Args:
        scored: Its exits and token-layers.
        request: Its tokens.
        model: Its backbone.
    """
    assert model.backbone is not None
    config, layer = model.backbone.config, model.backbone.layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.ndim == 2}
    whole, owed = (
        sum(sizes.values()),
        sum(n for name, n in sizes.items() if "k_proj" in name or "v_proj" in name),
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    deepest = max(int(depth.max(initial=0)), 0)
    at = np.arange(1, deepest + 1)[:, None]
    passes, leaves = depth > at, depth == at  # (deepest, candidates)
    tokens, read, slots = passes @ own, leaves @ own, leaves.sum(axis=1)
    seen = passes @ (own * s + own * (own + 1) / 2) + leaves @ (s + own)
    if scored.token_layers > (np.maximum(depth, 0) * own).sum():  # the stream ran
        goes_on = at[:, 0] < deepest
        tokens, read = tokens + s * goes_on, read + s * ~goes_on
        seen = seen + goes_on * s * (s + 1) / 2
    linear = whole * tokens + owed * read + (whole - owed) * slots
    flops: Floats = 2.0 * linear + 4.0 * config.num_attention_heads * width * seen
    return flops


@torch.inference_mode()
def _seconds(layers: Sequence[Any], rows: int, like: torch.Tensor) -> float:
    """Of these linear layers one after the other, each on rows of its own width."""
    given = {n: like.new_ones(rows, n) for n in {layer.in_features for layer in layers}}
    start = time.perf_counter()
    for layer in layers:
        out = layer(given[layer.in_features])
    float(out[0, 0])  # waits for the device
    return time.perf_counter() - start


DRAWS = 2000  # resamples of requests behind an interval


@dataclass(frozen=True)
class Against:
    """What a side is compared with, all measured in the same run.

    Attributes:
        full: Packed full depth, which speed and efficiency are over.
        static_exit: The static exit of equal accuracy; None where it is exit 0, which runs no layer.
        limits: What the machine allows.
    """

    full: Side
    static_exit: Side | None
    limits: Limits


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
        prepare_ms: What a request needs before it can be scored: history, retrieved features, exit 0 and token ids.
    """
    assert model.backbone is not None
    own = str(model.backbone.embed_tokens.weight.dtype).removeprefix("torch.")
    asked = [request for unit in units[: side.units] for request in unit]
    wall, each = side.typical("wall"), np.array(side.wall).ravel() * 1e3
    rates = len(asked) / side.totals("wall")
    flops = _flops(side, units, model)
    useful = sum(float(own.sum()) for unit in flops for own in unit)
    depths = np.concatenate([s.exit_layers for s in side.scored])
    return {
        "engine": side.engine,
        "policy": side.policy,
        "requests": len(asked),
        "at_once": len(units[0]),
        "rounds": len(side.wall),
        "dtype": own,
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
        **_limits(side, against, flops, _flops(against.full, units[: side.units], model)),
        "gflops": useful / float(side.typical("backbone").sum()) / 1e9,
    }


def _flops(side: Side, units: list[Unit], model: ExitRecommender) -> list[list[Floats]]:
    """Per unit that a side scored, per request: useful FLOPs by layer."""
    found = {s.request_id: s for s in side.scored}
    return [[useful_flops(found[r.request_id], r, model) for r in unit] for unit in units[: side.units]]


def _limits(
    side: Side, against: Against, flops: list[list[Floats]], same: list[list[Floats]]
) -> dict[str, Any]:
    """How near a side's backbone comes to what the machine allows, and the efficiency that it would have there."""
    limits, saved = against.limits, _saved(side, against.full)
    least, whole = (sum(map(limits.least_seconds, each)) for each in (flops, same))
    return {
        "of_limit": least / float(side.typical("backbone").sum()),
        # who runs more tokens than packed full depth does not need them
        "efficiency_at_limit": whole / least / saved if saved and saved >= 1 and least else None,
        "gflops_ceiling": limits.gflops,
        "gbytes_ceiling": limits.gbytes,
    }


def _ratios(side: Side, against: Against, requests: int, prepare_ms: float) -> dict[str, Any]:
    """A side against full depth and the static exit, on the requests that it scored itself."""
    n, wall, backbone, full = side.units, side.typical("wall"), side.typical("backbone"), against.full
    whole = full.typical("wall", n)
    mine, theirs = (prepare_ms * requests / 1e3 + float(seconds.sum()) for seconds in (wall, whole))
    saved = _saved(side, full)
    measured = ratio_interval(whole, wall)
    return {
        "measured_speedup": measured["value"],
        "measured_speedup_interval": measured["interval"],
        "speedup_over_static": {"value": None, "interval": None}
        if against.static_exit is None
        else ratio_interval(against.static_exit.typical("wall", n), wall),
        "prepare_ms": prepare_ms,
        "request_ms": mine / requests * 1e3,
        "request_speedup": theirs / mine,
        "backbone_speedup": float(full.typical("backbone", n).sum() / backbone.sum()),
        "token_layer_speedup": saved,
        **_efficiency(side, full, saved),
    }


def _saved(side: Side, full: Side) -> float | None:
    """Token-layers of full depth over a side's, on the requests that it scored; None where it ran none."""
    spent = side.token_layers()
    return full.token_layers(len(side.scored)) / spent if spent else None


def _efficiency(side: Side, full: Side, saved: float | None) -> dict[str, Any]:
    """Backbone time saved over token-layers saved."""
    if not saved:
        return {"efficiency": None, "efficiency_spread": None}
    n = side.units
    typical = float(full.typical("backbone", n).sum() / side.typical("backbone").sum())
    rounds = full.totals("backbone", n)[: len(side.wall)] / side.totals("backbone")
    spread = [float(ratio) / saved for ratio in (rounds.min(), rounds.max())]
    return {"efficiency": typical / saved, "efficiency_spread": spread}


ROUNDS = 3  # fewer say nothing about spread
FEWEST = 4  # units: fewer are not a sample


def run_engine(
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    folder: Path,
    settings: ExitSettings,
    device: torch.device,
    seconds: float,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Measure and write results/benchmark.json.

    Args:
        model: Made from the run's configuration.
        data: Real requests.
        checkpoint: A calibrated run's checkpoint.
        folder: Run folder of the result file.
        settings: The run's budget, which also chooses the plans of other workloads.
        device: Where everything runs.
        seconds: About how long to measure; making plans and scoring requests for them comes on top.
        sizes: Candidates of a request.

    Raises:
        NotFittedError: No checkpoint.
        ConfigError: No size, or none that the catalogue has items for.
    """
    if checkpoint is None:
        raise NotFittedError(
            "benchmark --only engine needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` writes one."
        )
    data.prepare_data()
    wanted = _possible(sizes, data.split)
    plans = load_run(model, data.tokenizer, checkpoint, data)
    model.to(device)  # not before: the backbone was just made
    worth = RunWorth(model, data, folder, plans, settings)
    asked = AskedRequests(model, data, folder, plans.plan.calibration)
    bench = Bench(model, worth, asked, device)
    for hint in bench.hints():
        Console().print(hint)
    rows = list[dict[str, Any]]()
    for case in wanted:
        units, prepare_ms = sample(model, data, case)
        rows += [
            {**case.row(), **row} for row in measure(bench, case, units, prepare_ms, seconds / len(wanted))
        ]
        # what is measured stays measured, whatever happens to the next workload
        result = result_head("benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed)
        path = write_json(folder / "results" / "benchmark.json", result | {"rows": rows})
    Console(width=190).print(shown(render(result | {"rows": rows})), f"written: {path}")
    return result | {"rows": rows}


def _possible(sizes: Sequence[int], split: SplitInteractions) -> list[Case]:
    """The workloads that catalogue and histories of test can fill; says which sizes they cannot."""
    items = split.interactions.items.height
    kept = [size for size in sizes if 1 <= size <= items]
    if not kept:
        raise ConfigError(
            f"--sizes is {list(sizes)}: expected candidates of a request, from 1 to {items} (all items)."
        )
    if len(kept) < len(sizes):
        left_out = ", ".join(str(size) for size in sizes if size not in kept)
        Console().print(f"no requests of {left_out} candidates: the catalogue has {items} items.")
    tested = split.rows.filter((pl.col("split") == "test") & (pl.col("role") == "target"))
    longest = int(tested["hist"].max() or 0)  # type: ignore[arg-type]
    return [case for case in cases(kept) if (case.history or 0) <= longest]


def sample(model: ExitRecommender, data: InteractionData, case: Case) -> tuple[list[Unit], float]:
    """Requests of a workload as units of one call each, and the milliseconds that preparing a request took.

    Args:
        model: Its exit 0.
        data: Real logs.
        case: The workload.
    """
    drawn = catalogue_requests(data.split, "test", case.requests, case.candidates, data.seed, case.history)
    start = time.perf_counter()
    prepared = prepare_requests(model, data, drawn.requests)
    spent = (time.perf_counter() - start) / len(prepared) * 1e3
    # every request has a stream of its own, whoever it is of
    prepared = [replace(r, user=r.request_id) for r in prepared]
    whole = len(prepared) - len(prepared) % case.at_once or len(prepared)
    return [prepared[i : i + case.at_once] for i in range(0, whole, case.at_once)], round(spent, 2)


def measure(
    bench: Bench, case: Case, units: list[Unit], prepare_ms: float, seconds: float
) -> list[dict[str, Any]]:
    """Rows of one workload.

    Args:
        bench: The run.
        case: The workload.
        units: Its sample.
        prepare_ms: What a request needs before it can be scored.
        seconds: About how long to measure.
    """
    cache = StreamCache(capacity=10**9) if case.prefix_cached else None
    full = bench.full(cache)
    full.runs.score(units[0])  # warm up
    start = time.perf_counter()
    for unit in units:
        full.runs.score(unit)  # fills the cache
    once = (time.perf_counter() - start) / len(units)
    sides = bench.sides(case, units, cache)
    most = int(seconds / (once * len(sides) * ROUNDS)) if once > 0 else len(units)
    units = units[: max(FEWEST, most)]
    for side in (s for s in sides[1:] if s.rounds is None):
        own = case.prefix_cached and side.engine == "shared_prefix"
        for unit in (
            units[: side.most] if own else units[:1]
        ):  # warm up; who has streams of its own keeps them all now
            side.runs.score(unit)
    limits, start, number = list[Limits](), time.perf_counter(), 0
    while number < ROUNDS or time.perf_counter() - start < seconds:
        run_rounds(sides, units, number)
        limits += [Limits.measure(bench.module) for _ in units]
        number += 1
    return _rows(bench, sides, units, Limits.median(limits), prepare_ms)


def _rows(
    bench: Bench,
    sides: list[Side],
    units: list[Unit],
    limits: Limits,
    prepare_ms: float,
) -> list[dict[str, Any]]:
    """A row a side, beside full depth, the static exit and the limits."""
    named = (
        "packed" if bench.worth.static_exit == bench.model.depth else f"fixed_depth_{bench.worth.static_exit}"
    )
    static_exit = next((side for side in sides if side.engine == named), None)
    against = Against(sides[0], static_exit, limits)
    rows = [side_row(side, against, units, bench.model, prepare_ms) for side in sides]
    return [{**row, "static_exit": side is static_exit} for row, side in zip(rows, sides, strict=True)]
