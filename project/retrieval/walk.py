"""Walks through a log in time: every row is answered from strictly earlier rows, then observed itself.

In reading order: which rows a split may read; the log in blocks, and what is fitted before each; the walk; the checks
of answers; lists of what similar users liked; the cache.

Three flags say what a row may do. A log row is answered (`query`), becomes a rating that others may read (`rater`) and
enters its user's own past (`own`); a request's history is answered and own, its candidates are only answered. So a
request is answered by the code that made the training features and changes nobody else's. Labels are read only from
rows that are `rater` or `own`, once their time has passed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.arrays import F64, I8, I64, Bool
from project.data.download import remove_orphans
from project.data.protocol import SPLITS, SplitInteractions, answered
from project.errors import ConfigError, DataError
from project.features import Retrieved
from project.retrieval.base import Edges, Neighbours, Raters, Retriever, Snapshot
from project.retrieval.compiled import place_of, put_last

Make = Callable[[pl.DataFrame, str, Path], pl.DataFrame]
CHECKED_TOGETHER = 4096  # answers; fewer at first, so that a slow and wrong retriever is refused early
BLOCK = 2**16  # answers that are kept as arrays of `neighbours` columns, before they become lists
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]  # of a full disk
FORMAT = 1  # raise it when the same settings would give other retrieved features or other files


def split_tables(
    split: SplitInteractions, parent: Path, content: dict[str, Any], make: Make, own_second: bool = False
) -> Path:
    """Folder of `parent` with train, valid and test.parquet, named by a hash of log, protocol and `content`.

    Where the cache does not have it, `make` turns a split's readable rows, its name and the folder into a table with
    their row_id: first for test, then for valid and train where their tables are not parts of test's. A table that
    begins one written before is stored as its row_id alone. With `own_second` a table also holds what happened in a
    row's own second, see `reads_all_earlier`.
    """

    def write(folder: Path) -> None:
        code = split.rows["split"].cast(pl.String).replace_strict({name: k for k, name in enumerate(SPLITS)})
        once = reads_all_earlier(split.rows["timestamp"].to_numpy(), code.to_numpy(), own_second)
        table: pl.DataFrame | None = None
        for k, name in reversed(list(enumerate(SPLITS))):
            readable = split.rows.filter(code <= k)
            if table is None or not once:
                written = table = make(readable, name, folder)
            elif table["row_id"].head(readable.height).equals(readable["row_id"]):  # of a log cut by time
                table = table.head(readable.height)  # no copy
                written = table.select("row_id")
            else:
                written = table = table.filter(pl.col("row_id").is_in(readable["row_id"].implode()))
            written.write_parquet(folder / f"{name}.parquet")

    depends = {"files": split.interactions.files, "protocol": split.hash, **content}
    return cached_folder(parent, depends, write)


def read_tables(folder: Path) -> dict[str, pl.DataFrame]:
    """The tables that `split_tables` wrote."""
    tables, later = dict[str, pl.DataFrame](), pl.DataFrame()
    for name in reversed(SPLITS):
        table = pl.read_parquet(folder / f"{name}.parquet", glob=False)
        tables[name] = later = later.head(table.height) if table.width == 1 else table
    return {name: tables[name] for name in SPLITS}


def reads_all_earlier(timestamp: F64, split: I64, own_second: bool = False) -> bool:
    """Whether no row has a row of a later split strictly before it: then all splits' tables coincide.

    Rows ascend in time, splits are 0, 1, 2. With `own_second` a row's own second counts too, as lists of what similar
    users liked read it.
    """
    latest_before = np.concatenate([[0], np.maximum.accumulate(split)])
    side: Literal["left", "right"] = "right" if own_second else "left"
    return bool(np.all(latest_before[np.searchsorted(timestamp, timestamp, side=side)] <= split))


def block_cuts(timestamp: F64, refits: int) -> F64:
    """First timestamps of blocks 1, 2, ...: those at positions k * rows / refits, rounded down, k = 1 .. refits - 1.

    `timestamp` is that of all rows of the log, ascending. Rows of one timestamp stay together.
    """
    if not timestamp.size:
        return np.empty(0)
    cuts = np.unique(timestamp[np.arange(1, refits) * timestamp.size // refits])
    later: F64 = cuts[cuts > timestamp[0]]
    return later


@dataclass(frozen=True)
class Snapshots:
    """Block k >= 1 holds the rows with cuts[k-1] <= timestamp < cuts[k]; block 0 has no past and no snapshot."""

    cuts: F64  # (blocks - 1,), ascending
    fitted: list[Snapshot]  # what was fitted before blocks 1, 2, ...

    def save(self, path: Path) -> None:
        """Write to one npz file."""
        arrays: dict[str, Any] = {"cuts": self.cuts}
        for block, snapshot in enumerate(self.fitted, 1):
            arrays |= {f"{block}/{name}": array for name, array in snapshot.items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Snapshots":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            cuts = stored["cuts"]
            fitted: list[dict[str, NDArray[Any]]] = [{} for _ in cuts]
            for key in stored.files:
                block, _, name = key.partition("/")
                if name:
                    fitted[int(block) - 1][name] = stored[key]
        return cls(cuts, [*fitted])


def edges_before(rows: pl.DataFrame, cuts: F64) -> list[Edges]:
    """The rows strictly before each cut; rows in time order, columns user, item, timestamp, label."""
    rows = rows.filter(answered(rows))
    user, item, label = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
    ends = np.searchsorted(rows["timestamp"].to_numpy(), cuts, side="left").tolist()
    return [Edges(user[:end], item[:end], label[:end]) for end in ends]


def fit_blocks(
    rows: pl.DataFrame, cuts: F64, fit: Callable[[Edges, int], Snapshot], description: str
) -> Snapshots:
    """What `fit` makes of all rows strictly before each block 1, 2, ...; `description` labels the progress bar."""
    before, fitted = edges_before(rows, cuts), list[Snapshot]()
    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=sum(edges.label.size for edges in before))
        for block, edges in enumerate(before, 1):
            fitted.append(fit(edges, block))
            progress.advance(task, edges.label.size)
    return Snapshots(cuts, fitted)


def fit_snapshots(
    rows: pl.DataFrame, retriever: Retriever, num_users: int, items: pl.DataFrame, cuts: F64
) -> Snapshots:
    """Fit a retriever block after block, each on all rows strictly before it; `items` is the log's item table."""
    retriever.begin(num_users, items)
    return fit_blocks(rows, cuts, retriever.fit, f"{type(retriever).__name__} snapshots")


