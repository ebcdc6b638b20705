import numpy as np

from project.data.ragged import Ragged, join, within


def test_golden() -> None:
    """Lists survive; take repeats and reorders; join puts parts side by side."""
    a, b = Ragged.of([[1, 2], [], [3]]), Ragged.of([[7], [8, 9], []])
    assert [x.tolist() for x in (a[0], a[1], a[2])] == [[1, 2], [], [3]]
    taken = a.take(np.array([2, 0, 0]))
    assert [taken[i].tolist() for i in range(3)] == [[3], [1, 2], [1, 2]]
    joined = join([a, b])
    assert [joined[i].tolist() for i in range(3)] == [[1, 2, 7], [8, 9], [3]]
    assert within(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


def test_join_equals_python() -> None:
    """Random parts: join equals list concatenation."""
    rng = np.random.default_rng(0)
    parts = [[rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(50)] for _ in range(3)]
    joined = join([Ragged.of(p) for p in parts])
    assert [joined[i].tolist() for i in range(50)] == [[v for p in parts for v in p[i]] for i in range(50)]
