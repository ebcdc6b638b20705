"""Two versions in one server under load. `python -m research.versions --run A --other B --out FILE`.

Three phases: users are split and requests compared; B is promoted while users ask; B answers everybody. No request may
fail, each response must be that of the user's version alone (its name, its order, the largest distance of a probability
is told), and the share of the log's users must be the one asked for (chi-square). Both runs know the same items.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy.stats import chisquare

from project.benchmark.load import Sent
from project.benchmark.serve import drawn_requests, drive, serving, with_expected
from project.config import open_run
from project.run import write_json
from project.serve.ranker import Ranker
from project.serve.settings import run_name
from project.serve.versions import takes

LOADING = 1800.0  # seconds that a run may take until it answers


def counted(address: str) -> dict[str, float]:
    """What /metrics has of versions."""
    lines = httpx.get(f"{address}/metrics", timeout=600).text.splitlines()
    rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    names = ("version_seconds_count", "version_seconds_sum", "other_", "shadow_", "later_")
    kept = tuple(f"exitrec_{name}" for name in names)
    return {
        name.removeprefix("exitrec_"): float(value)
        for name, value in rows
        # without later events their AUC is no number
        if name.startswith(kept) and "_created" not in name and value != "NaN"
    }


def wait(true: Callable[[], bool]) -> None:
    """Until something is so."""
    end = time.monotonic() + LOADING
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("a run did not answer in time; see the server's log")
        time.sleep(0.2)


def distance(address: str, sent: list[Sent], names: list[str]) -> float:
    """The largest distance of a probability from the expected one; infinite where another run answered."""
    found = 0.0
    for one, name in zip(sent, names, strict=True):
        response = httpx.post(f"{address}/v1/rank", json=one["body"], timeout=600)
        answer = response.raise_for_status().json()
        if answer["model"] != name:
            return inf
        for item in answer["items"]:
            expected = one["expected"][item["index"]]
            assert expected is not None
            found = max(found, abs(item["probability"] - expected))
    return found


def summary(driven: dict[str, Any]) -> dict[str, Any]:
    """What users saw of a phase."""
    ms = driven.pop("ms")
    del driven["at"]
    percentiles = {f"p{p}_ms": float(np.percentile(ms, p)) for p in (50, 95) if ms}
    return {"answers": len(ms), **percentiles, **driven}


def measure(
    run: Path,
    other: Path,
    seconds: float,
    users: int,
    split: float,
    shadow_share: float,
) -> dict[str, Any]:
    """Serve both runs; each of three phases lasts so many seconds."""
    # 1. requests, and the probabilities that each version alone gives
    result, requests = drawn_requests(run)
    names = [run_name(one.resolve()) for one in (run, other)]
    salt = names[1]
    taken = [takes(r.user_id, split, salt) for r in requests]
    ranked = [
        Ranker.load(one, audit_share=0.0).rank_after_log(requests) for one in (run, other)
    ]
    chosen = [pair[k] for k, *pair in zip(taken, *ranked, strict=True)]
    sent = with_expected(requests, chosen)
    promoted = with_expected(requests, ranked[1])
    # 2. users of the log
    ids = open_run(run)[1].split.interactions.users["user_id"].to_list()
    given = sum(takes(user, split, salt) for user in ids)
    shares = np.array([split, 1 - split]) * len(ids)
    found: dict[str, Any] = {
        "users": len(ids),
        "users_of_other": given,
        "chi_square_p": float(chisquare([given, len(ids) - given], shares).pvalue),
        "requests_of_other": sum(taken),
    }
    # 3. the server
    options = {"other": other, "split": split, "shadow_share": shadow_share}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(run, False, Path(folder), **options) as (_, address),
        ThreadPoolExecutor(1) as pool,
    ):
        load: dict[str, Any] = {"users": users, "seconds": seconds}
        wait(lambda: counted(address)["other_ready"] == 1)
        answering = [names[k] for k in taken]
        found["split_distance"] = distance(address, sent, answering)
        found["split"] = summary({**drive(address, sent, **load)})
        found["metrics"] = counted(address)
        asking = pool.submit(drive, address, promoted, **load)
        httpx.post(f"{address}/v1/reload?promote=true", timeout=600).raise_for_status()
        wait(lambda: httpx.get(f"{address}/info").json()["run"] == str(other.resolve()))
        found["promotion"] = summary({**asking.result()})
        del found["promotion"]["wrong"]  # the first version answered some
        everybody = [names[1]] * len(promoted)
        found["promoted_distance"] = distance(address, promoted, everybody)
        found["promoted"] = summary({**drive(address, promoted, **load)})
    # 4. what may not be
    phases = [found[name] for name in ("split", "promotion", "promoted")]
    missed = [name for name in found["metrics"] if name.startswith("other_missed_total")]
    found["passed"] = (
        not any(phase["errors"] or phase.get("wrong") for phase in phases)
        and not missed
        and max(found["split_distance"], found["promoted_distance"]) < inf
        and found["chi_square_p"] > 0.001
    )
    return {**result, **options, "other": other.name, "clients": users, **found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "other", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--split", type=float, default=0.1)
    parser.add_argument("--shadow_share", type=float, default=0.1)
    how = vars(parser.parse_args())
    out = how.pop("out")
    made = measure(**how)
    print(json.dumps(made, indent=1), write_json(out, made))