@dataclass(frozen=True)
class WalkRows:
    """Rows in time order; all arrays have shape (rows,).

    A person's own ratings are never their neighbours. `person` differs from `user` where a request brings its own
    history for a user of the log.
    """

    row_id: I64  # id of the row in the retrieved features table
    user: I64  # whose past (vector, rate) the row is answered with and adds to
    person: I64  # whose rating it is
    item: I64  # item code; the number of items stands for any item the log does not have
    timestamp: F64  # seconds; rows of one timestamp never see each other
    label: I8  # 0, 1, or -1 for unknown
    query: Bool  # retrieved features are requested
    rater: Bool  # becomes a rating that others may read
    own: Bool  # enters the past of its user

    @classmethod
    def from_log(cls, rows: pl.DataFrame, query: bool = True) -> "WalkRows":
        """Rows of a log, by time and user, with every flag (or all but `query`); sampled negatives are not read."""
        row_id, user, item = (rows[name].to_numpy().astype(np.int64) for name in ("row_id", "user", "item"))
        timestamp = rows["timestamp"].to_numpy().astype(np.float64)
        label = rows["label"].to_numpy().astype(np.int8)
        queries, read = np.full(rows.height, query), answered(rows).to_numpy()
        return cls(row_id, user, user, item, timestamp, label, query=queries, rater=read, own=read)


def own_earlier_rows(user: I64, timestamp: F64) -> tuple[I64, I64, I64]:
    """The user's own strictly earlier rows, of every row: `order[start[k]:stop[k]]` for row k, oldest first.

    Rows are in time order. `order` holds positions of rows grouped by user; (rows,) each.
    """
    order = np.argsort(user, kind="stable")
    by_user, by_time = user[order], timestamp[order]
    new_user = np.diff(by_user, prepend=-1) != 0
    new_second = new_user | (np.diff(by_time, prepend=-np.inf) != 0)
    position = np.arange(order.size)
    start, stop = np.empty_like(order), np.empty_like(order)
    start[order] = np.maximum.accumulate(np.where(new_user, position, 0))
    stop[order] = np.maximum.accumulate(np.where(new_second, position, 0))
    return order, start, stop


