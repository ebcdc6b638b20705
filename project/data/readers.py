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

from project.data.logs import Logs, RawLogs
from project.data.tables import note_file
from project.errors import DataError

Names = Mapping[str, tuple[str, ...]]  # our name -> a file's names, of which a row has one

RATED = {"user_id": ("User-ID",), "item_id": ("ISBN",), "rating": ("Book-Rating",)}
BOOK = {
    "item_id": ("ISBN",),
    "title": ("Book-Title",),
    "author": ("Book-Author",),
    "year": ("Year-Of-Publication",),
    "publisher": ("Publisher",),
}
# names of 2014 and 2018, and of 2023 (which has asin too: a variant of parent_asin)
REVIEW = {
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


class Dump:
    """Two files of a dump as they become a log; rows that are left out are counted by file and reason."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}  # name -> SHA-256
        # file, reason -> the first row left out, from 1, and how many
        self.left_out: dict[tuple[str, str], list[int]] = {}
        self.not_read: list[str] = []  # fields of the log's first row

    def leave_out(self, path: Path, reason: str, row: int, count: int = 1) -> None:
        """Count rows of a file; `row` (from 1) is the first."""
        self.left_out.setdefault((path.name, reason), [row, 0])[1] += count

    def kept(
        self, table: pl.DataFrame, keep: pl.Expr, path: Path, reason: str
    ) -> pl.DataFrame:
        """The rows to keep; the others are counted."""
        gone = table.filter(~keep)
        if not gone.is_empty():
            self.leave_out(path, reason, gone["source_row"].min(), gone.height)  # type: ignore[arg-type]
        return table.filter(keep)

    def table(self, path: Path, names: Names, needed: tuple[str, ...]) -> pl.DataFrame:
        """Fields of a file under our names as text, and source_row; rows that lack a `needed` one are left out."""
        note_file(path, self.files)
        fields = list[str]()  # of the first row
        found = []
        records = _semicolons(path) if path.suffix == ".csv" else _objects(path)
        for row, record in enumerate(records, 1):
            if isinstance(record, str):
                self.leave_out(path, record, row)
                continue
            fields = fields or list(record)
            values = [
                _text(next((record[n] for n in theirs if n in record), ""))
                for theirs in names.values()
            ]
            absent = [
                ours
                for ours, value in zip(names, values, strict=True)
                if ours in needed and not value
            ]
            if absent:
                self.leave_out(path, f"it has no {' or '.join(names[absent[0]])}", row)
            else:
                found.append([row, *values])
        if not found:
            expected = ", ".join(" or ".join(names[name]) for name in needed)
            raise DataError(
                f"{path}: no row has {expected}; the first has {', '.join(fields) or 'nothing'}."
            )
        if "user_id" in names:
            read = {name for theirs in names.values() for name in theirs}
            self.not_read = [name for name in fields if name not in read]
        schema = {"source_row": pl.Int64, **dict.fromkeys(names, pl.String)}
        return pl.DataFrame(found, schema=schema, orient="row")

    def log(
        self, rows: pl.DataFrame, log: Path, items: pl.DataFrame, catalogue: Path
    ) -> RawLogs:
        """The log of rows whose items are listed; of an item that is listed again the first row counts."""
        items = self.kept(
            items,
            pl.col("item_id").is_first_distinct(),
            catalogue,
            "it lists an item again",
        )
        listed = pl.col("item_id").is_in(items["item_id"].implode())
        rows = self.kept(rows, listed, log, f"its item is not in {catalogue.name}")
        left_out = tuple(
            f"{file}: {count:,} rows left out, the first is row {first}: {reason}"
            for (file, reason), (first, count) in self.left_out.items()
        )
        return RawLogs(
            rows.with_columns(source_file=pl.lit(str(log))),
            items.drop("source_row"),
            self.files,
            left_out=left_out,
            not_read=tuple(self.not_read),
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
        self.ratings = Path(folder) / "BX-Book-Ratings.csv"
        self.books = Path(folder) / "BX-Books.csv"

    def read(self) -> RawLogs:
        """Read both files; see `Logs.read`."""
        dump = Dump()
        # 1. ratings that are numbers
        rows = dump.table(self.ratings, RATED, tuple(RATED))
        rows = rows.with_columns(pl.col("rating").cast(pl.Float64, strict=False))
        rows = dump.kept(
            rows, pl.col("rating").is_not_null(), self.ratings, "its rating is no number"
        )
        # 2. books; the year 0 is unknown
        books = dump.table(self.books, BOOK, ("item_id",))
        books = books.with_columns(pl.col("year").replace("0", ""))
        return dump.log(rows, self.ratings, books, self.books)


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
        self.reviews = Path(reviews)
        self.metadata = Path(metadata)

    def read(self) -> RawLogs:
        """Read both files; see `Logs.read`."""
        dump = Dump()
        # 1. reviews with a time and a rating
        rows = dump.table(self.reviews, REVIEW, tuple(REVIEW))
        rows = rows.with_columns(
            pl.col("timestamp", "rating").cast(pl.Float64, strict=False)
        )
        present = pl.all_horizontal(pl.col("timestamp", "rating").is_not_null())
        rows = dump.kept(rows, present, self.reviews, "its time or rating is no number")
        # 2. the earliest of a user and an item
        rows = rows.sort("timestamp", maintain_order=True)
        first = pl.struct("user_id", "item_id").is_first_distinct()
        rows = dump.kept(
            rows, first, self.reviews, "a later review of the same item by the same user"
        )
        # 3. items; of 2018 some have a page's script in place of a title
        items = dump.table(self.metadata, PRODUCT, ("item_id",))
        scripts = pl.col("title").str.contains("getTime", literal=True)
        items = dump.kept(items, ~scripts, self.metadata, "its title is a script")
        return dump.log(rows.sort("source_row"), self.reviews, items, self.metadata)


def _semicolons(path: Path) -> Iterator[dict[str, str] | str]:
    r"""Each row of a latin-1 table with a header, quotes escaped by \; of a broken one, why it is left out."""
    header = list[str]()
    with path.open(encoding="latin-1") as lines:
        for line in lines:
            fields = next(
                csv.reader([line], delimiter=";", escapechar="\\", doublequote=False), []
            )
            if not header:
                header = fields
            elif len(fields) == len(header):
                yield dict(zip(header, fields, strict=True))
            else:
                yield f"it does not have {len(header)} fields"


def _objects(path: Path) -> Iterator[dict[str, Any] | str]:
    """The object of each line, JSON or a Python literal; of another line, why it is left out."""
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                try:
                    record = ast.literal_eval(line.strip())
                except (ValueError, SyntaxError, MemoryError, RecursionError):
                    record = None
            yield record if isinstance(record, dict) else "it is no object"


def _text(value: Any) -> str:
    """One line of text; of a list (of lists) each value once."""
    if isinstance(value, list):
        parts = [
            part
            for entry in value
            for part in (entry if isinstance(entry, list) else [entry])
        ]
        return ", ".join(dict.fromkeys(text for text in map(_text, parts) if text))
    return "" if value is None else " ".join(html.unescape(str(value)).split())
