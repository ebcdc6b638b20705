from collections.abc import Callable
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.data.logs import RAW_SCHEMA, RawLogs
from project.data.protocol import Protocol, build_interactions
from project.errors import DataError

MakeLogs = Callable[..., RawLogs]


def test_golden_table(make_logs: MakeLogs) -> None:
    """Codes in numeric order (9 before 10), rows by (timestamp, user, item), labels by the rule."""
    raw = make_logs(
        [("10", "b", 2.0, 5.0), ("9", "b", 1.0, 3.0), ("9", "a", 2.0, 4.0), ("10", "a", 2.0, 1.0)]
    )
    built = build_interactions(raw, Protocol(label="rating > 3"))
    assert built.users.rows() == [(0, "9"), (1, "10")]
    assert built.items.rows() == [(0, "a", "Title a"), (1, "b", "Title b")]
    assert built.rows.rows() == [
        (0, 0, 1, 1.0, 0, 3.0, None),
        (1, 0, 0, 2.0, 1, 4.0, None),
        (2, 1, 0, 2.0, 0, 1.0, None),
        (3, 1, 1, 2.0, 1, 5.0, None),
    ]
    assert dict(built.rows.schema) == {
        "row_id": pl.Int64,
        "user": pl.Int32,
        "item": pl.Int32,
        "timestamp": pl.Float64,
        "label": pl.Int8,
        "rating": pl.Float64,
        "given_split": pl.String,
    }
    assert built.files == raw.files


def test_ids_that_are_not_all_integers_are_ordered_as_text(make_logs: MakeLogs) -> None:
    """One id with a letter, and "10" comes before "9"."""
    raw = make_logs([("10", "i", 1.0, 5.0), ("9", "i", 2.0, 1.0), ("x", "i", 3.0, 1.0)])
    assert build_interactions(raw, Protocol(label="rating > 3")).users["user_id"].to_list() == [
        "10",
        "9",
        "x",
    ]


def test_ids_that_differ_only_as_text_stay_apart(make_logs: MakeLogs) -> None:
    """Users "7" and "07" are two."""
    raw = make_logs([("7", "i", 1.0, 5.0), ("07", "i", 1.0, 1.0)])
    assert build_interactions(raw, Protocol(label="rating > 3")).users["user_id"].to_list() == ["07", "7"]


def test_dropped_ratings_and_their_users_are_gone(make_logs: MakeLogs) -> None:
    """drop_ratings removes rows before anything else; the catalogue keeps every item."""
    raw = make_logs([("1", "a", 1.0, 5.0), ("2", "b", 2.0, 3.0), ("1", "c", 3.0, 1.0)])
    built = build_interactions(raw, Protocol(drop_ratings=[3], label="rating > 3"))
    assert (built.rows.height, built.users.height, built.items.height, built.dropped) == (2, 1, 3, 1)


def test_labels_of_the_log(make_logs: MakeLogs) -> None:
    """With `label: null` the log's own labels are used."""
    raw = make_logs([("1", "a", 1.0, 0.0), ("1", "b", 2.0, 0.0)], labels=[1, 0])
    assert build_interactions(raw, Protocol(label=None)).rows["label"].to_list() == [1, 0]


def test_rule_without_ratings_and_labels_without_labels_name_the_key(make_logs: MakeLogs) -> None:
    """Each message says where, and which other value of data.protocol.label fits the log."""
    labels = make_logs([("1", "a", 1.0, 0.0), ("1", "b", 2.0, 0.0)], labels=[1, 0])
    with pytest.raises(
        DataError, match=r"log\.csv, row 1: no rating \(2 of 2.*Set data\.protocol\.label: null"
    ):
        build_interactions(labels, Protocol(label="rating > 3"))
    ratings = make_logs([("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0)])
    with pytest.raises(DataError, match=r'log\.csv, row 1: no label .*data\.protocol\.label: "rating > 3"'):
        build_interactions(ratings, Protocol(label=None))


DUPLICATED = [("1", "a", 1.0, 5.0), ("1", "b", 1.0, 1.0), ("1", "a", 1.0, 2.0), ("1", "a", 2.0, 5.0)]


def test_duplicates_are_an_error_that_names_the_rows(make_logs: MakeLogs) -> None:
    """Rows 1 and 3 repeat (user, item, timestamp); the same item at another time is none."""
    with pytest.raises(DataError) as caught:
        build_interactions(make_logs(DUPLICATED), Protocol(label="rating > 3"))
    assert "1 duplicate rows" in str(caught.value)
    assert "user '1', item 'a', timestamp 1: log.csv row 1, log.csv row 3" in str(caught.value)


@pytest.mark.parametrize(("policy", "rating"), [("first", 5.0), ("last", 2.0)])
def test_duplicates_by_policy(make_logs: MakeLogs, policy: str, rating: float) -> None:
    """The first or last in file order stays, and the number removed is kept."""
    built = build_interactions(make_logs(DUPLICATED), Protocol(duplicates=policy, label="rating > 3"))  # type: ignore[arg-type]
    assert built.rows.filter((pl.col("item") == 0) & (pl.col("timestamp") == 1))["rating"].to_list() == [
        rating
    ]
    assert (built.rows.height, built.duplicates) == (3, 1)


@settings(derandomize=True)
@given(st.permutations(range(12)))
def test_order_of_the_file_does_not_matter(order: list[int]) -> None:
    """Without duplicates the table is a function of the set of rows."""
    rows = [(str(i % 3), str(i % 4), float(i // 5), float(i % 5 + 1)) for i in range(12)]

    def built(rows: list[tuple[str, str, float, float]]) -> pl.DataFrame:
        frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "rating"], orient="row")
        full = frame.with_columns(
            pl.lit(None, RAW_SCHEMA[name]).alias(name) for name in RAW_SCHEMA if name not in frame.columns
        )
        items = pl.DataFrame({"item_id": ["0", "1", "2", "3"], "title": ["a", "b", "c", "d"]})
        return build_interactions(RawLogs(full, items, {}), Protocol(label="rating > 3")).rows

    assert built([rows[i] for i in order]).equals(built(rows))


def test_a_log_of_labels_needs_no_rule(make_logs: MakeLogs) -> None:
    """The default protocol reads the log's own labels."""
    raw = make_logs([("1", "a", 1.0, 0.0), ("1", "b", 2.0, 0.0)], labels=[1, 0])
    assert build_interactions(raw, Protocol()).rows["label"].to_list() == [1, 0]


def test_an_item_without_a_title_has_its_id(make_logs: MakeLogs) -> None:
    """It is counted; blanks are no title."""
    raw = make_logs([("1", "a", 1.0, 0.0), ("1", "b", 2.0, 0.0), ("1", "c", 3.0, 0.0)], labels=[1, 0, 1])
    items = raw.items.with_columns(title=pl.Series([None, "Brazil", "  "]))
    built = build_interactions(replace(raw, items=items), Protocol())
    assert built.items["title"].to_list() == ["a", "Brazil", "c"]
    assert built.items_without_title == 2