def queries_by_user(rows: WalkRows, description: str) -> Iterator[tuple[I64, I64, I64]]:
    """For each user with rows to answer: their positions `queries` (n,), the past `own` (m,), and `earlier` (n,).

    Row queries[j] may read own[: earlier[j]], the user's strictly earlier rows, oldest first. `description` labels the
    progress bar, which requests do not have.
    """
    order = np.argsort(rows.user, kind="stable")
    of_user = np.split(order, np.flatnonzero(np.diff(rows.user[order])) + 1)
    # making a bar takes as long as answering a request
    for index in of_user if order.size < BLOCK else _followed(of_user, order.size, description):
        own, queries = index[rows.own[index]], index[rows.query[index]]
        if queries.size:
            yield queries, own, np.searchsorted(rows.timestamp[own], rows.timestamp[queries], side="left")


def _followed(parts: list[I64], total: int, description: str) -> Iterator[I64]:
    """The parts, with a progress bar of their rows."""
    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        for part in parts:
            yield part
            progress.advance(task, part.size)


def walk(
    rows: WalkRows,
    retriever: Retriever,
    items: pl.DataFrame,
    cuts: F64,
    snapshots: list[Snapshot],
    description: str = "retrieved features",
) -> pl.DataFrame:
    """The retrieved features table (see `features.py`) of the `query` rows, in their order.

    `items` is the log's item table, `cuts` and `snapshots` are those of `Snapshots`, `description` labels the progress
    bar.
    """
    retriever.begin(int(rows.user.max(initial=-1)) + 1, items)
    queries = np.flatnonzero(rows.query)
    past = Past(retriever.max_raters)
    answers = Answers(rows, queries, retriever, items.height, min(queries.size, BLOCK))
    similar = SimilarLikes(retriever) if retriever.similar_every else None
    block_of = np.searchsorted(cuts, rows.timestamp, side="right")
    block, check_at = 0, 1
    with Progress(transient=True) as progress:
        starts = _span_starts(rows, block_of)
        for start, stop in progress.track(_spans(starts, rows), total=starts.size, description=description):
            # 1. a new block: answer from what was fitted before it
            if block_of[start] != block:
                block = int(block_of[start])
                retriever.start_block(snapshots[block - 1], block)
            # 2. answer all rows of the second, from strictly earlier ones
            for row in range(start, stop):
                if rows.query[row]:
                    answers.answer(past, 1)
            if answers.unchecked >= check_at:
                answers.check()
                check_at = min(2 * check_at, CHECKED_TOGETHER)
            # 3. observe the rows of the second
            for row in range(start, stop):
                past.observe(rows, row)
                if rows.own[row]:
                    retriever.observe(row, int(rows.user[row]), int(rows.item[row]), int(rows.label[row]))
            # 4. lists that are due, dated just after the second: they may hold its answers
            if similar is not None:
                similar.observe(range(start, stop), rows)
    table = answers.table()
    if similar is not None:
        table = table.with_columns(similar_after=similar.column(queries))
    return table


def _span_starts(rows: WalkRows, block_of: I64) -> I64:
    """Where time groups start; neighbouring groups without a query are one span, for speed."""
    new_group = np.flatnonzero(np.diff(rows.timestamp, prepend=-np.inf))
    if not new_group.size:
        return new_group
    query = np.logical_or.reduceat(rows.query, new_group)
    new_block = np.diff(block_of, prepend=-1)[new_group] != 0
    starts: I64 = new_group[query | np.concatenate([[True], query[:-1]]) | new_block]
    return starts


def _spans(starts: I64, rows: WalkRows) -> Iterator[tuple[int, int]]:
    """Spans as (start, stop); some are numbers of Python at a time, since these are large."""
    stops = np.append(starts[1:], rows.timestamp.size)
    for part in (slice(k, k + BLOCK) for k in range(0, starts.size, BLOCK)):
        yield from zip(starts[part].tolist(), stops[part].tolist(), strict=True)


