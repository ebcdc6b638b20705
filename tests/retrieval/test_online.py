"""Tests the index: event by event it answers as the walk does, and a request leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from example_logs import NUM_ITEMS, NUM_USERS, CoLikes, by_time, make_log, make_split

from project.data.protocol import SplitInteractions
from project.errors import ConfigError, DataError
from project.features import Retrieved
from project.retrieval import (
    ItemKNN,
    LightGCN,
    MatrixFactorisation,
    NoRetriever,
    RetrievedFeatures,
    Retriever,
    online,
)
from project.retrieval.online import FeatureIndex
from project.retrieval.past import WalkRows
from project.retrieval.walk import walk

REFITS, MF, END = 4, MatrixFactorisation(dim=2), 1000.0
# sums in another order
SUMMED = (
    "mf",
    "mf_rating",
    "text",
    "text_weight",
    "item_similarity",
    "item_similarity_weight",
)
RETRIEVERS: dict[str, Retriever] = {
    "co_likes": CoLikes(neighbours=4, item_neighbours=3, similar_every=3, max_raters=5),
    "lightgcn": LightGCN(dim=4, epochs=1),
    "item_knn": ItemKNN(neighbours=4),
    "none": NoRetriever(),
}
each_retriever = pytest.mark.parametrize(
    "retriever", RETRIEVERS.values(), ids=RETRIEVERS.keys()
)


def with_new(split: SplitInteractions, title: str) -> pl.DataFrame:
    """The log's items, and one that it does not have."""
    items = split.interactions.items
    return pl.concat(
        [items, pl.DataFrame({"item": [NUM_ITEMS], "title": [title]}).cast(items.schema)]
    )


def same(found: Retrieved, expected: pl.DataFrame) -> None:
    """Bit for bit, but for sums in another order."""
    table = Retrieved.of(expected)
    assert found.columns.keys() == table.columns.keys()
    for name, values in table.columns.items():
        atol = 1e-6 if name in SUMMED else 0
        np.testing.assert_allclose(found.columns[name], values, rtol=0, atol=atol)


def replay(
    made: FeatureIndex,
    rows: pl.DataFrame,
    table: pl.DataFrame,
    without: tuple[str, ...] = (),
) -> int:
    """Answer the rows of each second, compare them with the table, then observe them; returns their number."""
    answered = 0
    for (second,), group in rows.group_by("timestamp", maintain_order=True):
        for row in group.iter_rows(named=True):
            found = made.retrieved(row["user"], [row["item"]], time=second)  # type: ignore[arg-type]
            for name in without:
                del found.columns[name]
            same(found, table.filter(pl.col("row_id") == row["row_id"]))
            answered += 1
        events = group.select("user", "item", "label", "timestamp", "rating")
        for event in events.fill_null(np.nan).iter_rows():
            made.observe(*event)
    return answered


def indexed(
    split: SplitInteractions, retriever: Retriever, folder: Path, before: float = END
) -> FeatureIndex:
    """An index of the rows before a second, with what was fitted on the whole log."""
    features = RetrievedFeatures(split, retriever, REFITS, folder, MF)
    features.tables()
    rows = split.rows.filter(pl.col("timestamp") < before)
    features.split = replace(split, rows=rows)
    return features.index()


@each_retriever
def test_a_replay_gives_the_table_of_the_split(
    retriever: Retriever, tmp_path: Path
) -> None:
    """Rows of a second do not see each other; blocks start on the way."""
    rows = make_log(2)
    split = make_split(rows, by_time(rows))
    table = RetrievedFeatures(split, retriever, REFITS, tmp_path, MF).tables()["test"]
    made = indexed(split, retriever, tmp_path, before=40.0)
    assert replay(made, rows.filter(pl.col("timestamp") >= 40), table) > 60


@pytest.mark.slow
@pytest.mark.real
def test_a_replay_gives_the_table_of_the_demo(tmp_path: Path) -> None:
    """The first 2,000 test rows of MovieLens latest-small, with tables as of configs/quickstart.yaml."""
    from project.data.logs import MovieLensLatestSmall
    from project.data.protocol import Protocol, apply_protocol, build_interactions

    protocol = Protocol(minimum_history=5, label="rating > 3.5")
    split = apply_protocol(
        build_interactions(MovieLensLatestSmall().read(), protocol), protocol
    )
    parts = LightGCN(item_neighbours=30), 10, tmp_path, MatrixFactorisation()
    table = RetrievedFeatures(split, *parts).tables()["test"]
    is_test = pl.col("split") == "test"
    made = RetrievedFeatures(
        replace(split, rows=split.rows.filter(~is_test)), *parts
    ).index()
    rows = split.rows.filter(is_test).head(2000)
    found = table.filter(pl.col("row_id").is_in(rows["row_id"].implode()))
    assert replay(made, rows, found) == rows.height == 2000


