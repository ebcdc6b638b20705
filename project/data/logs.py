"""Readers: interactions and items in memory, checked, whatever their file."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from project.data.context import check_kinds, texts_of
from project.data.download import fetch
from project.data.tables import (
    finite_numbers,
    ids,
    numbers,
    plain_text,
    read_table,
    require,
    times,
)
from project.errors import ConfigError, DataError

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
SESSION = "session_id"  # a further column, where a log has sessions
# what a file's columns are mapped to
OURS = ("user_id", "item_id", "timestamp", "rating", "label", "split", SESSION)
READER = "the reader's"  # tables of a reader, in messages
OWN_SCORE = "own score"  # column of the scores of the ranker that runs today


@dataclass(frozen=True)
class RawLogs:
    """A log as read, in file order.

    `interactions` has the columns of `RAW_SCHEMA`: ids, `timestamp` (seconds; of a log with dates every row has one),
    `rating`, `label` (0 or 1) and `split` (one of `GIVEN_SPLITS`), null or absent where the log does not have them,
    and `session_id` where there are sessions; `source_file` and `source_row` (from 1) are for messages. `files` has the
    SHA-256 of each file, in reading order, and under a name of its own a digest of whatever else decides what is made
    of them: the protocol's hash and all caches rest on it.
    """

    interactions: pl.DataFrame
    # item_id (unique), title, then attributes; all String, "" = unknown
    items: pl.DataFrame
    files: dict[str, str]
    columns: tuple[str, ...] = ()  # of the interactions' file, for messages
    not_read: tuple[str, ...] = ()  # columns of interactions that nothing reads
    # further columns of interactions, known before the answer
    context: tuple[str, ...] = ()
    users: pl.DataFrame | None = None  # user_id (unique), then attributes
    # number or category, by name of a column of context or users; others: as values say
    kinds: Mapping[str, str] = field(default_factory=dict)
    # column of interactions with the scores of the ranker that runs today
    own_scores: str | None = None


class Logs(ABC):
    """A log of interactions with its items: what `data.logs` in YAML names."""

    @abstractmethod
    def read(self) -> RawLogs:
        """Read the files; `checked` makes sure of what comes back, so a reader of your own need not."""


class TableLogs(Logs):
    """Your own log: CSV or Parquet tables.

    Args:
        interactions: One file (.csv, .tsv or .parquet), or one file per split, such as {train: a.csv, valid: b.csv,
            test: c.csv}; a `history` file is past that is only ever context. Needs user_id, item_id, a rating or a
            0/1 label (neither where data.protocol.label is clicked), and timestamp (seconds or milliseconds since 1970,
            or dates in ISO format; without a zone they are UTC; none where data.protocol.split is random or given).
        items: Table of items with item_id and title; every other column is an attribute.
        columns: Our column name -> the name in your interactions, for user_id, item_id, timestamp, rating, label,
            split, session_id (rows of one user and session are one request: none reads another's answer).
        item_columns: Our name -> the name in your items, for item_id, title and any attribute.
        context: Further columns of the interactions that exit 0, baselines and requests read: what is known before the
            answer, such as device, placement or price. Empty values are unknown.
        users: Table of users with user_id; every other column is an attribute, read as it stands. Null: none.
        kinds: Column of context or users -> number or category. Others are numbers if all their values are.
        own_scores: Column of the interactions with the scores of the ranker that runs today: a baseline of its own.
    """

    def __init__(
        self,
        interactions: str | dict[str, str],
        items: str,
        columns: dict[str, str] | None = None,
        item_columns: dict[str, str] | None = None,
        context: list[str] | None = None,
        users: str | None = None,
        kinds: dict[str, str] | None = None,
        own_scores: str | None = None,
    ) -> None:
        if isinstance(interactions, str):
            self.parts: list[tuple[str | None, str]] = [(None, interactions)]
        else:
            unknown = sorted(set(interactions) - set(GIVEN_SPLITS))
            if unknown or not interactions:
                raise DataError(
                    f"data.logs.init_args.interactions names the splits {', '.join(unknown) or '(none)'}; "
                    f"allowed are {', '.join(GIVEN_SPLITS)}."
                )
            self.parts = [
                (split, interactions[split])
                for split in GIVEN_SPLITS
                if split in interactions
            ]
        self.items = items
        self.columns = columns or {}
        self.item_columns = item_columns or {}
        self.context = tuple(context or ())
        self.users = users
        self.kinds = kinds or {}
        self.own_scores = own_scores
        # the column of scores may be listed as context, too
        self.further = dict.fromkeys([*self.context, *filter(None, [own_scores])])
        answers = {*OURS, *self.columns.values()} & {*self.further}
        if answers:
            raise ConfigError(
                f"data.logs.init_args.context or own_scores lists {', '.join(sorted(answers))}, which is read as "
                "another column already. List what is known before the answer, and nothing else."
            )

    def read(self) -> RawLogs:
        """Read all files; see `Logs.read`."""
        sums: dict[str, str] = {}
        read = [(split, name, read_table(Path(name), sums)) for split, name in self.parts]
        tables = [
            _interactions(table, name, self.columns, split, [*self.further])
            for split, name, table in read
        ]
        own = self.own_scores
        if own is not None:  # an error names the file
            for _, name, table in read:
                finite_numbers(texts_of(table[own], name, own), name, own, optional=True)
        items = _items(read_table(Path(self.items), sums), self.items, self.item_columns)
        users = None
        if self.users is not None:
            table = read_table(Path(self.users), sums)
            users = _users(table, self.users, self.columns.get("user_id", "user_id"))
        # the same file read by other columns is another log
        names: list[object] = [self.columns, self.item_columns]
        if self.context or self.kinds:
            names += [self.context, self.kinds]
        if any(names):
            text = json.dumps(names, sort_keys=True)
            sums[MAPPING] = hashlib.sha256(text.encode()).hexdigest()
        wanted = {self.columns.get(name, name) for name in OURS} | {*self.further}
        not_read = dict.fromkeys(
            name for *_, table in read for name in table.columns if name not in wanted
        )
        return RawLogs(
            pl.concat(tables),
            items,
            sums,
            tuple(read[0][2].columns),
            not_read=tuple(not_read),
            context=self.context,
            users=users,
            kinds=self.kinds,
            own_scores=self.own_scores,
        )


class RecBoleLogs(TableLogs):
    """A data set in RecBole's atomic files: tab-separated, with typed headers such as `user_id:token`.

    Args:
        folder: Folder with <name>.inter and <name>.item.
        name: Common name of the files. Null: the name of the folder.
        users: Read attributes of <name>.user, too.
        **kwargs: As of TableLogs: names are those of the .inter and .item files without their types.
    """

    def __init__(
        self, folder: str, name: str | None = None, users: bool = False, **kwargs: Any
    ) -> None:
        path = Path(folder) / (name or Path(folder).resolve().name)
        attributes = f"{path}.user" if users else None
        super().__init__(f"{path}.inter", f"{path}.item", users=attributes, **kwargs)


def _movielens(key: str, genres: str, **options: Any) -> RawLogs:
    names = {"title": "movie_title", "year": "release_year", "genres": genres}
    raw = RecBoleLogs(str(fetch(key)), key, item_columns=names, **options).read()
    del raw.files[MAPPING]  # it is always the same: the hash is that of the files alone
    return raw


class MovieLens100K(Logs):
    """MovieLens 100K (943 users, 1,682 films, 100,000 ratings), fetched on first use.

    It has its own licence: research use, no redistribution.
    """

    def read(self) -> RawLogs:
        """Fetch the files where they are not yet here, and read them; see `Logs.read`."""
        return _movielens("ml-100k", genres="class")


class MovieLens1M(Logs):
    """MovieLens 1M (6,040 users, 3,883 films of which 3,706 are rated, 1,000,209 ratings), fetched on first use.

    A film's id is its title with its year, such as "Toy Story (1995)", a user's is 1m_1 to 1m_6040. Items have title,
    year and genres. It has its own licence: research use, no redistribution.

    Args:
        users: Read the users' age, gender, occupation and zip code, too.
    """

    def __init__(self, users: bool = False) -> None:
        self.users = users

    def read(self) -> RawLogs:
        """Fetch the files where they are not yet here, and read them; see `Logs.read`."""
        kinds = dict.fromkeys(["occupation", "zip_code"] if self.users else [], "category")
        return _movielens("ml-1m", "genre", users=self.users, kinds=kinds)


class MovieLensLatestSmall(Logs):
    """MovieLens latest-small of 2016 (671 users, 9,066 films, 100,004 ratings), fetched on first use.

    Items have title, year and genres; five have no title, their id stands for it. It has its own licence: research
    use, no redistribution.
    """

    def read(self) -> RawLogs:
        """Fetch the files where they are not yet here, and read them; see `Logs.read`."""
        folder = fetch("ml-latest-small")
        columns = {"user_id": "userId", "item_id": "movieId"}
        logs = TableLogs(
            str(folder / "ratings.csv"),
            str(folder / "movies.csv"),
            columns,
            {"item_id": "movieId"},
        )
        return logs.read()


def _renamed(
    table: pl.DataFrame,
    file: str,
    names: Mapping[str, str],
    needed: tuple[str, ...],
    key: str,
) -> pl.DataFrame:
    """The table under our names; if one that is mapped or needed is absent, the error lists what is there."""
    wanted = {name: name for name in needed} | dict(names)
    absent = [ours for ours, theirs in wanted.items() if theirs not in table.columns]
    if absent:
        missing = ", ".join(f"{wanted[ours]} (our {ours})" for ours in absent)
        raise DataError(
            f"{file}: no column {missing}; there are {', '.join(table.columns)}. "
            f"{_rename(file, key, absent[0], '<your column>')}"
        )
    # their column is not read where another one is mapped to its name
    used = {*wanted, *wanted.values()}
    mapped = [pl.col(theirs).alias(ours) for ours, theirs in wanted.items()]
    return table.select(
        *mapped, *(column for column in table.columns if column not in used)
    )


def _rename(file: str, key: str, ours: str, theirs: str) -> str:
    """Where a column gets another name; a reader of one's own has no key for it."""
    if file.startswith(READER):
        return f"Name it {ours} in what read() returns."
    return f"Name yours under data.logs.init_args.{key}, for example {key}: {{{ours}: {theirs}}}."


def _interactions(
    table: pl.DataFrame,
    file: str,
    columns: Mapping[str, str],
    split: str | None,
    context: Sequence[str],
) -> pl.DataFrame:
    """Columns of `RAW_SCHEMA` and `context`; `columns`: our name -> the file's, `split`: of the whole file."""
    # 1. our names
    unknown = [name for name in columns if name not in OURS]
    if unknown:
        raise DataError(
            f"data.logs.init_args.columns maps {', '.join(unknown)}; our names are {', '.join(OURS)}."
        )
    table = _renamed(table, file, columns, OURS[:2], "columns")
    absent = [name for name in context if name not in table.columns]
    if absent:
        raise DataError(
            f"{file}: no column {', '.join(absent)} (data.logs.init_args.context, own_scores); there are "
            f"{', '.join(table.columns)}."
        )
    further = [texts_of(table[name], file, name) for name in context]
    table = table.select(name for name in OURS if name in table.columns)
    # 2. answers: of two columns the protocol needs one, and a label may be a record's, so
    # that what cannot be read is null; of one column every value must be readable
    answers = [name for name in ("rating", "label") if name in table.columns]
    for name in answers:
        theirs = columns.get(name, name)
        if len(answers) == 1:
            values = finite_numbers(table[name], file, theirs)
        else:
            values = numbers(table[name], file, theirs)
            if name == "label":
                values = values.set(~values.is_in([0.0, 1.0]), None)
        table = table.with_columns(values)
    # 3. the split of a file
    if split is not None:
        table = table.with_columns(split=pl.lit(split))
    return _typed(table, file, columns).hstack(further)


def _users(table: pl.DataFrame, file: str, theirs: str) -> pl.DataFrame:
    """user_id, each once, and attributes as text; null where there is none."""
    mapped = {} if theirs not in table.columns else {"user_id": theirs}
    table = _renamed(table, file, mapped, ("user_id",), "columns")
    user_id = ids(table["user_id"], file, theirs)
    require(user_id.is_first_distinct(), user_id, "each user once", file, theirs)
    texts = [texts_of(table[c], file, c) for c in table.columns if c != "user_id"]
    return pl.DataFrame([user_id, *texts])


def _typed(table: pl.DataFrame, file: str, columns: Mapping[str, str]) -> pl.DataFrame:
    """The columns of `RAW_SCHEMA` with their types, every value checked; `columns`: our name -> the one in messages."""
    theirs = {name: columns.get(name, name) for name in RAW_SCHEMA}
    # 1. null for what the log does not have
    table = table.with_columns(
        pl.lit(None).alias(name) for name in RAW_SCHEMA if name not in table.columns
    )
    # 2. types
    typed = pl.DataFrame(
        [
            *(ids(table[name], file, theirs[name]) for name in ("user_id", "item_id")),
            times(table["timestamp"], file, theirs["timestamp"]),
            *(
                finite_numbers(table[name], file, theirs[name], optional=True)
                for name in ("rating", "label")
            ),
            plain_text(table["split"], file, theirs["split"]),
            table["source_file"].cast(pl.String).fill_null(file),
            table["source_row"].cast(pl.Int64),
        ]
    ).with_columns(pl.col("source_row").fill_null(pl.int_range(1, pl.len() + 1)))
    if SESSION in table.columns:
        typed = typed.with_columns(
            texts_of(table[SESSION], file, columns.get(SESSION, SESSION))
        )
    # 3. values
    for name, allowed in (("label", [0.0, 1.0]), ("split", GIVEN_SPLITS)):
        values = typed[name]
        right = values.is_null() | values.is_in(allowed)
        require(right, values, f"one of {', '.join(map(str, allowed))}", file, theirs[name])
    return typed.cast(RAW_SCHEMA)  # type: ignore[arg-type]


def _items(table: pl.DataFrame, file: str, columns: Mapping[str, str]) -> pl.DataFrame:
    """One row an item, all columns text."""
    table = _renamed(table, file, columns, ("item_id", "title"), "item_columns")
    if "item" in table.columns:
        raise DataError(
            f"{file}: the attribute name item is used by the project. "
            f"{_rename(file, 'item_columns', 'kind', 'item')}"
        )
    item_id = ids(table["item_id"], file, columns.get("item_id", "item_id"))
    texts = [plain_text(table[c], file, c) for c in table.columns if c != "item_id"]
    table = table.with_columns(item_id, *texts).fill_null("")
    titles = table.group_by("item_id", maintain_order=True).agg(
        pl.col("title").unique(maintain_order=True)
    )
    twice = titles.filter(pl.col("title").list.len() > 1)
    if not twice.is_empty():
        shown = " and ".join(repr(title) for title in twice["title"][0])
        raise DataError(
            f"{file}: item {twice['item_id'][0]!r} is listed with the titles {shown} ({twice.height:,} such "
            "items); keep one row per item."
        )
    return table.unique("item_id", keep="first", maintain_order=True)


def checked(raw: RawLogs) -> RawLogs:
    """The log with the types of `RAW_SCHEMA`, its values checked as those of a file: a reader may be the user's own."""
    file = f"{READER} interactions"
    interactions = _typed(
        _renamed(raw.interactions, file, {}, OURS[:2], "columns"), file, {}
    )
    undated = interactions.filter(pl.col("timestamp").is_null())
    if 0 < undated.height < interactions.height:
        raise DataError(
            f"{undated['source_file'][0]}, row {undated['source_row'][0]}: no timestamp ({undated.height:,} of "
            f"{interactions.height:,} rows have none). Give every row its time, or no row."
        )
    items = _items(raw.items, f"{READER} items", {})
    absent = interactions.join(items, on="item_id", how="anti", maintain_order="left")
    if not absent.is_empty():
        raise DataError(
            f"{absent['source_file'][0]}, row {absent['source_row'][0]}: item {absent['item_id'][0]!r} is not in "
            f"{READER} items ({absent.height:,} rows, {absent['item_id'].n_unique():,} items). Add or remove them."
        )
    further = [texts_of(raw.interactions[name], file, name) for name in raw.context]
    own = raw.own_scores
    if own is not None:
        scores = texts_of(raw.interactions[own], file, own)
        further.append(finite_numbers(scores, file, own, optional=True).alias(OWN_SCORE))
    users = None if raw.users is None else _users(raw.users, f"{READER} users", "user_id")
    attributes = [] if users is None else users.columns[1:]
    check_kinds(raw.kinds, [*raw.context, *attributes])
    read = (*RAW_SCHEMA, SESSION, *raw.context, own)
    unread = [name for name in raw.interactions.columns if name not in read]
    return replace(
        raw,
        interactions=interactions.hstack(further),
        items=items,
        not_read=(*raw.not_read, *unread),
        users=users,
    )
