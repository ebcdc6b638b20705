"""One walk through time: every question is answered from strictly earlier rows, then taken in itself.

Unusual: what a row may do is three flags. A log row is asked about (`query`), becomes a rating others may
read (`rater`) and enters its user's own past (`own`); a request's history is asked about and own, its
candidates are only asked about. So a request is answered by the very code that made the training evidence and
changes nobody else's. Labels are read only from rows that are `rater` or `own`, once their time has passed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.retrieval.base import IntArray, Neighbours, Raters, Retriever, Snapshot
from project.retrieval.checks import check_rows, check_shape
from project.retrieval.similar import SimilarLikes

BoolArray = NDArray[np.bool_]
# answers; the first ones are checked sooner, a retriever may be slow and wrong from the start
CHECKED_TOGETHER = 4096


@dataclass(frozen=True)
class WalkRows:
    """Rows in time order; all arrays have shape (rows,).

    Attributes:
        row_id: what evidence calls the row.
        user: whose past (vector, rate) the row asks with and adds to.
        person: who it is: their own ratings are never their neighbours. Differs from `user` where a request
            brings its own history for a user of the log.
        item: item code; the number of items stands for any item the log does not have.
        timestamp: seconds; rows of one timestamp never see each other.
        label: 0, 1, or -1 for unknown.
        query: evidence is wanted.
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


def walk(
    rows: WalkRows,
    retriever: Retriever,
    items: pl.DataFrame,
    cuts: NDArray[np.float64],
    snapshots: list[Snapshot],
    description: str = "evidence",
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
        The evidence table (see `evidence.py`), one row per asking row, in the order of `rows`.
    """
    retriever.begin(int(rows.user.max(initial=-1)) + 1, items)
    past, answers = _Past(rows, retriever.max_raters), _Answers(rows, retriever)
    similar = SimilarLikes(retriever) if retriever.similar_every else None
    block_of = np.searchsorted(cuts, rows.timestamp, side="right")
    block = 0
    with Progress(transient=True) as progress:
        for start, stop in progress.track(list(_spans(rows, block_of)), description=description):
            if block_of[start] != block:
                block = int(block_of[start])
                retriever.start_block(snapshots[block - 1], block)
            for row in range(start, stop):
                if rows.query[row]:
                    _answer(row, rows, retriever, past, answers)
            for row in range(start, stop):
                past.observe(row)
                if rows.own[row]:
                    retriever.observe(row, int(rows.user[row]), int(rows.item[row]), int(rows.label[row]))
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


def _take_in(group: range, rows: WalkRows, similar: SimilarLikes) -> None:
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
    if answers.alike is not None:
        answers.alike[row] = retriever.alike(user, item)
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
    """Room for everything a walk finds, and the evidence table made from it."""

    def __init__(self, rows: WalkRows, retriever: Retriever) -> None:
        size, neighbours = rows.row_id.size, retriever.neighbours
        self._rows, self._retriever = rows, retriever
        self._unchecked, self._check_at = list[int](), 1
        self.count = np.zeros(size, np.int32)
        self.row = np.zeros((size, neighbours), np.int64)
        self.similarity = np.zeros((size, neighbours), np.float32)
        self.rates = np.zeros((size, 4), np.int32)
        self.alike = np.zeros((size, 2), np.float32) if retriever.alike_items else None

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
        """Evidence of the rows that asked; a share that rests on nothing is null."""
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
        if self.alike is None:
            return table
        likes, weight = self.alike[asked].T
        columns = table.with_columns(alike=pl.Series(likes), alike_weight=pl.Series(weight))
        share = pl.when(pl.col("alike_weight") > 0).then(pl.col("alike") / pl.col("alike_weight"))
        return columns.with_columns(alike=share.cast(pl.Float32))


def _rate(likes: str, count: str) -> pl.Expr:
    return pl.when(pl.col(count) > 0).then(pl.col(likes) / pl.col(count)).cast(pl.Float32)
