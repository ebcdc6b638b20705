"""Workloads drawn from a generated log: what a request may ask, read and know."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from world import read_split

from project.data.protocol import Protocol, SplitInteractions
from project.data.requests import (
    SCHEMA,
    Workload,
    catalogue_requests,
)
from project.errors import ConfigError, DataError
from project.request import RankRequest

PROTOCOL = Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2], label="rating > 3")


@pytest.fixture(scope="module")
def split(tiny_logs: Path) -> SplitInteractions:
    return read_split(tiny_logs, PROTOCOL)


def log_of(split: SplitInteractions) -> pl.DataFrame:
    items = split.interactions.items.select("item", "item_id")
    return (
        split.rows.join(split.interactions.users, on="user")
        .join(items, on="item")
        .sort("row_id")
    )


def rated_before(log: pl.DataFrame, user_id: str | None, time: float | None) -> set[str]:
    return set(
        log.filter(pl.col("user_id") == user_id, pl.col("timestamp") < time)["item_id"]
    )


def as_asked(workload: Workload) -> pl.DataFrame:
    """The label table with item ids, joined by position as the scores will be."""
    assert dict(workload.table.schema) == SCHEMA
    joined = workload.requests.table().join(
        workload.table, on=["request_id", "candidate_index"], how="left"
    )
    assert len(joined) == len(workload.table)
    return joined


def pairs(
    workload: Workload, log: pl.DataFrame
) -> list[tuple[RankRequest, dict[str, Any]]]:
    """Each request with the row of the log that it is about."""
    known = as_asked(workload).drop_nulls("row_id").join(log, on="row_id")
    rows = {row["request_id"]: row for row in known.iter_rows(named=True)}
    return [(request, rows[request.request_id]) for request in workload.requests.requests]


@pytest.mark.parametrize("part", ["test", "tune", "certify"])
def test_catalogue_requests(split: SplitInteractions, part: str) -> None:
    """Each is a target of the part at its own time, among distinct items that the user has not rated before."""
    workload, log = catalogue_requests(split, part, 25, 6, seed=3), log_of(split)
    known = as_asked(workload).drop_nulls("row_id").join(log, on="row_id", suffix="_log")
    assert len(known) == known["row_id"].n_unique() == len(workload.requests.requests) == 25
    assert set(known["role"]) == {"target"}
    assert set(known["split"] if part == "test" else known["fold"]) == {part}
    for column in ("item_id", "label", "user"):
        assert known[column].to_list() == known[f"{column}_log"].to_list()
    for request, target in pairs(workload, log):
        assert (request.user_id, request.time) == (target["user_id"], target["timestamp"])
        assert request.history is None
        assert len(set(request.candidates)) == len(request.candidates) == 6
        others = set(request.candidates) - {target["item_id"]}
        assert not others & rated_before(log, request.user_id, request.time)


def test_a_history_of_fixed_length(split: SplitInteractions) -> None:
    """Requests bring the user's latest 11 strictly earlier rows, as anybody's; shorter ones are not asked."""
    workload, log = (
        catalogue_requests(split, "test", 1000, 4, seed=3, history=11),
        log_of(split),
    )
    targets = log.filter((pl.col("split") == "test") & (pl.col("role") == "target"))
    assert (
        len(workload.requests.requests)
        == len(targets.filter(pl.col("hist") >= 11))
        < len(targets)
    )
    for request, target in pairs(workload, log):
        mine = log.filter(
            pl.col("user_id") == target["user_id"],
            pl.col("timestamp") < target["timestamp"],
        )
        latest = mine.tail(11).select("item_id", "label", "timestamp", "rating")
        assert request.user_id is None
        assert list(request.history) == list(latest.iter_rows())
        assert not (set(request.candidates) - {target["item_id"]}) & set(mine["item_id"])


def test_a_full_request_is_everything_unrated(split: SplitInteractions) -> None:
    """Asked for more candidates than there are: all items but those rated strictly earlier, and the target."""
    workload, log = catalogue_requests(split, "test", 10, 1000, seed=0), log_of(split)
    everything = set(split.interactions.items["item_id"])
    lengths = set()
    for request, target in pairs(workload, log):
        free = everything - rated_before(log, request.user_id, request.time)
        assert set(request.candidates) == free | {target["item_id"]}
        lengths.add(len(request.candidates))
    assert min(lengths) < len(everything)  # somebody had rated something


def test_the_sample_is_seeded_and_nested(split: SplitInteractions) -> None:
    """The same seed gives the same requests, another seed others; 10 requests are among 30, candidates and all."""
    ten, thirty = (
        catalogue_requests(split, "test", n, 6, seed=1).requests.requests for n in (10, 30)
    )
    assert ten == catalogue_requests(split, "test", 10, 6, seed=1).requests.requests
    assert set(ten) < set(thirty)
    other = catalogue_requests(split, "test", 30, 6, seed=2).requests.requests
    assert {r.request_id for r in other} != {r.request_id for r in thirty}
    same = {r.request_id: r for r in thirty}
    both = [r for r in other if r.request_id in same]
    assert both
    assert all(r.candidates != same[r.request_id].candidates for r in both)


def test_the_target_stands_anywhere(split: SplitInteractions) -> None:
    """Over all test targets, each of four places holds the target in 15 to 35 % of requests."""
    table = catalogue_requests(split, "test", 10_000, 4, seed=0).table
    found = table.drop_nulls("row_id")
    assert len(found) == split.manifest["counts"]["test"]
    shares = found["candidate_index"].value_counts(normalize=True).sort("candidate_index")
    assert shares["candidate_index"].to_list() == [0, 1, 2, 3]
    assert shares["proportion"].is_between(0.15, 0.35).all()


@pytest.mark.parametrize("kind", ["user_time", "random", "leave_last"])
def test_folds_may_not_read_test(kind: Any, tiny_logs: Path) -> None:
    split = read_split(tiny_logs, replace(PROTOCOL, split=kind))
    with pytest.raises(ConfigError, match=f"data.protocol.split is {kind}.*global_time"):
        catalogue_requests(split, "tune", 5, 5, 0)
    assert catalogue_requests(split, "test", 5, 5, 0).requests.requests


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("test", 0, 5, 0), "0 requests of 5"),
        (
            ("test", 1, 4, 3, 10_000),
            "no target of test has 10000 strictly earlier rows",
        ),
    ],
)
def test_bad_arguments(arguments: Any, words: str, split: SplitInteractions) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        catalogue_requests(split, *arguments)
