"""What a history that stays shallow costs and saves. `python -m research.shallow_history RUN,BASE [RUN,BASE ...] OUT`.

Each pair is a run with `model.history_layers` and one without, of one seed. AUC of every exit is of the test rows of
both, differences are paired, users resampled. Times are of the first pair, one thread: requests of 64 candidates of
test, each alone, not cached and cached, every request by both engines before the next one, by turns first.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.config import open_run
from project.data.requests import catalogue_requests
from project.engine.cache import StreamCache
from project.engine.decisions import static_exits
from project.engine.engine import Engine
from project.engine.predict import load_run
from project.engine.requests import prepare_requests
from project.evaluation.bootstrap import UserBootstrap
from project.metrics import auc
from project.run import result_head, write_json

REQUESTS = 16
ROUNDS = 7
CANDIDATES = 64


def difference(run: Path, base: Path) -> dict[str, Any]:
    """AUC of both at every exit, and run minus base."""
    tables = [pl.read_parquet(one / "scores" / "test.parquet") for one in (run, base)]
    assert tables[0]["row_id"].equals(tables[1]["row_id"])
    pairs = UserBootstrap(tables[0]["user"].to_numpy())
    label = tables[0]["label"].to_numpy()
    found = dict[str, Any]()
    for name in tables[0].columns:
        if name.startswith("logit_") and name != "logit_0":
            logits = [table[name].to_numpy() for table in tables]
            found[name.removeprefix("logit_")] = {
                "auc": auc(logits[0], label),
                "base": auc(logits[1], label),
                "difference": pairs.difference_interval(*logits, label),
            }
    return found


def times(runs: tuple[Path, Path]) -> dict[str, Any]:
    """Median milliseconds of a request by exit of the run and of the base, and their ratio."""
    torch.set_num_threads(1)
    found = dict[str, Any]()
    opened = []
    for run in runs:
        model, data = open_run(run)
        plans = load_run(model, data.tokenizer, run / "checkpoints" / "last.ckpt", data)
        drawn = catalogue_requests(data.split, "test", REQUESTS, CANDIDATES, data.seed)
        requests = prepare_requests(model, data, drawn.requests)
        opened.append(
            (model, plans.plan, [replace(r, user=r.request_id) for r in requests])
        )
    layers = [layer for layer in opened[0][1].layers if layer > 0]
    for cached in (False, True):
        for layer in layers:
            engines = [
                Engine(m, static_exits(p, layer), StreamCache() if cached else None)
                for m, p, _ in opened
            ]
            spent = np.zeros((2, ROUNDS + 1, REQUESTS))
            for number in range(ROUNDS + 1):  # the first warms up, and fills the cache
                for k in range(REQUESTS):
                    for which in ((0, 1), (1, 0))[(number + k) % 2]:
                        start = time.perf_counter()
                        engines[which].score([opened[which][2][k]])
                        spent[which, number, k] = time.perf_counter() - start
            typical = np.median(spent[:, 1:], axis=1)  # (2, REQUESTS)
            ratio = UserBootstrap(np.arange(REQUESTS)).ratio_interval(
                typical[1], typical[0]
            )
            found[f"{'cached' if cached else 'cold'} exit {layer}"] = {
                "ms": float(1e3 * typical[0].mean()),
                "base_ms": float(1e3 * typical[1].mean()),
                "speedup": ratio,
            }
    return found


def main(arguments: list[str]) -> None:
    """Compare all pairs, time the first."""
    *named, out = arguments
    pairs = [tuple(Path(one) for one in pair.split(",")) for pair in named]
    model, data = open_run(pairs[0][0])
    head = result_head("shallow_history", data.split.manifest, "", data.seed)
    result: dict[str, Any] = {
        **head,
        "history_layers": model.history_layers,
        "pairs": [difference(run, base) for run, base in pairs],
        "times": times((pairs[0][0], pairs[0][1])),
    }
    print(write_json(Path(out), result))


if __name__ == "__main__":
    main(sys.argv[1:])