class Past:
    """What has been observed: each item's latest raters in time order, likes and rows that rates are made of."""

    def __init__(self, max_raters: int) -> None:
        self._max_raters = max_raters
        self._raters: dict[int, I64] = {}  # by item: rows and persons, (2, room)
        self._size: dict[int, int] = {}  # by item: how many there are
        self._items: dict[int, list[int]] = {}  # likes and rows of each
        self._users: dict[int, list[int]] = {}

    def raters(self, item: int, person: int) -> Raters:
        """Raters of an item without `person`, oldest first, the latest row of each, at most max_raters."""
        if item not in self._raters:
            return NO_RATERS
        rows, persons = self._raters[item][:, : self._size[item]]
        own = place_of(person, persons)
        if own < 0:
            return Raters(rows[-self._max_raters :], persons[-self._max_raters :])
        return Raters(np.delete(rows, own), np.delete(persons, own))

    def rates(self, item: int, user: int) -> tuple[int, int, int, int]:
        """Likes and rows of the item, likes and rows of the user."""
        return (*self._items.get(item, (0, 0)), *self._users.get(user, (0, 0)))

    def observe(self, rows: WalkRows, row: int) -> None:
        """Take in a row whose time has passed."""
        label = int(rows.label[row])
        if rows.rater[row]:
            item = int(rows.item[row])
            known, size = self._raters.get(item), self._size.get(item, 0)
            # one more than max_raters, since a person's own row is not shown to them
            if known is None or size == known.shape[1] <= self._max_raters:
                more = np.empty((2, min(max(size, 4), self._max_raters + 1 - size)), np.int64)
                known = self._raters[item] = more if known is None else np.concatenate([known, more], axis=1)
            self._size[item] = put_last(known, size, row, int(rows.person[row]))
            _count(self._items, item, label)
        if rows.own[row]:
            _count(self._users, int(rows.user[row]), label)

    def forget(self, user: int) -> None:
        """Drop the rate of a user."""
        self._users.pop(user, None)


NO_RATERS = Raters(np.empty(0, np.int64), np.empty(0, np.int64))


def _count(counts: dict[int, list[int]], code: int, label: int) -> None:
    of_code = counts.setdefault(code, [0, 0])
    of_code[0] += label
    of_code[1] += 1


