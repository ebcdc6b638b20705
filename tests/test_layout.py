"""Tests the visibility rule of tokens, and the blocks that attention computes it in."""

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from world import dense_mask

from project.layout import MERGED_GAP, Layout, plan_blocks


def bare(**rows: list[list[int]]) -> Layout:
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    tensors["context"] = tensors["context"].bool()
    return Layout(**tensors, position=torch.zeros_like(tensors["sequence"]))


def random_layout(seed: int, length: int = 90) -> Layout:
    """Two rows of packed sequences: ties, target-only segments anywhere, candidates, padding."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(2):
        tokens: list[tuple[int, int, int, bool, int]] = []
        segment = 0
        for sequence in range(int(rng.integers(1, 4))):
            group, start, size = 0, 0, 0
            stream, candidates = int(rng.integers(0, 9)), int(rng.integers(0, 5))
            for kind in ["instruction", *["stream"] * stream, *["candidate"] * candidates]:
                if kind != "instruction" and (
                    group == 0 or (kind == "stream" and rng.random() < 0.6)
                ):
                    group, start, size = group + 1, start + size, 0
                n = int(rng.integers(1, 8))
                context = kind == "instruction" or (kind == "stream" and rng.random() < 0.8)
                tokens += [(sequence, segment, group, context, start + i) for i in range(n)]
                size += n
                segment += 1
        tokens = tokens[: length - int(rng.integers(0, 20))]
        rows.append(tokens + [(-1, 0, 0, True, 0)] * (length - len(tokens)))
    columns = torch.tensor(rows).permute(2, 0, 1)
    return Layout(columns[0], columns[1], columns[2], columns[3].bool(), columns[4])


def from_blocks(layout: Layout) -> Tensor:
    """The dense mask that a plan amounts to; padding sees itself."""
    rows, length = layout.shape
    mask = torch.zeros(rows, length, length, dtype=torch.bool)
    for block in layout.blocks:
        keys = torch.cat([torch.arange(*span) for span in block.keys])
        assert block.mask.shape == (block.queries[1] - block.queries[0], len(keys))
        for i, q in enumerate(range(*block.queries)):
            mask[block.row, q, keys] |= block.mask[i]
    padding = layout.sequence < 0
    return mask | (torch.eye(length, dtype=torch.bool) & padding[:, :, None])


def test_rule_by_hand() -> None:
    """Strictly earlier context and own past are visible; ties, targets, other sequences, the future not."""
    layout = bare(
        # instruction, a (two tokens), b (ties with a, a mere target), t | another sequence
        # | padding
        sequence=[[0, 0, 0, 0, 0, 1, 1, -1, -1]],
        segment=[[0, 1, 1, 2, 3, 4, 5, 0, 0]],
        group=[[0, 1, 1, 1, 2, 0, 1, 0, 0]],
        context=[[1, 1, 1, 0, 0, 1, 1, 1, 1]],
    )
    expected = [
        "100000000",  # instruction: itself
        "110000000",  # a, first token
        "111000000",  # a, second token
        "100100000",  # b: not a, whose group is its own
        "111010000",  # t: not b, which is no context
        "000001000",  # another sequence: nothing of the first
        "000001100",
        "000000010",  # padding: itself
        "000000001",
    ]
    assert dense_mask(layout)[0].int().tolist() == [
        [int(c) for c in row] for row in expected
    ]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("block_tokens", [1, 7, 32, 1000])
def test_blocks_amount_to_the_rule(seed: int, block_tokens: int) -> None:
    """For any layout, order of tokens and block size the plan allows exactly what the rule allows, each query once."""
    ordered = random_layout(seed)
    order = torch.randperm(ordered.shape[1], generator=torch.Generator().manual_seed(seed))
    names = ("sequence", "segment", "group", "context", "position")
    for layout in (ordered, Layout(*(getattr(ordered, name)[:, order] for name in names))):
        layout = replace(layout, blocks=plan_blocks(layout, block_tokens))
        assert torch.equal(from_blocks(layout), dense_mask(layout))
        queries = [(b.row, q) for b in layout.blocks for q in range(*b.queries)]
        assert queries == [(int(r), int(t)) for r, t in (layout.sequence >= 0).nonzero()]
        assert all(b.queries[1] - b.queries[0] <= block_tokens for b in layout.blocks)


def test_keys_of_a_usual_sequence() -> None:
    """Stream blocks read from the sequence's start to their own end, candidate blocks stream and themselves."""
    # the first 20 are the stream, the others candidates of one group
    segments, size = 40, 10
    segment = torch.arange(segments).repeat_interleave(size)[None]
    context = segment < 20
    group = torch.where(context, segment, 20)
    layout = Layout.build(
        torch.zeros_like(segment), segment, group, context, segment, block_tokens=100
    )
    assert [(b.queries, b.keys) for b in layout.blocks] == [
        ((0, 100), [(0, 100)]),
        ((100, 200), [(0, 200)]),
        ((200, 300), [(0, 300)]),
        ((300, 400), [(0, 200), (300, 400)]),
    ]


