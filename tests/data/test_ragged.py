"""Rows of unequal length lie in ragged arrays."""

from __future__ import annotations

import numpy as np

from project.data.ragged import Ragged, join, within


def test_ragged_golden() -> None:
    a = Ragged.of([[1, 2], [], [3]])
    assert [x.tolist() for x in (a[0], a[1], a[2])] == [[1, 2], [], [3]]
    taken = a.take(np.array([2, 0, 0]))
    assert [taken[i].tolist() for i in range(3)] == [[3], [1, 2], [1, 2]]
    assert within(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


def test_join_equals_python() -> None:
    rng = np.random.default_rng(0)
    parts = [
        [rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(50)]
        for _ in range(3)
    ]
    joined = join([Ragged.of(p) for p in parts])
    assert [joined[i].tolist() for i in range(50)] == [
        [v for p in parts for v in p[i]] for i in range(50)
    ]
