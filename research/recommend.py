"""Whether a run finds what its users will like: `python -m research.recommend RUN OUT.json [USERS]`.

Users of test are frozen before its first second. Truth are the items of test that a user liked and had not answered.
Candidates as `data.candidates` says, ranked at full depth and by exit 0, each with likes of late as served and by
probability alone, and by lists of the best 10, beside each source alone: NDCG@10 and recall@10, paired, users
resampled; recall of the 100 candidates, of items with and without a row before. Then seconds of `recommend` for users
who ask together, and of the exact product over a million drawn items. Of more than USERS (1,000) users so many are
drawn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from project.arrays import F64
from project.data.requests import Requests
from project.datamodule import InteractionData
from project.engine.engine import score_every_head
from project.engine.predict import Run
from project.engine.requests import prepare_requests
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.recall import MOST, Frozen, found_by, frozen, recalls
from project.loading import open_run
from project.metrics import probabilities
from project.request import RankRequest, RecommendRequest
from project.retrieval.candidates import (
    SHARES,
    CandidateFinder,
    CandidateSettings,
    best,
)
from project.retrieval.own_text import item_vectors
from project.run import result_head, write_json
from project.serve.ranker import Ranker

FIRST = 10
CANDIDATES = 100
TOGETHER = (1, 8, 32)
ROUNDS = 3
CATALOGUE = 1_000_000
DIM = 64
ABOUT = (
    "Users of test, frozen before its first second; truth: items of test that they liked and had not answered. Ranked: "
    "the candidates of all sources at full depth and by exit 0, each by its probability times likes of late, as "
    "served, and by the probability alone, as lists of the best 10 are. Alone: the best 10 of one source. "
    "Differences are full depth minus the row, paired, users resampled, 95 %."
)


def quality(lists: dict[int, list[int]], at: Frozen) -> dict[str, F64]:
    """NDCG@10 and recall@10 of each user, in the order of `at.truth`."""
    gains = 1 / np.log2(np.arange(2, FIRST + 2))
    ndcg, share = list[float](), list[float]()
    for user, truth in at.truth.items():
        hits = np.array([item in truth for item in lists[user][:FIRST]], float)
        ndcg.append(float(hits @ gains[: hits.size] / gains[: len(truth)].sum()))
        share.append(float(hits.sum() / len(truth)))
    return {"ndcg": np.array(ndcg), "recall": np.array(share)}


def ranked(
    run: Run, at: Frozen, found: dict[int, dict[int, str]], finder: CandidateFinder
) -> dict[str, dict[int, list[int]]]:
    """The best 10 of the candidates by way of ranking and user."""
    log = run.data.split.interactions
    ids = log.items["item_id"].to_list()
    names = log.users["user_id"].to_list()
    requests = [
        RankRequest(
            names[user],
            None,
            [ids[item] for item in items],
            top_n=FIRST,
            time=at.before,
            request_id=str(user),
        )
        for user, items in found.items()
    ]
    prepared = prepare_requests(run.model, run.data, Requests(requests, log.items))
    table = score_every_head(run.model.eval(), prepared)
    raw = table.select(f"logit_{layer}" for layer in run.plan.layers).to_torch()
    chances = probabilities(run.plan.calibration.apply(raw.double()).numpy())
    lists = dict[str, dict[int, list[int]]]()
    for name, column in (("exit 0", 0), ("full depth", -1)):
        for way, weighted in ((name, True), (f"{name}, probability alone", False)):
            lists[way] = {}
            start = 0
            for user, items in found.items():
                values = chances[start : start + len(items), column]
                start += len(items)
                if weighted:
                    values = values * finder.weights(np.array(list(items)))
                order = np.argsort(-values, kind="stable")[:FIRST]
                lists[way][user] = [list(items)[k] for k in order]
    lists["lists, probability alone"] = {}
    for request, one in zip(requests, run.engine.score(prepared), strict=True):
        items = list(found[int(request.request_id)])
        lists["lists, probability alone"][int(request.request_id)] = [
            items[k] for k in one.best_first(FIRST)
        ]
    return lists


def seconds_of(call: Callable[[], object]) -> float:
    """Median of a few calls, after one that is not counted."""
    call()
    taken = list[float]()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def timed(folder: Path, data: InteractionData) -> list[dict[str, Any]]:
    """Seconds of `recommend` by how many users ask together, each for the first time; of their candidates alone."""
    ranker = Ranker.load(folder, cache_mib=0, audit_share=0.0)
    users = data.split.interactions.users["user_id"].tail(max(TOGETHER)).to_list()
    rows = []
    for count in TOGETHER:
        asked = [RecommendRequest(user, None, top_n=FIRST) for user in users[:count]]
        made = [replace(one) for one in asked]

        def candidates(requests: list[RecommendRequest] = made) -> None:
            for request in requests:
                ranker._with_candidates(request, ranker._codes)

        rows.append(
            {
                "users": count,
                "seconds": seconds_of(lambda asked=asked: ranker.rank_after_log(asked)),  # type: ignore[misc]
                "seconds_candidates": seconds_of(candidates),
            }
        )
    return rows


def million() -> dict[str, Any]:
    """The exact product over vectors that are drawn, and its best 100, one user at a time."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((CATALOGUE, DIM), np.float32)
    user = rng.standard_normal(DIM, np.float32)
    allowed = np.ones(CATALOGUE, np.bool_)
    found = seconds_of(lambda: best((vectors @ user).astype(np.float64), allowed, 100))
    return {"items": CATALOGUE, "dim": DIM, "seconds": found}


