"""Blocks: cuts and their prefix property, and snapshots that survive a file."""

from pathlib import Path

import numpy as np
import pytest

from project.retrieval.walk import Snapshots, block_cuts


def test_a_cut_is_the_timestamp_at_its_share():
    """Three blocks of 0, 0, 1, 1, 1, 2, 5, 6: positions 8 / 3 and 16 / 3, rounded down 2 and 5, hold 1 and 2."""
    assert block_cuts(np.array([0.0, 0, 1, 1, 1, 2, 5, 6]), 3).tolist() == [1, 2]


@pytest.mark.parametrize(("rows", "first"), [(100_000, 10_000), (3_000, 300), (1_000_000, 100_000)])
def test_a_log_of_any_length_is_cut_into_tenths(rows: int, first: int):
    """ML-100K's 100,000 rows are cut at 10,000, 20,000, ..., 90,000; a short log too, and a long one as often."""
    assert block_cuts(np.arange(float(rows)), 10).tolist() == list(range(first, rows, first))


def test_one_long_second_makes_no_empty_block():
    """Two cuts in one second are one cut, and the first second never is one; fewer rows than blocks are no error."""
    assert block_cuts(np.array([0.0, 0, 0, 1, 1, 1, 1, 2]), 4).tolist() == [1]
    assert block_cuts(np.array([4.0]), 2).tolist() == []
    assert block_cuts(np.array([]), 2).tolist() == []
    assert block_cuts(np.array([0.0, 1, 2]), 10).tolist() == [1, 2]


def test_a_file_gives_back_what_was_saved(tmp_path: Path):
    """Arrays come back by block and name, blocks without arrays included."""
    snapshots = Snapshots(
        np.array([1.0, 2, 3]), [{"a": np.arange(3)}, {}, {"a": np.ones((2, 2)), "b": np.zeros(1)}]
    )
    snapshots.save(tmp_path / "s.npz")
    loaded = Snapshots.load(tmp_path / "s.npz")
    assert loaded.cuts.tolist() == [1, 2, 3]
    for before, after in zip(snapshots.fitted, loaded.fitted, strict=True):
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
