"""Readers of published dumps, Book-Crossing and Amazon reviews: what they leave out is counted and said."""

import ast
import csv
import gzip
import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from project.data.logs import RAW_SCHEMA, Logs, RawLogs
from project.data.tables import note_file
from project.errors import DataError

REVIEW = {  # our name -> names of 2014 and 2018, and of 2023 (which has asin too: a variant of parent_asin)
    "user_id": ("reviewerID", "user_id"),
    "item_id": ("parent_asin", "asin"),
    "timestamp": ("unixReviewTime", "timestamp"),
    "rating": ("overall", "rating"),
}
PRODUCT = {
    "item_id": ("parent_asin", "asin"),
    "title": ("title",),
    "brand": ("brand", "store"),
    "category": ("category", "categories"),
}


class LeftOut:
    """Counts rows that a reader leaves out, by file and reason, and remembers the first of each."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._first: dict[tuple[str, str], int] = {}

    def add(self, path: Path, reason: str, row: int, count: int = 1) -> None:
        """Rows of a file; `row` (from 1) is the first."""
        self._first.setdefault((path.name, reason), row)
        self._counts[path.name, reason] = self._counts.get((path.name, reason), 0) + count

    def words(self) -> tuple[str, ...]:
        """A line for each file and reason."""
        return tuple(
            f"{file}: {count:,} rows left out, the first is row {self._first[file, reason]}: {reason}"
            for (file, reason), count in self._counts.items()
        )


class BookCrossing(Logs):
    """The original Book-Crossing dump (278,858 users, 271,379 books, 1,149,780 rows), which has no timestamps.

    Rating 0 says that a book was read and not rated: `data.protocol.drop_ratings: [0]` leaves these rows out. Without
    timestamps `data.protocol.split` is random. An item's id is its ISBN; items have title, author, year and publisher.
    Rows with too many or too few fields and ratings of books that BX-Books.csv lacks are left out. It is free for
    research that cites Ziegler et al. (WWW 2005).

    Args:
        folder: Folder with BX-Book-Ratings.csv and BX-Books.csv.
    """

    def __init__(self, folder: str) -> None:
        self.ratings, self.books = Path(folder) / "BX-Book-Ratings.csv", Path(folder) / "BX-Books.csv"

    def read(self) -> RawLogs:
        """Read both files; see `Logs.read`."""
        sums, left_out = dict[str, str](), LeftOut()
        names = {"user_id": "User-ID", "item_id": "ISBN", "rating": "Book-Rating"}
        rows = _semicolons(self.ratings, names, sums, left_out)
        rating = pl.col("rating").cast(pl.Float64, strict=False)
        rows = _kept(
            rows.with_columns(rating), rating.is_not_null(), self.ratings, "its rating is no number", left_out
        )
        names = {"item_id": "ISBN", "title": "Book-Title", "author": "Book-Author"}
        names |= {"year": "Year-Of-Publication", "publisher": "Publisher"}
        books = _semicolons(self.books, names, sums, left_out)
        books = books.with_columns(pl.col("year").replace("0", ""))  # unknown
        return _log(rows, self.ratings, books, self.books, sums, left_out)


class AmazonReviews(Logs):
    """Reviews of one category of the Amazon data sets of 2014, 2018 and 2023 (McAuley's group); fields say which.

    Files have one JSON object a line, of the oldest a Python literal, and may be gzipped. Items have title, brand (of
    2023 the store) and category. Of a user's reviews of one item the earliest is kept. Lines that cannot be read or
    lack a field, and reviews of items without metadata, are left out.

    Args:
        reviews: File of reviews, such as reviews_Beauty_5.json.gz (2014), All_Beauty.json.gz (2018) or
            All_Beauty.jsonl.gz (2023).
        metadata: File of the same category's items, such as meta_Beauty.json.gz.
    """

    def __init__(self, reviews: str, metadata: str) -> None:
        self.reviews, self.metadata = Path(reviews), Path(metadata)

    def read(self) -> RawLogs:
        """Read both files; see `Logs.read`."""
        sums, left_out = dict[str, str](), LeftOut()
        rows = _records(self.reviews, REVIEW, tuple(REVIEW), sums, left_out)
        numbers = pl.col("timestamp", "rating").cast(pl.Float64, strict=False)
        present = pl.all_horizontal(pl.col("timestamp", "rating").is_not_null())
        reason = "its time or rating is no number"
        rows = _kept(rows.with_columns(numbers), present, self.reviews, reason, left_out)
        rows = rows.sort("timestamp", maintain_order=True)
        first = pl.struct("user_id", "item_id").is_first_distinct()
        rows = _kept(rows, first, self.reviews, "a later review of the same item by the same user", left_out)
        items = _records(self.metadata, PRODUCT, ("item_id",), sums, left_out)
        scripts = pl.col("title").str.contains(
            "getTime", literal=True
        )  # of 2018: a page's script in place of a title
        items = _kept(items, ~scripts, self.metadata, "its title is a script", left_out)
        return _log(rows.sort("source_row"), self.reviews, items, self.metadata, sums, left_out)


def _semicolons(path: Path, names: dict[str, str], sums: dict[str, str], left_out: LeftOut) -> pl.DataFrame:
    """Columns under our names, and source_row, of a latin-1 table: semicolons, quotes escaped by a backslash, &amp;."""
    note_file(path, sums)
    found, header = [], list[str]()
    with path.open(encoding="latin-1") as lines:
        for row, line in enumerate(lines):
            fields = next(csv.reader([line], delimiter=";", escapechar="\\", doublequote=False), [])
            if row == 0:
                header = fields
                if absent := [name for name in names.values() if name not in header]:
                    raise DataError(f"{path}: no column {absent[0]}; there are {', '.join(header)}.")
            elif len(fields) != len(header):
                left_out.add(path, f"it does not have {len(header)} fields", row)
            else:
                found.append([row, *(html.unescape(fields[header.index(name)]) for name in names.values())])
    schema = {"source_row": pl.Int64, **dict.fromkeys(names, pl.String)}
    return pl.DataFrame(found, schema=schema, orient="row")


def _records(
    path: Path,
    names: Mapping[str, tuple[str, ...]],
    needed: tuple[str, ...],
    sums: dict[str, str],
    left_out: LeftOut,
) -> pl.DataFrame:
    """Fields under our names as text, and source_row, of a file with one object a line; what is `needed` is there."""
    note_file(path, sums)
    found, seen = [], list[str]()
    for row, record in enumerate(_objects(path), 1):
        if record is None:
            left_out.add(path, "it is no object", row)
            continue
        values = {
            ours: _text(next((record[n] for n in theirs if n in record), ""))
            for ours, theirs in names.items()
        }
        if absent := [name for name in needed if not values[name]]:
            seen = seen or list(record)
            left_out.add(path, f"it has no {' or '.join(names[absent[0]])}", row)
        else:
            found.append([row, *values.values()])
    if not found:
        fields = ", ".join(" or ".join(names[name]) for name in needed)
        raise DataError(f"{path}: no line has {fields}; the first object has {', '.join(seen) or 'nothing'}.")
    schema = {"source_row": pl.Int64, **dict.fromkeys(names, pl.String)}
    return pl.DataFrame(found, schema=schema, orient="row")


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line; None where a line is none."""
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as lines
    ):
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                try:
                    record = ast.literal_eval(line.strip())
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    record = None
            yield record if isinstance(record, dict) else None


