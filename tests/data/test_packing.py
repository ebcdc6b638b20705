"""A packed target reads exactly its prompt, among other users as in a window of its own.

Prompts are characters, so what a target reads can be compared as text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from world import read_split, streams_without_retrieved, text_of

from project.data.batch import pack
from project.data.protocol import Protocol
from project.data.stream import Streams, Window
from research.packing import prompts_of

KINDS = ("global_time", "user_time", "random", "leave_last")


@pytest.fixture(params=KINDS)
def streams(request: pytest.FixtureRequest, tiny_logs: Path) -> Streams:
    split = read_split(tiny_logs, Protocol(split=request.param, minimum_history=1))
    return streams_without_retrieved(split, "test")


def test_each_target_sees_its_prompt(streams: Streams) -> None:
    """Packed among others, a target reads exactly: instruction, strictly earlier rows with answers, itself without."""
    windows = streams.evaluation(200)
    checked = 0
    for start in range(0, len(windows), 7):
        some = windows[start : start + 7]
        batch = pack(streams, some)
        mask = batch.layout.dense_mask()[0]
        expected = [text_of(p) for s, w in some for p in prompts_of(streams, s, w)]
        assert [text_of(batch.tokens[0, mask[slot]].numpy()) for slot in batch.slots.tolist()] == expected
        own = batch.target_tokens.tolist()
        assert batch.stream_tokens.tolist() == [len(e) - t for e, t in zip(expected, own, strict=True)]
        checked += len(expected)
    assert checked == streams.target.sum()


def test_groups_start_together(streams: Streams) -> None:
    """Segments of one timestamp start at one position; the next group starts after the sum of their lengths."""
    layout = pack(streams, streams.evaluation(200)[:5]).layout
    for s in layout.sequence.unique():
        inside = layout.sequence[0] == s
        group, segment, position = (x[0][inside] for x in (layout.group, layout.segment, layout.position))
        expected = 0
        for g in range(int(group.max()) + 1):
            starts = [int(position[segment == x].min()) for x in segment[group == g].unique()]
            assert set(starts) == {expected}
            expected += int((group == g).sum())


def test_packed_equals_alone(streams: Streams, hidden: Callable[..., Any]) -> None:
    """A random backbone gives a target the same hidden state packed among others and in a window of its own."""
    windows = streams.evaluation(300)[:6]
    together = hidden(pack(streams, windows))
    for s, w in windows:
        first = streams.offsets[s]
        time = streams.timestamp[first : streams.offsets[s + 1]]
        for p in range(w.first, w.last):
            if not streams.target[first + p]:
                continue
            earlier = w.positions[time[w.positions] < time[p]]
            stop = int(earlier[-1]) + 1 if len(earlier) else w.start
            alone = hidden(pack(streams, [(s, Window(w.start, stop, p, p + 1))]))
            ((row, state),) = alone.items()
            torch.testing.assert_close(state, together[row], atol=1e-4, rtol=0)


def test_batches_hold_numbers_of_their_rows(streams: Streams) -> None:
    batch = pack(streams, streams.evaluation(150))
    found = sorted(zip(batch.row_id.tolist(), batch.label.tolist(), strict=True))
    rows, labels = (values[streams.target].tolist() for values in (streams.row_id, streams.label))
    assert found == sorted(zip(rows, labels, strict=True))
