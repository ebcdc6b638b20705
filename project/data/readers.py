"""Readers: files of a log become `RawLogs`, one typed table of interactions and one of items.

To add a data set write one class here (or in your own package) and name it in YAML:
`logs: {class_path: project.data.readers.TableLogs, init_args: {interactions: log.parquet, items:
items.csv}}`. Unusual: every column of a text file is read as text and converted here, so that an error can
name file, row, column and value.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from project.data.columns import finite_number, nonempty_text, plain_text, refuse
from project.data.sources import fetch
from project.errors import DataError

GIVEN_SPLITS = ("history", "train", "valid", "test")
RAW_SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,
    "timestamp": pl.Float64,
    "rating": pl.Float64,
    "label": pl.Int8,
    "split": pl.String,
    "source_file": pl.String,
    "source_row": pl.Int64,
}


@dataclass(frozen=True)
class RawLogs:
    """A log as read, in file order.

    Attributes:
        interactions: Columns of `RAW_SCHEMA`: ids, `timestamp` (seconds), `rating`, `label` (0 or 1) and
            `split` (one of `GIVEN_SPLITS`), null where the log does not have them; `source_file` and
            `source_row` (the data row in that file, from 1) are for messages.
        items: `item_id` (unique), `title`, then attributes; all String, "" = unknown.
        files: File name -> SHA-256, in reading order.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    files: dict[str, str]


class Logs(ABC):
    """A log of interactions with its items: what `data.logs` in YAML names."""

    @abstractmethod
    def read(self) -> RawLogs:
        """Read and check the files.

        Raises:
            DataError: A file, row, column or value is not usable; the message says which and what fixes it.
        """


class TableLogs(Logs):
    """Your own log: CSV or Parquet tables.

    Args:
        interactions: One file (.csv, .tsv or .parquet), or one file per split, such as {train: a.csv, valid:
            b.csv, test: c.csv}; a `history` file is past that is only ever context. Needs user_id, item_id,
            timestamp (seconds, or dates in ISO format; without a zone they are UTC) and a rating or a 0/1
            label.
        items: Table of items with item_id and title; every other column is an attribute.
        columns: Our column name -> the name in your interactions, for user_id, item_id, timestamp, rating,
            label, split.
        item_columns: Our name -> the name in your items, for item_id, title and any attribute.
    """

    def __init__(
        self,
        interactions: str | dict[str, str],
        items: str,
        columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
    ) -> None:
        if isinstance(interactions, dict):
            unknown = sorted(set(interactions) - set(GIVEN_SPLITS))
            if unknown or not interactions:
                raise DataError(
                    f"data.logs.init_args.interactions names the splits {', '.join(unknown) or '(none)'}; "
                    f"allowed are {', '.join(GIVEN_SPLITS)}."
                )
            self.parts: dict[str | None, str] = {
                split: interactions[split] for split in GIVEN_SPLITS if split in interactions
            }
        else:
            self.parts = {None: interactions}
        self.items = items
        self.columns = columns or {}
        self.item_columns = item_columns or {}

    def read(self) -> RawLogs:
        """Read all files; see `Logs.read`."""
        files = _Files()
        parts = []
        for split, name in self.parts.items():
            table = files.table(Path(name), _parse_table)
            parts.append(_interactions(table, name, self.columns, split))
        items = _items(files.table(Path(self.items), _parse_table), self.items, self.item_columns)
        return _checked(pl.concat(parts), items, self.items, files.sums)


