"""How a batch is made: windows packed into rows of tokens, rows shared out among processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from project.arrays import I64
from project.data.ragged import offsets_of, within
from project.data.stream import Streams, Window
from project.layout import Layout


@dataclass
class Batch:
    """Packed windows: n targets in one row of T tokens."""

    tokens: Tensor  # (1, T) token ids
    layout: Layout  # which token may see which
    slots: Tensor  # (n,) flat index of each target's answer slot
    row_id: Tensor  # (n,) row of the log, or index of the candidate
    label: Tensor  # (n,) 0, 1, or -1 where unknown
    target_tokens: Tensor  # (n,) tokens of the target's own segment up to its answer slot
    stream_tokens: Tensor  # (n,) context tokens that the target may see

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; Lightning calls it."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


Windows = list[tuple[int, Window]]
"""(stream, window) pairs."""


def pack(streams: Streams, windows: Sequence[tuple[int, Window]]) -> Batch:
    """Put windows side by side in one row, each a sequence of its own with the instruction before it."""
    # 1. segments: the instruction of each window, then its own
    positions = [
        np.append(streams.instructions[s], w.positions + streams.offsets[s])
        for s, w in windows
    ]
    counts = np.array(list(map(len, positions)))
    starts = offsets_of(counts)[:-1]
    index = np.concatenate(positions)
    sequence = np.repeat(np.arange(len(windows)), counts)
    real = np.ones(len(index), dtype=bool)
    real[starts] = False  # the instructions
    row = np.where(real, index, 0)
    context = ~real | streams.context[row]

    # 2. targets: those behind the part that is context alone
    behind = np.array([w.stop - w.start for _, w in windows])
    scored = real & (within(counts) > behind[sequence]) & streams.target[row]

    # 3. time groups, numbered through in all sequences (run) and inside each (group)
    time = np.where(real, streams.timestamp[row], -np.inf)
    new_group = np.ones(len(index), dtype=bool)
    new_group[1:] = (time[1:] != time[:-1]) | (sequence[1:] != sequence[:-1])
    run = np.cumsum(new_group) - 1
    group = run - run[starts][sequence]

    # 4. token positions: all segments of a time group start at the same one; the next group
    # starts after the sum of the lengths of those that later groups may see
    lists = streams.tokens.take(index)
    lengths = lists.lengths
    run_start = offsets_of(np.bincount(run, weights=lengths * context).astype(np.int64))
    group_start = run_start[run] - run_start[run[starts]][sequence]

    # 5. from segments to tokens
    segment = np.repeat(np.arange(len(index)), lengths)
    slot = np.where(real, streams.slots[row], 0)
    layout = Layout.build(
        sequence=_row(sequence[segment]),
        segment=_row(segment),
        group=_row(group[segment]),
        context=_row(context[segment]),
        position=_row(group_start[segment] + within(lengths)),
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


def window_tokens(streams: Streams, windows: Windows) -> I64:
    """(w,) tokens of each window, its instruction included."""
    stream = np.array([s for s, _ in windows], dtype=np.int64)
    within_stream = [(w.start, w.stop, w.first, w.last) for _, w in windows]
    places = (
        np.array(within_stream, dtype=np.int64).reshape(-1, 4)
        + streams.offsets[stream, None]
    )
    at = streams.tokens.offsets
    start, stop, first, last = at[places].T
    instruction = streams.tokens.lengths[streams.instructions[stream]]
    tokens: I64 = instruction + stop - start + last - first
    return tokens


def fill(streams: Streams, windows: Windows, batch_tokens: int) -> list[Windows]:
    """Windows in their order, as many in a batch as `batch_tokens` hold (at least one)."""
    batches: list[Windows] = []
    spent = 0
    for window, tokens in zip(
        windows, window_tokens(streams, windows).tolist(), strict=True
    ):
        if not batches or spent + tokens > batch_tokens:
            batches.append([])
            spent = 0
        batches[-1].append(window)
        spent += tokens
    return batches


def share_out(streams: Streams, windows: Windows, count: int) -> list[Windows]:
    """Windows in their order as exactly `count` batches of nearly equal tokens, none empty."""
    # tiny logs: rather repeat a window than leave a rank without a step
    if len(windows) < count:
        windows = [windows[i % len(windows)] for i in range(count)]
    ends = np.cumsum(window_tokens(streams, windows))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="left") + 1
    k = np.arange(count - 1)  # at least one window each, from the left and from the right
    cuts = np.minimum(np.maximum.accumulate(cuts - k) + k, len(windows) - count + k + 1)
    edges = [0, *cuts.tolist(), len(windows)]
    return [windows[a:b] for a, b in pairwise(edges)]


@dataclass(eq=False)
class TrainSampler:
    """The batches of one epoch for one rank; the same on every machine for the same seed and epoch.

    A window has at most `context_tokens`, a batch about `batch_tokens`; `seed` decides order and cuts of windows.
    """

    streams: Streams
    context_tokens: int
    batch_tokens: int
    seed: int
    rank: int
    world_size: int
    epoch = 0
    start = 0  # batches of the epoch that were handed out before a run was stopped

    def __post_init__(self) -> None:
        streams = self.streams
        # streams without a target are not read
        # (s,)
        targets = np.add.reduceat(streams.target, streams.offsets[:-1])
        # (n,) segments of the others
        read = np.repeat(targets > 0, np.diff(streams.offsets))
        lengths = streams.tokens.lengths[: read.size]
        tokens = int(np.minimum(lengths, self.context_tokens)[read].sum())
        # of an epoch, on each rank
        self._steps = max(1, round(tokens / self.batch_tokens / self.world_size))

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Windows]:
        rng = np.random.default_rng([self.seed, self.epoch])
        windows = self.streams.training(self.context_tokens, rng)
        windows = [windows[i] for i in rng.permutation(len(windows))]
        batches = share_out(self.streams, windows, self._steps * self.world_size)
        start, self.start = self.start, 0
        yield from batches[self.rank :: self.world_size][start:]


class EvaluationSampler(list[Windows]):
    """All windows with targets, dealt out to ranks in batches of at most `batch_tokens` (one window may be more)."""

    epoch = start = 0  # as of `TrainSampler`; nothing sets them

    def __init__(
        self,
        streams: Streams,
        context_tokens: int,
        batch_tokens: int,
        rank: int,
        world_size: int,
    ) -> None:
        batches = fill(streams, streams.evaluation(context_tokens), batch_tokens)
        steps = -(-len(batches) // world_size)
        mine = batches[rank::world_size]
        super().__init__(mine + [batches[-1]] * (steps - len(mine)))


class PackedLoader:
    """Packed batches of a sampler's windows; the position inside an epoch is part of the checkpoint.

    No DataLoader of torch: Lightning would rebuild one to put its own samplers in.
    """

    def __init__(self, streams: Streams, sampler: TrainSampler | EvaluationSampler) -> None:
        self.batch_sampler = sampler  # Lightning looks here to set its epoch
        self._streams = streams
        self._done = 0  # batches of the epoch that were handed out

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._done = self.batch_sampler.start
        for windows in self.batch_sampler:
            self._done += 1
            yield pack(self._streams, windows)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and how many of its batches have been handed out on this rank (the same on all)."""
        return {"epoch": self.batch_sampler.epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that the state was saved at."""
        if isinstance(self.batch_sampler, TrainSampler):
            # saved at the end of an epoch: go on with the next one
            whole = state["batches"] >= len(self)
            self.batch_sampler.set_epoch(state["epoch"] + whole)
            self.batch_sampler.start = 0 if whole else state["batches"]


class StageClock:
    """Adds up wall seconds by stage name, in the order in which stages first ran."""

    def __init__(self) -> None:
        self.seconds = defaultdict[str, float](float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the body's time as `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """For result files."""
        return {name: round(spent, 1) for name, spent in self.seconds.items()}
