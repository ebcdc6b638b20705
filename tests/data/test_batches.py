"""Streams are cut into windows and windows dealt out into batches; rows of unequal length lie in ragged arrays."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import read_split, streams_without_retrieved

from project.data.batch import EvaluationSampler, PackedLoader, TrainSampler, share_out, window_tokens
from project.data.protocol import Protocol
from project.data.ragged import Ragged, join, within
from project.data.stream import Streams, context_starts, evaluation_windows, time_groups, training_windows


def test_ragged_golden() -> None:
    a = Ragged.of([[1, 2], [], [3]])
    assert [x.tolist() for x in (a[0], a[1], a[2])] == [[1, 2], [], [3]]
    taken = a.take(np.array([2, 0, 0]))
    assert [taken[i].tolist() for i in range(3)] == [[3], [1, 2], [1, 2]]
    assert within(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


def test_join_equals_python() -> None:
    rng = np.random.default_rng(0)
    parts = [[rng.integers(0, 9, rng.integers(0, 4)).tolist() for _ in range(50)] for _ in range(3)]
    joined = join([Ragged.of(p) for p in parts])
    assert [joined[i].tolist() for i in range(50)] == [[v for p in parts for v in p[i]] for i in range(50)]


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
    for seed in range(50):
        lengths, *_ = random_stream(seed)
        windows = training_windows(lengths, 60, first_cut)
        assert [w[0] for w in windows] == [0, *(w[1] for w in windows[:-1])]
        assert windows[-1][1] == len(lengths)
        assert all(lengths[a:b].sum() <= 60 or b - a == 1 for a, b in windows)


@pytest.fixture(scope="module")
def streams(tiny_logs: Path) -> Streams:
    return streams_without_retrieved(read_split(tiny_logs, Protocol()), "train")


def rows(loader: PackedLoader) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in loader]


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def train_loader(streams: Streams, rank: int = 0, world: int = 1, workers: int = 0) -> PackedLoader:
    return PackedLoader(streams, TrainSampler(streams, 200, 600, 0, rank, world), workers)


def test_an_epoch_is_every_target_once(streams: Streams) -> None:
    """Over all batches of an epoch each train target stands exactly once; another epoch cuts and orders anew."""
    loader = train_loader(streams)
    first = rows(loader)
    loader.batch_sampler.set_epoch(1)
    second = rows(loader)
    for epoch in (first, second):
        assert sorted(flat(epoch)) == sorted(streams.row_id[streams.target])
        assert len(epoch) == len(loader)
    assert first != second


def test_ranks_share_an_epoch(streams: Streams) -> None:
    """In as many batches, every target once; in any epoch no row twice, and tokens within 5 % of each other."""
    parts = [rows(train_loader(streams, rank, 2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(flat(parts[0] + parts[1])) == sorted(streams.row_id[streams.target])
    samplers = [TrainSampler(streams, 50, 600, 0, rank, 2) for rank in range(2)]
    for epoch in range(5):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [flat(sampler) for sampler in samplers]
        read = np.concatenate([w.positions + streams.offsets[s] for s, w in flat(shares)])
        assert len(set(read)) == len(read)
        assert set(np.flatnonzero(streams.target)) <= set(read)
        tokens = [window_tokens(streams, share).sum() for share in shares]
        assert abs(tokens[0] - tokens[1]) < 0.05 * np.mean(tokens)


def test_batches_have_equal_tokens(streams: Streams) -> None:
    """No batch is further from the mean than one window: ranks wait for each other as little as can be."""
    batches = list(TrainSampler(streams, 200, 600, 0, 0, 1))
    tokens = np.array([window_tokens(streams, b).sum() for b in batches])
    largest = max(window_tokens(streams, b).max() for b in batches)
    assert np.abs(tokens - tokens.mean()).max() <= largest


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_goes_on_where_it_stopped(streams: Streams, workers: int) -> None:
    """State saved after k batches of epoch 1, loaded into a new loader: the rest of that epoch, then epoch 2 whole."""
    whole = train_loader(streams)
    whole.batch_sampler.set_epoch(1)
    expected = rows(whole)
    stopped = train_loader(streams, workers=workers)
    stopped.batch_sampler.set_epoch(1)
    assert [b.row_id.tolist() for b in islice(stopped, 2)] == expected[:2]
    state = stopped.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    resumed = train_loader(streams)
    resumed.load_state_dict(state)
    resumed.batch_sampler.set_epoch(1)  # as Lightning does
    assert rows(resumed) == expected[2:]
    assert resumed.state_dict() == {"epoch": 1, "batches": len(expected)}
    resumed.batch_sampler.set_epoch(2)
    whole.batch_sampler.set_epoch(2)
    assert rows(resumed) == rows(whole)


def test_evaluation_deals_out_all_windows(streams: Streams) -> None:
    """Three ranks have equal step counts and together score every target; only whole batches are repeated."""
    loaders = [PackedLoader(streams, EvaluationSampler(streams, 200, 600, rank, 3)) for rank in range(3)]
    scored = [rows(loader) for loader in loaders]
    assert len({len(r) for r in scored}) == 1
    assert set(flat(flat(r) for r in scored)) == set(streams.row_id[streams.target])
    alone = rows(PackedLoader(streams, EvaluationSampler(streams, 200, 600, 0, 1)))
    assert sorted(flat(alone)) == sorted(streams.row_id[streams.target])


def test_share_out_never_leaves_a_batch_empty(streams: Streams) -> None:
    windows = streams.training(200, np.random.default_rng(0))
    for count in (1, 2, 5, len(windows) - 1, len(windows), len(windows) + 3):
        batches = share_out(streams, windows, count)
        assert len(batches) == count
        assert min(map(len, batches)) >= 1
        if count <= len(windows):
            assert flat(batches) == windows
