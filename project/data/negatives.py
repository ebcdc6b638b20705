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

    Args:
        per_positive: Negatives of each target, at its time.
        by: How items are drawn. uniform: each of the catalogue alike; popularity: in proportion to 1 + the clicks that
            an item had strictly earlier.
        repeats: Clicks on an item that their user had clicked strictly earlier. context: they are read and not scored,
            since no negative was clicked before, so that alone would tell them; target: they are scored.
    """

    per_positive: int = 1
    by: Literal["uniform", "popularity"] = "uniform"
    repeats: Literal["context", "target"] = "context"


def repeated(rows: pl.DataFrame) -> pl.Series:
    """Whether each row's user clicked its item strictly earlier, in a row of a split that the row may read."""
    code, time = pl.col("split").to_physical(), pl.col("timestamp")
    again = [
        (code == k) & (time > pl.when(code <= k).then(time).min().over("user", "item")) for k in range(3)
    ]
    return rows.select(pl.any_horizontal(again)).to_series()


def draw_negatives(rows: pl.DataFrame, negatives: Negatives, hidden: pl.Series, seed: int) -> pl.DataFrame:
    """Rows with label 0 for the targets among `rows` (in time order): a target's user, time and split, an unseen item.

    What decides is what a row may read: rows of splits up to its own. Items that are `hidden` (a Boolean each) are not
    drawn for train. No item is drawn twice for one user, time and split.
    """
    rng, parts = np.random.default_rng(seed), []
    code = rows["split"].to_physical()
    for k in range(3):
        readable = rows.filter(code <= k)
        targets = rows.filter((code == k) & (rows["role"] == "target"))
        repeated = targets[np.repeat(np.arange(targets.height), negatives.per_positive)]
        allowed = ~hidden.to_numpy() if k == 0 else np.ones(len(hidden), np.bool_)
        item = _unseen(readable, repeated, allowed, negatives.by == "popularity", rng)
        parts.append(repeated.with_columns(item=pl.Series(item, dtype=pl.Int32), hidden=hidden.gather(item)))
    return pl.concat(parts).with_columns(
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
    # 1. when a user clicked an item first, by a key of both
    items = allowed.size
    clicked, clicked_at = readable["item"].to_numpy().astype(np.int64), readable["timestamp"].to_numpy()
    keys, first = np.unique(readable["user"].to_numpy() * np.int64(items) + clicked, return_index=True)
    # 2. draw: place j below `earlier` is the item of the j-th earlier click, the places behind it are the catalogue
    user, time = drawn["user"].to_numpy().astype(np.int64), drawn["timestamp"].to_numpy()
    earlier = np.searchsorted(clicked_at, time, side="left") if popular else np.zeros(drawn.height, np.int64)
    item, waiting = np.zeros(drawn.height, np.int64), np.arange(drawn.height)
    for _ in range(ROUNDS):
        before = earlier[waiting]
        place = (rng.random(waiting.size) * (before + items)).astype(np.int64)
        item[waiting] = np.where(place < before, clicked[np.minimum(place, before - 1)], place - before)
        # 3. refuse items that the user had clicked by then, that are not allowed, or that stand there twice
        key = user * items + item
        at = np.minimum(np.searchsorted(keys, key), keys.size - 1)
        seen = (keys[at] == key) & (clicked_at[first[at]] <= time)
        once = pl.DataFrame({"key": key, "time": time}).select(pl.struct(pl.all()).is_first_distinct())
        waiting = np.flatnonzero(seen | ~allowed[item] | ~once.to_series().to_numpy())
        if not waiting.size:
            return item
    raise DataError(
        f"{waiting.size:,} of {drawn.height:,} negatives were not found: {ROUNDS} draws of {items:,} items gave none "
        "that the user had not clicked by then. Lower data.protocol.negatives.per_positive."
    )
