from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from project.data.splits import ROLES
from project.floors.peers.history import NO_ROW, earlier_rows


def test_golden(build):
    """Two places. User 0 rates items 1 to 4 at 1, 2, 2 and 3 s: rows of 2 s see item 1 alone, that of 3 s both of 2 s.

    User 1's row between them is nobody else's past.
    """
    rows = pl.DataFrame(
        {
            "user": [0, 1, 0, 0, 0],
            "item": [1, 9, 2, 3, 4],
            "timestamp": [1, 1, 2, 2, 3],
            "label": [1, 1, 0, 1, 0],
            "split": ["train"] * 5,
        }
    )
    items, answers = earlier_rows(build(rows).rows, "train", 2)
    n = NO_ROW
    assert items.tolist() == [[n, n], [n, n], [n, 1], [n, 1], [2, 3]]
    assert answers.tolist() == [[n, n], [n, n], [n, 1], [n, 1], [0, 1]]


def test_context_is_read_and_later_splits_are_not(build):
    """A valid row reads an earlier context row of train, but not an earlier row of test."""
    rows = pl.DataFrame(
        {
            "user": [0, 0, 0],
            "item": [5, 6, 7],
            "timestamp": [1, 2, 3],
            "label": [1, 0, 1],
            "split": ["train", "test", "valid"],
        }
    )
    log = build(rows).rows.with_columns(role=pl.Series(["context", "target", "target"], dtype=pl.Enum(ROLES)))
    items, answers = earlier_rows(log, "valid", 3)
    assert items.tolist() == [[NO_ROW, NO_ROW, 5]]
    assert answers.tolist() == [[NO_ROW, NO_ROW, 1]]


@pytest.mark.parametrize("kind", ["by_time", "random"])
def test_equals_the_slow_way(build, draw, kind):
    """For every target: the user's last five readable rows of strictly smaller time, in the log's order."""
    log = build(draw(kind, 400)).rows
    reads = {
        "train": ["train"],
        "valid": ["train", "valid"],
        "test": ["train", "valid", "test"],
    }
    for split, readable in reads.items():
        items, answers = earlier_rows(log, split, 5)
        targets = log.filter(pl.col("split") == split)
        assert len(items) == targets.height
        for row, item, answer in zip(targets.iter_rows(named=True), items, answers, strict=True):
            past = log.filter(
                (pl.col("user") == row["user"])
                & (pl.col("timestamp") < row["timestamp"])
                & pl.col("split").cast(pl.String).is_in(readable)
            ).tail(5)
            padding = [NO_ROW] * (5 - past.height)
            np.testing.assert_array_equal(item, padding + past["item"].to_list())
            np.testing.assert_array_equal(answer, padding + past["label"].to_list())
