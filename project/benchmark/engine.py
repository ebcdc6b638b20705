"""The engine benchmark: every configuration on the same requests, in turns, as ratios."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown

from project.benchmark.configurations import (
    FLOAT32,
    LISTED,
    REQUESTS,
    Bench,
    Case,
    Configuration,
    cases,
    run_rounds,
)
from project.data.requests import catalogue_requests
from project.engine.cache import StreamCache
from project.engine.predict import load_run
from project.engine.requests import PreparedRequest, prepare_requests
from project.errors import NotFittedError
from project.evaluation.baselines import targets_of
from project.evaluation.bootstrap import UNDEFINED, UserBootstrap
from project.report.tables import render
from project.results import EngineResult, EngineRow, Timed
from project.run import result_head, write_json

if TYPE_CHECKING:
    from project.data.protocol import SplitInteractions
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

ROUNDS = 3  # fewer do not show the spread
FEWEST = 4  # requests: fewer are not a sample


def configuration_row(
    own: Configuration,
    full: Configuration,
    static_exit: Configuration | None,
) -> Timed:
    """One row of a result file.

    Speed is over `full`, full depth with prepacked weights, and over the `static_exit` of equal accuracy, None where it
    is exit 0, which runs no layer.
    """
    # 1. seconds of each turn, the median of the rounds, beside full depth's on the same
    wall = own.typical()
    bootstrap = UserBootstrap(np.arange(len(wall)))  # turns are resampled
    measured = bootstrap.ratio_interval(full.typical(), wall)
    over_static = UNDEFINED
    if static_exit is not None:
        over_static = bootstrap.ratio_interval(static_exit.typical(), wall)
    # 2. token-layers
    spent = sum(s.token_layers for s in own.scored)
    whole = sum(s.token_layers for s in full.scored)
    saved = whole / spent if spent else None
    return {
        "engine": own.engine,
        "policy": own.policy,
        "auc": own.auc,
        **(own.quality or {"overlap": None, "ndcg": None, "hits": None}),
        "token_layer_speedup": saved,
        "measured_speedup": measured["value"],
        "measured_speedup_interval": measured["interval"],
        "speedup_over_static": over_static,
        "static_exit": own is static_exit,
    }


def run_engine(
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    folder: Path,
    device: torch.device,
    seconds: float,
    sizes: Sequence[int],
) -> EngineResult:
    """Measure requests of these numbers of candidates for about so many seconds; write results/benchmark.json.

    The checkpoint is a calibrated run's, `folder` its folder. What is not timed comes on top of `seconds`:
    requests that lists are fitted on.
    """
    if checkpoint is None:
        raise NotFittedError(
            "benchmark --only engine needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` writes one."
        )
    # 1. workloads that this log can fill
    data.prepare_data()
    wanted = possible_cases(sizes, data.split)
    # 2. the run
    plans = load_run(model, data.tokenizer, checkpoint, data)
    model.to(device)  # not before: the backbone was just made
    bench = Bench(model, data, folder, plans)
    # 3. rows, workload by workload
    head = result_head(
        "benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed
    )
    result: EngineResult = {**head, "rows": []}

    @cache
    def drawn(most: int, candidates: int, history: int | None) -> list[PreparedRequest]:
        """Requests; some workloads differ by what is cached alone."""
        found = catalogue_requests(
            data.split, "test", most, candidates, data.seed, history
        ).requests
        # every request has a cached history of its own, whoever it is of
        return [
            replace(r, user=r.request_id, list_of=LISTED)
            for r in prepare_requests(model, data, found)
        ]

    for case in wanted:
        most = max(REQUESTS.get(case.candidates, 8), 2 * case.at_once)
        requests = drawn(most, case.candidates, case.history)
        for row in measured_rows(bench, case, requests, seconds / len(wanted)):
            dtype = FLOAT32 if row["engine"] == FLOAT32 else bench.dtype
            result["rows"].append(cast(EngineRow, {**vars(case), "dtype": dtype, **row}))
        # what is measured stays measured, whatever happens to the next workload
        path = write_json(folder / "results" / "benchmark.json", result)
    Console(width=190).print(Markdown(render(result)), f"written: {path}")
    return result


def possible_cases(sizes: Sequence[int], split: SplitInteractions) -> list[Case]:
    """The workloads that catalogue and histories of test can fill; prints which sizes they cannot."""
    items = split.interactions.items.height
    kept = [size for size in sizes if 1 <= size <= items]
    if len(kept) < len(sizes):
        left_out = ", ".join(str(size) for size in sizes if size not in kept)
        Console().print(
            f"no requests of {left_out} candidates: the catalogue has {items} items."
        )
    longest = max(targets_of(split.rows, "test")["hist"].to_list(), default=0)
    return [case for case in cases(kept) if (case.history or 0) <= longest]


def measured_rows(
    bench: Bench,
    case: Case,
    requests: list[PreparedRequest],
    seconds: float,
) -> list[Timed]:
    """A row a configuration of one workload, measured for about so many seconds."""
    cache = StreamCache(mib=np.inf) if case.prefix_cached else None
    configurations = bench.configurations(case, cache)
    full = configurations[0]
    # 1. warm up full depth, fill the cache, and see how many requests there is time for
    full.runner.score(requests[:1])
    start = time.perf_counter()
    for request in requests:
        full.runner.score([request])
    once = case.at_once * (time.perf_counter() - start) / len(requests)
    most = int(seconds / (once * len(configurations) * ROUNDS))
    turns = [
        requests[at : at + case.at_once] for at in range(0, len(requests), case.at_once)
    ]
    turns = turns[: max(FEWEST // min(case.at_once, 2), most)]
    # 2. warm up the others
    for configuration in configurations[1:]:
        configuration.runner.score(requests[:1])
    # 3. rounds
    start = time.perf_counter()
    number = 0
    while number < ROUNDS or time.perf_counter() - start < seconds:
        run_rounds(configurations, turns, number)
        number += 1
    # 4. rows, beside full depth and the static exit of equal accuracy
    layer = bench.plans.static_exit
    name = "packed" if layer == bench.model.depth else f"fixed_depth_{layer}"
    static_exit = next((c for c in configurations if c.engine == name), None)
    return [configuration_row(c, full, static_exit) for c in configurations]
