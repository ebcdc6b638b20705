"""Workloads: requests drawn from a split log, and what is known about their candidates.

Unusual here: a request reads everything strictly before its time, of all splits. So requests of validation exist only
where no test row lies before them, as in a split by time; elsewhere they are refused, they would read test labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from project.data.protocol import FOLDS
from project.data.requests import Request, Requests
from project.data.splits import SplitInteractions
from project.errors import ConfigError, DataError

PARTS = (*FOLDS, "test")
SCHEMA: dict[str, type[pl.DataType]] = {
    "request_id": pl.String,
    "candidate_index": pl.Int64,
    "user": pl.Int32,
    "label": pl.Int8,
    "row_id": pl.Int64,
}
Candidate = tuple[str, int | None, int | None]
"""Item id, label and row id; None where the candidate has no label."""
History = tuple[tuple[str, int, float], ...]
"""(item id, answer, time) of rows that a request brings along."""
Asked = tuple[str, Any, float, list[Candidate], History | None]
"""Request id, user code, time, candidates, and the history; None: the user's, from the log."""


@dataclass(frozen=True)
class Workload:
    """Requests and the answers that the log knows.

    Attributes:
        requests: What is scored.
        table: One row a candidate, in the order of `requests.table()`: request_id, candidate_index, user, and label
            and row_id of a labelled target, null for a candidate from the catalogue.
    """

    requests: Requests
    table: pl.DataFrame


def catalogue_requests(
    split: SplitInteractions, part: str, count: int, candidates: int, seed: int, history: int | None = None
) -> Workload:
    """Requests of sampled targets, each at its own time, filled up with items from the catalogue.

    The target's item is the labelled candidate, at a random place. The others are distinct items that the user has
    not rated strictly earlier; a request is shorter where fewer are left. A target has the same candidates whatever
    `count` is, and a larger sample contains the smaller one.

    Args:
        split: The log under its protocol.
        part: test, or a fold of validation: select, tune or certify.
        count: Requests; all targets of the part where it has fewer.
        candidates: Candidates of a request, the target included.
        seed: Seed of the sample.
        history: Requests bring a history of their own, the user's latest so many rows that are strictly earlier, and
            targets with fewer are not asked; None: the log's, as long as it is.

    Raises:
        ConfigError: An unknown part, fewer than one request or candidate, or a fold that may not read all its past.
        DataError: The part has no target, or none with so long a history.
    """
    if count < 1 or candidates < 1:
        raise ConfigError(f"found {count} requests of {candidates} candidates; expected 1 or more of both")
    targets = _targets(split, part)
    if history is not None:
        targets = targets.filter(pl.col("hist") >= history)
        if targets.is_empty():
            raise DataError(
                f"no target of {part} has {history} strictly earlier rows of its user; ask for fewer."
            )
    drawn = np.sort(np.random.default_rng(seed).permutation(targets.height)[:count])
    past = split.rows.filter(pl.col("user").is_in(targets["user"].unique().implode()))
    rated = {user: rows for (user,), rows in past.group_by("user", maintain_order=True)}
    ids = split.interactions.items["item_id"].to_list()
    asked = []
    for row in targets[drawn].iter_rows(named=True):
        rng = np.random.default_rng([seed, row["row_id"]])
        earlier = rated[row["user"]].filter(pl.col("timestamp") < row["timestamp"])
        free = np.ones(len(ids), dtype=bool)
        free[earlier["item"].to_numpy()], free[row["item"]] = False, False
        others = rng.permutation(np.flatnonzero(free))[: candidates - 1]
        listed: list[Candidate] = [(ids[item], None, None) for item in others]
        place = int(rng.integers(len(listed) + 1))
        listed.insert(place, (ids[row["item"]], row["label"], row["row_id"]))
        own = None if history is None else _brought(earlier.tail(history), ids)
        asked.append((f"catalogue/{part}/{row['row_id']}", row["user"], row["timestamp"], listed, own))
    return _workload(split, asked)


