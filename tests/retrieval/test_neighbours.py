"""The walk: golden example, ties, repeated ratings, the latest raters, and what each flag may do."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from project.retrieval import NoRetriever, VectorRetriever
from project.retrieval.base import Edges, FloatArray, Neighbours, Raters, Retriever, top
from project.retrieval.walk import WalkRows, fit_snapshots, own_earlier_rows, walk

ROOT_HALF, ROOT_THIRD, ROOT_TWO_THIRDS = 0.5**0.5, (1 / 3) ** 0.5, (2 / 3) ** 0.5


class UnitItems(VectorRetriever):
    """Item 0 is (1, 0), item 1 is (0, 1)."""

    def item_table(self, edges: Edges, block: int) -> FloatArray:
        return np.eye(2, dtype=np.float32)


class AllRaters(Retriever):
    """Returns the raters it is shown, latest first."""

    def begin(self, num_users: int, items: pl.DataFrame) -> None: ...

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        rows = raters.row[::-1][: self.neighbours]
        return Neighbours(rows, np.zeros(rows.size, np.float32))


def table(columns: list[tuple[float, int, int, int]]) -> pl.DataFrame:
    """Rows (timestamp, user, item, label), already in order."""
    frame = pl.DataFrame(columns, ["timestamp", "user", "item", "label"], orient="row")
    return frame.with_columns(
        row_id=pl.int_range(pl.len(), dtype=pl.Int64), timestamp=pl.col("timestamp").cast(pl.Float64)
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


def golden() -> list[dict]:
    """Retrieved features of the golden log with one cut at 10."""
    rows, retriever, cuts = table(GOLDEN), UnitItems(), np.array([10.0])
    items = pl.DataFrame({"item": [0, 1]})
    snapshots = fit_snapshots(rows, retriever, 4, items, cuts)
    return walk(WalkRows.from_log(rows), retriever, items, cuts, snapshots.fitted).to_dicts()


def test_block_zero_has_rates_but_no_neighbours():
    """Before the first cut there is no snapshot: item 0 was liked by 1 of 2, user 0 is new."""
    assert golden()[4] == {
        "row_id": 4,
        "neighbours": [],
        "similarities": [],
        "answers": [],
        "vote": None,
        "neighbour_count": 0,
        "item_rate": 0.5,
        "item_count": 2,
        "user_rate": None,
        "user_count": 0,
    }


def test_golden_neighbours():
    """Before the cut item 0 has 2 likes, item 1 has 1: w0 = (1/sqrt 2, 0), w1 = (0, 1).

    v0 = w0, v1 = w0 + w1, v2 = -.5 v1; cos(v0, v1) = (1/2) / (sqrt(1/2) sqrt(3/2)) = sqrt(1/3), v2 the negative.
    """
    row = golden()[5]
    assert row["neighbours"] == [2, 3]
    assert row["answers"] == [1, 0]
    assert row["similarities"] == pytest.approx([ROOT_THIRD, -ROOT_THIRD], abs=1e-6)
    assert (row["vote"], row["neighbour_count"]) == (0.5, 2)
    assert (row["item_rate"], row["item_count"], row["user_rate"], row["user_count"]) == (0.5, 2, 1.0, 1)


def test_a_tie_is_invisible():
    """Row 6 shares its second with row 5: it does not count it, and its user has no earlier row, so no neighbours."""
    row = golden()[6]
    assert (row["item_count"], row["user_count"], row["neighbours"]) == (2, 0, [])


def test_vectors_move_inside_a_block_and_equal_similarity_prefers_the_later_row():
    """v3 = -.5 w1 from row 6; v0 = w0 + w1 = v1 from row 5; cos(v3, v1) = -sqrt(2/3) = -cos(v3, v2)."""
    row = golden()[7]
    assert row["neighbours"] == [1, 4, 0]
    assert row["answers"] == [0, 1, 1]
    assert row["similarities"] == pytest.approx(
        [ROOT_TWO_THIRDS, -ROOT_TWO_THIRDS, -ROOT_TWO_THIRDS], abs=1e-6
    )
    assert row["vote"] == pytest.approx(2 / 3)
    assert (row["item_rate"], row["user_rate"]) == (pytest.approx(2 / 3), 0.0)


def test_types_are_the_schema():
    """The retrieved features table's columns and types are part of the contract."""
    rows = table(GOLDEN)
    found = walk(WalkRows.from_log(rows), NoRetriever(), pl.DataFrame({"item": [0, 1]}), np.empty(0), [])
    assert dict(found.schema) == {
        "row_id": pl.Int64,
        "neighbours": pl.List(pl.Int64),
        "similarities": pl.List(pl.Float32),
        "answers": pl.List(pl.Int8),
        "vote": pl.Float32,
        "neighbour_count": pl.Int32,
        "item_rate": pl.Float32,
        "item_count": pl.Int32,
        "user_rate": pl.Float32,
        "user_count": pl.Int32,
    }


