"""Tables: files of a log as they are read, with their checksums.

Unusual here: every column of a text file stays text, so that whoever converts it can name row, column and value; and a
row that is too long is looked for a second time, line by line, since the fast reader does not say where it is.
"""

import csv
import hashlib
from collections.abc import Callable
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
