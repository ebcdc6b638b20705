"""The serve benchmark: a server on loopback at full load, the plan beside full depth, both beside the bare ranker."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
from rich.console import Console

from project.data.requests import catalogue_requests
from project.errors import ConfigError
from project.report.tables import render, shown
from project.run import result_head, write_json
from project.serve.ranker import Ranker
from project.serve.request import RankRequest
from project.serve.settings import ServeSettings

USERS = (1, 8, 32)
REQUESTS, CANDIDATES = 48, 64
ROUNDS = 3  # fewer do not show the spread
LOADING = 1800.0  # seconds that a server may take until it is ready
CACHE_MIB = 1024  # all histories of the requests have room
AUDIT_SHARE = ServeSettings.audit_share  # the ranker alone audits as many: it differs by HTTP and batching
PROGRAM = """import sys
from project.serve.server import run_serve
from project.benchmark.serve import {} as load
run_serve(sys.argv[1:], load)"""


def load_plan(run: Path, **options: Any) -> Ranker:
    """What `serve` loads."""
    return Ranker.load(run, **options)


def load_full_depth(run: Path, **options: Any) -> Ranker:
    """The same after an alarm: nobody leaves early."""
    ranker = Ranker.load(run, **options)
    ranker.full_depth = True
    return ranker


@contextmanager
def serving(run: Path, full_depth: bool, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`serve` on a free port in processes of its own, ready; the process and its address."""
    name = "load_full_depth" if full_depth else "load_plan"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--run", run, "--port", port, "--db", f"sqlite:///{folder / name}.db", "--cache_mib", CACHE_MIB]
    given += ["--audit_share", AUDIT_SHARE]
    program = PROGRAM.format(name)
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, given)], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{address}/readyz", folder / f"{name}.log")
        yield process, address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + LOADING
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(address, timeout=10) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ConfigError(
        f"the server did not get ready; its log ends: {log.read_text(errors='replace')[-2000:]}"
    )


def _ask(address: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    with urlopen(
        Request(f"{address}/v1/rank", json.dumps(body).encode(), headers), timeout=LOADING
    ) as answer:
        answer.read()


def drive(address: str, requests: Sequence[dict[str, Any]], **how: Any) -> dict[str, Any]:
    """`load.drive` in a process of its own."""
    asked = json.dumps({"address": address, "requests": requests, **how})
    command = [sys.executable, "-m", "project.benchmark.load"]
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, env=os.environ)
    if ran.returncode:
        raise ConfigError(f"locust failed: {ran.stderr[-500:]}")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


class Bare:
    """The ranker in this process, called with so many requests at once, and the engine's part of its time."""

    def __init__(self, ranker: Ranker, requests: Sequence[RankRequest]) -> None:
        self.ranker, self.requests, self._turn, self._engine = ranker, requests, 0, 0.0
        for engine in (ranker._engine, ranker._whole):
            engine.score = self._timed(engine.score)  # type: ignore[method-assign]

    def _timed(self, score: Any) -> Any:
        def timed(requests: Any) -> Any:
            start = time.perf_counter()
            found = score(requests)
            self._engine += time.perf_counter() - start
            return found

        return timed

    def measure(self, at_once: int, seconds: float) -> tuple[float, float]:
        """Requests a second of the ranker, and of its engine alone."""
        start, self._engine, done = time.perf_counter(), 0.0, 0
        while time.perf_counter() - start < seconds:
            batch = [self.requests[(self._turn + k) % len(self.requests)] for k in range(at_once)]
            self.ranker.rank(batch)
            self._turn, done = self._turn + at_once, done + at_once
        return done / (time.perf_counter() - start), done / self._engine


