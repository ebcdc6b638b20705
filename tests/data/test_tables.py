"""Values of columns are read strictly, from files and from readers of one's own: nothing is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import polars as pl
import pytest

from project.data.logs import RAW_SCHEMA, RawLogs, checked
from project.data.protocol import Protocol, build_interactions
from project.data.tables import finite_numbers, ids, plain_text, times
from project.errors import DataError

MAY_2 = 86_400 * (365 + 31 + 28 + 31 + 30 + 1)  # seconds from 1970 to 1971-05-02
NOW = 1_715_938_200.0
ROWS = [("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0), ("2", "a", 3.0, 4.0)]
CATEGORIES = pl.Enum(["4", "1971-05-02"])
Change = Callable[[pl.DataFrame], pl.DataFrame]


def read(name: str, values: list[Any], kind: Any = None) -> list[Any]:
    """A column as it is read: times, numbers or text, by its name."""
    of = {
        "timestamp": times,
        "rating": finite_numbers,
        "label": finite_numbers,
        "user_id": ids,
    }
    return of.get(name, plain_text)(pl.Series(name, values, kind), "f", "c").to_list()


@pytest.mark.parametrize(
    ("name", "values", "kind", "expected"),
    [
        *(
            ("timestamp", [moment], None, [MAY_2])  # one moment; without a zone it is UTC
            for moment in (
                "1971-05-02",
                "1971-05-02T00:00:00Z",
                "1971-05-02 02:00:00+02:00",
                f" {MAY_2}.0 ",
                date(1971, 5, 2),
                datetime(1971, 5, 2),
                datetime(1971, 5, 2, tzinfo=UTC),
                datetime(1971, 5, 2, 2, tzinfo=timezone(timedelta(hours=2))),
            )
        ),
        ("timestamp", ["1970-01-01T00:00:01.250", None], None, [1.25, None]),
        ("timestamp", [0.0, NOW], None, [0.0, NOW]),
        *(
            ("timestamp", [NOW * unit, (NOW + 60) * unit], None, [NOW, NOW + 60])
            for unit in (10**3, 10**6, 10**9)
        ),
        (
            "timestamp",
            [20_240_517.0, 20_249_999.0],
            None,
            [20_240_517.0, 20_249_999.0],
        ),  # among others no date
        *(
            ("timestamp", ["4", "1971-05-02"], kind, [4, MAY_2])
            for kind in (pl.Categorical, CATEGORIES)
        ),
        *(("rating", ["4"], kind, [4]) for kind in (pl.Categorical, CATEGORIES)),
        ("label", ["True", " false", "1"], None, [1, 0, 1]),
        ("label", [True, False], None, [1, 0]),
        ("user_id", [7, 12], None, ["7", "12"]),
        ("genres", [["Comedy", "Drama"], []], None, ["Comedy, Drama", ""]),
    ],
)
def test_what_is_read(name: str, values: list[Any], kind: Any, expected: list[Any]) -> None:
    assert read(name, values, kind) == expected


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        *(
            ("rating", ["1", v, v], f"f, row 2: .* is '{v}'.* 2 of 3 rows")
            for v in ("four", "NaN")
        ),
        *(("timestamp", ["1", v], f"f, row 2: .* is '{v}'") for v in ("inf", "-inf")),
        ("timestamp", [NOW, NOW + 1, NOW * 1000], "row 1: .*one unit.*2 of 3 rows"),
        # the year 3000, in seconds, and a date without dashes
        ("timestamp", [NOW, 32_503_680_000], "row 1: .*up to the year 2286"),
        ("timestamp", [32_503_680_000] * 2, "row 1: .* is 32503680000"),
        ("timestamp", [20_240_517_093_000] * 2, "row 1: .* is 20240517093000"),
        *(
            (
                "timestamp",
                [moment(2024, 5, 17), moment(9999, 12, 31)],
                "row 2: .*9999-12-31",
            )
            for moment in (date, datetime)
        ),
        (
            "timestamp",
            [20_240_517.0, 20_231_231.0],
            "dates .* 20240517 in row 1.*2024-05-17",
        ),
        ("rating", ["2024-01-01"], "'2024-01-01'"),
        ("rating", [date(2024, 1, 1)], "the type Date"),
        ("rating", ["true"], "a finite number"),
        ("rating", [None, 4], "f, row 1: column c is empty"),
        ("label", ["1", "yes"], "'yes'.*true or false"),
        *(
            (name, [{"a": 1}], "the type Struct")
            for name in ("rating", "user_id", "genres")
        ),
        *((name, [b"\xff"], "the type Binary") for name in ("rating", "user_id")),
        *((name, [[["a"]]], "the type List") for name in ("rating", "genres")),
        *(
            ("user_id", ["a", value], "f, row 2: column c is empty")
            for value in ("", "  ", None)
        ),
    ],
)
def test_what_is_an_error(name: str, values: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(name, values)


def test_tables_of_other_types_are_converted(make_logs: Callable[..., RawLogs]) -> None:
    """Integer ids, dates and labels of True are read as a file's would be; places may be empty, columns absent."""
    raw = make_logs(ROWS, labels=[1, 0, 1])
    loose = raw.interactions.drop("split", "source_row").with_columns(
        timestamp=pl.from_epoch(pl.col("timestamp").cast(pl.Int64)),
        user_id=pl.col("user_id").cast(pl.Int64),
        label=pl.col("label") == 1,
        source_file=None,
        more=0,
    )
    items = raw.items.with_columns(year=pl.Series([1999, None]))
    found = checked(replace(raw, interactions=loose, items=items))
    same = [name for name in RAW_SCHEMA if name != "source_file"]
    assert found.interactions.select(same).equals(raw.interactions.select(same))
    assert found.interactions.schema == RAW_SCHEMA
    assert found.items["year"].to_list() == ["1999", ""]
    assert found.not_read == ("more",)


def second(column: str, value: Any) -> Change:
    """Another value in the second row."""
    return lambda table: table.with_columns(
        pl.Series(
            column, [v if k != 1 else value for k, v in enumerate(table[column].to_list())]
        )
    )


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        (
            "interactions",
            lambda t: t.drop("user_id"),
            r"no column user_id.*Name it user_id in what read\(\) returns",
        ),
        (
            "interactions",
            second("timestamp", None),
            r"log\.csv, row 2: no timestamp \(1 of 3 rows",
        ),
        ("interactions", second("item_id", "c"), r"log\.csv, row 2: item 'c' is not in"),
        (
            "interactions",
            second("split", "dev"),
            "row 2: column split is 'dev'; expected one of history, train",
        ),
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
