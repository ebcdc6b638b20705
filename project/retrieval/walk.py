"""The as-of walk: every row is answered from strictly earlier rows, then taken in itself.

In reading order:

1. `tables_by_split`: which rows a split may read, and where one table serves all splits.
2. `block_cuts`, `fit_snapshots`: the log in blocks, and what a retriever fitted before each.
3. `WalkRows`, `walk`: rows in time order; each second is asked about first and taken in after that.
4. `_Past`: raters of an item and counts so far. `_Answers`: what was found, checked, as a table.
5. `SimilarLikes`: what similar users liked, for later prompts.
6. `cached_folder`: what was made is kept under a hash of everything it depends on.

What a row may do is three flags. A log row is asked about (`query`), becomes a rating others may read (`rater`) and
enters its user's own past (`own`); a request's history is asked about and own, its candidates are only asked about.
So a request is answered by the very code that made the training retrieved features and changes nobody else's. Labels
are read only from rows that are `rater` or `own`, once their time has passed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.data.download import remove_orphans
from project.data.protocol import SPLITS, SplitInteractions
from project.errors import ConfigError
from project.retrieval.base import Edges, FloatArray, IntArray, Neighbours, Raters, Retriever, Snapshot

BoolArray = NDArray[np.bool_]
# answers; the first ones are checked sooner, a retriever may be slow and wrong from the start
CHECKED_TOGETHER = 4096
FORMAT = 1  # raise it when the same settings would give other retrieved features or other files


def tables_by_split(
    split: SplitInteractions, make: Callable[[pl.DataFrame, str], pl.DataFrame], own_second: bool = False
) -> Iterator[tuple[str, pl.DataFrame]]:
    """(name, table) of test, valid and train, in this order; a table is made again only where it differs.

    Args:
        split: the log under its protocol.
        make: from the readable rows and the split's name to a table with their row_id.
        own_second: the table also tells what happened in a row's own second, see `reads_all_earlier`.
    """
    code = split.rows["split"].cast(pl.String).replace_strict({name: k for k, name in enumerate(SPLITS)})
    monotone = reads_all_earlier(split.rows["timestamp"].to_numpy(), code.to_numpy(), own_second)
    table = pl.DataFrame()
    for k, name in reversed(list(enumerate(SPLITS))):
        readable = split.rows.filter(code <= k)
        if k == len(SPLITS) - 1 or not monotone:
            table = make(readable, name)
        else:
            table = table.filter(pl.col("row_id").is_in(readable["row_id"].implode()))
        yield name, table


def reads_all_earlier(timestamp: NDArray[np.float64], split: IntArray, own_second: bool = False) -> bool:
    """Whether no row has a row of a later split strictly before it: then all splits' tables coincide.

    Args:
        timestamp: seconds, ascending, shape (rows,).
        split: 0 train, 1 valid, 2 test, shape (rows,).
        own_second: a row's own second counts too, as lists of what similar users liked read it.
    """
    latest_before = np.concatenate([[0], np.maximum.accumulate(split)])
    side: Literal["left", "right"] = "right" if own_second else "left"
    return bool(np.all(latest_before[np.searchsorted(timestamp, timestamp, side=side)] <= split))


def block_cuts(timestamp: NDArray[np.float64], refits: int) -> NDArray[np.float64]:
    """First timestamps of blocks 1, 2, ...: those at positions k * rows / refits, rounded down, k = 1 .. refits - 1.

    Args:
        timestamp: seconds, ascending, of all rows of the log, shape (rows,).
        refits: blocks of the log, as far as rows of one timestamp, which stay together, allow.
    """
    if not timestamp.size:
        return np.empty(0)
    cuts = np.unique(timestamp[np.arange(1, refits) * timestamp.size // refits])
    later: NDArray[np.float64] = cuts[cuts > timestamp[0]]
    return later


@dataclass(frozen=True)
class Snapshots:
    """Block k >= 1 holds the rows with cuts[k-1] <= timestamp < cuts[k]; block 0 has no past and no snapshot.

    Attributes:
        cuts: first timestamps of blocks 1, 2, ..., ascending, shape (blocks - 1,).
        fitted: what the retriever returned for blocks 1, 2, ...
    """

    cuts: NDArray[np.float64]
    fitted: list[Snapshot]

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


def fit_snapshots(
    rows: pl.DataFrame, retriever: Retriever, num_users: int, items: pl.DataFrame, cuts: NDArray[np.float64]
) -> Snapshots:
    """Fit a retriever block after block, each on all rows strictly before it.

    Args:
        rows: the readable rows in time order, columns user, item, timestamp, label.
        retriever: who is fitted.
        num_users: user codes of the log.
        items: the log's item table (`Interactions.items`).
        cuts: first timestamps of blocks 1, 2, ...
    """
    retriever.begin(num_users, items)
    user, item, label = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
    ends = np.searchsorted(rows["timestamp"].to_numpy(), cuts, side="left").tolist()
    fitted = []
    description = f"{type(retriever).__name__} snapshots"
    with Progress(transient=True) as progress:
        for block, end in enumerate(progress.track(ends, description=description), 1):
            fitted.append(retriever.fit(Edges(user[:end], item[:end], label[:end]), block))
    return Snapshots(cuts, fitted)


@dataclass(frozen=True)
class WalkRows:
    """Rows in time order; all arrays have shape (rows,).

    Attributes:
        row_id: what retrieved features calls the row.
        user: whose past (vector, rate) the row asks with and adds to.
        person: who it is: their own ratings are never their neighbours. Differs from `user` where a request
            brings its own history for a user of the log.
        item: item code; the number of items stands for any item the log does not have.
        timestamp: seconds; rows of one timestamp never see each other.
        label: 0, 1, or -1 for unknown.
        query: retrieved features is wanted.
        rater: becomes a rating that others may read.
        own: enters the past of its user.
    """

    row_id: IntArray
    user: IntArray
    person: IntArray
    item: IntArray
    timestamp: NDArray[np.float64]
    label: NDArray[np.int8]
    query: BoolArray
    rater: BoolArray
    own: BoolArray

    @classmethod
    def from_log(cls, rows: pl.DataFrame, query: bool = True) -> "WalkRows":
        """Rows of a log, sorted by (timestamp, user, item), which may do everything (or all but ask)."""
        yes = np.ones(rows.height, np.bool_)
        user = rows["user"].to_numpy().astype(np.int64)
        return cls(
            row_id=rows["row_id"].to_numpy().astype(np.int64),
            user=user,
            person=user,
            item=rows["item"].to_numpy().astype(np.int64),
            timestamp=rows["timestamp"].to_numpy().astype(np.float64),
            label=rows["label"].to_numpy().astype(np.int8),
            query=yes if query else ~yes,
            rater=yes,
            own=yes,
        )


def own_earlier_rows(user: IntArray, timestamp: NDArray[np.float64]) -> tuple[IntArray, IntArray, IntArray]:
    """The user's own strictly earlier rows, of every row: `order[start[k]:stop[k]]` for row k, oldest first.

    Args:
        user: user codes of rows in time order, shape (rows,).
        timestamp: seconds, ascending, shape (rows,); rows of one second do not see each other.

    Returns:
        `order`, positions of rows grouped by user, and `start` and `stop`, where a row's past lies in it; (rows,) each.
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


