"""Hostile load: 8 users ask for known items while others send what costs most. `python research/hostile.py RUN`.

A round has a server of its own, a calm phase and then a hostile one, in which each of `KINDS` has a client that posts,
waits for the response and pauses. The ratio is the median over rounds; users' scores are checked. Clients share the
machine with the server, so their work is in the ratio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil  # type: ignore[import-untyped]

from project.benchmark.serve import drawn_requests, drive, serving, with_expected
from project.run import write_json
from project.serve.ranker import Ranker

USERS = 8
ROUNDS = 3
PAUSE = 0.5  # seconds between a hostile client's posts
DEADLINE_MS = 500
NUMBERS = count()  # no two texts are the same, or the second would be cached


def titles(length: int) -> list[str]:
    """1,000 new titles of so many characters."""
    return [f"{next(NUMBERS):08} {'a long way home ' * 200}"[:length] for _ in range(1000)]


def ranked(length: int, **more: Any) -> dict[str, Any]:
    """A request to score 1,000 new titles."""
    candidates = [{"title": title} for title in titles(length)]
    return {"history": [], "candidates": candidates, **more}


# method, path, body. All but the first, second and fourth are within the limits that a server has by default.
KINDS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "a title of 4 MiB": (
        "PUT",
        "/v1/items",
        lambda: [{"item_id": "long", "title": "x" * (2**22 - 100)}],
    ),
    "5,000 columns": (
        "PUT",
        "/v1/items",
        lambda: [{"item_id": "wide", "title": "x"} | {f"c{k}": "x" for k in range(5000)}],
    ),
    "1,000 items with long titles": (
        "PUT",
        "/v1/items",
        lambda: [{"item_id": title[:8], "title": title} for title in titles(2000)],
    ),
    "1,000 long titles to rank": ("POST", "/v1/rank", lambda: ranked(100)),
    "1,000 short titles to rank": ("POST", "/v1/rank", lambda: ranked(16)),
    "1,000 short titles to rank by a deadline": (
        "POST",
        "/v1/rank",
        lambda: ranked(16, deadline_ms=DEADLINE_MS),
    ),
}


def post(address: str, kind: str, stop: threading.Event, found: dict[str, Any]) -> None:
    """A hostile client: note statuses, and milliseconds of what was accepted."""
    method, path, body = KINDS[kind]
    statuses = found.setdefault("statuses", {})
    with httpx.Client(base_url=address, timeout=600) as client:
        while not stop.wait(PAUSE):
            sent = body()
            began = time.perf_counter()
            response = client.request(method, path, json=sent)
            status = str(response.status_code)
            statuses[status] = statuses.get(status, 0) + 1
            if response.is_success:
                found.setdefault("ms", []).append(1e3 * (time.perf_counter() - began))


def watch(server: psutil.Process, stop: threading.Event, found: dict[str, Any]) -> None:
    """MiB that the HTTP process and the inference process hold, each second."""
    while not stop.wait(1.0):
        below = [p.memory_info().rss for p in server.children(recursive=True)]
        found.setdefault("http_mib", []).append(server.memory_info().rss / 2**20)
        found.setdefault("inference_mib", []).append(max(below) / 2**20)


def users(address: str, sent: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What 8 users saw, who ask again as soon as they have a response."""
    found = drive(address, sent, users=USERS, seconds=seconds)
    return {name: found[name] for name in ("ms", "errors", "error", "wrong")}


def measure(run: Path, seconds: float, rounds: int = ROUNDS) -> dict[str, Any]:
    """Serve a run anew for each round: a calm phase of so many seconds, then a hostile one."""
    # 1. requests and the probabilities that responses must have
    result, requests = drawn_requests(run)
    sent = with_expected(
        requests, Ranker.load(run, audit_share=0.0).rank_after_log(requests)
    )
    # 2. rounds
    phases = dict[str, list[dict[str, Any]]](calm=[], hostile=[])
    memory = list[dict[str, Any]]()  # of each round
    seen = dict[str, dict[str, Any]]()  # by hostile clients, by kind
    for _ in range(rounds):
        with (
            tempfile.TemporaryDirectory() as folder,
            serving(run, False, Path(folder)) as (process, address),
        ):
            users(address, sent, seconds / 2)  # until histories are cached
            stop = threading.Event()
            memory.append({})
            watcher = (psutil.Process(process.pid), stop, memory[-1])
            threads = [threading.Thread(target=watch, args=watcher)]
            threads[0].start()
            phases["calm"].append(users(address, sent, seconds))
            for kind in KINDS:
                client = (address, kind, stop, seen.setdefault(kind, {}))
                threads.append(threading.Thread(target=post, args=client))
                threads[-1].start()
            phases["hostile"].append(users(address, sent, seconds))
            stop.set()
            metrics = httpx.get(f"{address}/metrics", timeout=600).text
            for thread in threads:
                thread.join()
            lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines())
            memory[-1]["waiting_characters"] = float(lines["exitrec_new_characters"])
    # 3. numbers
    statuses = [status for one in seen.values() for status in one["statuses"]]
    result |= {"users": USERS, "seconds": seconds, "rounds": rounds}
    result |= {name: percentiles(found) for name, found in phases.items()}
    for p in ("p50_ms", "p95_ms"):
        each = [
            percentiles([x])[p] / percentiles([y])[p]
            for x, y in zip(phases["hostile"], phases["calm"], strict=True)
        ]
        result[f"{p}_ratio"] = float(np.median(each))
        result[f"{p}_ratios"] = each
    for one in seen.values():
        ms = one.pop("ms", [])
        one["p95_ms"] = float(np.percentile(ms, 95)) if ms else None
    return result | {
        "errors_5xx": sum(status.startswith("5") for status in statuses),
        "kinds": seen,
        "memory": memory,
    }


def percentiles(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the responses of some phases."""
    ms = np.concatenate([one["ms"] for one in phases])
    p50, p95 = np.percentile(ms, [50, 95]).tolist()
    return {
        "responses": len(ms),
        "p50_ms": p50,
        "p95_ms": p95,
        "errors": sum(one["errors"] for one in phases),
        "error": next((one["error"] for one in phases if one["error"]), None),
        "wrong_orders": sum(one["wrong"] for one in phases),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("results/quickstart/hostile.json"))
    given = parser.parse_args()
    measured = measure(given.run, given.seconds, given.rounds)
    write_json(given.out, measured)
    print(json.dumps(measured, indent=1))
