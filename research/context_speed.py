"""What context columns cost: `python -m research.context_speed OUT.json [ROWS]`.

Short fits on one generated log of clicks, with eight context columns and without any, each with items in words (the
default prompt) and in one token (the demo's). Then the server's ranker answers requests of 64 candidates, one thread,
each by both runs before the next one, by turns first, the user's history cached: all from a request to its scores. With
columns a request brings the eight values, and every candidate a price of its own. Memory is the peak of a process that
reads a log of ROWS (1e6) rows with the columns or without, and cuts it by the protocol.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.data.logs import TableLogs
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.evaluation.bootstrap import UserBootstrap
from project.request import Item, RankRequest
from project.run import SCHEMA_VERSION, write_json
from project.serve.ranker import Ranker
from research.generate import generate_clicks
from research.scale import SEGMENT

ROWS = 15_000  # of the log that requests are made on
REQUESTS = 16
ROUNDS = 15
CANDIDATES = 64
MORE = {"browser": 12, "weekday": 7}  # further categories and how many values each has
COLUMNS = ["device", "placement", "hour", "price", *MORE, "scroll", "discount"]
SEGMENTS: dict[str, str | None] = {"in words": None, "in one token": SEGMENT}
SIZES = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
ABOUT = (
    "A request of 64 candidates to the server's ranker, with eight context columns, and without: median milliseconds, "
    "and their ratio (16 requests resampled, 95 %). Items in words: the default prompt; in one token: the demo's. "
    "Memory: peak of a process that reads a log and cuts it by the protocol."
)


def make_log(folder: Path, rows: int) -> None:
    """Write a generated log of clicks with eight context columns, half of them numbers."""
    log, items, _ = generate_clicks(rows)
    rng = np.random.default_rng(1)
    further: dict[str, Any] = {
        name: pl.Series([f"{name} {k}" for k in rng.integers(count, size=log.height)])
        for name, count in MORE.items()
    }
    further |= {name: rng.random(log.height) for name in ("scroll", "discount")}
    folder.mkdir(parents=True)
    log.drop("chance").with_columns(**further).write_parquet(
        folder / "interactions.parquet"
    )
    items.write_parquet(folder / "items.parquet")


def fit(folder: Path, columns: list[str], segment: str | None) -> Path:
    """A short fit on the log; its run folder."""
    words = "words" if segment is None else "token"
    name = f"context_speed_{words}_{len(columns)}"
    config = {
        "data": {
            "logs": {
                "class_path": "project.data.logs.TableLogs",
                "init_args": {
                    "interactions": str(folder / "interactions.parquet"),
                    "items": str(folder / "items.parquet"),
                    "context": columns,
                },
            },
            "protocol": {"minimum_history": 5},
            "prompt": {"segment": segment},
        }
    }
    file = folder / f"{name}.yaml"  # JSON is YAML
    file.write_text(json.dumps(config))
    command = ["-m", "project", "fit", "--config", str(file), *SIZES]
    subprocess.run(
        [sys.executable, *command, "--exits.lists", "0"], check=True, stdout=sys.stderr
    )
    return Path("runs") / name / "latest"


def times(runs: dict[str, Path], log: pl.DataFrame) -> dict[str, Any]:
    """Median milliseconds of a request by run, and the ratio of the first to the second."""
    torch.set_num_threads(1)
    rankers = {
        name: Ranker.load(run.resolve(), audit_share=0.0) for name, run in runs.items()
    }
    rng = np.random.default_rng(0)
    users = log["user_id"].unique(maintain_order=True).to_list()
    items = log["item_id"].unique(maintain_order=True).to_list()
    asked: list[dict[str, RankRequest]] = []
    for user, row in zip(users, log.sample(REQUESTS, seed=0).to_dicts(), strict=False):
        drawn = [str(items[k]) for k in rng.permutation(len(items))[:CANDIDATES]]
        context = {name: row[name] for name in COLUMNS if row[name] == row[name]}
        priced = [
            Item(item, context=(("price", float(1 + price)),))
            for item, price in zip(drawn, rng.random(CANDIDATES), strict=True)
        ]
        asked.append(
            {
                "with columns": RankRequest(str(user), None, priced, context=context),
                "without": RankRequest(str(user), None, drawn),
            }
        )
    spent = np.zeros((2, ROUNDS + 1, REQUESTS))
    for number in range(ROUNDS + 1):  # the first warms up, and fills the cache
        for k, of in enumerate(asked):
            for which in ((0, 1), (1, 0))[(number + k) % 2]:
                name = list(runs)[which]
                start = time.perf_counter()
                (scored,) = rankers[name].rank_after_log([of[name]])
                spent[which, number, k] = time.perf_counter() - start
                assert scored.error is None, scored.error
    typical = np.median(spent[:, 1:], axis=1)  # (2, REQUESTS)
    return {
        "ms": [float(1e3 * of.mean()) for of in typical],
        "ratio": UserBootstrap(np.arange(REQUESTS)).ratio_interval(*typical),
    }


def peak_mib(folder: Path, columns: list[str]) -> int:
    """Peak memory of this process after a log was read and cut."""
    logs = TableLogs(
        str(folder / "interactions.parquet"), str(folder / "items.parquet"), context=columns
    )
    protocol = Protocol(minimum_history=5)
    apply_protocol(build_interactions(logs.read(), protocol), protocol)
    # not getrusage: a process begins with the peak of the one that started it
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main(out: Path, rows: int) -> None:
    """Measure both and write the file."""
    with tempfile.TemporaryDirectory() as scratch:
        # 1. requests
        small = Path(scratch) / "small"
        make_log(small, ROWS)
        log = pl.read_parquet(small / "interactions.parquet")
        rows_made = list[dict[str, Any]]()
        for words, segment in SEGMENTS.items():
            brought = {"with columns": COLUMNS, "without": list[str]()}
            runs = {name: fit(small, of, segment) for name, of in brought.items()}
            found = times(runs, log)
            rows_made += [
                {"items": words, "run": name, "ms a request": found["ms"][k]}
                | {"over without": found["ratio"] if k == 0 else None}
                for k, name in enumerate(runs)
            ]
        # 2. memory, a process each
        large = Path(scratch) / "large"
        make_log(large, rows)
        peaks = dict[str, int]()
        for name, columns in (("with columns", COLUMNS), ("without", [])):
            called = [sys.executable, "-m", "research.context_speed", "one", str(large)]
            done = subprocess.run([*called, *columns], check=True, stdout=subprocess.PIPE)
            peaks[name] = int(done.stdout.split()[-1])
    memory = f"peak MiB of {rows:,} rows"
    made = [row | {memory: peaks[row["run"]]} for row in rows_made]
    head = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "protocol": {"name": "a generated log", "hash": "generated"},
        "about": ABOUT,
    }
    print(write_json(out, head | {"rows": made}))


if __name__ == "__main__":
    if sys.argv[1] == "one":
        print(peak_mib(Path(sys.argv[2]), sys.argv[3:]))
    else:
        main(Path(sys.argv[1]), int(float((*sys.argv[2:], "1e6")[0])))
