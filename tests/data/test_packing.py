from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from world import read_split, streams_without_retrieved, text_of

from project.benchmark.packing import prompts_of
from project.data.batch import Batch, pack
from project.data.protocol import Protocol
from project.data.stream import Streams
from project.model.backbone import Backbone

KINDS = ("global_time", "user_time", "random", "leave_last")


@pytest.fixture(params=KINDS)
def streams(request: pytest.FixtureRequest, tiny_logs: Path) -> Streams:
    """Test targets with all readable rows, prompts of characters."""
    split = read_split(tiny_logs, Protocol(split=request.param, minimum_history=1))
    return streams_without_retrieved(split, "test")


def seen_text(batch: Batch, target: int) -> str:
    """What the answer slot of a target can read, by the written-out rule."""
    slot = int(batch.slots[target])
    return text_of(batch.tokens[0, batch.layout.dense_mask()[0, slot]].numpy())


def test_each_target_sees_its_prompt(streams: Streams) -> None:
    """Packed among others, a target reads exactly: instruction, strictly earlier rows with answers, itself without."""
    windows = streams.evaluation(200)
    checked = 0
    for start in range(0, len(windows), 7):
        some = windows[start : start + 7]
        batch = pack(streams, some)
        expected = [text_of(p) for s, w in some for p in prompts_of(streams, s, w)]
        assert [seen_text(batch, i) for i in range(len(batch.label))] == expected
        assert batch.stream_tokens.tolist() == [
            len(e) - int(t) for e, t in zip(expected, batch.target_tokens, strict=True)
        ]
        checked += len(expected)
    assert checked == streams.target.sum()


def test_groups_start_together(streams: Streams) -> None:
    """Segments of one timestamp start at one position; the next group starts after the sum of their lengths."""
    batch = pack(streams, streams.evaluation(200)[:5])
    layout = batch.layout
    for s in layout.sequence.unique():
        inside = layout.sequence[0] == s
        group, segment, position = (x[0][inside] for x in (layout.group, layout.segment, layout.position))
        expected = 0
        for g in range(int(group.max()) + 1):
            starts = [int(position[segment == x].min()) for x in segment[group == g].unique()]
            assert set(starts) == {expected}
            expected += int((group == g).sum())


def test_packed_equals_alone(streams: Streams) -> None:
    """A random backbone gives a target the same hidden state packed among others and in a window of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    backbone = Backbone.from_config(config).eval()

    def hidden(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return backbone.run(backbone.embed(batch.tokens, batch.layout), 0, 2).hidden[0, batch.slots]

    windows = streams.evaluation(300)[:6]
    packed = pack(streams, windows)
    together = dict(zip(packed.row_id.tolist(), hidden(packed), strict=True))
    for s, w in windows:
        for p in range(w.first, w.last):
            row = streams.offsets[s] + p
            if streams.target[row]:
                alone = alone_batch(streams, s, w, p)
                torch.testing.assert_close(
                    hidden(alone)[0], together[int(streams.row_id[row])], atol=1e-4, rtol=0
                )


def alone_batch(streams: Streams, s: int, window: object, p: int) -> Batch:
    """One target as a window of its own: its strictly earlier context in the window, nothing else."""
    from project.data.stream import Window

    assert isinstance(window, Window)
    time = streams.timestamp[streams.offsets[s] : streams.offsets[s + 1]]
    positions = window.positions
    earlier = positions[time[positions] < time[p]]
    stop = int(earlier[-1]) + 1 if len(earlier) else window.start
    return pack(streams, [(s, Window(window.start, stop, p, p + 1))])


def test_batches_hold_numbers_of_their_rows(streams: Streams) -> None:
    """Labels and row ids of a batch are those of the stream's targets, each once over all windows."""
    windows = streams.evaluation(150)
    batch = pack(streams, windows)
    order = np.argsort(batch.row_id.numpy())
    targets = np.flatnonzero(streams.target)
    expected = targets[np.argsort(streams.row_id[targets])]
    assert batch.row_id.numpy()[order].tolist() == streams.row_id[expected].tolist()
    assert batch.label.numpy()[order].tolist() == streams.label[expected].tolist()
