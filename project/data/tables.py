"""Tables of text in, typed columns out, or one error that names file, row and column."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl

from project.errors import DataError

LATEST = 1e10  # seconds: the year 2286
UNITS = ("seconds", "milliseconds", "microseconds", "nanoseconds")
# the largest number of a column has the next unit from each of these on
EDGES = (LATEST, 1e13, 1e16)
EARLIEST = 1e8  # seconds: 1973, from which on times may be in other units than seconds
ATOMIC = (".inter", ".item", ".user")  # RecBole's files
DATES = (19_000_101, 21_001_231)  # as digits; as seconds August and September 1970


def read_table(path: Path, sums: dict[str, str]) -> pl.DataFrame:
    """A .csv, .tsv, .parquet or RecBole (.inter, .item, .user) file; adds its SHA-256 to `sums` under its name."""
    if not path.is_file():
        raise DataError(f"File {path} does not exist (looked for it from {Path.cwd()}).")
    sums[path.name if path.name not in sums else str(path)] = sha256_of(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet", *ATOMIC):
        raise DataError(
            f"File {path} has the suffix {kind!r}; expected .csv, .tsv or .parquet."
        )
    # quotes are plain characters, and headers have types: user_id:token
    atomic = kind in ATOMIC
    try:
        if kind == ".parquet":
            table = pl.read_parquet(path, glob=False)
        else:
            separator = "," if kind == ".csv" else "\t"
            quote = None if atomic else '"'
            table = pl.read_csv(
                path, separator=separator, quote_char=quote, infer_schema=False, glob=False
            )
    except pl.exceptions.NoDataError:
        raise DataError(f"File {path} is empty; expected a header row and data.") from None
    except pl.exceptions.PolarsError as error:
        problem = str(error)
        if "utf-8" in problem:
            problem = "it is not UTF-8 text. Save it as UTF-8."
        elif "more fields" in problem:
            problem = "a row has more fields than the header. Put texts that hold the separator into double quotes."
        raise DataError(f"File {path} cannot be read as a table: {problem}") from error
    # so polars renames them
    twice = [name for name in table.columns if name.endswith("_duplicated_0")]
    if twice:
        name = twice[0].removesuffix("_duplicated_0")
        raise DataError(
            f"File {path} has the column {name!r} more than once. Rename or remove all but one."
        )
    if table.is_empty():
        raise DataError(
            f"File {path} has no data rows (columns: {', '.join(table.columns)})."
        )
    return table.rename(lambda column: column.split(":")[0]) if atomic else table


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require(
    right: pl.Series, values: pl.Series, expected: str, file: str, column: str
) -> None:
    """Raise `DataError` at the first value that is not right; a null among `right` counts as false."""
    wrong = (~right.fill_null(False)).arg_true()
    if len(wrong):
        value = values[wrong[0]]
        shown = (
            "empty"
            if value is None or value == ""
            else str(value)
            if values.dtype.is_temporal()
            else repr(value)
        )
        raise DataError(
            f"{file}, row {wrong[0] + 1}: column {column} is {shown}; expected {expected}. {len(wrong):,} of "
            f"{len(values):,} rows are like this; correct or remove them."
        )


def plain_text(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as text, null where it was; a list becomes "a, b"."""
    if isinstance(values.dtype, pl.List) and not values.dtype.inner.is_nested():
        values = values.cast(pl.List(pl.String)).list.join(", ")
    try:
        text = None if values.dtype.is_nested() else values.cast(pl.String)
    except pl.exceptions.PolarsError:  # bytes that are no UTF-8
        text = None
    if text is None:
        raise DataError(
            f"{file}: column {column} has the type {values.dtype}; expected text or numbers, one value a row."
        )
    # mostly a quote that pairs with one in another row, and swallows the rows between
    whole = ~text.str.strip_chars().str.contains("[\n\r]")
    expected = "a text without a line break. A quote that begins there may not be closed"
    require(whole | text.is_null(), text.str.slice(0, 60), expected, file, column)
    return text


def ids(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as text without blanks around it; an empty value is a `DataError`."""
    text = plain_text(values, file, column).str.strip_chars()
    require(text != "", text, f"a {values.name}", file, column)
    return text


def numbers(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as Float64, null where it is no finite number; a column named label may say true and false."""
    if values.dtype.is_temporal() or values.dtype.is_nested() or values.dtype == pl.Binary:
        raise DataError(
            f"{file}: column {column} has the type {values.dtype}; expected numbers."
        )
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if values.dtype == pl.String:
        values = values.str.strip_chars()
        if values.name == "label":
            values = values.str.to_lowercase().replace({"true": "1", "false": "0"})
    found = values.cast(pl.Float64, strict=False)
    return found.set(~found.is_finite(), None)


def finite_numbers(
    values: pl.Series, file: str, column: str, optional: bool = False
) -> pl.Series:
    """`numbers` without nulls (optional: null where `values` are); any other value is a `DataError`."""
    found = numbers(values, file, column)
    expected = "0 or 1, or true or false" if values.name == "label" else "a finite number"
    require(
        found.is_not_null() | (values.is_null() & optional), values, expected, file, column
    )
    return found


def times(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as seconds since 1970, null where it was: dates, typed or as ISO text, or numbers.

    Dates without a zone are UTC. Numbers are in one of `UNITS`, which the size of the largest tells.
    """
    # 1. dates name their moment
    if values.dtype in (pl.Date, pl.Datetime):
        exact = values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values
        moments = exact.dt.epoch("us") / 1e6
        size = pl.repeat(None, len(values), dtype=pl.Float64, eager=True)
    else:
        size = numbers(values, file, column)
        text = values.cast(pl.String)
        dates = text.filter(size.is_null()).drop_nulls().unique()
        seconds_of = {date: moment_of(date) for date in dates}
        moments = text.replace_strict(seconds_of, default=None, return_dtype=pl.Float64)
    # 2. the unit of all numbers
    unit = int(np.digitize(size.abs().max() or 0.0, EDGES))  # type: ignore[arg-type]
    seconds = size / 1000.0**unit
    least = EARLIEST if unit else 0.0
    right = seconds.abs().is_between(least, LATEST) | (moments.abs() < LATEST)
    expected = (
        f"a time up to the year 2286, all rows in one unit ({', '.join(UNITS)} since 1970; the largest number is in "
        f"{UNITS[unit]}), or an ISO date such as 2024-05-17T09:30:00"
    )
    require(right.fill_null(False) | values.is_null(), values, expected, file, column)
    # 3. dates without dashes look like seconds
    if len(size) and size.is_between(*DATES).all() and size.null_count() == 0:
        dates = size.cast(pl.String).str.to_date("%Y%m%d.0", strict=False)
        if dates.is_not_null().all():
            raise DataError(
                f"{file}: column {column} holds dates without dashes, such as {size[0]:.0f} in row 1, which would be "
                f"read as seconds. Write them as {dates[0]}."
            )
    return seconds.fill_null(moments).alias(values.name)


def moment_of(text: str) -> float | None:
    """Seconds since 1970 of an ISO date; None of another text."""
    try:
        moment = datetime.fromisoformat(text.strip().upper())
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
