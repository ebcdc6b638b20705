from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import read_split, streams_without_retrieved

from project.data.batch import (
    EvaluationSampler,
    PackedLoader,
    TrainSampler,
    share_out,
    window_tokens,
)
from project.data.protocol import Protocol
from project.data.stream import Streams


@pytest.fixture(scope="module")
def streams(tiny_logs: Path) -> Streams:
    """Train targets of the tiny logs."""
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
    """Two ranks have equal step counts, no target twice, and none is left out."""
    parts = [rows(train_loader(streams, rank, 2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sorted(flat(parts[0] + parts[1])) == sorted(streams.row_id[streams.target])


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
    """Any count from 1 to beyond the number of windows gives that many batches with at least one window."""
    windows = streams.training(200, np.random.default_rng(0))
    for count in (1, 2, 5, len(windows) - 1, len(windows), len(windows) + 3):
        batches = share_out(streams, windows, count)
        assert len(batches) == count
        assert min(map(len, batches)) >= 1
        if count <= len(windows):
            assert flat(batches) == windows
