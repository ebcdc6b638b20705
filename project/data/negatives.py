"""Negatives of a log of clicks: items that a user had not clicked by then, drawn once, by the protocol's seed."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from project.arrays import I64, Bool
from project.errors import DataError

ROUNDS = 100  # of drawing anew what may not stay


@dataclass
class Negatives:
    """Items that stand beside the clicks of a log with the answer 0.

    Clicks on an item that their user had clicked strictly earlier are read and not scored: no negative was clicked
    before, so that alone would tell them.

    Args:
        per_positive: Negatives of each target, at its time.
        by: How items are drawn. uniform: each of the catalogue alike; popularity: in proportion to 1 + the clicks that
            an item had strictly earlier.
    """

    per_positive: int = 1
    by: Literal["uniform", "popularity"] = "uniform"


def repeated(rows: pl.DataFrame) -> pl.Series:
    """Whether each row's user clicked its item strictly earlier, in a row of a split that the row may read."""
    split = pl.col("split").to_physical()
    time = pl.col("timestamp")
    again = [
        (split == k) & (time > pl.when(split <= k).then(time).min().over("user", "item"))
        for k in range(3)
    ]
    return rows.select(pl.any_horizontal(again)).to_series()


def draw_negatives(
    rows: pl.DataFrame, negatives: Negatives, hidden: pl.Series, seed: int
) -> pl.DataFrame:
    """Rows with label 0 for the targets among `rows` (in time order): a target's user, time and split, an unseen item.

    What decides is what a row may read: rows of splits up to its own. Items that are `hidden` (a Boolean each) are not
    drawn for train. No item is drawn twice for one user, time and split.
    """
    rng = np.random.default_rng(seed)
    split = rows["split"].to_physical()
    drawn = []  # a table each split
    for k in range(3):
        targets = rows.filter(split == k, role="target")
        negative = targets[np.repeat(np.arange(targets.height), negatives.per_positive)]
        # (items,)
        allowed = ~hidden.to_numpy() | (k > 0)
        item = _unseen(
            rows.filter(split <= k), negative, allowed, negatives.by == "popularity", rng
        )
        drawn.append(
            negative.with_columns(
                item=pl.Series(item, dtype=pl.Int32), hidden=hidden.gather(item)
            )
        )
    return pl.concat(drawn).with_columns(
        label=pl.lit(0, pl.Int8), rating=pl.lit(None, pl.Float64), sampled=pl.lit(True)
    )


def _unseen(
    readable: pl.DataFrame,
    drawn: pl.DataFrame,
    allowed: Bool,
    popular: bool,
    rng: np.random.Generator,
) -> I64:
    """An allowed item for each row of `drawn`, one that its user has not clicked in `readable` until its time."""
    items = allowed.size
    # 1. when a user clicked an item first, by a key of both
    clicked = readable["item"].to_numpy().astype(np.int64)  # (n,) in time order
    clicked_at = readable["timestamp"].to_numpy()  # (n,) seconds
    key_of_click = readable["user"].to_numpy() * np.int64(items) + clicked
    # (k,) ascending, and the first click of each
    keys, first = np.unique(key_of_click, return_index=True)
    # 2. draw: place j below `earlier` is the item of the j-th earlier click, the places
    # behind it are the catalogue
    user = drawn["user"].to_numpy().astype(np.int64)  # (m,)
    time = drawn["timestamp"].to_numpy()  # (m,) seconds
    # (m,) clicks
    earlier = (
        np.searchsorted(clicked_at, time) if popular else np.zeros(drawn.height, np.int64)
    )
    item = np.zeros(drawn.height, np.int64)  # (m,) what was drawn last
    # rows whose item may not stay; shrinks at every round
    waiting = np.arange(drawn.height)
    for _ in range(ROUNDS):
        before = earlier[waiting]
        drawn_place = (rng.random(waiting.size) * (before + items)).astype(np.int64)
        of_click = clicked[np.minimum(drawn_place, before - 1)]
        item[waiting] = np.where(drawn_place < before, of_click, drawn_place - before)
        # 3. draw anew what the user had clicked by then, what is not allowed, or stands
        # there twice
        key = user * items + item
        at = np.minimum(np.searchsorted(keys, key), keys.size - 1)
        seen = (keys[at] == key) & (clicked_at[first[at]] <= time)
        once = pl.DataFrame({"key": key, "time": time}).select(
            pl.struct(pl.all()).is_first_distinct()
        )
        waiting = np.flatnonzero(seen | ~allowed[item] | ~once.to_series().to_numpy())
        if not waiting.size:
            return item
    raise DataError(
        f"{waiting.size:,} of {drawn.height:,} negatives were not found: {ROUNDS} draws of {items:,} items gave none "
        "that the user had not clicked by then. Lower data.protocol.negatives.per_positive."
    )
