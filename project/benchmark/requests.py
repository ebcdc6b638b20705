"""Benchmark of the engine: packed full depth, static depths and early exit, side by side on requests of the test split.

Unusual here: every request is scored by all sides in turn before the next one, the order of the sides rotates, and all
ratios are of medians over rounds, so a busy minute hits everyone. Efficiency is the trunk's time ratio over its
token-layer ratio, same stream state on both sides: 1 means that what was not run cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console

from project.artefacts import result_head, write_json
from project.benchmark.rows import Side, benchmark_table, matmul_gflops, side_row
from project.callbacks.exit_calibration import Plans, features_of
from project.data.workloads import catalogue_requests
from project.engine.decisions import RowExits, static_exits
from project.engine.engine import Engine
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
"""Candidates of a request -> most requests in the sample."""
ROUNDS = 3  # fewer say nothing about spread
FEWEST = 4  # requests: fewer are not a sample
SIDES = 5  # about as many full depths as one request costs on all sides
SAVED = 2.0  # token-layers that the policy saves at which efficiency is quoted
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


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
    full.score(requests[:1])  # warm up
    requests = _affordable(full, requests, seconds)
    full.score(requests)  # fills the cache
    sides = _sides(model, plans, worth, requests, cache)
    ceiling, start, rounds = list[float](), time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - start < seconds:
        _round(sides, requests, rounds, ceiling, model)
        rounds += 1
    found = [side_row(side, sides[0], requests, model, float(np.median(ceiling))) for side in sides]
    return [{**row, "stream": stream} for row in found]


def _affordable(full: Engine, requests: list[PreparedRequest], seconds: float) -> list[PreparedRequest]:
    """As many requests as all sides can score `ROUNDS` times in the time there is; at least `FEWEST`."""
    spent = 0.0
    for count, request in enumerate(requests, start=1):
        start = time.perf_counter()
        full.score([request])
        spent += time.perf_counter() - start
        if spent * SIDES * ROUNDS > seconds and count >= FEWEST:
            return requests[:count]
    return requests


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
        if 0 < scores.token_layers * SAVED <= spent:
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
