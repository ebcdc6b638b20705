"""What a log's size costs: seconds and peak memory of every stage from files to packed batches, by log.

Generated logs (`research/generate.py`) and MovieLens 1M, each in a process of its own, one thread. Seconds are
those of the processor, so that a busy machine does not count. The exponent of a stage is log(seconds / seconds before)
over log(rows / rows before), from one generated log to the next ten times larger: 1 is linear.

    python -m research.scale results/scale/scale.json 1e5 1e6 ml1m 1e7
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from project.data.batch import TrainSampler, pack
from project.data.download import resolve_model
from project.data.logs import Logs, MovieLens1M, TableLogs
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.data.stream import build_streams
from project.report.tables import render
from project.retrieval import LightGCN, MatrixFactorisation
from project.retrieval.features import mf_column
from project.retrieval.own_text import item_vectors, text_similarity
from project.retrieval.past import WalkRows
from project.retrieval.walk import block_cuts, fit_snapshots, walk
from project.run import SCHEMA_VERSION, machine, read_result, write_json
from research.generate import run_generate

# the demo's
SEGMENT = (
    "{item_text}{item_number+vote_number+item_similarity_number+mf_number+text_number}"
)
REFITS = 10
ABOUT = (
    "Seconds of the processor, one thread, of each stage from files to the packed batches of an epoch; exponent: "
    "log(seconds over those of the generated log before) / log(rows over rows), 1 is linear."
)


def measured(logs: Logs, label: str | None) -> dict[str, Any]:
    """Rows, peak_mib and stages of one log; `peak_mib` of a stage is the highest so far."""
    stages: list[dict[str, Any]] = []

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds, peak = (
            time.process_time() - start,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        )
        stages.append({"name": name, "seconds": round(seconds, 2), "peak_mib": peak})
        print(f"{name:15} {seconds:9.1f} s {peak:7} MiB", file=sys.stderr, flush=True)

    protocol, retriever, mf = (
        Protocol(label=label, minimum_history=5),
        LightGCN(item_neighbours=30),
        MatrixFactorisation(),
    )
    with stage("read"):
        interactions = build_interactions(logs.read(), protocol)
    with stage("protocol"):
        split = apply_protocol(interactions, protocol)
    cuts, rows = (
        block_cuts(split.rows["timestamp"].to_numpy(), REFITS),
        WalkRows.from_log(split.rows),
    )
    with stage("LightGCN"):
        snapshots = fit_snapshots(
            split.rows, retriever, interactions.users.height, interactions.items, cuts
        )
    with stage("walk"):
        table = walk(rows, retriever, interactions.items, cuts, snapshots.fitted)
    with stage("factorisation"):
        chances = mf.chances(rows, mf.fit(split.rows, interactions.items.height, cuts))
    with stage("text"):
        texts = text_similarity(rows, item_vectors(interactions.items, interactions.items))
    with stage("prompts"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2-135m-instruct"))
        encoder = PromptEncoder(
            tokenizer, Prompt(instruction="I\n", segment=SEGMENT), interactions.items
        )
        table = table.hstack([mf_column(chances), texts["text"], texts["text_weight"]])
        streams = build_streams(split.rows, table, "train", encoder)
    with stage("packing"):  # one epoch
        targets = sum(
            len(pack(streams, windows).label)
            for windows in TrainSampler(streams, 1024, 4096, 0, 0, 1)
        )
    assert (
        targets
        == split.rows.filter(
            (split.rows["role"] == "target") & (split.rows["split"] == "train")
        ).height
    )
    return {"rows": split.rows.height, "peak_mib": stages[-1]["peak_mib"], "stages": stages}


def with_exponents(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs by size; stages of generated logs with `exponent` against the generated log before."""
    runs = sorted(runs, key=lambda run: int(run["rows"]))
    generated = [run for run in runs if run["log"].startswith("generated")]
    for before, run in pairwise(generated):
        for stage, less in zip(run["stages"], before["stages"], strict=True):
            times = stage["seconds"] / max(less["seconds"], 0.01)
            stage["exponent"] = round(
                math.log(times) / math.log(run["rows"] / before["rows"]), 2
            )
    return runs


def table(runs: list[dict[str, Any]]) -> list[dict[str, str | int]]:
    """A row for each stage and one for memory: seconds by log, and exponents."""
    rows: list[dict[str, str | int]] = []
    for k, of_stage in enumerate(runs[0]["stages"]):
        row: dict[str, str | int] = {"stage": of_stage["name"]}
        for run in runs:
            stage = run["stages"][k]
            row[f"{run['log']}, s"] = f"{stage['seconds']:,.1f}"
            if "exponent" in stage:
                row[f"exponent to {run['log'].removeprefix('generated ')}"] = (
                    f"{stage['exponent']:.2f}"
                )
        rows.append(row)
    peaks = {f"{run['log']}, s": f"{run['peak_mib']:,} MiB" for run in runs}
    return [*rows, {key: peaks.get(key, "") for key in rows[0]} | {"stage": "peak memory"}]


def main(out: Path, logs: list[str]) -> None:
    """Measure each log in a process of its own; `out` is written after each and keeps those it has of other logs."""
    for name in logs:
        called = subprocess.run(
            [sys.executable, "-m", "research.scale", "one", name],
            stdout=subprocess.PIPE,
            check=True,
        )
        run = {"log": name if name == "ml1m" else f"generated {name}"} | json.loads(
            called.stdout.splitlines()[-1]
        )
        known = json.loads(out.read_text())["runs"] if out.exists() else []
        runs = with_exponents([*(r for r in known if r["log"] != run["log"]), run])
        head = {
            "schema_version": SCHEMA_VERSION,
            "command": "study",
            "machine": machine(),
            "refits": REFITS,
        }
        head |= {"protocol": {"name": "of each log", "hash": "several"}, "about": ABOUT}
        write_json(out, head | {"rows": table(runs), "runs": runs})
    print(render(read_result(out)))


def one(name: str) -> None:
    """Print what `measured` finds as JSON."""
    if name == "ml1m":
        print(json.dumps(measured(MovieLens1M(), "rating > 3")))
        return
    with tempfile.TemporaryDirectory() as folder:
        run_generate([folder, "--rows", name])
        logs = TableLogs(f"{folder}/interactions.parquet", f"{folder}/items.parquet")
        print(json.dumps(measured(logs, None)))


if __name__ == "__main__":
    if sys.argv[1] == "one":
        one(sys.argv[2])
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
