"""Walks through a log in time: every row is answered from strictly earlier rows, then observed itself.

In reading order: the log in blocks, and what is fitted before each; the walk; the checks of answers and their table.
`past` holds the rows and what has been observed of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.arrays import F32, F64, I64
from project.data.protocol import answered, known_at
from project.errors import ConfigError
from project.features import Retrieved
from project.retrieval.base import Edges, Neighbours, Retriever, Snapshot
from project.retrieval.past import Past, SimilarLikes, WalkRows

# answers; fewer at first, so that a slow and wrong retriever fails early
CHECKED_TOGETHER = 4096
BLOCK = 2**16  # answers that become a table together, which bounds the memory
NOTHING = np.empty(0, np.int64)


def block_cuts(timestamp: F64, refits: int) -> F64:
    """First timestamps of blocks 1, 2, ...: those at positions k * rows / refits, rounded down, k = 1 .. refits - 1.

    `timestamp` is that of all rows of the log, ascending. Rows of one timestamp stay together.
    """
    if not timestamp.size:
        return np.empty(0)
    # two cuts in one second are one
    cuts = np.unique(timestamp[np.arange(1, refits) * timestamp.size // refits])
    # before the first second there is nothing to fit on
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
            # an npz file has no folders, so names carry the block
            arrays |= {f"{block}/{name}": array for name, array in snapshot.items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Snapshots":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            cuts = stored["cuts"]
            # a retriever without arrays has blocks, too
            fitted: list[dict[str, NDArray[Any]]] = [{} for _ in cuts]
            for key in stored.files:
                block, _, name = key.partition("/")
                if name:
                    fitted[int(block) - 1][name] = stored[key]
        return cls(cuts, [*fitted])


def fit_blocks(
    rows: pl.DataFrame, cuts: F64, fit: Callable[[Edges, int], Snapshot], description: str
) -> Snapshots:
    """What `fit` makes of all rows strictly before each block 1, 2, ...; `description` labels the progress bar.

    Rows are in time order, with columns user, item, timestamp, label and rating.
    """
    rows = rows.filter(answered(rows))
    known = known_at(rows)
    order = np.argsort(known, kind="stable")
    rows = rows[order]
    user = rows["user"].to_numpy().astype(np.int64)
    item = rows["item"].to_numpy().astype(np.int64)
    label = rows["label"].to_numpy().astype(np.int64)
    rating = rows["rating"].to_numpy().astype(np.float64)
    # (blocks - 1,) how many rows are known strictly before each block
    ends = np.searchsorted(known[order], cuts, side="left")
    fitted = list[Snapshot]()
    with Progress(transient=True) as progress:
        for end in progress.track(ends, description=description):
            edges = Edges(user[:end], item[:end], label[:end], rating[:end])
            fitted.append(fit(edges, len(fitted) + 1))
    return Snapshots(cuts, fitted)


def fit_snapshots(
    rows: pl.DataFrame, retriever: Retriever, num_users: int, items: pl.DataFrame, cuts: F64
) -> Snapshots:
    """Fit a retriever block after block, each on all rows strictly before it; `items` is the log's item table."""
    retriever.begin(num_users, items)
    return fit_blocks(rows, cuts, retriever.fit, f"{type(retriever).__name__} snapshots")


