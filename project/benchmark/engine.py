"""The engine benchmark: every contender on the same requests, in turns, as ratios."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from torch import nn

from project.arrays import F64
from project.benchmark.contenders import Bench, Case, Contender, Unit, cases, run_rounds
from project.data.requests import catalogue_requests
from project.engine.cache import StreamCache
from project.engine.predict import load_run
from project.engine.requests import PreparedRequest, Scored, prepare_requests
from project.errors import ConfigError, NotFittedError
from project.evaluation.bootstrap import UserBootstrap
from project.exits.plan import ExitSettings
from project.report.tables import render, shown
from project.retrieval.online import can_be_indexed
from project.run import result_head, write_json

if TYPE_CHECKING:
    from project.data.protocol import SplitInteractions
    from project.data.requests import Request
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender
    from project.serve.ranker import Ranker

DRAWS = 2000  # resamples of requests behind an interval
ROUNDS = 3  # fewer do not show the spread
FEWEST = 4  # units: fewer are not a sample


@dataclass(frozen=True)
class Limits:
    """Ceilings of the machine, measured."""

    gflops: float  # GFLOP/s of a matrix product of many rows
    gbytes: float  # GB/s at which the linear layers' weights are read for a single row
    layer_bytes: float  # bytes of the linear layers' weights of one decoder layer

    @classmethod
    def measure(cls, model: ExitRecommender, tokens: int = 1024) -> Limits:
        """Of this moment. One row is bound by reading the weights, a product of many `tokens` by arithmetic."""
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
        """Of each ceiling."""
        return cls(*np.median([astuple(limits) for limits in measured], axis=0).tolist())

    def least_seconds(self, flops: Sequence[F64]) -> float:
        """Seconds below which the backbone cannot do this; a layer's weights are read once for all.

        `flops`: per request that runs together with the others, `useful_flops` by layer.
        """
        every = np.zeros(max((len(own) for own in flops), default=0))
        for own in flops:
            every[: len(own)] += own
        return float(np.maximum(every / self.gflops, self.layer_bytes / self.gbytes).sum()) / 1e9


@torch.inference_mode()
def _seconds(layers: Sequence[Any], rows: int, like: torch.Tensor) -> float:
    """Of these linear layers one after the other, each on rows of its own width."""
    given = {n: like.new_ones(rows, n) for n in {layer.in_features for layer in layers}}
    start = time.perf_counter()
    for layer in layers:
        out = layer(given[layer.in_features])
    float(out[0, 0])  # waits for the device
    return time.perf_counter() - start


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> F64:
    """FLOPs that a request's exits need by layer, (deepest exit,): linear layers, and the scores that queries may see.

    At the layer where a candidate leaves, its tokens owe keys and values alone and its answer slot the rest; the same
    holds for the history at the request's deepest exit.
    """
    assert model.backbone is not None
    config, layer = model.backbone.config, model.backbone.layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.ndim == 2}
    whole = sum(sizes.values())
    owed = sum(n for name, n in sizes.items() if "k_proj" in name or "v_proj" in name)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    deepest = max(int(depth.max(initial=0)), 0)
    at = np.arange(1, deepest + 1)[:, None]
    passes, leaves = depth > at, depth == at  # (deepest, candidates)
    tokens, read, slots = passes @ own, leaves @ own, leaves.sum(axis=1)
    seen = passes @ (own * s + own * (own + 1) / 2) + leaves @ (s + own)
    if scored.token_layers > (np.maximum(depth, 0) * own).sum():  # the history ran
        goes_on = at[:, 0] < deepest
        tokens, read = tokens + s * goes_on, read + s * ~goes_on
        seen = seen + goes_on * s * (s + 1) / 2
    linear = whole * tokens + owed * read + (whole - owed) * slots
    flops: F64 = 2.0 * linear + 4.0 * config.num_attention_heads * width * seen
    return flops


@dataclass(frozen=True)
class Against:
    """What a contender is compared with, all measured in the same run."""

    full: Contender  # packed full depth, which speed and efficiency are over
    static_exit: Contender | None  # of equal accuracy; None where it is exit 0, which runs no layer
    limits: Limits


def ratio_interval(slow: F64, fast: F64) -> dict[str, Any]:
    """How many times faster, {`value`, `interval`}: a ratio of summed seconds (units,), units resampled, paired."""
    return UserBootstrap(np.arange(len(slow)), DRAWS).ratio_interval(slow, fast)


def contender_row(
    contender: Contender, against: Against, units: list[Unit], model: ExitRecommender, prepare_ms: float
) -> dict[str, Any]:
    """One row of a result file; preparing a request (history, features, exit 0, token ids) took `prepare_ms`."""
    assert model.backbone is not None
    full, limits, n = against.full, against.limits, contender.units
    # 1. what it scored, and the same requests at full depth
    requests = [request for unit in units[:n] for request in unit]
    depths = np.concatenate([s.exit_layers for s in contender.scored])
    spent = contender.token_layers()
    saved = full.token_layers(len(contender.scored)) / spent if spent else None
    # 2. seconds of each unit, the median of the rounds
    wall, backbone = contender.typical("wall"), contender.typical("backbone")
    full_wall, full_backbone = full.typical("wall", n), full.typical("backbone", n)
    each = np.array(contender.wall).ravel() * 1e3
    rates = len(requests) / contender.totals("wall")
    measured = ratio_interval(full_wall, wall)
    static: dict[str, Any] = {"value": None, "interval": None}
    if against.static_exit is not None:
        static = ratio_interval(against.static_exit.typical("wall", n), wall)
    whole, whole_full = (prepare_ms * len(requests) / 1e3 + float(x.sum()) for x in (wall, full_wall))
    # 3. efficiency: backbone time saved over token-layers saved
    efficiency, spread = None, None
    backbone_speedup = float(full_backbone.sum() / backbone.sum())
    if saved:
        rounds = full.totals("backbone", n)[: len(contender.wall)] / contender.totals("backbone")
        efficiency = backbone_speedup / saved
        spread = [float(ratio) / saved for ratio in (rounds.min(), rounds.max())]
    # 4. how near the backbone comes to what the machine allows, and the efficiency that it would have there
    flops, full_flops = (_flops(each, units[:n], model) for each in (contender, full))
    least, full_least = (sum(map(limits.least_seconds, unit)) for unit in (flops, full_flops))
    return {
        "engine": contender.engine,
        "policy": contender.policy,
        "requests": len(requests),
        "at_once": len(units[0]),
        "rounds": len(contender.wall),
        "dtype": str(model.backbone.embed_tokens.weight.dtype).removeprefix("torch."),
        "requests_per_s": len(requests) / float(wall.sum()),
        "candidates_per_s": len(depths) / float(wall.sum()),
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": float(np.percentile(each, p)) for p in (50, 95, 99)},
        "auc": None,
        "auc_drop": None,
        **contender.accuracy,
        "mean_depth": float(depths.mean()),
        "token_layers": spent,
        "measured_speedup": measured["value"],
        "measured_speedup_interval": measured["interval"],
        "speedup_over_static": static,
        "prepare_ms": prepare_ms,
        "request_ms": whole / len(requests) * 1e3,
        "request_speedup": whole_full / whole,
        "backbone_speedup": backbone_speedup,
        "token_layer_speedup": saved,
        "efficiency": efficiency,
        "efficiency_spread": spread,
        "of_limit": least / float(backbone.sum()),
        # a contender that runs more tokens than packed full depth does not need them
        "efficiency_at_limit": full_least / least / saved if saved and saved >= 1 and least else None,
        "gflops_ceiling": limits.gflops,
        "gbytes_ceiling": limits.gbytes,
        "gflops": sum(float(own.sum()) for unit in flops for own in unit) / float(backbone.sum()) / 1e9,
    }


def _flops(contender: Contender, units: list[Unit], model: ExitRecommender) -> list[list[F64]]:
    """Per unit, per request: useful FLOPs by layer."""
    found = {s.request_id: s for s in contender.scored}
    return [[useful_flops(found[r.request_id], r, model) for r in unit] for unit in units]


def online(bench: Bench, data: InteractionData, folder: Path) -> Ranker | None:
    """The server's ranker; None where the retriever cannot be indexed, or the extra `serve` is not installed."""
    if not can_be_indexed(data.retriever):
        return None
    try:
        from project.serve.ranker import Ranker
    except ImportError:
        return None
    return Ranker(folder, bench.module, data, bench.plans.plan, None, cache_mib=0, audit_share=0.0)


