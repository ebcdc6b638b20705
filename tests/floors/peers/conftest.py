"""A log with ties, two attributes and all three splits, whose labels say something about their user and item."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from project.data.interactions import Interactions
from project.data.splits import FOLDS, ROLES, SPLITS, Protocol, SplitInteractions

USERS, ITEMS = 24, 12


def make_split(rows: pl.DataFrame) -> SplitInteractions:
    """A split log from rows with user, item, timestamp, label and split, in time order; all are targets.

    Valid's folds go by user: select, tune, certify, and so on.
    """
    fold = pl.col("user").mod(3).replace_strict(dict(enumerate(FOLDS)), return_dtype=pl.Enum(FOLDS))
    rows = rows.with_columns(
        pl.col("user", "item").cast(pl.Int32),
        pl.col("timestamp").cast(pl.Float64),
        pl.col("label").cast(pl.Int8),
        pl.col("split").cast(pl.Enum(SPLITS)),
        row_id=pl.int_range(pl.len(), dtype=pl.Int64),
        fold=pl.when(pl.col("split") == "valid").then(fold),
        role=pl.lit("target", pl.Enum(ROLES)),
    )
    users = pl.DataFrame({"user": np.arange(USERS, dtype=np.int32)})
    items = pl.DataFrame(
        {
            "item": np.arange(ITEMS, dtype=np.int32),
            "item_id": [f"i{i}" for i in range(ITEMS)],
            "title": ["the same title"] * ITEMS,
            "year": [str(1990 + i % 4) for i in range(ITEMS)],
            "genres": [["Drama", "Drama|War", "Comedy  War", ""][i % 4] for i in range(ITEMS)],
        }
    )
    digest = hashlib.sha256(rows.write_csv().encode()).hexdigest()[:16]
    return SplitInteractions(Interactions(rows, users, items, {}), rows, Protocol(), {}, digest)


def random_rows(kind: str, size: int, seed: int = 0) -> pl.DataFrame:
    """Many rows share a second; users differ in kindness and items in quality; cut by time, or at random."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, USERS, size), rng.integers(0, ITEMS, size)
    kindness, quality = rng.normal(size=USERS), rng.normal(size=ITEMS)
    chance = 1 / (1 + np.exp(-2.5 * (kindness[user] + quality[item])))
    table = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "timestamp": rng.integers(0, size // 3, size),
            "label": (rng.random(size) < chance).astype(int),
        }
    ).sort("timestamp", "user", "item")
    late = table["timestamp"].to_numpy() / (size // 3)
    code = (late > 0.6).astype(int) + (late > 0.8) if kind == "by_time" else rng.integers(0, 3, size)
    return table.with_columns(split=pl.Series([SPLITS[c] for c in code]))


@pytest.fixture
def build() -> Callable[[pl.DataFrame], SplitInteractions]:
    """`make_split`."""
    return make_split


@pytest.fixture
def draw() -> Callable[..., pl.DataFrame]:
    """`random_rows`."""
    return random_rows