def run_load(run: Path, seconds: float) -> dict[str, Any]:
    """Measure a calibrated run for about so many seconds; write results/benchmark-serve.json into its folder.

    Loading it three times (two servers, and this process) comes on top. Rounds go through users and depths in turns.
    """
    # 1. requests, and what must be answered
    ranker = Ranker.load(run, CACHE_MIB, audit_share=0.0)
    split, seed = ranker._data.split, ranker._data.seed
    candidates = min(CANDIDATES, split.interactions.items.height)
    drawn = catalogue_requests(split, "test", REQUESTS, candidates, seed).requests.requests
    asked = [RankRequest(r.user_id, None, r.candidates) for r in drawn]
    bare = Bare(ranker, asked)
    expected = dict[bool, list[list[float]]]()
    spent = list[int]()
    for full in (False, True, True, False):  # first until all prefixes are cached in all layers
        ranker.full_depth = full
        answers = ranker.rank(asked)
        expected[full] = [answer.probability.tolist() for answer in answers]
        spent.append(sum(answer.token_layers for answer in answers))
    ranker.monitor.share = AUDIT_SHARE
    bodies = [{"user_id": r.user_id, "candidates": list(r.candidates)} for r in asked]
    # 2. rounds
    found = dict[tuple[int, bool], list[dict[str, Any]]]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {full: stack.enter_context(serving(run, full, Path(folder)))[1] for full in (False, True)}
        sent = {
            full: [{"body": b, "expected": p} for b, p in zip(bodies, expected[full], strict=True)]
            for full in servers
        }
        part = seconds / (ROUNDS * len(USERS) * 2 * 2)
        for address in servers.values():  # prefixes are cached before the clock starts
            for body in bodies:
                _ask(address, body)
        for _ in range(ROUNDS):
            for users in USERS:
                for full, address in servers.items():
                    one = drive(address, sent[full], users=users, seconds=part)
                    ranker.full_depth = full
                    one["bare"] = bare.measure(users, part)
                    found.setdefault((users, full), []).append(one)
    # 3. rows
    result = result_head("benchmark", split.manifest, str(run / "config.yaml"), seed)
    result["serve"] = [load_row(users, full, rounds) for (users, full), rounds in found.items()]
    full_depth = {row["users"]: row["requests_per_s"] for row in result["serve"] if row["depth"] == "full"}
    for row in result["serve"]:
        row |= {
            "candidates": candidates,
            "audit_share": AUDIT_SHARE if row["depth"] == "plan" else 0.0,
            "token_layer_speedup": 1.0 if row["depth"] == "full" else spent[2] / spent[3],
            # none where nothing was answered
            "speedup": row["requests_per_s"] / full_depth[row["users"]] if full_depth[row["users"]] else None,
        }
    path = write_json(run / "results" / "benchmark-serve.json", result)
    Console(width=150).print(shown(render(result)), f"written: {path}")
    return result


def load_row(users: int, full: bool, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of a result file; a round lasts until its last answer."""
    each = np.concatenate([one["ms"] for one in rounds])
    rates = np.array([len(one["ms"]) / max(one["at"], default=1.0) for one in rounds])
    ranker, engine = (float(np.median(rate)) for rate in zip(*(one["bare"] for one in rounds), strict=True))
    times = np.percentile(each, [50, 95, 99]).tolist() if each.size else [None] * 3
    return {
        "depth": "full" if full else "plan",
        "users": users,
        "rounds": len(rounds),
        "requests": int(each.size),
        "requests_per_s": float(np.median(rates)),
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": ms for p, ms in zip((50, 95, 99), times, strict=True)},
        "errors": sum(one["errors"] for one in rounds),
        "error": next((one["error"] for one in rounds if one["error"]), None),
        "wrong_orders": sum(one["wrong"] for one in rounds),
        "probability_distance": max(one["distance"] for one in rounds),
        "ranker_requests_per_s": ranker,  # the same in one process, called with as many requests as there are users
        "engine_requests_per_s": engine,
        "overhead": 1 - float(np.median(rates)) / ranker,  # of HTTP and batching
    }
