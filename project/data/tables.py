"""Tables of text in, typed columns out, or one error that names file, row and column."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from project.errors import DataError

MILLISECONDS = 1e11  # as seconds the year 5138, as milliseconds 1973
DATES = (19_000_101, 21_001_231)  # as digits; as seconds August and September 1970


def note_file(path: Path, sums: dict[str, str]) -> None:
    """Make sure that a file is there, and add its SHA-256 to `sums` under its name."""
    if not path.is_file():
        raise DataError(f"File {path} does not exist (looked for it from {Path.cwd()}).")
    with path.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
    sums[path.name if path.name not in sums else str(path)] = checksum


def read_table(path: Path, sums: dict[str, str]) -> pl.DataFrame:
    """A .csv, .tsv, .parquet or RecBole (.inter, .item) file; adds its SHA-256 to `sums` under its name."""
    kind = path.suffix.lower()
    note_file(path, sums)
    if kind not in (".csv", ".tsv", ".parquet", ".inter", ".item"):
        raise DataError(f"File {path} has the suffix {kind!r}; expected .csv, .tsv or .parquet.")
    atomic = kind in (".inter", ".item")  # quotes are plain characters, and headers have types: user_id:token
    try:
        if kind == ".parquet":
            table = pl.read_parquet(path, glob=False)
        else:
            separator, quote = "," if kind == ".csv" else "\t", None if atomic else '"'
            table = pl.read_csv(path, separator=separator, quote_char=quote, infer_schema=False, glob=False)
    except pl.exceptions.NoDataError:
        raise DataError(f"File {path} is empty; expected a header row and data.") from None
    except pl.exceptions.PolarsError as error:
        problem = str(error)
        if "utf-8" in problem:
            problem = "it is not UTF-8 text. Save it as UTF-8."
        elif "more fields" in problem:
            problem = (
                "a row has more fields than the header. Put texts that hold the separator into double quotes."
            )
        raise DataError(f"File {path} cannot be read as a table: {problem}") from error
    twice = [name for name in table.columns if name.endswith("_duplicated_0")]  # so polars renames them
    if twice:
        name = twice[0].removesuffix("_duplicated_0")
        raise DataError(f"File {path} has the column {name!r} more than once. Rename or remove all but one.")
    if table.is_empty():
        raise DataError(f"File {path} has no data rows (columns: {', '.join(table.columns)}).")
    return table.rename(lambda column: column.split(":")[0]) if atomic else table


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
    broken = text.str.strip_chars().str.contains("[\n\r]").arg_true()
    if len(broken):  # mostly a quote that pairs with one in another row, and swallows the rows between
        raise DataError(
            f"{file}, row {broken[0] + 1}: column {column} holds a line break: {text[broken[0]][:60]!r} "
            f"({len(broken):,} such rows). Close the quote that begins there and double quotes inside a text, or "
            "replace the line break."
        )
    return text


def ids(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as text without blanks around it; an empty value is a `DataError`."""
    text = plain_text(values, file, column).str.strip_chars()
    empty = (text.is_null() | (text == "")).arg_true()
    if len(empty):
        raise DataError(
            f"{file}, row {empty[0] + 1}: column {column} is empty ({len(empty):,} such rows); every row needs a "
            f"{values.name}. Fill it in, or remove the row."
        )
    return text


def numbers(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as Float64, null where it is no finite number.

    A column named timestamp may hold dates, typed or as ISO text (UTC where it names no zone): they become seconds
    since 1970. One named label may say true and false.
    """
    dates = values.name == "timestamp" and values.dtype in (pl.Date, pl.Datetime)
    if not dates and (values.dtype.is_temporal() or values.dtype.is_nested() or values.dtype == pl.Binary):
        raise DataError(f"{file}: column {column} has the type {values.dtype}; expected numbers.")
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if dates:
        exact = values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values
        found = exact.dt.epoch("us") / 1e6
    elif values.dtype == pl.String:
        text = values.str.strip_chars().str.to_lowercase()
        found = text.cast(pl.Float64, strict=False)
        worded = {"true": 1.0, "false": 0.0} if values.name == "label" else {}
        if values.name == "timestamp":
            worded = _seconds_of_dates(text.filter(found.is_null()).drop_nulls().unique().to_list())
        if worded:
            found = found.fill_null(text.replace_strict(worded, default=None, return_dtype=pl.Float64))
    else:
        found = values.cast(pl.Float64, strict=False)
    return found.set(~found.is_finite(), None).cast(pl.Float64)


def _seconds_of_dates(texts: list[str]) -> dict[str, float]:
    found = {}
    for text in texts:
        try:
            moment = datetime.fromisoformat(text.upper())
        except ValueError:
            continue
        found[text] = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return found


def finite_number(values: pl.Series, file: str, column: str, optional: bool = False) -> pl.Series:
    """`numbers` without nulls (optional: null where `values` are); any other value is a `DataError`."""
    found = numbers(values, file, column)
    wrong = (found.is_null() & values.is_not_null() if optional else found.is_null()).arg_true()
    if len(wrong):
        value = values[wrong[0]]
        expected = {
            "timestamp": "a finite number (seconds, or an ISO date such as 2024-05-17T09:30:00)",
            "label": "0 or 1, or true or false",
        }.get(values.name, "a finite number")
        raise DataError(
            f"{file}, row {wrong[0] + 1}: column {column} is {'empty' if value is None else repr(value)}; expected "
            f"{expected}. {len(wrong):,} of {len(values):,} rows are like this; correct or remove them."
        )
    return found


def seconds(times: pl.Series, file: str, column: str) -> pl.Series:
    """Float64 times as seconds since 1970; milliseconds are divided by 1,000, mixed columns and 20240517 refused."""
    large = times.abs() >= MILLISECONDS
    if large.any() and not large.all():
        row, other = large.arg_true()[0], (~large).arg_true()[0]
        raise DataError(
            f"{file}: column {column} mixes seconds and milliseconds: row {other + 1} is {times[other]:.15g}, row "
            f"{row + 1} is {times[row]:.15g} ({large.sum():,} of {len(times):,} rows are like this). Give all rows "
            "the same unit."
        )
    if not times.is_empty() and times.is_between(*DATES).all():
        dates = times.cast(pl.String).str.to_date("%Y%m%d.0", strict=False)
        if dates.is_not_null().all():
            raise DataError(
                f"{file}: column {column} holds dates without dashes, such as {times[0]:.0f} in row 1, which would be "
                f"read as seconds. Write them as {dates[0]}."
            )
    return times / 1000 if large.any() else times


def refuse(values: pl.Series, allowed: Sequence[float] | Sequence[str], file: str, column: str) -> None:
    """Raise `DataError` at the first value that is neither null nor one of `allowed`."""
    wrong = (~values.is_in(pl.Series(allowed, dtype=values.dtype).implode())).fill_null(False).arg_true()
    if len(wrong):
        raise DataError(
            f"{file}, row {wrong[0] + 1}: column {column} is {values[wrong[0]]!r} ({len(wrong):,} such rows); "
            f"allowed are {', '.join(map(str, allowed))}."
        )
