"""Tables of text in, typed columns out, or one error that names file, row and column."""

import csv
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import polars as pl

from project.errors import DataError


class Files:
    """Reads files and keeps their checksums by name.

    Attributes:
        sums: File name -> SHA-256, in reading order.
    """

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    def table(self, path: Path, parse: Callable[[Path], pl.DataFrame]) -> pl.DataFrame:
        """The file as `parse` reads it.

        Raises:
            DataError: There is no such file, it has no rows, or it is no table.
        """
        if not path.is_file():
            raise DataError(f"File {path} does not exist (looked for it from {Path.cwd()}).")
        try:
            table = parse(path)
        except pl.exceptions.NoDataError:
            raise DataError(f"File {path} is empty; expected a header row and data.") from None
        except pl.exceptions.PolarsError as error:
            raise DataError(f"File {path} cannot be read as a table: {error}") from error
        if table.is_empty():
            raise DataError(f"File {path} has no data rows (columns: {', '.join(table.columns)}).")
        with path.open("rb") as stream:
            checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        self.sums[path.name if path.name not in self.sums else str(path)] = checksum
        return table


def parse_table(path: Path) -> pl.DataFrame:
    """CSV, TSV or Parquet, by the file's suffix."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return pl.read_parquet(path, glob=False)
    if kind in (".csv", ".tsv"):
        return _text(path, "," if kind == ".csv" else "\t", '"')
    raise DataError(f"File {path} has the suffix {kind!r}; expected .csv, .tsv or .parquet.")


def parse_atomic(path: Path) -> pl.DataFrame:
    """RecBole's atomic file, its columns without their types."""
    return _text(path, "\t", None).rename(lambda column: column.split(":")[0])


def _text(path: Path, separator: str, quote: str | None) -> pl.DataFrame:
    try:
        read = partial(
            pl.read_csv, path, separator=separator, infer_schema=False, quote_char=quote, glob=False
        )
        header = read(has_header=False, n_rows=1).row(0)  # polars renames the second of two equal columns
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            raise DataError(
                f"File {path} has the column {twice[0]!r} more than once. Rename or remove all but one."
            )
        return read()
    except pl.exceptions.ComputeError as error:
        problem = str(error)
        if "utf-8" in problem:
            problem = "it is not UTF-8 text. Save it as UTF-8."
        elif "more fields" in problem:
            problem = _long_row(path, separator, quote)
        raise DataError(f"File {path} cannot be read as a table: {problem}") from error


def _long_row(path: Path, separator: str, quote: str | None) -> str:
    """Where the first row stands that has more fields than the header, and what mends it."""
    where, what = "some row has more fields than the header", "comma" if separator == "," else "tab"
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        rows = csv.reader(
            stream, delimiter=separator, quoting=csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL
        )
        try:
            header = next(rows)
            found = next((row for row in rows if len(row) > len(header)), None)
        except csv.Error:
            found = None
        if found is not None:
            where = f"line {rows.line_num} has {len(found)} fields, but the header has {len(header)}"
    fix = "Remove it" if quote is None else f"Put a text that holds a {what} into double quotes"
    return f"{where} (a {what} inside a text?). {fix}, or add the missing columns to the header."


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
