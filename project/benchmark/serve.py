"""The serve benchmark: a server on loopback at full load, the plan beside full depth, both beside the bare ranker."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from project.benchmark.load import Driven, Sent
from project.config import open_run
from project.data.requests import catalogue_requests
from project.errors import ConfigError
from project.report.tables import render
from project.request import RankRequest, Scored, id_of
from project.results import Cost, Head, Load, ServeResult, ServeRow
from project.run import result_head, write_json
from project.serve.ranker import Ranker
from project.serve.settings import ServeSettings

USERS = (1, 8, 32)
DEPTHS = ("full", "plan", "list")  # full depth, every candidate by the plan, lists
LISTED = 10  # items of a response
REQUESTS = 48  # in turns
CANDIDATES = 64  # of a request
ROUNDS = 3  # fewer do not show the spread
LOADING = 1800.0  # seconds that a server may take until it is ready
CACHE_MIB = 1024  # all histories of the requests have room
# the ranker alone audits as many: it differs by HTTP and batching
AUDIT_SHARE = ServeSettings.audit_share


@contextmanager
def serving(
    run: Path, full_depth: bool, folder: Path, **options: object
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with further options on a free port, ready; its process and its address."""
    name = "full" if full_depth else "plan"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["project.benchmark.full_depth"] if full_depth else ["project", "serve"]
    given = {
        "run": run,
        "port": port,
        "db": f"sqlite:///{folder / name}.db",
        "cache_mib": CACHE_MIB,
        "audit_share": AUDIT_SHARE,
        **options,
    }
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *(f"--{k}={v}" for k, v in given.items())],
            stdout=out,
            stderr=out,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + LOADING
        while not _ready(address):
            if time.monotonic() > end or process.poll() is not None:
                told = log.read_text(errors="replace")[-2000:]
                raise ConfigError(f"the server did not get ready; its log ends: {told}")
            time.sleep(0.2)
        yield process, address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(address: str) -> bool:
    try:
        urlopen(f"{address}/readyz", timeout=10).close()
    except OSError:
        return False
    return True


def drive(address: str, requests: Sequence[Sent], **how: Any) -> Driven:
    """`load.drive` in a process of its own."""
    given = json.dumps({"address": address, "requests": requests, **how})
    command = [sys.executable, "-m", "project.benchmark.load"]
    ran = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise ConfigError(f"locust failed: {ran.stderr[-500:]}")
    found: Driven = json.loads(ran.stdout.splitlines()[-1])
    return found


def drawn_requests(run: Path) -> tuple[Head, list[RankRequest]]:
    """The head of a result file of a run, and requests of its test users for catalogue items."""
    _, data = open_run(run)
    candidates = min(CANDIDATES, data.split.interactions.items.height)
    drawn = catalogue_requests(
        data.split, "test", REQUESTS, candidates, data.seed
    ).requests.requests
    head = result_head(
        "benchmark", data.split.manifest, str(run / "config.yaml"), data.seed
    )
    return head, [replace(r, time=None) for r in drawn]


def with_expected(requests: Sequence[RankRequest], ranked: Sequence[Scored]) -> list[Sent]:
    """What `drive` sends: bodies of /v1/rank, and the probabilities of the items that responses must list."""
    sent = list[Sent]()
    for request, one in zip(requests, ranked, strict=True):
        listed = set(one.best_first(request.top_n))
        body: dict[str, object] = {
            "user_id": request.user_id,
            "candidates": list(map(id_of, request.candidates)),
            "context": request.context,
            "top_n": request.top_n,
            "exhaustive": request.exhaustive,
        }
        chances = enumerate(one.probabilities.tolist())
        expected = [chance if k in listed else None for k, chance in chances]
        sent.append({"body": body, "expected": expected})
    return sent


def spent_by(address: str) -> tuple[float, ...]:
    """What /metrics of a server says: requests scored, CPU seconds and seconds of scoring them."""
    with urlopen(f"{address}/metrics", timeout=LOADING) as response:
        text = response.read().decode()
    names = "batch_requests_count", "cpu_seconds_total", "busy_seconds_total"
    found = (re.search(rf"^exitrec_{name} (\S+)", text, re.M) for name in names)
    return tuple(float(one[1]) for one in found if one)


def cost_of(counts: Sequence[tuple[float, ...]]) -> Cost:
    """CPU seconds and seconds of 1,000 requests, of counts (requests, CPU seconds, seconds) before and after rounds."""
    requests, cpu, busy = np.diff(np.reshape(counts, (-1, 2, 3)), axis=1).sum(axis=(0, 1))
    if not requests:
        return {"cpu_seconds": None, "busy_seconds": None}
    return {"cpu_seconds": 1000 * cpu / requests, "busy_seconds": 1000 * busy / requests}