def walk(
    rows: WalkRows,
    retriever: Retriever,
    items: pl.DataFrame,
    cuts: F64,
    snapshots: list[Snapshot],
) -> pl.DataFrame:
    """The retrieved features table (see `features.py`) of the `query` rows, in their order.

    `items` is the log's item table, `cuts` and `snapshots` are those of `Snapshots`.
    """
    retriever.begin(int(rows.user.max(initial=-1)) + 1, items)
    past = Past(retriever.max_raters)
    answers = Answers(rows, retriever, items.height)
    similar = SimilarLikes(retriever) if retriever.similar_every else None
    block_of = np.searchsorted(cuts, rows.timestamp, side="right")  # (rows,)
    block = 0  # the one whose snapshot the retriever answers from
    check_at = 1  # so many unchecked answers are checked together
    starts = _span_starts(rows, block_of)
    stops = np.append(starts, rows.timestamp.size)[1:]
    order = np.argsort(rows.known, kind="stable")  # (rows,) as labels come to be known
    # (spans,) how many of these are known strictly before each span
    ends = np.searchsorted(rows.known[order], rows.timestamp[starts], side="left")
    spans = zip(starts, stops, np.append(0, ends), ends, strict=False)

    def observe(news: list[int]) -> None:
        for row in news:
            past.observe(rows, row)
            if rows.own[row]:
                retriever.observe(
                    row, int(rows.user[row]), int(rows.item[row]), int(rows.label[row])
                )
        # lists that are due, dated just after the latest row: they may hold its answer
        if similar is not None:
            for _, second in groupby(news, lambda row: rows.known[row]):
                similar.observe(rows, list(second))

    with Progress(transient=True) as progress:
        for start, stop, seen, end in progress.track(
            spans, total=starts.size, description="retrieved features"
        ):
            # 1. what came to be known since the last span
            observe(order[seen:end].tolist())
            # 2. a new block: answer from what was fitted before it
            if block_of[start] != block:
                block = int(block_of[start])
                retriever.start_block(snapshots[block - 1], block)
            # 3. answer all rows of the second, from what is known
            for row in range(start, stop):
                if rows.query[row]:
                    answers.answer(past, np.array([row]))
            if answers.unchecked >= check_at:
                answers.check()
                check_at = min(2 * check_at, CHECKED_TOGETHER)
    table = answers.table()
    if similar is not None:
        observe(order[ends.max(initial=0) :].tolist())
        table = table.with_columns(similar_after=similar.column(np.flatnonzero(rows.query)))
    return table


def _span_starts(rows: WalkRows, block_of: I64) -> I64:
    """Where time groups start; neighbouring groups without a query are one span, for speed."""
    # (groups,) where another second begins
    new_group = np.flatnonzero(np.diff(rows.timestamp, prepend=-np.inf))
    if not new_group.size:
        return new_group
    # (groups,) whether any row of the second is answered
    query = np.logical_or.reduceat(rows.query, new_group)
    # what follows a query starts anew: the query's rows must not be observed with it
    after_query = np.concatenate([[True], query[:-1]])
    # a block begins with its own span, since the retriever changes there
    new_block = np.diff(block_of, prepend=-1)[new_group] != 0
    starts: I64 = new_group[query | after_query | new_block]
    return starts