def questions_by_user(rows: WalkRows) -> Iterator[tuple[IntArray, IntArray, IntArray]]:
    """Of each user that asks: positions of its asking rows and of its past, and how many of the past each may read.

    Args:
        rows: the rows, in time order.

    Yields:
        `asks` (n,), `own` (m,), oldest first, and `earlier` (n,): row asks[j] reads own[: earlier[j]], what is strictly
        before it.
    """
    order = np.argsort(rows.user, kind="stable")
    for index in np.split(order, np.flatnonzero(np.diff(rows.user[order])) + 1):
        own, asks = index[rows.own[index]], index[rows.query[index]]
        if asks.size:
            yield asks, own, np.searchsorted(rows.timestamp[own], rows.timestamp[asks], side="left")


def walk(
    rows: WalkRows,
    retriever: Retriever,
    items: pl.DataFrame,
    cuts: NDArray[np.float64],
    snapshots: list[Snapshot],
    description: str = "retrieved",
) -> pl.DataFrame:
    """Answer every row that asks, in time order.

    Args:
        rows: the rows, in time order.
        retriever: who picks neighbours.
        items: the log's item table (`Interactions.items`).
        cuts: first timestamps of blocks 1, 2, ..., ascending, shape (blocks - 1,).
        snapshots: what the retriever fitted for blocks 1, 2, ...
        description: label of the progress bar.

    Returns:
        The retrieved features table (see `retrieved.py`), one row per asking row, in the order of `rows`.
    """
    retriever.begin(int(rows.user.max(initial=-1)) + 1, items)
    past, answers = _Past(rows, retriever.max_raters), _Answers(rows, retriever)
    similar = SimilarLikes(retriever) if retriever.similar_every else None
    block_of = np.searchsorted(cuts, rows.timestamp, side="right")
    block = 0
    with Progress(transient=True) as progress:
        for start, stop in progress.track(list(_spans(rows, block_of)), description=description):
            # 1. a new block: answer from what was fitted before it
            if block_of[start] != block:
                block = int(block_of[start])
                retriever.start_block(snapshots[block - 1], block)
            # 2. answer all rows of the second, from strictly earlier ones
            for row in range(start, stop):
                if rows.query[row]:
                    _answer(row, rows, retriever, past, answers)
            # 3. take the second in
            for row in range(start, stop):
                past.observe(row)
                if rows.own[row]:
                    retriever.observe(row, int(rows.user[row]), int(rows.item[row]), int(rows.label[row]))
            # 4. lists that are due, dated just after the second: they may tell its answers
            if similar is not None:
                _take_in(range(start, stop), rows, similar)
    table = answers.table()
    if similar is not None:
        table = table.with_columns(similar_after=similar.column(np.flatnonzero(rows.query)))
    return table