@pytest.mark.parametrize(("hole", "ranges"), [(MERGED_GAP, 1), (MERGED_GAP + 1, 2)])
def test_short_holes_are_merged(hole: int, ranges: int) -> None:
    """A run of invisible keys splits the range only where it is longer than MERGED_GAP."""
    # context, a target that nobody sees, a later target
    lengths = torch.tensor([5, hole, 5])
    segment = torch.arange(3).repeat_interleave(lengths)[None]
    layout = Layout.build(
        torch.zeros_like(segment), segment, segment, segment == 0, segment, block_tokens=5
    )
    last = layout.blocks[-1]
    assert last.queries == (5 + hole, 10 + hole)
    assert len(last.keys) == ranges
    assert int(last.mask.sum()) == 5 * 5 + 15


def test_a_row_of_padding_has_no_block_and_sees_itself_alone() -> None:
    padding = torch.full((1, 4), -1)
    layout = Layout.build(padding, padding, padding, padding > 0, padding)
    assert layout.blocks == []
    assert torch.equal(dense_mask(layout)[0], torch.eye(4, dtype=torch.bool))


def test_masks_move_with_the_layout() -> None:
    layout = random_layout(0)
    layout = replace(layout, blocks=plan_blocks(layout, 32))
    moved = layout.to("meta")
    tensors = [getattr(moved, f.name) for f in fields(moved) if f.name != "blocks"]
    assert {t.device.type for t in [*tensors, *(b.mask for b in moved.blocks)]} == {"meta"}
    plans = [[(b.row, b.queries, b.keys) for b in each.blocks] for each in (moved, layout)]
    assert plans[0] == plans[1]
    copy = pickle.loads(pickle.dumps(layout))
    assert torch.equal(from_blocks(copy), dense_mask(layout))


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_plan_grows_with_its_parts(n: int) -> None:
    """(query, key) pairs of n parts are n times those of one, not n squared.

    Sequences of 1,024 tokens have 4 blocks of 256 queries, which read 256, 512, 768 and 1,024 keys: 256 * 2,560 pairs.
    A stream of 512 tokens has blocks that read 256 and 512 keys; each block of 256 tokens of candidates behind it reads
    the stream and itself, 768 keys.
    """
    index = torch.arange(1024 * n)[None]
    sequences = Layout.build(
        index // 1024, index // 32, index // 32, index >= 0, index, block_tokens=256
    )
    assert len(sequences.blocks) == 4 * n
    index = torch.arange(512 + 256 * n)[None]
    group = torch.where(index < 512, index // 32, 512)
    candidates = Layout.build(
        index * 0, index // 32, group, index < 512, index, block_tokens=256
    )
    pairs = [
        sum(block.mask.numel() for block in layout.blocks)
        for layout in (sequences, candidates)
    ]
    assert pairs == [256 * 2560 * n, 256 * (256 + 512) + n * 256 * 768]
