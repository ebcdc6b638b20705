"""Values of columns, from files and from readers of one's own, are read strictly: nothing is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest

from project.data.logs import RAW_SCHEMA, RawLogs, checked
from project.data.protocol import Protocol, build_interactions
from project.data.tables import finite_number, ids, plain_text, refuse, seconds
from project.errors import DataError

MAY_2 = 86_400 * (365 + 31 + 28 + 31 + 30 + 1)  # seconds from 1970 to 1971-05-02
NOW = 1_715_938_200.0
ROWS = [("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0), ("2", "a", 3.0, 4.0)]
Change = Callable[[pl.DataFrame], pl.DataFrame]


def number(name: str, values: list[Any], kind: Any = None, optional: bool = False) -> list[float | None]:
    return finite_number(pl.Series(name, values, kind), "f", "c", optional=optional).to_list()


@pytest.mark.parametrize(
    "moment",
    [
        "1971-05-02",
        "1971-05-02T00:00:00Z",
        "1971-05-02 02:00:00+02:00",
        f" {MAY_2}.0 ",
        date(1971, 5, 2),
        datetime(1971, 5, 2),
        datetime(1971, 5, 2, tzinfo=UTC),
        datetime(1971, 5, 2, 2, tzinfo=timezone(timedelta(hours=2))),
    ],
)
def test_timestamps_of_one_moment_are_equal(moment: str | date) -> None:
    """Numbers, ISO dates and typed dates; without a zone it is UTC."""
    assert number("timestamp", [moment]) == [MAY_2]


def test_numbers() -> None:
    """Parts of a second are kept; categories are their text; a label may be true or false; gaps where allowed."""
    assert number("timestamp", ["1970-01-01T00:00:01.250"]) == [1.25]
    for kind in (pl.Categorical, pl.Enum(["4", "1971-05-02"])):
        assert number("rating", ["4"], kind) == [4]
        assert number("timestamp", ["4", "1971-05-02"], kind) == [4, MAY_2]
    assert number("label", ["True", " false", "1"]) == [1, 0, 1]
    assert number("label", [True, False]) == [1, 0]
    assert number("rating", [None, 4], optional=True) == [None, 4]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        *(("rating", ["1", value, value], f"f, row 2: .*{value}.*2 of 3 rows") for value in ("four", "NaN")),
        *(("timestamp", ["1", value], f"f, row 2: .*{value}") for value in ("inf", "-inf")),
        ("timestamp", ["1", None], "f, row 2: column c is empty"),
        ("rating", ["2024-01-01"], "'2024-01-01'"),
        ("rating", [date(2024, 1, 1)], "the type Date"),
        ("rating", ["true"], "finite number"),
        ("label", ["1", "yes"], "'yes'.*true or false"),
        ("rating", [["a"]], r"the type List"),
        ("rating", [{"a": 1}], "the type Struct"),
        ("rating", [b"\xff"], "the type Binary"),
    ],
)
def test_what_is_no_number(name: str, values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        number(name, values)


def test_texts() -> None:
    assert ids(pl.Series("user_id", [7, 12]), "f", "c").to_list() == ["7", "12"]
    assert plain_text(pl.Series("genres", [["Comedy", "Drama"], []]), "f", "c").to_list() == [
        "Comedy, Drama",
        "",
    ]
    refuse(pl.Series("split", ["a", None]), ["a"], "f", "c")


@pytest.mark.parametrize(
    ("read", "values", "words"),
    [
        *((ids, ["a", value], "f, row 2: column c is empty") for value in ("", "  ", None)),
        (ids, [{"a": 1}], "Struct"),
        (ids, [b"\xff"], "the type Binary"),
        (plain_text, [{"a": 1}], "column c has the type Struct"),
        (plain_text, [[["a"]]], "column c has the type List"),
        (lambda v, f, c: finite_number(v, f, c, optional=True), [None, "x"], r"row 2: .*'x'.* 1 of 2 rows"),
        (lambda v, f, c: refuse(v, ["a", "b"], f, c), ["a", None, "x", "y"], r"row 3: .*'x' \(2 .*a, b"),
    ],
)
def test_other_values_that_are_refused(read: Callable[..., object], values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(pl.Series("genres", values), "f", "c")


def test_milliseconds_become_seconds() -> None:
    """A whole column of them would lie after the year 5138; a number that could be a date among others stays."""
    assert seconds(pl.Series([NOW * 1000, NOW * 1000 + 500]), "f", "c").to_list() == [NOW, NOW + 0.5]
    for times in ([0.0, NOW], [20_240_517.0, 20_249_999.0]):
        assert seconds(pl.Series(times), "f", "c").to_list() == times


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([NOW, NOW + 1, NOW * 1000], "mixes .* row 1 is 1715938200, row 3 is 1715938200000"),
        ([20_240_517.0, 20_231_231.0], "dates .* 20240517 in row 1.*2024-05-17"),
    ],
)
def test_times_that_are_no_seconds(times: list[float], words: str) -> None:
    with pytest.raises(DataError, match=words):
        seconds(pl.Series(times), "f", "c")


def test_tables_of_other_types_are_converted(make_logs: Callable[..., RawLogs]) -> None:
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


def second(column: str, value: Any) -> Change:
    """Another value in the second row."""
    return lambda table: table.with_columns(
        pl.Series(column, [v if k != 1 else value for k, v in enumerate(table[column].to_list())])
    )


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        ("interactions", lambda t: t.drop("timestamp", "split"), "no column timestamp, split"),
        ("interactions", second("timestamp", None), "row 2: no timestamp"),
        ("interactions", second("user_id", None), "row 2: column user_id is empty"),
        ("interactions", second("item_id", "c"), r"log\.csv, row 2: item 'c' is not in"),
        ("interactions", second("rating", float("inf")), "row 2: column rating is inf"),
        ("interactions", lambda t: t.with_columns(rating=pl.lit("good")), "row 1: column rating is 'good'"),
        ("interactions", lambda t: t.with_columns(label=2), r"row 1: column label is 2\.0"),
        ("interactions", lambda t: t.with_columns(split=pl.lit("dev")), "row 1: column split is 'dev'"),
        ("items", second("item_id", "a"), "item 'a' .*'Title a' and 'Title b'"),
        ("items", lambda t: t.drop("title"), r"no column title.*Name it title in what read\(\) returns"),
        (
            "items",
            lambda t: t.with_columns(item=0),
            r"attribute name item.*Name it kind in what read\(\) returns",
        ),
    ],
)
def test_a_reader_that_breaks_the_contract(
    table: str, change: Change, words: str, make_logs: Callable[..., RawLogs]
) -> None:
    raw = make_logs(ROWS)
    broken = replace(raw, **{table: change(getattr(raw, table))})
    with pytest.raises(DataError, match=words):
        build_interactions(broken, Protocol(label="rating > 3"))