def _brought(rows: pl.DataFrame, ids: list[str]) -> History:
    """Rows of the log, in time order, as the history of a request."""
    return tuple(
        (ids[i], label, float(time))
        for i, label, time in rows.select("item", "label", "timestamp").iter_rows()
    )


def labelled_requests(split: SplitInteractions, part: str, candidates: int, minimum: int) -> Workload:
    """One request a user over the user's own targets of the part, at the time of the first of them.

    All labels are known and the history is frozen at that time, so rankings can be judged by labels.

    Args:
        split: The log under its protocol.
        part: test, or a fold of validation: select, tune or certify.
        candidates: Most candidates of a request: the user's earliest targets, each item once.
        minimum: Users with fewer rated items among their targets are left out.

    Raises:
        ConfigError: An unknown part, or a fold that may not read all its past.
        DataError: No user has so many targets in the part.
    """
    targets = _targets(split, part).unique(["user", "item"], keep="first", maintain_order=True)
    ids = split.interactions.items["item_id"].to_list()
    asked = []
    for rows in targets.partition_by("user", maintain_order=True):
        if rows.height >= minimum:
            shown = rows.head(candidates).select("item", "label", "row_id").iter_rows()
            listed: list[Candidate] = [(ids[item], label, row) for item, label, row in shown]
            user = int(rows["user"][0])
            asked.append((f"labelled/{part}/{user}", user, rows["timestamp"][0], listed, None))
    if not asked:
        most = int(targets.group_by("user").len()["len"].max())  # type: ignore[arg-type]
        raise DataError(
            f"no user has {minimum} rated items among the targets of {part} (the most is {most}): requests whose "
            "candidates are all labelled need them. Set ranking.labelled_minimum to at most that, or give more data."
        )
    return _workload(split, asked)


def concatenate(workloads: Sequence[Workload]) -> Workload:
    """Several workloads of one log as one, to be scored together; their request ids must differ."""
    first = workloads[0].requests
    requests = [request for workload in workloads for request in workload.requests.requests]
    return Workload(
        Requests(requests, first.items, first.codes), pl.concat([workload.table for workload in workloads])
    )


def _workload(split: SplitInteractions, asked: Sequence[Asked]) -> Workload:
    """Args: the log; what is asked."""
    log = split.interactions
    user_ids = dict(log.users.select("user", "user_id").iter_rows())
    codes = dict(log.items.select("item_id", "item").iter_rows())
    requests, rows = [], []
    for request_id, user, time, listed, history in asked:
        items = tuple(item for item, _, _ in listed)
        owner = user_ids[user] if history is None else None
        requests.append(Request(request_id, owner, history or (), float(time), items))
        rows += [(request_id, k, user, label, row) for k, (_, label, row) in enumerate(listed)]
    return Workload(Requests(requests, log.items, codes), pl.DataFrame(rows, schema=SCHEMA, orient="row"))


def _targets(split: SplitInteractions, part: str) -> pl.DataFrame:
    if part not in PARTS:
        raise ConfigError(f"requests of {part!r} were asked for; expected one of {', '.join(PARTS)}")
    chosen = pl.col("split") == "test" if part == "test" else pl.col("fold") == part
    targets = split.rows.filter((pl.col("role") == "target") & chosen)
    if targets.is_empty():
        raise DataError(
            f"the part {part} has no targets to make requests of: give more data or change the shares"
        )
    if part != "test":
        _refuse_test_rows(split, part, float(targets["timestamp"].max()))  # type: ignore[arg-type]
    return targets


def _refuse_test_rows(split: SplitInteractions, part: str, last: float) -> None:
    """A request reads what is strictly earlier: nothing of test may be."""
    early = split.rows.filter((pl.col("split") == "test") & (pl.col("timestamp") < last)).height
    if early:
        raise ConfigError(
            f"data.protocol.split is {split.protocol.split}: {early:,} test rows lie before the last request of the "
            f"fold {part}, which would read them. Expected a split by time: set data.protocol.split to global_time, "
            "or give files that follow each other in time."
        )
