"""Readers: interactions and items in memory, checked, whatever their file."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from project.data.download import fetch
from project.data.tables import (
    Files,
    finite_number,
    ids,
    parse_atomic,
    parse_table,
    plain_text,
    refuse,
    seconds,
)
from project.errors import DataError

MAPPING = "names of columns"  # among RawLogs.files
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
        items: `item_id` (unique), `title`, then attributes; all String, "" = unknown. An item without a title
            gets its id as title (`project.data.logs.checked`).
        files: File name -> SHA-256, in reading order, and under a name of its own a digest of whatever else decides
            what is made of them: the protocol's hash and all caches rest on it.
        unread: rating or label -> why it is null although the log has it. Only where the log has both, for a
            protocol needs one; it is an error once the protocol needs this one.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    files: dict[str, str]
    unread: dict[str, str] = field(default_factory=dict)


class Logs(ABC):
    """A log of interactions with its items: what `data.logs` in YAML names."""

    @abstractmethod
    def read(self) -> RawLogs:
        """Read the files.

        What it returns is checked by `project.data.logs.checked`, so a reader of your own need not.

        Raises:
            DataError: A file, row, column or value is not usable; the message says which and what fixes it.
        """


class TableLogs(Logs):
    """Your own log: CSV or Parquet tables.

    Args:
        interactions: One file (.csv, .tsv or .parquet), or one file per split, such as {train: a.csv, valid:
            b.csv, test: c.csv}; a `history` file is past that is only ever context. Needs user_id, item_id,
            timestamp (seconds or milliseconds since 1970, or dates in ISO format; without a zone they are UTC)
            and a rating or a 0/1 label.
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
        files = Files()
        parts, unread = [], dict[str, str]()
        for split, name in self.parts.items():
            table = files.table(Path(name), parse_table)
            part, problems = _interactions(table, name, self.columns, split)
            parts.append(part)
            unread = problems | unread
        items = _items(files.table(Path(self.items), parse_table), self.items, self.item_columns)
        raw = RawLogs(pl.concat(parts), items, files.sums, unread)
        refuse_unknown_items(raw, self.items)
        return _mapped(raw, self.columns, self.item_columns)


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
        return _mapped(self._atomic(), self.columns, self.item_columns)

    def _atomic(self) -> RawLogs:
        files = Files()
        inter, item = (self.folder / f"{self.name}.{kind}" for kind in ("inter", "item"))
        interactions, unread = _interactions(files.table(inter, parse_atomic), inter.name, self.columns)
        items = _items(files.table(item, parse_atomic), item.name, self.item_columns)
        raw = RawLogs(interactions, items, files.sums, unread)
        refuse_unknown_items(raw, item.name)
        return raw


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
        return self._atomic()  # its mapping is always the same: the hash is that of the files alone


class MovieLensLatestSmall(TableLogs):
    """MovieLens latest-small of 2016 (671 users, 9,066 films, 100,004 ratings), fetched on first use.

    Items have title, year and genres; five have no title, their id stands for it. It has its own licence: research use,
    no redistribution.
    """

    def __init__(self) -> None:
        super().__init__(
            "ratings.csv",
            "movies.csv",
            columns={"user_id": "userId", "item_id": "movieId"},
            item_columns={"item_id": "movieId"},
        )

    def read(self) -> RawLogs:
        """Fetch the files where they are not yet here, and read them; see `Logs.read`."""
        folder = fetch("ml-latest-small")
        self.parts, self.items = {None: str(folder / "ratings.csv")}, str(folder / "movies.csv")
        return super().read()


def _mapped(raw: RawLogs, columns: Mapping[str, str], item_columns: Mapping[str, str]) -> RawLogs:
    """With the mapping among its `files`: the same file read by other columns is another log."""
    if not columns and not item_columns:
        return raw
    text = json.dumps([dict(columns), dict(item_columns)], sort_keys=True)
    return replace(raw, files=raw.files | {MAPPING: hashlib.sha256(text.encode()).hexdigest()})


