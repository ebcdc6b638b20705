"""Walks through a log in time: every row is answered from strictly earlier rows, then observed itself.

In reading order: the log in blocks, and what is fitted before each; the walk; the checks of answers and their table.
`past` holds the rows and what has been observed of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.arrays import F64, I64
from project.data.protocol import answered
from project.errors import ConfigError
from project.features import Retrieved
from project.retrieval.base import Edges, Neighbours, Retriever, Snapshot
from project.retrieval.past import BLOCK, Past, SimilarLikes, WalkRows

CHECKED_TOGETHER = 4096  # answers; fewer at first, so that a slow and wrong retriever is refused early


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