class Answers:
    """Collects and checks what a retriever answers, and makes the retrieved features table of it.

    `num_items` is the code of any item that the retriever does not know. Every BLOCK answers become a table, which
    bounds the memory.
    """

    def __init__(self, rows: WalkRows, retriever: Retriever, num_items: int) -> None:
        self._rows = rows
        self._retriever = retriever
        self._num_items = num_items
        self._closed = list[pl.DataFrame]()  # tables of earlier blocks of answers
        self._begin()

    def _begin(self) -> None:
        """Begin a block: lists with an entry for each of its n answers."""
        self._query = list[int]()  # position of the row that is answered
        self._row = list[I64]()  # (neighbours,) positions of their rows, most similar first
        self._similarity = list[F32]()  # (neighbours,)
        # likes and rows of the item, likes and rows of the user
        self._rates = list[tuple[int, ...]]()
        # (answers of a call, 2), see Retriever.item_similarities
        self._own_items = [np.empty((0, 2))]
        self._checked = 0  # leading answers that were checked

    def answer(self, past: Past, queries: I64) -> None:
        """Keep the retriever's answers to rows (n,) of one user and second, and the counts so far."""
        if len(self._query) + len(queries) > BLOCK:
            self._close()
        if not len(queries):
            return
        retriever = self._retriever
        user = int(self._rows.user[queries[0]])
        person = int(self._rows.person[queries[0]])
        time = float(self._rows.timestamp[queries[0]])
        items = self._rows.item[queries]
        # items that the retriever has not: one code stands for all of them
        known = np.minimum(items, self._num_items)
        for item, code in zip(items.tolist(), known.tolist(), strict=True):
            found = retriever.select(user, code, time, past.raters(item, person))
            if not isinstance(found, Neighbours) or len(found.row) != len(found.similarity):
                raise self._error(f"returned {found!r:.200}")
            if len(found.row) > retriever.neighbours:
                raise self._error(f"returned {len(found.row)} rows")
            # copies, because later rows move the raters
            self._row.append(np.array(found.row, np.int64))
            self._similarity.append(np.array(found.similarity, np.float32))
            self._rates.append(past.rates(item, user))
        # only after all were answered: the lists of a block have one length
        self._query += queries.tolist()
        if retriever.item_neighbours:
            self._own_items.append(retriever.item_similarities(user, known))

    @property
    def unchecked(self) -> int:
        """Answers since `check` was called."""
        return len(self._query) - self._checked

    def check(self) -> None:
        """Raise an error if an answer names a row that the retriever was not given: it may lie in the future.

        A row must be an earlier rating of the item by somebody else, or an earlier row of the user's own past.
        """
        rows = self._rows
        # NOTHING: concatenation needs one array at least
        found = np.concatenate([NOTHING, *self._row[self._checked :]])  # (pairs,)
        similarity = np.concatenate([NOTHING, *self._similarity[self._checked :]])
        count = [len(row) for row in self._row[self._checked :]]
        # (pairs,) the row that each pair answers
        query = np.repeat(np.array(self._query[self._checked :], np.int64), count)
        self._checked = len(self._query)
        if not np.isfinite(similarity).all():
            raise self._error("returned a similarity that is NaN or infinite")
        exists = (found >= 0) & (found < rows.row_id.size)
        # any row in place of one that does not exist; `exists` excludes the pair below
        row = np.where(exists, found, 0)
        # the user's own past, or the item's ratings by other persons
        own = rows.own[row] & (rows.user[row] == rows.user[query])
        others = rows.rater[row] & (rows.item[row] == rows.item[query])
        others &= rows.person[row] != rows.person[query]
        # either way known before
        given = exists & (rows.known[row] < rows.timestamp[query]) & (own | others)
        if not given.all():
            first = int((~given).argmax())
            raise self._error(
                f"answered row {query[first]} with row {found[first]}, neither one of the raters that it was given "
                "nor an earlier row of the user that observe got, so it may leak the future"
            )

    def _error(self, found: str) -> ConfigError:
        kind = type(self._retriever)
        return ConfigError(
            f"data.retriever is {kind.__module__}.{kind.__qualname__}: its select {found}; expected Neighbours(row, "
            f"similarity): values of raters.row, not positions in it, and finite numbers, at most neighbours "
            f"({self._retriever.neighbours}). Return NO_NEIGHBOURS for none."
        )

    def retrieved(self) -> Retrieved:
        """Features of the block's answers as numbers, as precise as in the table; a share of nothing is NaN."""
        self.check()

        def share(part: F64, total: F64) -> F64:
            return as_stored(
                np.divide(part, total, out=np.full_like(total, np.nan), where=total > 0)
            )

        count: F64 = np.array([row.size for row in self._row], np.float64)  # (n,)
        # the answer that each pair belongs to
        of_row = np.repeat(np.arange(count.size), count.astype(np.int64))  # (pairs,)
        answer = self._rows.label[np.concatenate([NOTHING, *self._row])]  # (pairs,)
        similarity = np.concatenate([NOTHING, *self._similarity])  # (pairs,)
        positive = np.maximum(similarity, 0.0)  # what a vote counts

        def summed(of_pair: NDArray[Any]) -> F64:
            return np.bincount(of_row, of_pair, count.size).astype(np.float64)

        weight = as_stored(summed(positive))  # (n,)
        # (n, 4) likes and rows of the item, likes and rows of the user
        rates = np.array(self._rates, np.float64).reshape(-1, 4)
        columns = {
            "vote": share(summed(answer), count),
            "neighbour_count": count,
            "weighted_vote": share(summed(positive * answer), weight),
            "vote_weight": weight,
            "similarity": share(summed(similarity), count),
            "item_rate": share(rates[:, 0], rates[:, 1]),
            "item_count": rates[:, 1],
            "user_rate": share(rates[:, 2], rates[:, 3]),
            "user_count": rates[:, 3],
        }
        if self._retriever.item_neighbours:
            # summed similarities of liked own items, and of all own items
            likes, weight = as_stored(np.concatenate(self._own_items)).T
            columns |= {
                "item_similarity": share(likes, weight),
                "item_similarity_weight": weight,
            }
        return Retrieved(columns)

    def table(self) -> pl.DataFrame:
        """Retrieved features of all answers."""
        self._close()
        return pl.concat(self._closed)

    def _close(self) -> None:
        """Make a table of the block, and begin the next."""
        found = self.retrieved()
        kinds: dict[Any, Any] = {
            name: pl.Int32 if name.endswith("_count") else pl.Float32
            for name in found.columns
        }
        row_id = self._rows.row_id[np.array(self._query, np.int64)]
        self._closed.append(
            found.table().cast(kinds).insert_column(0, pl.Series("row_id", row_id))
        )
        self._begin()


def as_stored(values: F64) -> F64:
    """Numbers as precise as a table keeps them."""
    return values.astype(np.float32).astype(np.float64)