@each_retriever
@pytest.mark.parametrize("user", [3, NUM_USERS + 5], ids=["known", "unknown"])
@pytest.mark.parametrize("brings", [False, True], ids=["log", "history"])
def test_a_request_is_answered_as_by_the_walk(
    retriever: Retriever, user: int, brings: bool, tmp_path: Path
) -> None:
    """At the end of the log, of items that the log has or that the request brings; again after other requests."""
    rows = make_log(2)
    split = make_split(rows, by_time(rows))
    catalogue = with_new(split, "title 3 again")
    history = (
        [
            (1, 1, 70.5, 5.0),
            (NUM_ITEMS, 0, 9.0, 1.0),
            (1, 0, 70.5, 2.5),
            (4, 1, 71.0, np.nan),
        ]
        if brings
        else []
    )
    candidates = [*range(NUM_ITEMS + 1), 1]
    end = max([float(rows["timestamp"].max()), *(row[2] for row in history)]) + 1  # type: ignore[arg-type]
    item, label, time, rating = zip(
        *history, *((item, -1, end, np.nan) for item in candidates), strict=True
    )
    asked = pl.DataFrame(
        {"item": item, "timestamp": time, "label": label, "rating": rating}
    ).with_columns(user=user, candidate=pl.col("label") < 0)
    features = RetrievedFeatures(split, retriever, REFITS, tmp_path, MF)
    expected = features.of_requests(asked, catalogue)
    made = indexed(split, retriever, tmp_path)
    for _ in range(2):
        found = made.retrieved(user, candidates, history if brings else None, catalogue)
        same(found.rows(slice(len(history), None)), expected.tail(len(candidates)))
        same(found, found.table())
        made.retrieved(5, [2], [(2, 0, 3.0, 1.0)])


def test_new_users_are_answered_as_by_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are more than there is room for."""
    monkeypatch.setattr(online, "ROOM", 2)
    retriever, rows = CoLikes(neighbours=4, item_neighbours=3), make_log(2)
    split = make_split(rows, by_time(rows))
    made = indexed(split, retriever, tmp_path)
    snapshots = RetrievedFeatures(split, retriever, REFITS, tmp_path).snapshots()
    new = make_log(3, 60, users=8).with_columns(
        pl.col("user") + NUM_USERS, pl.col("timestamp") + 100
    )
    every = pl.concat([rows, new.with_columns(pl.col("row_id") + rows.height)])
    walked = walk(
        WalkRows.from_log(every),
        retriever,
        split.interactions.items,
        snapshots.cuts,
        snapshots.fitted,
    )
    made._chances = {}
    later = every.filter(pl.col("timestamp") >= 100)
    replay(made, later, walked, without=("text", "text_weight"))


@each_retriever
def test_removed_rows_are_as_if_never_observed(
    retriever: Retriever, tmp_path: Path
) -> None:
    """A user's every row, or every third: everybody's features are those of a log without them, ties and ends too."""
    rows = make_log(2)
    split = make_split(rows, by_time(rows))
    for step in (1, 3):
        made = indexed(split, retriever, tmp_path)
        own = rows.filter(user=4)
        gone = own[::step]["row_id"].to_list()
        made.remove(4, range(0, own.height, step))
        left = split.rows.filter(~pl.col("row_id").is_in(gone))
        features = RetrievedFeatures(split, retriever, REFITS, tmp_path, MF)
        features.split = replace(split, rows=left)
        other = features.index()
        assert other._size == made._size - len(gone)
        for user in range(NUM_USERS):
            items = list(range(NUM_ITEMS))
            found = made.retrieved(user, items, time=END)
            expected = other.retrieved(user, items, time=END)
            for name, values in found.columns.items():
                np.testing.assert_allclose(values, expected.columns[name], atol=1e-6)
        assert [made.counts(i) for i in items] == [other.counts(i) for i in items]


def test_a_new_item_has_a_text_and_raters_at_once(tmp_path: Path) -> None:
    """Two events that say the same count twice; the rater's text similarity is that of the item's own text, 1."""
    rows = make_log(2)
    split, item = make_split(rows, by_time(rows)), NUM_ITEMS
    made = indexed(split, NoRetriever(), tmp_path)
    catalogue = with_new(split, "something else")
    for _ in range(2):
        made.observe(99, item, 1, END, catalogue=catalogue)
    (row,) = made.retrieved(99, [item]).table().to_dicts()
    assert (row["item_count"], row["item_rate"], row["user_count"], row["user_rate"]) == (
        2,
        1.0,
        2,
        1.0,
    )
    assert (row["text"], row["text_weight"]) == pytest.approx((0, 2))
    (other,) = made.retrieved(98, [item]).table().to_dicts()
    assert (other["item_count"], other["user_count"], other["text"]) == (2, 0, None)


def test_a_text_of_requests_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests bring the same new item in catalogues of their own."""
    rows, read = make_log(2), list[str]()
    split = make_split(rows, by_time(rows))
    made = indexed(split, NoRetriever(), tmp_path)
    encode = made._encode
    monkeypatch.setattr(made, "_encode", lambda texts: read.extend(texts) or encode(texts))
    found = [made.retrieved(1, [NUM_ITEMS], None, with_new(split, "new")) for _ in range(2)]
    assert read == ["item new"]
    same(found[0], found[1].table())


class Remembers(NoRetriever):
    """Keeps what it cannot drop."""

    def observe(self, row: int, user: int, item: int, label: int) -> None: ...


def test_what_is_refused(tmp_path: Path) -> None:
    """Time that goes back, labels that are no answers, and a retriever that cannot forget."""
    rows = make_log(2)
    split = make_split(rows, by_time(rows))
    made = indexed(split, NoRetriever(), tmp_path)
    made.observe(1, 1, 1, END)
    with pytest.raises(DataError, match=r"a request has time 1000.0; expected one after"):
        made.retrieved(1, [1], time=END)
    for label, time in ((1, END - 1), (-1, END), (1, np.nan)):
        with pytest.raises(DataError, match=f"an event has label {label} and time {time}"):
            made.observe(1, 1, label, time)
    with pytest.raises(ConfigError, match=r"Remembers, which has observe and no forget"):
        RetrievedFeatures(split, Remembers(), REFITS, tmp_path).index()