class Answers:
    """Collects and checks what a retriever answers, and makes the retrieved features table of it.

    `queries` are the positions of the rows to answer, in the order in which `answer` is called; `num_items` is the code
    of any item that the retriever does not know. Arrays hold `size` answers, which is at least what one call of
    `answer` adds; the others are in tables already.
    """

    def __init__(self, rows: WalkRows, queries: I64, retriever: Retriever, num_items: int, size: int) -> None:
        neighbours = retriever.neighbours
        self._rows, self._queries, self._retriever = rows, queries, retriever
        self._num_items, self._answered, self._checked = num_items, 0, 0  # of the block of `queries`
        self._closed: list[pl.DataFrame] = []
        self._count = np.zeros(size, np.int32)
        self._row = np.zeros((size, neighbours), np.int64)
        self._similarity = np.zeros((size, neighbours), np.float32)
        self._rates = np.zeros((size, 4), np.int32)
        self._own_items = np.zeros((size, 2), np.float32)

    def answer(self, past: Past, count: int) -> None:
        """Keep the retriever's answers to the next rows, which are of one user and second, and the counts so far."""
        if self._answered + count > self._count.size:
            self._close()
        rows, retriever, first = self._rows, self._retriever, self._answered
        queries = self._queries[first : first + count]
        if not count:
            return
        user, person = int(rows.user[queries[0]]), int(rows.person[queries[0]])
        time, items = float(rows.timestamp[queries[0]]), rows.item[queries]
        known = np.minimum(items, self._num_items)
        for item, code in zip(items.tolist(), known.tolist(), strict=True):
            at = self._answered
            found = retriever.select(user, code, time, past.raters(item, person))
            if not isinstance(found, Neighbours) or len(found.row) != len(found.similarity):
                raise self._refused(f"returned {found!r:.200}")
            size = len(found.row)
            if size > retriever.neighbours:
                raise self._refused(f"returned {size} rows")
            self._count[at] = size
            self._row[at, :size], self._similarity[at, :size] = found
            self._rates[at] = past.rates(item, user)
            self._answered += 1
        if retriever.item_neighbours:
            self._own_items[first : self._answered] = retriever.item_similarities(user, known)

    @property
    def unchecked(self) -> int:
        """Answers since `check` was called."""
        return self._answered - self._checked

    def check(self) -> None:
        """Refuse answers that name a row that the retriever was not given, since it may lie in the future.

        A row must be an earlier rating of the item by somebody else, or an earlier row of the user's own past.
        """
        rows, at = self._rows, slice(self._checked, self._answered)
        self._checked = self._answered
        used = np.arange(self._row.shape[1]) < self._count[at][:, None]
        queries, found = np.repeat(self._queries[at], self._count[at]), self._row[at][used]
        if not np.isfinite(self._similarity[at][used]).all():
            raise self._refused("returned a similarity that is NaN or infinite")
        there = (found >= 0) & (found < rows.row_id.size)
        place = np.where(there, found, 0)
        own = rows.own[place] & (rows.user[place] == rows.user[queries])
        others = rows.rater[place] & (rows.item[place] == rows.item[queries])
        others &= rows.person[place] != rows.person[queries]
        given = there & (rows.timestamp[place] < rows.timestamp[queries]) & (own | others)
        if not given.all():
            first = int((~given).argmax())
            raise self._refused(
                f"answered row {queries[first]} with row {found[first]}, neither one of the raters that it was given "
                "nor an earlier row of the user that observe got, so it may leak the future"
            )

    def _refused(self, found: str) -> ConfigError:
        kind = type(self._retriever)
        return ConfigError(
            f"data.retriever is {kind.__module__}.{kind.__qualname__}: its select {found}; expected Neighbours(row, "
            f"similarity): values of raters.row, not positions in it, and finite numbers, at most neighbours "
            f"({self._retriever.neighbours}). Return NO_NEIGHBOURS for none."
        )

    def retrieved(self) -> Retrieved:
        """Features of the answers in the arrays as numbers, as precise as in the table; a share of nothing is NaN."""
        self.check()
        block = slice(self._answered)

        def share(part: NDArray[Any], total: NDArray[Any]) -> F64:
            return as_stored(np.divide(part, total, out=np.full_like(total, np.nan), where=total > 0))

        used = np.arange(self._row.shape[1]) < self._count[block][:, None]
        answer = self._rows.label[self._row[block][used]].astype(np.float64)
        of_row = np.nonzero(used)[0]
        item_likes, item_count, user_likes, user_count = self._rates[block].T.astype(np.float64)
        count = self._count[block].astype(np.float64)
        columns = {
            "vote": share(np.bincount(of_row, answer, len(count)), count),
            "neighbour_count": count,
            "item_rate": share(item_likes, item_count),
            "item_count": item_count,
            "user_rate": share(user_likes, user_count),
            "user_count": user_count,
        }
        if self._retriever.item_neighbours:
            likes, weight = self._own_items[block].T.astype(np.float64)
            columns |= {"item_similarity": share(likes, weight), "item_similarity_weight": weight}
        return Retrieved(columns, of_row, self._similarity[block][used].astype(np.float64), answer)

    def table(self) -> pl.DataFrame:
        """Retrieved features of all queries."""
        self._close()
        return pl.concat(self._closed)

    def _close(self) -> None:
        """Make a table of the answers in the arrays; the next query begins them anew."""
        columns, block = self.retrieved().columns, slice(self._answered)
        lists: dict[
            str, tuple[NDArray[Any], Any]
        ] = {  # with their type, because older polars forgets it where there are no rows
            "neighbours": (self._rows.row_id[self._row[block]], pl.Int64),
            "similarities": (self._similarity[block].copy(), pl.Float32),
            "answers": (self._rows.label[self._row[block]], pl.Int8),
        }
        ids, count = self._rows.row_id[self._queries[block]], self._count[block].copy()
        frame = pl.DataFrame({"row_id": ids, "count": count}).with_columns(
            pl.Series(values).arr.to_list().alias(name) for name, (values, _) in lists.items()
        )
        kinds = {name: pl.Int32 if name.endswith("_count") else pl.Float32 for name in columns}
        found = frame.select(
            "row_id",
            *(pl.col(n).list.head(pl.col("count")).cast(pl.List(kind)) for n, (_, kind) in lists.items()),
            *(pl.Series(n, values, nan_to_null=True).cast(kinds[n]) for n, values in columns.items()),
        )
        self._closed.append(found)
        self._queries, self._answered, self._checked = self._queries[self._answered :], 0, 0


