"""Soak: a server at 70 % of its load; memory and latency by quarter. `python research/soak.py RUN [MINUTES]`.

Writes results/soak.json into the run. Memory is what the server's processes hold alone (USS), each second.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]

from project.benchmark.serve import drawn_requests, drive, serving, with_expected
from project.run import write_json
from project.serve.ranker import Ranker

USERS, LOAD = 16, 0.7


def watch(process: psutil.Process, stop: threading.Event, found: list[float]) -> None:
    """MiB of a process and all below it, each second."""
    while not stop.wait(1.0):
        every = [process, *process.children(recursive=True)]
        found.append(sum(p.memory_full_info().uss for p in every if p.is_running()) / 2**20)


def main(run: Path, minutes: float) -> None:
    """Measure the full load for a while, then 70 % of it."""
    # 1. requests and the probabilities that responses must have
    _, requests = drawn_requests(run)
    sent = with_expected(
        requests, Ranker.load(run, audit_share=0.0).rank_after_log(requests)
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(run, False, Path(folder)) as (process, address),
    ):
        # 2. the full load, once its prefixes are cached
        warm = min(30.0, 15 * minutes)
        drive(address, sent, users=1, seconds=warm)
        most = len(drive(address, sent, users=USERS, seconds=warm)["ms"]) / warm
        # 3. the soak
        memory, stop = list[float](), threading.Event()
        watcher = threading.Thread(
            target=watch, args=(psutil.Process(process.pid), stop, memory)
        )
        watcher.start()
        seconds = 60 * minutes
        found = drive(address, sent, users=USERS, seconds=seconds, rate=LOAD * most)
        stop.set()
        watcher.join()
    # 4. by quarter
    at, ms = np.array(found["at"]), np.array(found["ms"])
    quarters = []
    for k in range(4):
        mine = ms[(at >= k * seconds / 4) & (at < (k + 1) * seconds / 4)]
        held = memory[k * len(memory) // 4 : (k + 1) * len(memory) // 4]
        quarters.append(
            {
                "requests": len(mine),
                "memory_mib": float(np.median(held)),
                "most_mib": max(held),
            }
            | {f"p{p}_ms": float(np.percentile(mine, p)) for p in (50, 95, 99)}
        )
    second, last = (quarters[k]["memory_mib"] for k in (1, 3))
    result = {
        "minutes": minutes,
        "full_load_requests_per_s": most,
        "load": LOAD,
        "quarters": quarters,
    }
    result |= {
        "growth": last / second - 1,
        "errors": found["errors"],
        "wrong_orders": found["wrong"],
    }
    path = write_json(run / "results" / "soak.json", result)
    print(
        *quarters,
        f"memory of the last quarter over the second: {last / second - 1:+.2%}",
        path,
        sep="\n",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 20.0)
