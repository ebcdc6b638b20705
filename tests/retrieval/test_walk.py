"""Tests the walk: ties, repeated ratings, the latest raters, blocks, snapshots and the cache's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from example_logs import listed, make_log, numbered

from project.arrays import F32
from project.retrieval import NoRetriever, VectorRetriever
from project.retrieval.base import Edges, Neighbours, Raters, Retriever, top
from project.retrieval.past import WalkRows, queries_by_user
from project.retrieval.walk import Snapshots, block_cuts, fit_snapshots


class UnitItems(VectorRetriever):
    """Item 0 is (1, 0), item 1 is (0, 1)."""

    def item_table(self, edges: Edges, block: int) -> F32:
        return np.eye(2, dtype=np.float32)


class AllRaters(Retriever):
    """Returns the raters it is shown, latest first."""

    def begin(self, num_users: int, items: pl.DataFrame) -> None: ...

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        rows = raters.row[::-1][: self.neighbours]
        return Neighbours(rows, np.zeros(rows.size, np.float32))


def table(rows: list[tuple[float, int, int, int]]) -> pl.DataFrame:
    """Rows (timestamp, user, item, label), already in order."""
    frame = pl.DataFrame(rows, ["timestamp", "user", "item", "label"], orient="row")
    time = pl.col("timestamp").cast(pl.Float64)
    return numbered(frame.with_columns(time, rating=pl.lit(None, pl.Float64)))


def answer(rows: pl.DataFrame, retriever: Retriever) -> pl.DataFrame:
    """Retrieved features without a cut."""
    return listed(
        WalkRows.from_log(rows),
        retriever,
        pl.DataFrame({"item": range(20)}),
        np.empty(0),
        [],
    )


GOLDEN = [
    (1, 1, 0, 1),
    (2, 2, 0, 0),
    (3, 1, 1, 1),
    (4, 2, 1, 0),
    (5, 0, 0, 1),  # row 4, block 0
    (10, 0, 1, 1),  # row 5, block 1
    (10, 3, 1, 0),  # row 6, the same second
    (11, 3, 0, 1),  # row 7
]


def test_golden() -> None:
    rows, retriever, cuts = table(GOLDEN), UnitItems(), np.array([10.0])
    items = pl.DataFrame({"item": [0, 1]})
    fitted = fit_snapshots(rows, retriever, 4, items, cuts).fitted
    found = listed(WalkRows.from_log(rows), retriever, items, cuts, fitted).to_dicts()
    # block 0 has no snapshot: item 0 was liked by 1 of 2, user 0 is new
    neighbours: dict[str, Any] = {
        "neighbours": [],
        "similarities": [],
        "answers": [],
        "vote": None,
        "weighted_vote": None,
        "vote_weight": 0,
        "similarity": None,
    }
    rates = {"item_rate": 0.5, "item_count": 2, "user_rate": None, "user_count": 0}
    assert found[4] == {"row_id": 4, "neighbour_count": 0} | neighbours | rates
    # Before the cut item 0 has 2 likes, item 1 has 1: w0 = (1/sqrt 2, 0), w1 = (0, 1). v0 =
    # w0, v1 = w0 + w1, v2 = -.5 v1; cos(v0, v1) = (1/2) / (sqrt(1/2) sqrt(3/2)) =
    # sqrt(1/3), v2 the negative.
    row, third, two_thirds = found[5], (1 / 3) ** 0.5, (2 / 3) ** 0.5
    assert (row["neighbours"], row["answers"]) == ([2, 3], [1, 0])
    assert row["similarities"] == pytest.approx([third, -third], abs=1e-6)
    assert (row["vote"], row["neighbour_count"]) == (0.5, 2)
    # a similarity below 0 counts as 0 in the vote, and as it is in the mean
    weighted = (row["weighted_vote"], row["vote_weight"], row["similarity"])
    assert weighted == pytest.approx((1, third, 0), abs=1e-6)
    assert (row["item_rate"], row["item_count"], row["user_rate"], row["user_count"]) == (
        0.5,
        2,
        1.0,
        1,
    )
    # a tie is invisible: row 6 does not count row 5, and its user has no earlier row, so no
    # neighbours
    assert (found[6]["item_count"], found[6]["user_count"], found[6]["neighbours"]) == (
        2,
        0,
        [],
    )
    # vectors move inside a block: v3 = -.5 w1 from row 6, v0 = w0 + w1 = v1 from row 5, so
    # cos(v3, v1) = -sqrt(2/3) = -cos(v3, v2); of equal similarities the later row comes
    # first
    row = found[7]
    assert (row["neighbours"], row["answers"]) == ([1, 4, 0], [0, 1, 1])
    assert row["similarities"] == pytest.approx(
        [two_thirds, -two_thirds, -two_thirds], abs=1e-6
    )
    assert (row["vote"], row["item_rate"], row["user_rate"]) == pytest.approx(
        (2 / 3, 2 / 3, 0)
    )


def test_types_are_the_schema_also_without_rows() -> None:
    for rows in (table(GOLDEN), table(GOLDEN).clear()):
        assert dict(answer(rows, NoRetriever()).schema) == {
            "row_id": pl.Int64,
            "vote": pl.Float32,
            "neighbour_count": pl.Int32,
            "weighted_vote": pl.Float32,
            "vote_weight": pl.Float32,
            "similarity": pl.Float32,
            "item_rate": pl.Float32,
            "item_count": pl.Int32,
            "user_rate": pl.Float32,
            "user_count": pl.Int32,
            "neighbours": pl.List(pl.Int64),
            "similarities": pl.List(pl.Float32),
            "answers": pl.List(pl.Int8),
        }


@pytest.mark.parametrize("max_raters", [1, 3, 2000])
def test_raters_equal_a_filter_over_the_log(max_raters: int) -> None:
    """The latest row of each other user, strictly earlier, oldest first, and of these the latest `max_raters`."""
    rows, shown = make_log(4), []

    class Kept(AllRaters):
        def select(
            self, user: int, item: int, timestamp: float, raters: Raters
        ) -> Neighbours:
            shown.append((raters.row.tolist(), raters.user.tolist()))
            return super().select(user, item, timestamp, raters)

    answer(rows, Kept(max_raters=max_raters))
    for row, (found, users) in zip(rows.to_dicts(), shown, strict=True):
        past = rows.filter(
            pl.col("timestamp") < row["timestamp"], pl.col("item") == row["item"]
        )
        latest = dict(past.select("user", "row_id").iter_rows())
        others = sorted((r, user) for user, r in latest.items() if user != row["user"])[
            -max_raters:
        ]
        assert list(zip(found, users, strict=True)) == others


@pytest.mark.parametrize("seed", range(2))
def test_rates_and_own_rows_equal_a_filter_over_the_log(seed: int) -> None:
    rows = make_log(seed)
    found = answer(rows, NoRetriever())
    columns = {
        name: rows[name].to_numpy() for name in ("item", "user", "timestamp", "label")
    }
    own = {  # by row, its user's earlier ones
        int(query): past[:count].tolist()
        for queries, past, earlier in queries_by_user(WalkRows.from_log(rows))
        for query, count in zip(queries, earlier, strict=True)
    }
    for k, got in enumerate(found.to_dicts()):
        past = columns["timestamp"] < columns["timestamp"][k]
        for key in ("item", "user"):
            labels = columns["label"][past & (columns[key] == columns[key][k])]
            assert got[f"{key}_count"] == len(labels)
            assert got[f"{key}_rate"] == (
                pytest.approx(labels.mean()) if len(labels) else None
            )
        assert (
            own[k]
            == np.flatnonzero(past & (columns["user"] == columns["user"][k])).tolist()
        )


def test_rows_that_are_no_query_are_not_answered_but_count() -> None:
    rows = make_log(0)
    log = WalkRows.from_log(rows)
    query = np.random.default_rng(0).random(rows.height) < 0.1
    some = listed(
        WalkRows(**{**vars(log), "query": query}), AllRaters(), rows, np.empty(0), []
    )
    assert some.equals(answer(rows, AllRaters()).filter(pl.Series(query)))


def test_blocks_of_answers_are_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_log(0)
    whole = answer(rows, AllRaters())
    # a last block of one row, of some, and none after the first
    for size in (1, 7, rows.height):
        monkeypatch.setattr("project.retrieval.walk.BLOCK", size)
        assert answer(rows, AllRaters()).equals(whole)


def test_top_is_largest_first_later_first() -> None:
    assert top(np.array([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [1, 3, 4]
    assert top(np.array([1.0, 1.0]), 5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("seconds", "blocks", "cuts"),
    [
        # positions 8 / 3 and 16 / 3, rounded down 2 and 5, hold 1 and 2
        ([0, 0, 1, 1, 1, 2, 5, 6], 3, [1, 2]),
        (range(100_000), 10, list(range(10_000, 100_000, 10_000))),
        # two cuts in one second are one, and the first second is none
        ([0, 0, 0, 1, 1, 1, 1, 2], 4, [1]),
        ([4], 2, []),
        ([], 2, []),
        ([0, 1, 2], 10, [1, 2]),
    ],
)
def test_a_cut_is_the_timestamp_at_its_share(
    seconds: Any, blocks: int, cuts: list[int]
) -> None:
    assert block_cuts(np.array(seconds, np.float64), blocks).tolist() == cuts


def test_a_file_gives_back_snapshots_with_and_without_arrays(tmp_path: Path) -> None:
    fitted = [{"a": np.arange(3)}, {}, {"a": np.ones((2, 2)), "b": np.zeros(1)}]
    Snapshots(np.array([1.0, 2, 3]), fitted).save(tmp_path / "s.npz")
    loaded = Snapshots.load(tmp_path / "s.npz")
    assert loaded.cuts.tolist() == [1, 2, 3]
    np.testing.assert_equal(loaded.fitted, fitted)