def answer(rows: pl.DataFrame, retriever: Retriever) -> pl.DataFrame:
    items = pl.DataFrame({"item": range(int(rows["item"].max()) + 1)})
    return walk(WalkRows.from_log(rows), retriever, items, np.empty(0), [])


def test_only_the_latest_rating_of_each_other_user_and_never_ones_own():
    """User 1 rated twice (rows 0, 2), user 0 once before (row 1): user 0 is shown row 2 alone, user 2 rows 2 and 1."""
    rows = table([(1, 1, 0, 1), (2, 0, 0, 1), (3, 1, 0, 0), (4, 0, 0, 1), (4, 2, 0, 1)])
    found = answer(rows, AllRaters())
    assert found["neighbours"].to_list()[3:] == [[2], [2, 1]]
    assert found["item_count"].to_list() == [0, 1, 2, 3, 3]


def test_max_raters_keeps_the_latest():
    """Of 5 raters the latest 2 are considered, also when the user's own rating is among the latest."""
    rows = table([(t, t, 0, 1) for t in range(5)] + [(9, 4, 0, 1), (10, 7, 0, 1)])
    found = answer(rows, AllRaters(max_raters=2))["neighbours"].to_list()
    assert found[5] == [3, 2]
    assert found[6] == [5, 3]


@pytest.mark.parametrize("seed", range(5))
def test_rates_equal_a_filter_over_the_log(log_of: Callable[..., pl.DataFrame], seed: int):
    """Item and user rates and counts are those of a plain filter on strictly earlier rows."""
    rows = log_of(seed)
    found = answer(rows, NoRetriever())
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        past = rows.filter(pl.col("timestamp") < row["timestamp"])
        for key in ("item", "user"):
            labels = past.filter(pl.col(key) == row[key])["label"].to_list()
            assert got[f"{key}_count"] == len(labels)
            assert got[f"{key}_rate"] == (pytest.approx(sum(labels) / len(labels)) if labels else None)


def test_rows_that_do_not_ask_are_not_answered_but_count(log_of: Callable[..., pl.DataFrame]):
    """Spans of rows nobody asks about are taken in at once and change no answer."""
    rows = log_of(0)
    log = WalkRows.from_log(rows)
    query = np.random.default_rng(0).random(rows.height) < 0.1
    some = walk(WalkRows(**{**vars(log), "query": query}), AllRaters(), rows, np.empty(0), [])
    assert some.equals(answer(rows, AllRaters()).filter(pl.Series(query)))


def test_top_is_largest_first_later_first():
    """Equal values are ordered by later position, also at the boundary of the cut."""
    assert top(np.array([1.0, 3.0, 1.0, 2.0, 1.0]), 3).tolist() == [1, 3, 4]
    assert top(np.array([1.0, 1.0]), 5).tolist() == [1, 0]


def test_no_rows_give_an_empty_table():
    """An empty walk is a table without rows."""
    assert (
        answer(table(GOLDEN), NoRetriever()).clear().schema
        == walk(
            WalkRows.from_log(table(GOLDEN).clear()),
            NoRetriever(),
            pl.DataFrame({"item": [0]}),
            np.empty(0),
            [],
        ).schema
    )


@pytest.mark.parametrize("seed", range(3))
def test_own_earlier_rows_equal_the_slow_way(log_of: Callable, seed: int):
    """Of every row: the rows of its user with a strictly smaller timestamp, in the log's order."""
    rows = log_of(seed)
    user, time = rows["user"].to_numpy(), rows["timestamp"].to_numpy()
    order, start, stop = own_earlier_rows(user, time)
    for k in range(rows.height):
        assert (
            order[start[k] : stop[k]].tolist()
            == np.flatnonzero((user == user[k]) & (time < time[k])).tolist()
        )