class RecBoleLogs(Logs):
    """A data set in RecBole's atomic files: tab-separated, with typed headers such as `user_id:token`.

    Args:
        folder: Folder with <name>.inter and <name>.item.
        name: Common name of the files. Null: the name of the folder.
        columns: Our column name -> the name in the .inter file (without its type), for user_id, item_id,
            timestamp, rating, label, split.
        item_columns: Our name -> the name in the .item file, for item_id, title and any attribute.
    """

    def __init__(
        self,
        folder: str,
        name: str | None = None,
        columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = name or self.folder.resolve().name
        self.columns = columns or {}
        self.item_columns = item_columns or {}

    def read(self) -> RawLogs:
        """Read both files; see `Logs.read`."""
        files = _Files()
        inter, item = (self.folder / f"{self.name}.{kind}" for kind in ("inter", "item"))
        interactions = _interactions(files.table(inter, _parse_atomic), inter.name, self.columns)
        items = _items(files.table(item, _parse_atomic), item.name, self.item_columns)
        return _checked(interactions, items, item.name, files.sums)


class MovieLens100K(RecBoleLogs):
    """MovieLens 100K (943 users, 1,682 films, 100,000 ratings), fetched on first use.

    It has its own licence: research use, no redistribution.
    """

    def __init__(self) -> None:
        super().__init__(
            "", "ml-100k", item_columns={"title": "movie_title", "year": "release_year", "genres": "class"}
        )

    def read(self) -> RawLogs:
        """Fetch the files where they are not yet here, and read them; see `Logs.read`."""
        self.folder = fetch("ml-100k")
        return super().read()


class _Files:
    """Reads files and keeps their checksums by name."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    def table(self, path: Path, parse: Callable[[Path], pl.DataFrame]) -> pl.DataFrame:
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


def _parse_table(path: Path) -> pl.DataFrame:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return pl.read_parquet(path)
    if kind in (".csv", ".tsv"):
        return pl.read_csv(path, separator="," if kind == ".csv" else "\t", infer_schema=False)
    raise DataError(f"File {path} has the suffix {kind!r}; expected .csv, .tsv or .parquet.")


def _parse_atomic(path: Path) -> pl.DataFrame:
    table = pl.read_csv(path, separator="\t", infer_schema=False, quote_char=None)
    return table.rename(lambda column: column.split(":")[0])


def _renamed(
    table: pl.DataFrame, file: str, names: Mapping[str, str], needed: tuple[str, ...], key: str
) -> pl.DataFrame:
    """The table under our names; if one that is mapped or needed is absent, the error lists what is there."""
    wanted = {name: name for name in needed} | dict(names)
    missing = [f"{theirs} (our {ours})" for ours, theirs in wanted.items() if theirs not in table.columns]
    if missing:
        raise DataError(
            f"{file}: no column {', '.join(missing)}; there are {', '.join(table.columns)}. Name yours under "
            f"data.logs.init_args.{key}, for example {key}: {{{needed[0]}: {table.columns[0]}}}."
        )
    used = {*wanted, *wanted.values()}  # their column is not read where another one is mapped to its name
    mapped = [pl.col(theirs).alias(ours) for ours, theirs in wanted.items()]
    return table.select(*mapped, *(column for column in table.columns if column not in used))


def _interactions(
    table: pl.DataFrame, file: str, columns: Mapping[str, str], split: str | None = None
) -> pl.DataFrame:
    """The columns of `RAW_SCHEMA`, checked; `split` is the whole file's where there is one file per split."""
    allowed = ("user_id", "item_id", "timestamp", "rating", "label", "split")
    unknown = sorted(set(columns) - set(allowed))
    if unknown:
        raise DataError(
            f"data.logs.init_args.columns maps {', '.join(unknown)}; our names are {', '.join(allowed)}."
        )
    table = _renamed(table, file, columns, allowed[:3], "columns")
    if not {"rating", "label"} & set(table.columns):
        raise DataError(
            f"{file}: no column rating and no column label; there are {', '.join(table.columns)}. Name yours "
            "under data.logs.init_args.columns, for example columns: {rating: stars}."
        )
    theirs = {ours: columns.get(ours, ours) for ours in allowed}
    table = table.with_columns(
        nonempty_text(table["user_id"], file, theirs["user_id"]),
        nonempty_text(table["item_id"], file, theirs["item_id"]),
    )
    for name in ("timestamp", "rating", "label"):
        if name in table.columns:
            table = table.with_columns(finite_number(table[name], file, theirs[name]))
        else:
            table = table.with_columns(pl.lit(None, RAW_SCHEMA[name]).alias(name))
    refuse(table["label"], [0, 1], file, theirs["label"])
    if split is not None or "split" not in table.columns:
        table = table.with_columns(pl.lit(split, pl.String).alias("split"))
    table = table.with_columns(pl.col("split").cast(pl.String))
    refuse(table["split"], GIVEN_SPLITS, file, theirs["split"])
    located = table.with_row_index("source_row", offset=1).with_columns(source_file=pl.lit(file))
    return located.select(pl.col(name).cast(kind) for name, kind in RAW_SCHEMA.items())


def _items(table: pl.DataFrame, file: str, columns: Mapping[str, str]) -> pl.DataFrame:
    table = _renamed(table, file, columns, ("item_id", "title"), "item_columns")
    if "item" in table.columns:
        raise DataError(
            f"{file}: the attribute name item is used by the project. Map it to another name under "
            "data.logs.init_args.item_columns, for example item_columns: {kind: item}."
        )
    table = table.with_columns(
        nonempty_text(table[name], file, columns.get(name, name)) for name in ("item_id", "title")
    )
    table = table.with_columns(plain_text(table[name], file) for name in table.columns).fill_null("")
    titles = table.group_by("item_id", maintain_order=True).agg(pl.col("title").unique(maintain_order=True))
    twice = titles.filter(pl.col("title").list.len() > 1)
    if not twice.is_empty():
        shown = " and ".join(repr(title) for title in twice["title"][0])
        raise DataError(
            f"{file}: item {twice['item_id'][0]} is listed with the titles {shown} ({twice.height:,} such "
            "items); keep one row per item."
        )
    attributes = [name for name in table.columns if name not in ("item_id", "title")]
    return table.unique("item_id", keep="first", maintain_order=True).select("item_id", "title", *attributes)


def _checked(
    interactions: pl.DataFrame, items: pl.DataFrame, items_file: str, sums: dict[str, str]
) -> RawLogs:
    absent = interactions.filter(~pl.col("item_id").is_in(items["item_id"].implode()))
    if not absent.is_empty():
        raise DataError(
            f"{absent['source_file'][0]}, row {absent['source_row'][0]}: item {absent['item_id'][0]} is not "
            f"in {items_file} ({absent.height:,} rows, {absent['item_id'].n_unique():,} items). Add the "
            "items, or remove the rows."
        )
    return RawLogs(interactions, items, sums)