def as_stored(values: NDArray[Any]) -> F64:
    """Numbers as precise as a table keeps them."""
    return values.astype(np.float32).astype(np.float64)


class SimilarLikes:
    """Likes and ratings so far, and lists of what similar users liked, made every so many rows of a user.

    A list holds the items that the most similar users like by their latest rating, without those the user has rated, by
    the sum of the similarities; equal sums: the lower item code first.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._lists: dict[int, list[int]] = {}  # by position of the row
        self._likes: dict[int, dict[int, None]] = {}  # by person, the one with the latest row last
        self._rated: dict[int, list[int]] = {}  # by user, an item as often as it was rated

    def observe(self, group: range, rows: WalkRows) -> None:
        """Take in the rows of a second (or of several without a query) and make the lists that are due after it."""
        # 1. likes and ratings; by user: rows before the second, person, latest position
        latest: dict[int, tuple[int, int, int]] = {}
        for row in group:
            user, person, item = int(rows.user[row]), int(rows.person[row]), int(rows.item[row])
            if rows.rater[row]:
                liked = self._likes.pop(person, {})
                liked.pop(item, None)
                if rows.label[row] == 1:
                    liked[item] = None
                self._likes[person] = liked
            if rows.own[row]:
                rated = self._rated.setdefault(user, [])
                if rows.query[row]:
                    latest[user] = (latest[user][0] if user in latest else len(rated), person, row)
                rated.append(item)
        # 2. a list after the last row of a user whose count has passed a multiple of similar_every
        every = self._retriever.similar_every
        for user, (before, person, row) in latest.items():
            if len(self._rated[user]) // every > before // every:
                found = self._list(user, person)
                if found:
                    self._lists[row] = found

    def column(self, rows: I64) -> pl.Series:
        """Lists of the rows at these positions, List(Int32); null where there is none."""
        return pl.Series([self._lists.get(row) for row in rows.tolist()], dtype=pl.List(pl.Int32))

    def _list(self, user: int, person: int) -> list[int]:
        latest_first = (other for other, liked in reversed(self._likes.items()) if liked and other != person)
        others = list(islice(latest_first, self._retriever.max_raters))[::-1]
        similar = self._retriever.most_similar(user, np.array(others, np.int64))
        liked = [np.fromiter(self._likes[other], np.int64) for other in similar.user.tolist()]
        if not liked:
            return []
        items, place = np.unique(np.concatenate(liked), return_inverse=True)
        weight = np.repeat(similar.similarity.astype(np.float64), [part.size for part in liked])
        score = np.bincount(place, weight)
        score[np.isin(items, self._rated[user])] = 0
        best = np.argsort(-score, kind="stable")[: self._retriever.similar_items]
        found: list[int] = items[best[score[best] > 0]].tolist()
        return found


def content_key(content: dict[str, Any]) -> str:
    """Hex digest of what the stored files depend on, and of their format."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(parent: Path, content: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of this content in `parent`; where it is absent, `write` fills it, beside content.json."""

    def write_with_content(made: Path) -> None:
        write(made)
        stored = json.dumps({"format": FORMAT, **content}, indent=2, sort_keys=True)
        (made / "content.json").write_text(stored)

    folder = parent / content_key(content)
    _make_whole(folder, write_with_content)
    return folder


def restore(source: Path, target: Path) -> None:
    """Copy the content folders that `target` lacks, as from a run's bundle to the cache; `source` may be absent."""
    for folder in sorted(path for path in source.glob("*") if path.is_dir()):
        _make_whole(target / folder.name, partial(shutil.copytree, folder, dirs_exist_ok=True))


def _make_whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Fill an absent folder under a temporary name beside it, then rename it: it is whole or absent."""
    remove_orphans(folder.parent)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if folder.exists():  # by now
            return
        made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            write(made)
            try:
                os.replace(made, folder)
            except OSError:
                # another process was faster: its folder has the same content
                if not folder.exists():
                    raise
        except Exception as error:
            if full := next((text for text in FULL if text in str(error)), None):
                raise DataError(
                    f"{folder.parent} cannot be written to: {full}. Free space there, or set PROJECT_CACHE to a folder "
                    "on another disk."
                ) from error
            raise
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait while another process makes the folder. A killed one's lock is gone; without locks both make it."""
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
