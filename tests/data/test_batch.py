"""Windows are dealt out into batches; a packed target reads exactly its prompt, among others as alone.

Prompts are characters, so what a target reads can be compared as text.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import dense_mask, read_split, streams_without_retrieved, text_of

from project.data.batch import (
    EvaluationSampler,
    PackedLoader,
    TrainSampler,
    pack,
    share_out,
    window_tokens,
)
from project.data.protocol import Protocol
from project.data.stream import Streams
from research.packing import prompts_of

KINDS = ("global_time", "user_time", "random", "leave_last")


@pytest.fixture(params=KINDS)
def any_split(request: pytest.FixtureRequest, tiny_logs: Path) -> Streams:
    split = read_split(tiny_logs, Protocol(split=request.param, minimum_history=1))
    return streams_without_retrieved(split, "test")


def test_each_target_sees_its_prompt(any_split: Streams) -> None:
    """Packed among others, a target reads exactly: instruction, strictly earlier rows with answers, itself without."""
    windows = any_split.evaluation(200)
    checked = 0
    for start in range(0, len(windows), 7):
        some = windows[start : start + 7]
        batch = pack(any_split, some)
        mask = dense_mask(batch.layout)[0]
        expected = [text_of(p) for s, w in some for p in prompts_of(any_split, s, w)]
        assert [
            text_of(batch.tokens[0, mask[slot]].numpy()) for slot in batch.slots.tolist()
        ] == expected
        own = batch.target_tokens.tolist()
        assert batch.stream_tokens.tolist() == [
            len(e) - t for e, t in zip(expected, own, strict=True)
        ]
        checked += len(expected)
    assert checked == any_split.target.sum()


def test_groups_start_together(any_split: Streams) -> None:
    """Segments of one timestamp start at one position; the next group starts after the sum of their lengths."""
    layout = pack(any_split, any_split.evaluation(200)[:5]).layout
    for s in layout.sequence.unique():
        inside = layout.sequence[0] == s
        group, segment, position = (
            x[0][inside] for x in (layout.group, layout.segment, layout.position)
        )
        expected = 0
        for g in range(int(group.max()) + 1):
            starts = [
                int(position[segment == x].min()) for x in segment[group == g].unique()
            ]
            assert set(starts) == {expected}
            expected += int((group == g).sum())


def test_batches_hold_numbers_of_their_rows(any_split: Streams) -> None:
    batch = pack(any_split, any_split.evaluation(150))
    found = sorted(zip(batch.row_id.tolist(), batch.label.tolist(), strict=True))
    rows, labels = (
        values[any_split.target].tolist() for values in (any_split.row_id, any_split.label)
    )
    assert found == sorted(zip(rows, labels, strict=True))


@pytest.fixture(scope="module")
def streams(tiny_logs: Path) -> Streams:
    return streams_without_retrieved(read_split(tiny_logs, Protocol()), "train")


def rows(loader: PackedLoader) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in loader]


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def train_loader(streams: Streams, rank: int = 0, world: int = 1) -> PackedLoader:
    return PackedLoader(streams, TrainSampler(streams, 200, 600, 0, rank, world))


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


def test_goes_on_where_it_stopped(streams: Streams) -> None:
    """State saved after k batches of epoch 1, loaded into a new loader: the rest of that epoch, then epoch 2 whole."""
    whole = train_loader(streams)
    whole.batch_sampler.set_epoch(1)
    expected = rows(whole)
    stopped = train_loader(streams)
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
    loaders = [
        PackedLoader(streams, EvaluationSampler(streams, 200, 600, rank, 3))
        for rank in range(3)
    ]
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
