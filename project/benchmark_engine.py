"""Benchmark of the engine: packed full depth, static depths and early exit, side by side on requests of the test split.

Unusual here: every request is scored by all sides in turn before the next one, the order of the sides rotates, and all
ratios are of medians over rounds, so a busy minute hits everyone. Efficiency is the trunk's time ratio over its
token-layer ratio, same stream state on both sides: 1 means that what was not run cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from project.artefacts import result_head, write_json
from project.callbacks.exit_calibration import Plans, features_of
from project.data.workloads import catalogue_requests
from project.engine.decisions import RowExits, static_exits
from project.engine.engine import Engine, Scored, Scores
from project.engine.loading import load_run, prepare_requests
from project.engine.prepared import PreparedRequest
from project.engine.stream_cache import StreamCache
from project.errors import NotFittedError
from project.exits.outputs import HeadOutputs
from project.exits.plan import ExitPlan
from project.exits.policies import Policy
from project.metrics import auc

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]

REQUESTS = {1: 48, 8: 24, 64: 8, 256: 4}
"""Candidates of a request -> requests in the sample: about equal time each."""
ROUNDS = 3  # fewer say nothing about spread
SAVED = 2.0  # token-layers that the policy saves at which efficiency is quoted
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


@dataclass
class Side:
    """One engine, and what it needed: a row of seconds a round, a column a request."""

    engine: str
    policy: str
    runs: Engine
    auc: float | None = None
    wall: list[list[float]] = field(default_factory=list)
    trunk: list[list[float]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)

    def score(self, request: PreparedRequest) -> tuple[float, Scores]:
        """Seconds and scores of one request."""
        start = time.perf_counter()
        scores = self.runs.score([request])
        return time.perf_counter() - start, scores

    def typical(self, which: str) -> float:
        """Seconds of all requests, each the median of its rounds; `which` is wall or trunk."""
        return float(np.median(np.array(getattr(self, which)), axis=0).sum())

    def totals(self, which: str) -> Floats:
        """(rounds,) seconds of all requests."""
        found: Floats = np.array(getattr(self, which)).sum(axis=1)
        return found

    @property
    def token_layers(self) -> int:
        """Of all requests."""
        return sum(s.token_layers for s in self.scored)


def run_engine(
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    folder: Path,
    seconds: float,
    sizes: Sequence[int] = (1, 8, 64, 256),
) -> dict[str, Any]:
    """Measure and write results/benchmark.json.

    Args:
        model: Made from the run's configuration.
        data: Real requests.
        checkpoint: A calibrated run's checkpoint.
        folder: Run folder of the result file.
        seconds: About how long to measure.
        sizes: Candidates of a request.

    Raises:
        NotFittedError: No checkpoint.
    """
    if checkpoint is None:
        raise NotFittedError(
            "benchmark --only engine needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` writes one."
        )
    data.prepare_data()
    plans = load_run(model, data.tokenizer, checkpoint)
    worth = _Worth(model, data, folder)
    rows = list[dict[str, Any]]()
    for size in sizes:
        workload = catalogue_requests(data.split, "test", REQUESTS.get(size, 8), size, data.seed)
        start = time.perf_counter()
        requests = prepare_requests(model, data, workload.requests)
        # every request has a stream of its own, whoever it is of: warm is warm
        requests = [replace(r, user=r.request_id) for r in requests]
        prepare_ms = (time.perf_counter() - start) / len(requests) * 1e3
        for stream in ("cold", "warm"):
            share = seconds / len(sizes) / 2
            for row in measure(model, plans, worth, requests, stream, share):
                rows.append({"candidates": size, **row, "prepare_ms": round(prepare_ms, 1)})
    result = result_head("benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed)
    result["rows"] = rows
    path = write_json(folder / "results" / "benchmark.json", result)
    Console(width=150).print(benchmark_table(rows), f"written: {path}")
    return result


def measure(
    model: ExitRecommender,
    plans: Plans,
    worth: _Worth,
    requests: list[PreparedRequest],
    stream: str,
    seconds: float,
) -> list[dict[str, Any]]:
    """Rows of one workload.

    Args:
        model: The run.
        plans: Its exit plans.
        worth: Knows the AUC of plans.
        requests: The sample.
        stream: cold, or warm: all streams' keys and values are cached at full depth before the clock starts.
        seconds: About how long to measure.
    """
    cache = StreamCache(capacity=10**9) if stream == "warm" else None
    full = Engine(model, static_exits(plans.plan, model.depth), cache)
    full.score(requests)  # fills the cache
    sides = _sides(model, plans, worth, requests, cache)
    ceiling, start, rounds = list[float](), time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - start < seconds:
        _round(sides, requests, rounds, ceiling, model)
        rounds += 1
    found = [_row(side, sides[0], requests, model, float(np.median(ceiling))) for side in sides]
    return [{**row, "stream": stream} for row in found]


def _sides(
    model: ExitRecommender,
    plans: Plans,
    worth: _Worth,
    requests: list[PreparedRequest],
    cache: StreamCache | None,
) -> list[Side]:
    def side(engine: str, policy: str, decision: RowExits, value: float | None) -> Side:
        return Side(engine, policy, Engine(model, decision, cache), value)

    plan, full = plans.plan, model.depth
    sides = [side("packed", "full depth", static_exits(plan, full), worth.static(plan, full))]
    for layer in model.exit_layers[:-1]:
        decision = static_exits(plan, layer)
        sides.append(side(f"fixed_depth_{layer}", "static", decision, worth.static(plan, layer)))
    budget = {"budget": plan, "budget without exit 0": plans.without}
    for name, one in {**budget, **_faster(model, plan, worth, requests, cache, sides[0])}.items():
        sides.append(side("early_exit", f"{name}: {one.criterion}", RowExits(one), worth.adaptive(one)))
    return sides


def _faster(
    model: ExitRecommender,
    plan: ExitPlan,
    worth: _Worth,
    requests: list[PreparedRequest],
    cache: StreamCache | None,
    full: Side,
) -> dict[str, ExitPlan]:
    """The same criterion, pushed until it saves x2 token-layers on these requests: where efficiency is quoted."""
    spent = sum(full.score(r)[1].token_layers for r in requests)
    for share in SHARES:
        pushed = worth.pushed(plan, share)
        if pushed is None:
            return {}
        scores = Engine(model, RowExits(pushed), cache).score(requests)
        if scores.token_layers * SAVED <= spent:
            return {f"{share:.0%} leave at each exit": pushed}
    return {}


def _round(
    sides: list[Side],
    requests: list[PreparedRequest],
    number: int,
    ceiling: list[float],
    model: ExitRecommender,
) -> None:
    for side in sides:
        side.wall.append([])
        side.trunk.append([])
        side.scored = []
    for k, request in enumerate(requests):
        turn = (number + k) % len(sides)
        for side in sides[turn:] + sides[:turn]:
            wall, scores = side.score(request)
            side.wall[-1].append(wall)
            side.trunk[-1].append(scores.seconds["trunk"])
            side.scored += scores.requests
        ceiling.append(matmul_gflops(model))


def matmul_gflops(model: ExitRecommender, tokens: int = 1024) -> float:
    """GFLOP/s of one matrix product of the trunk's widest layer, the ceiling of this minute."""
    weight = next(p for n, p in model.trunk.named_parameters() if n.endswith("up_proj.weight"))  # type: ignore[union-attr]
    x = torch.ones(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    start = time.perf_counter()
    with torch.inference_mode():
        float((x @ weight.T)[0, 0])  # waits for the device
    return 2e-9 * tokens * weight.numel() / (time.perf_counter() - start)


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> float:
    """FLOPs that a request's exits need: linear layers of all token-layers, and the scores that queries may see.

    Args:
        scored: Its exits and token-layers.
        request: Its tokens.
        model: Its trunk.
    """
    assert model.trunk is not None
    config, layer = model.trunk.config, model.trunk.layers[0]
    linear = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    seen = float((depth * (own * s + own * (own + 1) / 2)).sum())
    if scored.token_layers > (depth * own).sum():  # the stream ran
        seen += float(depth.max()) * s * (s + 1) / 2
    return 2.0 * linear * scored.token_layers + 4.0 * config.num_attention_heads * width * seen


def _row(
    side: Side, full: Side, requests: list[PreparedRequest], model: ExitRecommender, ceiling: float
) -> dict[str, Any]:
    wall, each = side.typical("wall"), np.array(side.wall).ravel() * 1e3
    saved = full.token_layers / side.token_layers if side.token_layers else None
    trunk = full.typical("trunk") / side.typical("trunk")
    ratios = full.totals("trunk") / side.totals("trunk")
    rates = len(requests) / side.totals("wall")
    flops = sum(useful_flops(s, r, model) for s, r in zip(_first(side, requests), requests, strict=True))
    depths = np.concatenate([s.exit_layers for s in side.scored])
    row: dict[str, Any] = {
        "engine": side.engine,
        "policy": side.policy,
        "workload": "catalogue, history as logged",
        "requests": len(requests),
        "rounds": len(side.wall),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "requests_per_s": len(requests) / wall,
        "candidates_per_s": len(depths) / wall,
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": float(np.percentile(each, p)) for p in (50, 95, 99)},
        "auc": side.auc,
        "auc_drop": None if side.auc is None or full.auc is None else full.auc - side.auc,
        "mean_depth": float(depths.mean()),
        "token_layers": side.token_layers,
        "measured_speedup": full.typical("wall") / wall,
        "trunk_speedup": trunk,
        "token_layer_speedup": saved,
        "efficiency": trunk / saved if saved else None,
        "efficiency_spread": [float(r) / saved for r in (ratios.min(), ratios.max())] if saved else None,
        "gflops": flops / side.typical("trunk") / 1e9,
        "gflops_ceiling": ceiling,
    }
    return row


def _first(side: Side, requests: list[PreparedRequest]) -> list[Scored]:
    found = {s.request_id: s for s in side.scored}
    return [found[r.request_id] for r in requests]


class _Worth:
    """AUC of plans on all test rows, from the run's score tables; None where `test` has not run.

    Candidates do not see each other, so a row scores in a request what it scores in the test.
    """

    def __init__(self, model: ExitRecommender, data: InteractionData, folder: Path) -> None:
        self._tables: dict[str, tuple[pl.DataFrame, Floats]] = {}
        for split in ("valid", "test"):
            path = folder / "scores" / f"{split}.parquet"
            if path.is_file():
                scores = pl.read_parquet(path)
                if split == "valid":
                    scores = scores.filter(pl.col("fold") == "tune")
                self._tables[split] = scores, features_of(model, data, scores)

    def static(self, plan: ExitPlan, layer: int) -> float | None:
        """Of one calibrated head."""
        if "test" not in self._tables:
            return None
        scores, features = self._tables["test"]
        logits = plan.outputs(scores, features).logits[:, plan.layers.index(layer)]
        return auc(logits.numpy(), scores["label"].to_numpy())

    def adaptive(self, plan: ExitPlan) -> float | None:
        """Of a plan."""
        if "test" not in self._tables:
            return None
        scores, features = self._tables["test"]
        _, logits = plan.emitted(plan.outputs(scores, features))
        return auc(logits.numpy(), scores["label"].to_numpy())

    def pushed(self, plan: ExitPlan, share: float) -> ExitPlan | None:
        """The plan with thresholds at which this share of the tune rows that reach an exit leave there."""
        if "valid" not in self._tables:
            return None
        outputs = plan.outputs(*self._tables["valid"])
        thresholds, running = list[float](), torch.arange(outputs.logits.shape[0])
        for head in range(outputs.heads - 1):
            safety = plan.policy.criterion.safety(_shown(outputs, running, head))
            known = safety[safety.isfinite()]
            limit = float(known.quantile(1 - share)) if len(known) else torch.inf
            thresholds.append(limit)
            running = running[safety < limit]
        values = torch.tensor([*thresholds, -torch.inf], dtype=torch.float64)
        return replace(plan, policy=Policy(plan.policy.criterion, values, plan.layers))


def _shown(outputs: HeadOutputs, rows: torch.Tensor, head: int) -> HeadOutputs:
    return outputs.rows(rows).until(head)


def benchmark_table(rows: list[dict[str, Any]]) -> Table:
    """What a person waits for.

    Args:
        rows: Of a result file.
    """
    table = Table(title="requests of the test split, one at a time")
    names = (
        "N",
        "stream",
        "engine",
        "requests/s",
        "p50 ms",
        "AUC",
        "depth",
        "token-layers",
        "measured",
        "efficiency",
    )
    for name in (*names, "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("stream", "engine") else "right")
    for r in rows:
        table.add_row(
            str(r["candidates"]),
            r["stream"],
            r["engine"] if r["engine"] != "early_exit" else f"early_exit, {r['policy']}",
            f"{r['requests_per_s']:.2f}",
            f"{r['p50_ms']:.0f}",
            "" if r["auc"] is None else f"{r['auc']:.4f}",
            f"{r['mean_depth']:.2f}",
            "" if r["token_layer_speedup"] is None else f"x{r['token_layer_speedup']:.2f}",
            f"x{r['measured_speedup']:.2f}",
            "" if r["efficiency"] is None else f"{r['efficiency']:.2f}",
            f"{r['gflops']:.0f} of {r['gflops_ceiling']:.0f}",
        )
    return table