def _text(value: Any) -> str:
    """One line of text; of a list (of lists) each value once."""
    if isinstance(value, list):
        parts = [part for entry in value for part in (entry if isinstance(entry, list) else [entry])]
        return ", ".join(dict.fromkeys(text for text in map(_text, parts) if text))
    return "" if value is None else " ".join(html.unescape(str(value)).split())


def _kept(table: pl.DataFrame, keep: pl.Expr, path: Path, reason: str, left_out: LeftOut) -> pl.DataFrame:
    """The rows to keep; the others are counted."""
    gone = table.filter(~keep)
    if not gone.is_empty():
        left_out.add(path, reason, int(gone["source_row"].min()), gone.height)  # type: ignore[arg-type]
    return table.filter(keep)


def _log(
    rows: pl.DataFrame,
    log: Path,
    items: pl.DataFrame,
    catalogue: Path,
    sums: dict[str, str],
    left_out: LeftOut,
) -> RawLogs:
    """The log of rows whose items are listed; of an item that is listed again the first row counts."""
    again = "it lists an item again"
    items = _kept(items, pl.col("item_id").is_first_distinct(), catalogue, again, left_out)
    listed = pl.col("item_id").is_in(items["item_id"].implode())
    rows = _kept(rows, listed, log, f"its item is not in {catalogue.name}", left_out)
    absent = [pl.lit(None, kind).alias(name) for name, kind in RAW_SCHEMA.items() if name not in rows.columns]
    interactions = rows.with_columns(absent).with_columns(source_file=pl.lit(str(log))).select(*RAW_SCHEMA)
    return RawLogs(interactions, items.drop("source_row"), sums, left_out=left_out.words())
