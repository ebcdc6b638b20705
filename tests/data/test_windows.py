import numpy as np
import pytest

from project.data.stream import context_starts, evaluation_windows, time_groups, training_windows


def random_stream(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    time = np.sort(rng.integers(0, rng.integers(1, 40), n)).astype(float)
    return rng.integers(5, 40, n), time, rng.random(n) < 0.5, int(rng.integers(50, 400))


def test_oldest_half_is_dropped() -> None:
    """Capacity 30, segments of 10: the 4th makes 40 > 30, so at most 15 are kept (one segment); golden."""
    lengths, groups = np.full(6, 10), np.arange(7)
    #            before row 0  1  2  3  4  5  and after all
    assert context_starts(lengths, groups, 30).tolist() == [0, 0, 0, 0, 3, 3, 3]


def test_context_depends_on_earlier_rows_only() -> None:
    """Where a group's context starts does not change with the rows that come after it: serving equals evaluation."""
    for seed in range(100):
        lengths, time, _, capacity = random_stream(seed)
        groups = time_groups(time)
        whole = context_starts(lengths, groups, capacity)
        for j in range(len(groups)):
            n = groups[j]
            part = context_starts(lengths[:n], time_groups(time[:n]) if n else np.array([0]), capacity)
            assert part[-1] == whole[j]


def test_every_target_is_scored_once_with_its_context() -> None:
    """Each target is in one window, which holds exactly the strictly earlier rows that the rule keeps for it."""
    for seed in range(300):
        lengths, time, target, capacity = random_stream(seed)
        groups = time_groups(time)
        starts = context_starts(lengths, groups, capacity)
        group_of = np.searchsorted(groups, np.arange(len(time)), side="right") - 1
        scored = np.zeros(len(time), dtype=int)
        for w in evaluation_windows(lengths, groups, target, capacity, np.ones_like(target)):
            assert lengths[w.positions].sum() <= max(1.25 * capacity, capacity + lengths.max())
            for p in range(w.first, w.last):
                scored[p] += 1
                if target[p]:
                    seen = [q for q in w.positions if time[q] < time[p]]
                    assert seen == list(range(starts[group_of[p]], groups[group_of[p]]))
        assert (scored[target] == 1).all()
        assert scored.max(initial=0) <= 1


def test_later_rows_have_half_a_window() -> None:
    """After the first window no target has less than half a window of context, one segment more or less."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 30, 400)
    starts = context_starts(lengths, np.arange(401), 300)
    context = np.array([lengths[s:j].sum() for j, s in enumerate(starts)])
    first = int(np.argmax(starts > 0))
    assert context[first:].min() > 150 - 30
    assert context.max() <= 300


def test_many_rows_of_one_second() -> None:
    """Capacity 100, ten rows of 20 with one timestamp and no past: 125 has room for 6, so two windows score 6 and 4."""
    lengths, groups = np.full(10, 20), np.array([0, 10])
    windows = list(evaluation_windows(lengths, groups, np.ones(10, bool), 100, np.ones(10, bool)))
    assert [(w.start, w.stop, w.first, w.last) for w in windows] == [(0, 0, 0, 6), (0, 0, 6, 10)]


@pytest.mark.parametrize("first_cut", [1, 17, 60])
def test_training_windows_tile_the_stream(first_cut: int) -> None:
    """Windows are back to back, hold every row once, and only single rows pass the capacity."""
    for seed in range(50):
        lengths, *_ = random_stream(seed)
        windows = training_windows(lengths, 60, first_cut)
        assert [w[0] for w in windows] == [0, *(w[1] for w in windows[:-1])]
        assert windows[-1][1] == len(lengths)
        assert all(lengths[a:b].sum() <= 60 or b - a == 1 for a, b in windows)
