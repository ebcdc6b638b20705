"""A reader of one's own is checked as the project's readers are: nothing of it is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from project.data.logs import RAW_SCHEMA, RawLogs, checked
from project.data.protocol import Protocol, build_interactions
from project.errors import DataError

MakeLogs = Callable[..., RawLogs]
ROWS = [("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0), ("2", "a", 3.0, 4.0)]
Change = Callable[[pl.DataFrame], pl.DataFrame]


def second(column: str, value: Any) -> Change:
    """Another value in the second row."""
    return lambda table: table.with_columns(
        pl.Series(column, [v if k != 1 else value for k, v in enumerate(table[column].to_list())])
    )


def test_tables_of_other_types_are_converted(make_logs: MakeLogs) -> None:
    """Integer ids, dates and labels of True are read as a file's would be; places may be empty; extra columns go."""
    raw = make_logs(ROWS, labels=[1, 0, 1])
    loose = raw.interactions.with_columns(
        timestamp=pl.from_epoch(pl.col("timestamp").cast(pl.Int64)),
        user_id=pl.col("user_id").cast(pl.Int64),
        label=pl.col("label") == 1,
        source_file=None,
        source_row=None,
        more=0,
    )
    items = raw.items.with_columns(year=pl.Series([1999, None]))
    found = checked(replace(raw, interactions=loose, items=items))
    same = [name for name in RAW_SCHEMA if name != "source_file"]
    assert found.interactions.select(same).equals(raw.interactions.select(same))
    assert found.interactions.schema == RAW_SCHEMA
    assert found.items["year"].to_list() == ["1999", ""]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop("timestamp", "split"), "no column timestamp, split; there are the columns user_id"),
        (second("timestamp", None), "row 2: column timestamp is empty"),
        (second("user_id", None), "row 2: column user_id is empty"),
        (
            second("item_id", "c"),
            r"log\.csv, row 2: item 'c' is not in the reader's items \(1 rows, 1 items\)",
        ),
        (second("rating", float("inf")), "row 2: column rating is inf; expected a finite number"),
        (lambda t: t.with_columns(rating=pl.lit("good")), "row 1: column rating is 'good'"),
        (lambda t: t.with_columns(label=2), r"row 1: column label is 2\.0"),
        (lambda t: t.with_columns(split=pl.lit("dev")), "row 1: column split is 'dev'"),
    ],
)
def test_interactions(change: Change, words: str, make_logs: MakeLogs) -> None:
    """A column, value or row that breaks the contract is named with its place, by whoever builds interactions."""
    raw = make_logs(ROWS)
    with pytest.raises(DataError, match=words):
        build_interactions(replace(raw, interactions=change(raw.interactions)), Protocol(label="rating > 3"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.with_columns(item_id=pl.lit("a")),
            "item 'a' is listed with the titles 'Title a' and 'Title b'",
        ),
        (lambda t: t.drop("title"), "the reader's items: no column title"),
        (lambda t: t.with_columns(item=0), "attribute name item"),
    ],
)
def test_items(change: Change, words: str, make_logs: MakeLogs) -> None:
    """The catalogue has a row an item."""
    raw = make_logs(ROWS)
    with pytest.raises(DataError, match=words):
        checked(replace(raw, items=change(raw.items)))