def study(folder: Path, out: Path, most: int = MOST) -> None:
    """Write everything."""
    run = open_run(folder)
    data = run.data
    texts = item_vectors(data.split.interactions.items, data.split.interactions.items)[:-1]
    rows, recalled = list[dict[str, Any]](), list[dict[str, Any]]()
    for part in ("valid", "test"):
        at = frozen(data, part, most)
        named = np.array(list(at.truth))
        ways = {"all": data.candidates.shares} | {name: {name: 1.0} for name in SHARES}
        found = {
            name: found_by(data, at, texts, CandidateSettings(CANDIDATES, shares))
            for name, shares in ways.items()
        }
        # 1. candidates
        for name, of in found.items():
            recalled.append({"split": part, "source": name, **recalls(of, at)})
        if part == "valid":  # shares were chosen on it
            continue
        # 2. lists
        snapshots = data.features.snapshots()
        finder = CandidateFinder(data.split, snapshots, data.candidates, at.before)
        lists = ranked(run, at, found["all"], finder)
        lists |= {
            f"{name} alone": {u: list(v) for u, v in found[name].items()} for name in SHARES
        }
        users = np.array([bool(at.pasts[user]) for user in at.truth])
        made = {name: quality(of, at) for name, of in lists.items()}
        for name, of in made.items():
            row: dict[str, Any] = {
                "ranked": name,
                "users": users.size,
                "with_history": int(users.sum()),
            }
            for metric, values in of.items():
                gap = made["full depth"][metric] - values
                for which, of_them in (("", users | True), ("_with_history", users)):
                    # the same draws for every row, so that differences are paired
                    bootstrap = UserBootstrap(named[of_them])
                    row[f"{metric}{which}"] = float(values[of_them].mean())
                    row[f"{metric}{which}_full_depth_minus"] = bootstrap.ratio_interval(
                        gap[of_them], np.ones(of_them.sum())
                    )
            rows.append(row)
    head = result_head("study", data.split.manifest, str(folder / "config.yaml"), data.seed)
    times = timed(folder, data)
    result = head | {"rows": rows, "recall_100": recalled, "recommend": times}
    write_json(out, result | {"catalogue": million(), "about": ABOUT})


if __name__ == "__main__":
    study(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