def preparation(ranker: Ranker, requests: Sequence[Request], cached: bool) -> tuple[float, float]:
    """Milliseconds that retrieved features and prompt of a request take as of now: medians, after one round to warm up.

    Histories are token ids already where `cached`; else each request makes its own anew.
    """
    index, spent, found = ranker._index, 0.0, list[tuple[float, float]]()
    answer = index.retrieved

    def timed(*given: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        features = answer(*given)
        spent += time.perf_counter() - start
        return features

    index.retrieved = timed  # type: ignore[assignment, method-assign]
    for request in (*requests, *requests):
        if not cached:
            ranker._histories.clear()
        start, spent = time.perf_counter(), 0.0
        ranker._prepare(request, ranker._codes, ranker._items, ranker._encoder)
        found.append((spent, time.perf_counter() - start - spent))
    index.retrieved = answer  # type: ignore[method-assign]
    features, prompt = 1e3 * np.median(found[len(requests) :], axis=0)
    return float(features), float(prompt)


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
    """Measure requests of these numbers of candidates for about so many seconds; write results/benchmark.json.

    The checkpoint is a calibrated run's, `folder` its folder, `settings` its budget, which also chooses the plan
    of the paper's rule.
    Making plans and scoring requests for them comes on top of
    `seconds`, as does the index of retrieved features.
    """
    if checkpoint is None:
        raise NotFittedError(
            "benchmark --only engine needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` writes one."
        )
    data.prepare_data()
    wanted = _possible(sizes, data.split)
    plans = load_run(model, data.tokenizer, checkpoint, data)
    model.to(device)  # not before: the backbone was just made
    bench = Bench(model, data, folder, plans, settings, device)
    if bench.no_lists:
        Console().print(f"no lists: {bench.no_lists}")
    ranker = online(bench, data, folder)
    result = result_head("benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed)
    result["rows"] = []
    for case in wanted:
        units, about = _sample(model, data, case, ranker)
        rows = _measure(bench, case, units, about["prepare_ms"], seconds / len(wanted))
        result["rows"] += [{**case.row(), **row, **about} for row in rows]
        # what is measured stays measured, whatever happens to the next workload
        path = write_json(folder / "results" / "benchmark.json", result)
    Console(width=190).print(shown(render(result)), f"written: {path}")
    return result


def _possible(sizes: Sequence[int], split: SplitInteractions) -> list[Case]:
    """The workloads that catalogue and histories of test can fill; prints which sizes they cannot."""
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


def _sample(
    model: ExitRecommender, data: InteractionData, case: Case, ranker: Ranker | None
) -> tuple[list[Unit], dict[str, Any]]:
    """Requests of a workload as units of one call each, and the milliseconds that preparing a request takes.

    `prepare_ms` is the sum of `features_ms` and `prompt_ms` as of now, by the server's ranker; without one, a request's
    share of preparing all of them by a walk through the log.
    """
    drawn = catalogue_requests(data.split, "test", case.requests, case.candidates, data.seed, case.history)
    start = time.perf_counter()
    prepared = prepare_requests(model, data, drawn.requests)
    about: dict[str, Any] = {"features_ms": None, "prompt_ms": None}
    about["prepare_ms"] = (time.perf_counter() - start) / len(prepared) * 1e3
    if ranker is not None:
        features, prompt = preparation(ranker, drawn.requests.requests, case.prefix_cached)
        about = {"features_ms": features, "prompt_ms": prompt, "prepare_ms": features + prompt}
    # every request has a cached history of its own, whoever it is of
    prepared = [replace(r, user=r.request_id) for r in prepared]
    whole = len(prepared) - len(prepared) % case.at_once or len(prepared)
    return [prepared[i : i + case.at_once] for i in range(0, whole, case.at_once)], about


def _measure(
    bench: Bench, case: Case, units: list[Unit], prepare_ms: float, seconds: float
) -> list[dict[str, Any]]:
    """A row a contender of one workload, measured for about so many seconds."""
    cache = StreamCache(mib=np.inf) if case.prefix_cached else None
    # 1. warm up packed full depth, fill the cache, and see how many units there is time for
    full = bench.static("packed", "full depth", bench.model.depth, cache).runner
    full.score(units[0])
    start = time.perf_counter()
    for unit in units:
        full.score(unit)
    once = (time.perf_counter() - start) / len(units)
    contenders = bench.contenders(case, cache)
    most = int(seconds / (once * len(contenders) * ROUNDS)) if once > 0 else len(units)
    units = units[: max(FEWEST, most)]
    # 2. warm up the others; those with a cache of their own keep all histories now
    for contender in (c for c in contenders[1:] if c.rounds is None):
        own_cache = case.prefix_cached and contender.engine in ("shared_prefix", "llama_cpp")
        for unit in units[: contender.most] if own_cache else units[:1]:
            contender.runner.score(unit)
    # 3. rounds; the machine's limits are measured as often as the contenders
    limits, start, number = list[Limits](), time.perf_counter(), 0
    while number < ROUNDS or time.perf_counter() - start < seconds:
        run_rounds(contenders, units, number)
        limits += [Limits.measure(bench.module) for _ in units]
        number += 1
    # 4. rows, beside full depth and the static exit of equal accuracy
    layer = bench.plans.static_exit
    name = "packed" if layer == bench.model.depth else f"fixed_depth_{layer}"
    static_exit = next((c for c in contenders if c.engine == name), None)
    against = Against(contenders[0], static_exit, Limits.median(limits))
    return [
        {**contender_row(c, against, units, bench.model, prepare_ms), "static_exit": c is static_exit}
        for c in contenders
    ]