def _spans(rows: WalkRows, block_of: NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """Time groups as (start, stop); neighbouring groups nobody asks in are one span, for speed."""
    new_group = np.flatnonzero(np.diff(rows.timestamp, prepend=-np.inf))
    if not new_group.size:
        return iter(())
    asked = np.logical_or.reduceat(rows.query, new_group)
    new_block = np.diff(block_of, prepend=-1)[new_group] != 0
    needed = asked | np.concatenate([[True], asked[:-1]]) | new_block
    starts = new_group[needed].tolist()
    return zip(starts, [*starts[1:], rows.timestamp.size], strict=True)


def _take_in(group: range, rows: WalkRows, similar: "SimilarLikes") -> None:
    """The rows of one second (or of several that nobody asks in)."""
    for row in group:
        user, person, item = int(rows.user[row]), int(rows.person[row]), int(rows.item[row])
        if rows.rater[row]:
            similar.read(person, item, int(rows.label[row]))
        if rows.own[row]:
            similar.own(row, user, person, item, bool(rows.query[row]))
    similar.end_group()


def _answer(row: int, rows: WalkRows, retriever: Retriever, past: "_Past", answers: "_Answers") -> None:
    user, item = int(rows.user[row]), int(rows.item[row])
    raters = past.raters(item, int(rows.person[row]))
    found = retriever.select(user, item, float(rows.timestamp[row]), raters)
    answers.take(row, found)
    if answers.item_similarity is not None:
        answers.item_similarity[row] = retriever.item_similarity(user, item)
    answers.rates[row, :2] = past.item_likes[item], past.item_count[item]
    answers.rates[row, 2:] = past.user_likes[user], past.user_count[user]


class _Past:
    """What has been observed: each item's raters in time order, and the counts that rates are made of.

    An item's raters are a growing prefix of its rows in time order, so a question costs a slice and no copy.
    """

    def __init__(self, rows: WalkRows, max_raters: int) -> None:
        self._rows, self._max_raters = rows, max_raters
        num_users, num_items = int(rows.user.max(initial=-1)) + 1, int(rows.item.max(initial=-1)) + 1
        raters = np.flatnonzero(rows.rater)
        self._by_item = raters[np.argsort(rows.item[raters], kind="stable")]
        self._users = rows.person[self._by_item]
        self._starts = np.searchsorted(rows.item[self._by_item], np.arange(num_items)).tolist()
        self._latest: dict[tuple[int, int], int] = {}
        self._superseded: dict[int, list[int]] = {}
        self.item_likes, self.item_count = [0] * num_items, [0] * num_items
        self.user_likes, self.user_count = [0] * num_users, [0] * num_users

    def raters(self, item: int, person: int) -> Raters:
        """Raters of an item without `person`, oldest first, the latest row of each, at most max_raters."""
        start = self._starts[item]
        stop = start + self.item_count[item]
        dropped = list(self._superseded.get(item, ()))
        own = self._latest.get((item, person))
        if own is not None:
            dropped.append(own)
        if dropped:
            kept = np.ones(stop - start, np.bool_)
            kept[np.array(dropped) - start] = False
            chosen = (np.flatnonzero(kept) + start)[-self._max_raters :]
            return Raters(self._by_item[chosen], self._users[chosen])
        chosen_slice = slice(max(start, stop - self._max_raters), stop)
        return Raters(self._by_item[chosen_slice], self._users[chosen_slice])

    def observe(self, row: int) -> None:
        """Take in a row whose time has passed."""
        rows = self._rows
        label = int(rows.label[row])
        if rows.rater[row]:
            item = int(rows.item[row])
            position, key = self._starts[item] + self.item_count[item], (item, int(rows.person[row]))
            if key in self._latest:
                self._superseded.setdefault(item, []).append(self._latest[key])
            self._latest[key] = position
            self.item_count[item] += 1
            self.item_likes[item] += label
        if rows.own[row]:
            user = int(rows.user[row])
            self.user_count[user] += 1
            self.user_likes[user] += label


class _Answers:
    """Room for everything a walk finds, and the retrieved features table made from it."""

    def __init__(self, rows: WalkRows, retriever: Retriever) -> None:
        size, neighbours = rows.row_id.size, retriever.neighbours
        self._rows, self._retriever = rows, retriever
        self._unchecked, self._check_at = list[int](), 1
        self.count = np.zeros(size, np.int32)
        self.row = np.zeros((size, neighbours), np.int64)
        self.similarity = np.zeros((size, neighbours), np.float32)
        self.rates = np.zeros((size, 4), np.int32)
        self.item_similarity = np.zeros((size, 2), np.float32) if retriever.item_neighbours else None

    def take(self, row: int, found: Neighbours) -> None:
        """Keep the answer to one row, if it is one that a retriever may give."""
        check_shape(found, self._retriever)
        count = found.row.size
        self.count[row] = count
        self.row[row, :count] = found.row
        self.similarity[row, :count] = found.similarity
        self._unchecked.append(row)
        if len(self._unchecked) >= self._check_at:
            self._check()

    def _check(self) -> None:
        at = np.array(self._unchecked, np.int64)
        given = self.count[at], self.row[at], self.similarity[at]
        check_rows(at, *given, self._rows, self._retriever)
        self._check_at = min(2 * self._check_at, CHECKED_TOGETHER)
        self._unchecked.clear()

    def table(self) -> pl.DataFrame:
        """Retrieved features of the rows that asked; a share that rests on nothing is null."""
        self._check()
        asked = self._rows.query
        row, (item_likes, item_count, user_likes, user_count) = self.row[asked], self.rates[asked].T
        frame = pl.DataFrame(
            {
                "row_id": self._rows.row_id[asked],
                "neighbours": pl.Series(self._rows.row_id[row]),
                "similarities": pl.Series(self.similarity[asked]),
                "answers": pl.Series(self._rows.label[row]),
                "neighbour_count": self.count[asked],
                "item_likes": item_likes,
                "item_count": item_count,
                "user_likes": user_likes,
                "user_count": user_count,
            }
        )
        kinds = {"neighbours": pl.Int64, "similarities": pl.Float32, "answers": pl.Int8}
        lists = [  # the type is said because older polars forgets it where there are no rows
            pl.col(name).arr.to_list().list.head(pl.col("neighbour_count")).cast(pl.List(kind))
            for name, kind in kinds.items()
        ]
        table = frame.with_columns(lists).select(
            "row_id",
            "neighbours",
            "similarities",
            "answers",
            vote=pl.col("answers").list.mean().cast(pl.Float32),
            neighbour_count="neighbour_count",
            item_rate=_rate("item_likes", "item_count"),
            item_count="item_count",
            user_rate=_rate("user_likes", "user_count"),
            user_count="user_count",
        )
        if self.item_similarity is None:
            return table
        likes, weight = self.item_similarity[asked].T
        columns = table.with_columns(
            item_similarity=pl.Series(likes), item_similarity_weight=pl.Series(weight)
        )
        share = pl.when(pl.col("item_similarity_weight") > 0).then(
            pl.col("item_similarity") / pl.col("item_similarity_weight")
        )
        return columns.with_columns(item_similarity=share.cast(pl.Float32))


def _rate(likes: str, count: str) -> pl.Expr:
    return pl.when(pl.col(count) > 0).then(pl.col(likes) / pl.col(count)).cast(pl.Float32)


def check_shape(found: Neighbours, retriever: Retriever) -> None:
    """Refuse an answer that is not two arrays of one length, at most `neighbours`.

    Args:
        found: what `select` returned.
        retriever: who answered.

    Raises:
        ConfigError: It is something else.
    """
    wrong = _malformed(found, retriever.neighbours)
    if wrong:
        raise _refused(retriever, wrong)


def check_rows(
    asked: IntArray,
    count: NDArray[np.int32],
    row: IntArray,
    similarity: FloatArray,
    rows: WalkRows,
    retriever: Retriever,
) -> None:
    """Refuse answers that name a row that was not handed out: it may tell the future.

    Args:
        asked: positions of the rows that asked, shape (n,).
        count: how many rows each answer has, shape (n,).
        row: the answers' rows, in its first `count` places, shape (n, neighbours).
        similarity: likewise.
        rows: all rows of the walk.
        retriever: who answered.

    Raises:
        ConfigError: A row is neither an earlier rating of the item by somebody else nor of the user's own past, or a
            similarity is not finite.
    """
    used = np.arange(row.shape[1]) < count[:, None]
    asks = np.repeat(asked, count)
    if not np.isfinite(similarity[used]).all():
        raise _refused(retriever, "a similarity that is NaN or infinite")
    found = row[used]
    there = (found >= 0) & (found < rows.row_id.size)
    place = np.where(there, found, 0)
    own = rows.own[place] & (rows.user[place] == rows.user[asks])
    others = rows.rater[place] & (rows.item[place] == rows.item[asks])
    others &= rows.person[place] != rows.person[asks]
    handed = there & (rows.timestamp[place] < rows.timestamp[asks]) & (own | others)
    if not handed.all():
        first = int((~handed).argmax())
        raise ConfigError(
            f"{_select(retriever)} answered row {asks[first]} with row {found[first]}, neither one of the raters that "
            "it was handed nor an earlier row of the user that observe told it of, so it may tell the future. Expected "
            "values of raters.row; positions in it are not rows."
        )


def _select(retriever: Retriever) -> str:
    kind = type(retriever)
    return f"data.retriever is {kind.__module__}.{kind.__qualname__}: its select"


def _refused(retriever: Retriever, found: str) -> ConfigError:
    return ConfigError(
        f"{_select(retriever)} returned {found}; expected Neighbours(row, similarity): arrays of integers and finite "
        f"numbers, of one length, at most neighbours ({retriever.neighbours}). Return NO_NEIGHBOURS for none."
    )


def _malformed(found: object, most: int) -> str:
    """What is wrong with an answer, in words; empty where nothing is."""
    if not isinstance(found, Neighbours):
        return "None" if found is None else f"a {type(found).__name__}"
    row, similarity = found
    if not (isinstance(row, np.ndarray) and isinstance(similarity, np.ndarray)):
        return f"Neighbours of a {type(row).__name__} and a {type(similarity).__name__}"
    if row.ndim != 1 or row.shape != similarity.shape:
        return f"arrays of shapes {row.shape} and {similarity.shape}"
    if row.dtype.kind != "i" or similarity.dtype.kind not in "fi":
        return f"arrays of {row.dtype} and {similarity.dtype}"
    return f"{row.size} rows" if row.size > most else ""


class SimilarLikes:
    """Who likes what and who rated what so far, and the lists made from it.

    A list holds the items that the most similar users like by their latest rating, without those the user has
    rated, by the sum of the similarities; equal sums: the lower item code first.

    Args:
        retriever: Who compares users; its similar_every is above 0.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._lists: dict[int, list[int]] = {}  # by position of the row
        self._likes: dict[int, dict[int, None]] = {}  # by person, the one with the latest row last
        self._rated: dict[int, list[int]] = {}  # by user, an item as often as it was rated
        self._group: dict[int, tuple[int, int, int]] = {}  # by user: rows before, person, latest position

    def read(self, person: int, item: int, label: int) -> None:
        """Take in a row that others may read."""
        liked = self._likes.pop(person, {})
        liked.pop(item, None)
        if label == 1:
            liked[item] = None
        self._likes[person] = liked

    def own(self, row: int, user: int, person: int, item: int, asked: bool) -> None:
        """Take in a row of a user's own past; `row` is its position, `asked` whether its features are wanted."""
        rated = self._rated.setdefault(user, [])
        if asked:
            before = self._group[user][0] if user in self._group else len(rated)
            self._group[user] = (before, person, row)
        rated.append(item)

    def end_group(self) -> None:
        """All rows of a second were taken in: make the lists that are due."""
        every = self._retriever.similar_every
        for user, (before, person, row) in self._group.items():
            if len(self._rated[user]) // every > before // every:
                found = self._list(user, person)
                if found:
                    self._lists[row] = found
        self._group.clear()

    def column(self, rows: IntArray) -> pl.Series:
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
    """The folder of this content; where it is absent, `write` fills it under a temporary name beside it.

    Args:
        parent: folder of folders, made where absent.
        content: JSON-able description of everything the files depend on; stored beside them as content.json.
        write: fills an empty folder.
    """

    def write_with_content(made: Path) -> None:
        write(made)
        stored = json.dumps({"format": FORMAT, **content}, indent=2, sort_keys=True)
        (made / "content.json").write_text(stored)

    folder = parent / content_key(content)
    _make_whole(folder, write_with_content)
    return folder


def restore(source: Path, target: Path) -> None:
    """Copy the content folders that `target` lacks, as from a run's bundle to the cache.

    Args:
        source: folder of content folders; absent: there is nothing to copy.
        target: folder of content folders, made where absent.
    """
    for folder in sorted(path for path in source.glob("*") if path.is_dir()):
        _make_whole(target / folder.name, partial(shutil.copytree, folder, dirs_exist_ok=True))


def _make_whole(folder: Path, write: Callable[[Path], object]) -> None:
    remove_orphans(folder.parent)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        write(made)
        try:
            os.replace(made, folder)
        except OSError:
            # another process was faster: its folder has the same content
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
