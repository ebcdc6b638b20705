"""Makes small random logs with given splits and cuts, and a retriever that any edge too many would change."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import polars as pl

from project.arrays import F32
from project.data.protocol import (
    FOLDS,
    ROLES,
    SPLITS,
    Interactions,
    Protocol,
    SplitInteractions,
)
from project.retrieval import VectorRetriever
from project.retrieval.base import Edges, Neighbours, Retriever
from project.retrieval.past import WalkRows
from project.retrieval.walk import fit_snapshots, walk

NUM_USERS, NUM_ITEMS = 12, 9
CUTS = np.array([20.0, 45.0])
Array = np.ndarray[Any, Any]


class CoLikes(VectorRetriever):
    """An item's vector counts which items its likers liked: any edge too many changes it."""

    def item_table(self, edges: Edges, block: int) -> F32:
        likes = np.zeros((self._num_users, self._items.height), np.float32)
        np.add.at(likes, (edges.user, edges.item), edges.label.astype(np.float32))
        table: F32 = likes.T @ likes
        return table


def make_log(
    seed: int, rows: int = 150, users: int = NUM_USERS, items: int = NUM_ITEMS
) -> pl.DataFrame:
    """Few users, items and seconds, so that ties and repeated ratings are common."""
    random = np.random.default_rng(seed)
    table = pl.DataFrame(
        {
            "user": random.integers(0, users, rows).astype(np.int32),
            "item": random.integers(0, items, rows).astype(np.int32),
            "timestamp": random.integers(0, rows // 2, rows).astype(np.float64),
            "label": random.integers(0, 2, rows).astype(np.int8),
        }
    )
    distinct = table.unique(
        ["user", "item", "timestamp"], keep="first", maintain_order=True
    )
    return numbered(rated(distinct).sort("timestamp", "user", "item"))


def rated(rows: pl.DataFrame) -> pl.DataFrame:
    """With ratings, 3 to 5 of what is liked and 1 to 3 of what is not; user 0 gives none."""
    rating = 2.0 * pl.col("label") + pl.col("item") % 3 + 1
    return rows.with_columns(rating=pl.when(pl.col("user") > 0).then(rating))


def numbered(rows: pl.DataFrame) -> pl.DataFrame:
    """The same rows with their row_id."""
    return rows.with_columns(row_id=pl.int_range(pl.len(), dtype=pl.Int64))


def flip(rows: pl.DataFrame, where: pl.Expr) -> pl.DataFrame:
    """The opposite answer in these rows."""
    turned = pl.when(where).then(1 - pl.col("label")).otherwise("label")
    return rated(rows.with_columns(label=turned.cast(rows["label"].dtype)))


def items_table(items: int = NUM_ITEMS) -> pl.DataFrame:
    """Codes and titles."""
    return pl.DataFrame(
        {
            "item": np.arange(items, dtype=np.int32),
            "title": [f"title {i}" for i in range(items)],
        }
    )


def by_time(rows: pl.DataFrame) -> Array:
    """Split codes 0, 1, 2 by two cuts in time."""
    time = rows["timestamp"].to_numpy()
    return (time >= 40).astype(int) + (time >= 60)


def at_random(rows: pl.DataFrame) -> Array:
    """Split codes that do not depend on time."""
    return np.random.default_rng(0).integers(0, 3, rows.height)


def make_split(rows: pl.DataFrame, codes: Array) -> SplitInteractions:
    """A split log from rows and split codes, without the protocol's work."""
    split = pl.Series([SPLITS[code] for code in codes], dtype=pl.Enum(SPLITS))
    table = rows.with_columns(
        split=split,
        fold=pl.lit(None, pl.Enum(FOLDS)),
        role=pl.lit("target", pl.Enum(ROLES)),
        hist=pl.lit(0),
    )
    users = pl.DataFrame({"user": np.arange(NUM_USERS, dtype=np.int32)})
    log = Interactions(rows, users, items_table(), {"log.csv": "0" * 64})
    digest = str(abs(hash((rows.write_csv(), tuple(codes)))))
    return SplitInteractions(log, table, Protocol(), {}, digest)


def retrieved(
    rows: pl.DataFrame,
    retriever: Retriever,
    cuts: Array = CUTS,
    silent: tuple[int, ...] = (),
) -> pl.DataFrame:
    """Retrieved features of all rows; rows with a `silent` row_id are answered but otherwise absent."""
    absent = rows["row_id"].is_in(silent)
    snapshots = fit_snapshots(
        rows.filter(~absent), retriever, NUM_USERS, items_table(), cuts
    )
    log = WalkRows.from_log(rows)
    present = ~absent.to_numpy()
    flagged = WalkRows(**{**vars(log), "rater": present, "own": present})
    return listed(flagged, retriever, items_table(), cuts, snapshots.fitted)


def listed(rows: WalkRows, retriever: Retriever, *about: Any) -> pl.DataFrame:
    """`walk`, with lists of the neighbours' rows, similarities and answers, as `select` gives them."""
    found = []

    def recorded(*asked: Any) -> Neighbours:
        # a copy, since later rows move the raters
        found.append(deepcopy(type(retriever).select(retriever, *asked)))
        return found[-1]

    retriever.select = recorded  # type: ignore[method-assign]
    try:
        table = walk(rows, retriever, *about)
    finally:
        del retriever.select
    at = [neighbours.row for neighbours in found]
    return table.with_columns(
        neighbours=pl.Series(
            [rows.row_id[n].tolist() for n in at], dtype=pl.List(pl.Int64)
        ),
        similarities=pl.Series(
            [n.similarity.tolist() for n in found], dtype=pl.List(pl.Float32)
        ),
        answers=pl.Series([rows.label[n].tolist() for n in at], dtype=pl.List(pl.Int8)),
    )


def columns(rows: pl.DataFrame) -> tuple[Array, ...]:
    """Users, items, timestamps and labels of rows."""
    names = ("user", "item", "timestamp", "label")
    return tuple(rows[name].to_numpy() for name in names)


def request(rows: pl.DataFrame, own: bool = True) -> pl.DataFrame:
    """Log rows as a request's: the user's own past, or candidates."""
    label = pl.col("label") if own else pl.lit(-1, pl.Int8)
    return rows.with_columns(label=label, candidate=not own)


def likes_before(rows: pl.DataFrame, time: float) -> Array | None:
    """Of each user and item, the likes before the block of a second, by a filter; none in the first block."""
    starts = CUTS[time >= CUTS]
    if not starts.size:
        return None
    user, item, when, label = columns(rows)
    likes = np.zeros((NUM_USERS, NUM_ITEMS))
    np.add.at(likes, (user, item), (when < starts[-1]) & (label == 1))
    return likes


def user_vectors(past: pl.DataFrame, likes: Array) -> Array:
    """What CoLikes makes of users with these past rows, a row a user, of length 1 or 0."""
    weighted = likes.T @ likes / np.sqrt(np.maximum(likes.sum(0), 1))[:, None]
    user, item, _, label = columns(past)
    vectors = np.zeros((NUM_USERS, NUM_ITEMS))
    np.add.at(vectors, user, np.where(label == 1, 1, -0.5)[:, None] * weighted[item])
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)[:, None]
