"""Typed columns out of a table as read: text, finite numbers, seconds, allowed values.

Unusual: nothing is coerced silently. The first value that does not fit is reported with file, row (the data
row, from 1), column (under its name in the file) and how many rows are like it.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

import polars as pl

from project.errors import DataError

MILLISECONDS = 1e11  # as seconds the year 5138, as milliseconds 1973
_DATE = (19_000_101, 21_001_231)  # as digits; as seconds August and September 1970


def ids(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as text without blanks around it; an empty value is a `DataError`.

    Args:
        values: The column, under our name.
        file: Name of the file, for the message.
        column: The column's name in the file, for the message.
    """
    text = _worded(values, file, column).str.strip_chars()
    empty = text.is_null() | (text == "")
    if empty.any():
        rows = empty.arg_true()
        raise DataError(
            f"{file}, row {rows[0] + 1}: column {column} is empty ({len(rows):,} such rows); every row needs "
            f"a {values.name}. Fill it in, or remove the row."
        )
    return text


def plain_text(values: pl.Series, file: str) -> pl.Series:
    """A column as text, null where it was; a list becomes "a, b", a nested type is a `DataError`."""
    if isinstance(values.dtype, pl.List) and not values.dtype.inner.is_nested():
        return values.cast(pl.List(pl.String)).list.join(", ")
    if values.dtype.is_nested():
        raise DataError(
            f"{file}: column {values.name} has the type {values.dtype}; expected text, numbers or lists."
        )
    return _worded(values, file, values.name)


def seconds(times: pl.Series, file: str, column: str) -> pl.Series:
    """Times from `finite_number` as seconds since 1970; a column of milliseconds is divided by 1,000.

    Args:
        times: Float64 without nulls.
        file: Name of the file, for the message.
        column: The column's name in the file, for the message.

    Raises:
        DataError: Seconds and milliseconds in one column, or dates such as 20240517.
    """
    if times.is_empty():
        return times
    large = times.abs() >= MILLISECONDS
    if large.any() and not large.all():
        row, other = large.arg_true()[0], (~large).arg_true()[0]
        raise DataError(
            f"{file}: column {column} mixes seconds and milliseconds: row {other + 1} is {times[other]:.15g}, row "
            f"{row + 1} is {times[row]:.15g} ({large.sum():,} of {len(times):,} rows are like this). Give all rows "
            "the same unit."
        )
    month, day = times // 100 % 100, times % 100
    if (
        times.is_between(*_DATE) & month.is_between(1, 12) & day.is_between(1, 31) & (day == day.floor())
    ).all():
        text = f"{times[0]:.0f}"
        raise DataError(
            f"{file}: column {column} holds dates without dashes, such as {text} in row 1, which would be read as "
            f"seconds. Write them as {text[:4]}-{text[4:6]}-{text[6:]}."
        )
    return times / 1000 if large.all() else times


def finite_number(values: pl.Series, file: str, column: str, optional: bool = False) -> pl.Series:
    """A column as Float64; empty values, NaN, infinities and text are a `DataError`.

    A column named timestamp may hold dates (by its type, or as ISO text, UTC where it names no zone): they
    become seconds since 1970. One named label may say true and false.

    Args:
        values: The column, under our name.
        file: Name of the file, for the message.
        column: The column's name in the file, for the message.
        optional: Empty values stay empty.
    """
    moments = values.dtype in (pl.Date, pl.Datetime) and values.name == "timestamp"
    if not moments and (values.dtype.is_temporal() or values.dtype.is_nested() or values.dtype == pl.Binary):
        raise DataError(
            f"{file}: column {column} has the type {values.dtype}; expected numbers"
            f"{' (seconds) or dates' if values.name == 'timestamp' else ''}. Convert it where it is written."
        )
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if moments:
        exact = values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values
        numbers = exact.dt.epoch("us") / 1e6
    elif values.dtype == pl.String:
        numbers = values.str.strip_chars().cast(pl.Float64, strict=False)
        if values.name == "timestamp":
            numbers = _seconds(values, numbers)
        elif values.name == "label":
            said = values.str.strip_chars().str.to_lowercase()
            numbers = numbers.fill_null(said.replace_strict({"true": 1.0, "false": 0.0}, default=None))
    else:
        numbers = values.cast(pl.Float64, strict=False)
    wrong = ~numbers.is_finite().fill_null(False)
    if optional:
        wrong &= values.is_not_null()
    if wrong.any():
        rows = wrong.arg_true()
        value = values[rows[0]]
        found = "empty" if value is None else repr(value)
        expected = {
            "timestamp": "a finite number (seconds, or an ISO date such as 2024-05-17T09:30:00)",
            "label": "0 or 1, or true or false",
        }.get(values.name, "a finite number")
        raise DataError(
            f"{file}, row {rows[0] + 1}: column {column} is {found}; expected {expected}. "
            f"{len(rows):,} of {len(values):,} rows are like this; correct or remove them."
        )
    return numbers.cast(pl.Float64)


def refuse(values: pl.Series, allowed: Sequence[float] | Sequence[str], file: str, column: str) -> None:
    """Raise `DataError` at the first value that is neither null nor one of `allowed`."""
    wrong = ~values.is_in(pl.Series(allowed, dtype=values.dtype).implode()).fill_null(True)
    if wrong.any():
        rows = wrong.arg_true()
        raise DataError(
            f"{file}, row {rows[0] + 1}: column {column} is {values[rows[0]]!r} ({len(rows):,} such rows); "
            f"allowed are {', '.join(str(value) for value in allowed)}."
        )


def _worded(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column of text, numbers, dates or categories as text."""
    problem = f"has the type {values.dtype}"
    if not values.dtype.is_nested():  # polars would word a struct
        try:
            text = values.cast(pl.String)
        except pl.exceptions.PolarsError:
            problem = "has bytes that are no UTF-8 text"
        else:
            return _one_line(text, file, column)
    raise DataError(
        f"{file}: column {column} {problem}; expected text or numbers, one value a row. Convert it where it "
        "is written."
    )


def _one_line(text: pl.Series, file: str, column: str) -> pl.Series:
    """The text; a line break inside a value is mostly a quote that pairs with one in another row."""
    rows = text.str.strip_chars().str.contains("[\n\r]").arg_true()
    if len(rows):
        raise DataError(
            f"{file}, row {rows[0] + 1}: column {column} holds a line break: {text[rows[0]][:60]!r} ({len(rows):,} "
            "such rows). Close the quote that begins there and double quotes inside a text, or replace the line break."
        )
    return text


def _seconds(values: pl.Series, numbers: pl.Series) -> pl.Series:
    """Fill what is not a number with the seconds of ISO dates."""
    dates = {}
    for text in values.filter(numbers.is_null()).drop_nulls().unique():
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            continue
        dates[text] = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not dates:
        return numbers
    return numbers.fill_null(values.replace_strict(dates, default=None, return_dtype=pl.Float64))
