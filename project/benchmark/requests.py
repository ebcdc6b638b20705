"""Benchmark of the engine: transformers, full depth, static depths and early exit, side by side on real requests.

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

import polars as pl
import torch
from rich.console import Console

from project.artefacts import result_head, write_json
from project.benchmark.asked import AskedRequests
from project.benchmark.cases import Case, cases
from project.benchmark.limits import Limits
from project.benchmark.policies import Bench
from project.benchmark.rows import Against, side_row
from project.benchmark.sides import Side, Unit, run_rounds
from project.benchmark.worth import RunWorth
from project.data.workloads import catalogue_requests
from project.engine.loading import load_run
from project.engine.prepared import prepare_requests
from project.engine.stream_cache import StreamCache
from project.errors import ConfigError, NotFittedError
from project.exits.settings import ExitSettings
from project.report.tables import render, shown

if TYPE_CHECKING:
    from project.data.splits import SplitInteractions
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

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
    model.to(device)  # not before: the trunk was just made
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
    # every request has a stream of its own, whoever it is of: warm is warm
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
    cache = StreamCache(capacity=10**9) if case.stream == "warm" else None
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
        own = case.stream == "warm" and side.engine == "shared_prefix"
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
    """A row a side, beside full depth, the rival and the limits."""
    named = "packed" if bench.worth.rival == bench.model.depth else f"fixed_depth_{bench.worth.rival}"
    rival = next((side for side in sides if side.engine == named), None)
    against = Against(sides[0], rival, limits)
    rows = [side_row(side, against, units, bench.model, prepare_ms) for side in sides]
    return [{**row, "rival": side is rival} for row, side in zip(rows, sides, strict=True)]