def _renamed(
    table: pl.DataFrame, file: str, names: Mapping[str, str], needed: tuple[str, ...], key: str
) -> pl.DataFrame:
    """The table under our names; if one that is mapped or needed is absent, the error lists what is there."""
    wanted = {name: name for name in needed} | dict(names)
    missing = [f"{theirs} (our {ours})" for ours, theirs in wanted.items() if theirs not in table.columns]
    if missing:
        absent = next(ours for ours, theirs in wanted.items() if theirs not in table.columns)
        raise DataError(
            f"{file}: no column {', '.join(missing)}; there are {', '.join(table.columns)}. Name yours under "
            f"data.logs.init_args.{key}, for example {key}: {{{absent}: <your column>}}."
        )
    used = {*wanted, *wanted.values()}  # their column is not read where another one is mapped to its name
    mapped = [pl.col(theirs).alias(ours) for ours, theirs in wanted.items()]
    return table.select(*mapped, *(column for column in table.columns if column not in used))


def _interactions(
    table: pl.DataFrame, file: str, columns: Mapping[str, str], split: str | None = None
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The columns of `RAW_SCHEMA`, checked, and `RawLogs.unread`.

    Args:
        table: As read.
        file: Its name, for messages.
        columns: Our name -> theirs.
        split: That of the whole file, where there is one file per split.
    """
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
            "under data.logs.init_args.columns, for example columns: {rating: stars}. A log of clicks alone needs a "
            "column label: 1, and rows with 0 for what was shown and not clicked, or for negatives of your own."
        )
    theirs = {ours: columns.get(ours, ours) for ours in allowed}
    table = table.with_columns(
        ids(table["user_id"], file, theirs["user_id"]),
        ids(table["item_id"], file, theirs["item_id"]),
    )
    times = finite_number(table["timestamp"], file, theirs["timestamp"])
    table = table.with_columns(seconds(times, file, theirs["timestamp"]))
    there = [name for name in ("rating", "label") if name in table.columns]
    unread = dict[str, str]()
    for name in ("rating", "label"):
        answers = pl.Series(name, [None] * table.height, RAW_SCHEMA[name])
        try:
            answers = _answers(table[name], file, theirs[name]) if name in there else answers
        except DataError as error:
            if len(there) == 1:
                raise
            unread[name] = str(error)
        table = table.with_columns(answers)
    if split is not None or "split" not in table.columns:
        table = table.with_columns(pl.lit(split, pl.String).alias("split"))
    table = table.with_columns(pl.col("split").cast(pl.String))
    refuse(table["split"], GIVEN_SPLITS, file, theirs["split"])
    located = table.select(allowed).with_row_index("source_row", offset=1)  # the log may have such a column
    located = located.with_columns(source_file=pl.lit(file))
    return located.select(pl.col(name).cast(kind) for name, kind in RAW_SCHEMA.items()), unread


def _answers(values: pl.Series, file: str, column: str) -> pl.Series:
    numbers = finite_number(values, file, column)
    if values.name == "label":
        refuse(numbers, [0, 1], file, column)
    return numbers


def _items(table: pl.DataFrame, file: str, columns: Mapping[str, str]) -> pl.DataFrame:
    table = _renamed(table, file, columns, ("item_id", "title"), "item_columns")
    if "item" in table.columns:
        raise DataError(
            f"{file}: the attribute name item is used by the project. Map it to another name under "
            "data.logs.init_args.item_columns, for example item_columns: {kind: item}."
        )
    table = table.with_columns(ids(table["item_id"], file, columns.get("item_id", "item_id")))
    table = table.with_columns(plain_text(table[name], file) for name in table.columns).fill_null("")
    titles = table.group_by("item_id", maintain_order=True).agg(pl.col("title").unique(maintain_order=True))
    twice = titles.filter(pl.col("title").list.len() > 1)
    if not twice.is_empty():
        shown = " and ".join(repr(title) for title in twice["title"][0])
        raise DataError(
            f"{file}: item {twice['item_id'][0]!r} is listed with the titles {shown} ({twice.height:,} such "
            "items); keep one row per item."
        )
    attributes = [name for name in table.columns if name not in ("item_id", "title")]
    return table.unique("item_id", keep="first", maintain_order=True).select("item_id", "title", *attributes)


def refuse_unknown_items(raw: RawLogs, where: str) -> None:
    """Raise `DataError` for an interaction whose item has no row.

    Args:
        raw: The log.
        where: What its items are called in the message.
    """
    absent = raw.interactions.filter(~pl.col("item_id").is_in(raw.items["item_id"].implode()))
    if not absent.is_empty():
        raise DataError(
            f"{absent['source_file'][0]}, row {absent['source_row'][0]}: item {absent['item_id'][0]!r} is not "
            f"in {where} ({absent.height:,} rows, {absent['item_id'].n_unique():,} items). Add the "
            "items, or remove the rows."
        )


_INTERACTIONS, _ITEMS = "the reader's interactions", "the reader's items"
_FIX = "Mend read() of the class that data.logs names."


def checked(raw: RawLogs) -> RawLogs:
    """The logs with the types of `RAW_SCHEMA`.

    Args:
        raw: What a reader returned.

    Raises:
        DataError: A table or column is missing, an id is empty, a value is not finite or not allowed, an item stands
            twice in the items, or an interaction's item does not stand there.
    """
    tables = [raw.interactions, raw.items] if isinstance(raw, RawLogs) else []
    if not tables or not all(isinstance(table, pl.DataFrame) for table in tables):
        found = ", ".join(type(table).__name__ for table in tables) or type(raw).__name__
        raise DataError(
            f"data.logs: read() returned {found}; expected RawLogs of two polars DataFrames. {_FIX}"
        )
    typed = replace(
        raw, interactions=_checked_interactions(raw.interactions), items=_checked_items(raw.items)
    )
    refuse_unknown_items(typed, _ITEMS)
    return typed


def _checked_interactions(table: pl.DataFrame) -> pl.DataFrame:
    _has(table, tuple(RAW_SCHEMA), _INTERACTIONS, " A column that the log does not have is null.")
    split = plain_text(table["split"], _INTERACTIONS)
    table = table.select(
        ids(table["user_id"], _INTERACTIONS, "user_id"),
        ids(table["item_id"], _INTERACTIONS, "item_id"),
        seconds(finite_number(table["timestamp"], _INTERACTIONS, "timestamp"), _INTERACTIONS, "timestamp"),
        *(finite_number(table[name], _INTERACTIONS, name, optional=True) for name in ("rating", "label")),
        split,
        plain_text(table["source_file"], _INTERACTIONS).fill_null(_INTERACTIONS),
        finite_number(table["source_row"], _INTERACTIONS, "source_row", optional=True).fill_null(
            pl.int_range(1, pl.len() + 1)
        ),
    )
    refuse(table["label"], [0, 1], _INTERACTIONS, "label")
    refuse(split, GIVEN_SPLITS, _INTERACTIONS, "split")
    return table.cast(RAW_SCHEMA)  # type: ignore[arg-type]


def _checked_items(table: pl.DataFrame) -> pl.DataFrame:
    _has(table, ("item_id", "title"), _ITEMS)
    if "item" in table.columns:
        raise DataError(
            f"{_ITEMS}: the attribute name item is used by the project. Give it another one. {_FIX}"
        )
    table = table.with_columns(ids(table["item_id"], _ITEMS, "item_id"))
    table = table.with_columns(plain_text(values, _ITEMS) for values in table).fill_null("")
    table = table.with_columns(
        title=pl.when(pl.col("title").str.strip_chars() == "").then("item_id").otherwise("title")
    )
    twice = table.filter(pl.col("item_id").is_duplicated())
    if not twice.is_empty():
        raise DataError(
            f"{_ITEMS}: item {twice['item_id'][0]!r} stands there more than once ({twice['item_id'].n_unique():,} such "
            f"items); expected one row an item. {_FIX}"
        )
    return table


def _has(table: pl.DataFrame, needed: tuple[str, ...], name: str, note: str = "") -> None:
    missing = [column for column in needed if column not in table.columns]
    if missing or table.is_empty():
        found = f"no column {', '.join(missing)}" if missing else "no rows"
        raise DataError(f"{name}: {found}; there are the columns {', '.join(table.columns)}.{note} {_FIX}")
