"""Packing: windows become one batch of token ids, its layout and its answer slots.

A batch is one long row (1, T) without any padding: attention runs block by block inside each sequence, so packing
many users in one row costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from project.data.ragged import offsets_of, within
from project.data.streams import Streams
from project.data.windows import Window
from project.layout import Layout


@dataclass
class Batch:
    """n targets in one row of T tokens.

    Attributes:
        tokens: (1, T) token ids.
        layout: Which token may see which.
        slots: (n,) flat index of each target's answer slot.
        row_id: (n,) row of the log, or index of the candidate.
        label: (n,) 0, 1, or -1 where unknown.
        target_tokens: (n,) tokens of the target's own segment up to its answer slot.
        stream_tokens: (n,) context tokens that the target may see.
    """

    tokens: Tensor
    layout: Layout
    slots: Tensor
    row_id: Tensor
    label: Tensor
    target_tokens: Tensor
    stream_tokens: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        del non_blocking  # Lightning passes it; the layout decides for itself
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def pack(streams: Streams, windows: Sequence[tuple[int, Window]]) -> Batch:
    """Put windows side by side in one row, the instruction before each.

    Positions: all segments of a time group start at the same position; the next group starts after the sum of the
    lengths of those that later groups may see.

    Args:
        streams: Where the segments come from.
        windows: (stream, window) pairs; each becomes a sequence of its own.
    """
    positions, behind = [], []  # segments of each window, and how many of them are context alone
    for s, w in windows:
        behind.append(w.stop - w.start)
        positions.append(w.positions + streams.offsets[s])
    counts = np.array([len(p) + 1 for p in positions])
    starts = offsets_of(counts)[:-1]
    index = np.concatenate([part for p in positions for part in ([streams.instruction], p)]).astype(np.int64)
    sequence = np.repeat(np.arange(len(windows)), counts)
    real = np.ones(len(index), dtype=bool)
    real[starts] = False  # the instructions
    scored = np.zeros(len(index), dtype=bool)
    for count, begin, past in zip(counts, starts, behind, strict=True):
        scored[begin + 1 + past : begin + count] = True
    row = np.where(real, index, 0)
    context = ~real | streams.context[row]
    scored &= streams.target[row]

    time = np.where(real, streams.timestamp[row], -np.inf)
    new_group = np.ones(len(index), dtype=bool)
    new_group[1:] = (time[1:] != time[:-1]) | (sequence[1:] != sequence[:-1])
    run = np.cumsum(new_group) - 1  # time groups of all sequences, numbered through
    group = run - run[starts][sequence]
    lists = streams.tokens.take(index)
    lengths = lists.lengths
    run_start = offsets_of(np.bincount(run, weights=lengths * context).astype(np.int64))[:-1]
    group_start = run_start[run] - run_start[run[starts]][sequence]

    inside = within(lengths)
    segment = np.repeat(np.arange(len(index)), lengths)
    slot = np.where(real, streams.slots[row], 0)
    layout = Layout.build(
        sequence=_row(sequence[segment]),
        segment=_row(segment),
        group=_row(group[segment]),
        context=_row(context[segment]),
        position=_row(group_start[segment] + inside),
    )
    return Batch(
        tokens=_row(lists.values),
        layout=layout,
        slots=torch.from_numpy((lists.offsets[:-1] + slot)[scored]),
        row_id=torch.from_numpy(streams.row_id[row[scored]]),
        label=torch.from_numpy(streams.label[row[scored]].astype(np.int64)),
        target_tokens=torch.from_numpy(slot[scored] + 1),
        stream_tokens=torch.from_numpy(group_start[scored]),
    )


def _row(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))[None]