def ranker_rate(
    ranker: Ranker, requests: Iterator[RankRequest], at_once: int, seconds: float
) -> float:
    """Requests a second of the ranker in this process, called with so many requests at once."""
    start = time.perf_counter()
    done = 0
    while time.perf_counter() - start < seconds:
        ranker.rank_after_log(list(islice(requests, at_once)))
        done += at_once
    return done / (time.perf_counter() - start)


def run_load(run: Path, seconds: float) -> ServeResult:
    """Measure a calibrated run for about so many seconds; write results/benchmark-serve.json into its folder.

    Loading it three times (two servers, and this process) comes on top. Rounds go through users and depths in turns.
    """
    # 1. requests, and their probabilities by depth
    head, requests = drawn_requests(run)
    ranker = Ranker.load(run, CACHE_MIB, audit_share=0.0)
    asked = {
        depth: [replace(r, top_n=LISTED, exhaustive=depth != "list") for r in requests]
        for depth in DEPTHS
    }
    sent = dict[str, list[Sent]]()  # by depth
    spent = dict[str, int]()  # by depth, token-layers of all requests
    # full depth first, which caches all prefixes in all layers
    for depth in ("full", *DEPTHS):
        ranker.full_depth = depth == "full"
        ranked = ranker.rank_after_log(asked[depth])
        spent[depth] = sum(one.token_layers for one in ranked)
        sent[depth] = with_expected(asked[depth], ranked)
    ranker.monitor.share = AUDIT_SHARE
    endless = {depth: cycle(asked[depth]) for depth in DEPTHS}
    # 2. rounds
    found = defaultdict[tuple[int, str], list[tuple[Driven, float]]](list)
    # before and after, in turns
    costs = defaultdict[tuple[int, str], list[tuple[float, ...]]](list)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        full, plan = (
            stack.enter_context(serving(run, whole, Path(folder)))[1]
            for whole in (True, False)
        )
        servers = {"full": full, "plan": plan, "list": plan}
        part = seconds / (ROUNDS * len(USERS) * len(DEPTHS) * 2)
        # prefixes are cached before the clock starts
        for depth, address in servers.items():
            for one in sent[depth]:
                headers = {"Content-Type": "application/json"}
                body = json.dumps(one["body"]).encode()
                once = Request(f"{address}/v1/rank", body, headers)
                urlopen(once, timeout=LOADING).close()
        for _ in range(ROUNDS):
            for users in USERS:
                for depth, address in servers.items():
                    cost = costs[users, depth]
                    cost.append(spent_by(address))
                    driven = drive(address, sent[depth], users=users, seconds=part)
                    cost.append(spent_by(address))
                    ranker.full_depth = depth == "full"
                    alone = ranker_rate(ranker, endless[depth], users, part)
                    found[users, depth].append((driven, alone))
    # 3. rows, beside full depth with as many users
    loads = {key: load_row(*key, rounds) for key, rounds in found.items()}
    rows = list[ServeRow]()
    for (users, depth), load in loads.items():
        whole = loads[users, "full"]["requests_per_s"]
        rows.append(
            {
                **load,
                **cost_of(costs[users, depth]),
                "candidates": len(requests[0].candidates),
                "audit_share": 0.0 if depth == "full" else AUDIT_SHARE,
                "token_layer_speedup": spent["full"] / spent[depth],
                # None where nothing was answered
                "speedup": load["requests_per_s"] / whole if whole else None,
            }
        )
    result: ServeResult = {**head, "serve": rows}
    path = write_json(run / "results" / "benchmark-serve.json", result)
    Console(width=150).print(Markdown(render(result)), f"written: {path}")
    return result


def load_row(users: int, depth: str, rounds: Sequence[tuple[Driven, float]]) -> Load:
    """One row of a result file, of rounds and the ranker's requests a second; a round lasts until its last response."""
    driven = [one for one, _ in rounds]
    each = np.concatenate([one["ms"] for one in driven])  # (responses,) milliseconds
    # (rounds,) a second
    rates = [len(one["ms"]) / max(one["at"], default=1.0) for one in driven]
    rate = float(np.median(rates))
    ranker = float(np.median([alone for _, alone in rounds]))
    return {
        "depth": depth,
        "users": users,
        "requests": int(each.size),
        "requests_per_s": rate,
        "p95_ms": float(np.percentile(each, 95)) if each.size else None,
        "errors": sum(one["errors"] for one in driven),
        "error": next((one["error"] for one in driven if one["error"]), None),
        "wrong_orders": sum(one["wrong"] for one in driven),
        "overhead": 1 - rate / ranker,
    }
