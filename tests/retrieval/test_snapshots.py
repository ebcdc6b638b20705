"""Blocks: cuts and their prefix property, and snapshots that survive a file."""

from pathlib import Path

import numpy as np
import pytest

from project.retrieval.snapshots import Snapshots, block_cuts


def test_a_cut_is_the_timestamp_at_its_index():
    """Positions 3 and 6 of 0, 0, 1, 1, 1, 2, 5, 6 hold 1 and 5."""
    assert block_cuts(np.array([0.0, 0, 1, 1, 1, 2, 5, 6]), 3).tolist() == [1, 5]


def test_one_long_second_makes_no_empty_block():
    """Two cuts in one second are one cut, and the first second never is one."""
    assert block_cuts(np.array([0.0, 0, 0, 1, 1, 1, 1, 2]), 2).tolist() == [1]
    assert block_cuts(np.array([4.0]), 2).tolist() == []


@pytest.mark.parametrize("rows", range(1, 60, 7))
def test_a_longer_log_begins_with_the_same_cuts(rows: int):
    """The cuts of the first rows are those of the whole log that lie in them."""
    time = np.sort(np.random.default_rng(0).integers(0, 30, 60)).astype(float)
    short, long = block_cuts(time[:rows], 5), block_cuts(time, 5)
    assert long[: short.size].tolist() == short.tolist()


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
