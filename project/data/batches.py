"""Batches: which windows go together, on which rank, and where to go on after an interruption.

Training batches hold equal shares of an epoch's tokens, so ranks wait for each other as little as possible and every
epoch has the same number of steps. Evaluation batches keep the order of the windows; short ranks repeat their last
batch, and scores are told apart by row id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from project.data.packing import Batch, pack
from project.data.streams import Streams
from project.data.windows import Window

Windows = list[tuple[int, Window]]


def window_tokens(streams: Streams, windows: Windows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(w,) tokens of each window, its instruction included."""
    at, base = streams.tokens.offsets, streams.offsets
    head = at[-1] - at[-2]
    return np.array(
        [
            head + at[base[s] + w.stop] - at[base[s] + w.start] + at[base[s] + w.last] - at[base[s] + w.first]
            for s, w in windows
        ],
        dtype=np.int64,
    )


def fill(streams: Streams, windows: Windows, batch_tokens: int) -> list[Windows]:
    """Windows in their order, as many in a batch as `batch_tokens` hold (at least one)."""
    batches: list[Windows] = []
    spent = 0
    for window, tokens in zip(windows, window_tokens(streams, windows).tolist(), strict=True):
        if not batches or spent + tokens > batch_tokens:
            batches.append([])
            spent = 0
        batches[-1].append(window)
        spent += tokens
    return batches


def share_out(streams: Streams, windows: Windows, count: int) -> list[Windows]:
    """Windows in their order as exactly `count` batches of nearly equal tokens, none empty."""
    if len(windows) < count:  # tiny logs: rather repeat a window than leave a rank without a step
        windows = [windows[i % len(windows)] for i in range(count)]
    ends = np.cumsum(window_tokens(streams, windows))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count, side="left") + 1
    for k in range(len(cuts)):  # at least one window each, from the left ...
        cuts[k] = max(cuts[k], cuts[k - 1] + 1 if k else 1)
    for k in range(len(cuts)):  # ... and from the right
        cuts[k] = min(cuts[k], len(windows) - count + k + 1)
    edges = [0, *cuts.tolist(), len(windows)]
    return [windows[a:b] for a, b in pairwise(edges)]


class TrainSampler(Sampler[Windows]):
    """The batches of one epoch for one rank; the same on every machine for the same seed and epoch.

    Args:
        streams: Streams with training targets.
        context_tokens: Capacity of a window.
        batch_tokens: Tokens of a batch, about.
        seed: Order and cuts of windows.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, streams: Streams, context_tokens: int, batch_tokens: int, seed: int, rank: int, world_size: int
    ) -> None:
        self._streams, self._context_tokens, self._seed = streams, context_tokens, seed
        self._rank, self._world_size = rank, world_size
        tokens = int(np.minimum(streams.tokens.lengths[:-1], context_tokens).sum())
        self._steps = max(1, round(tokens / batch_tokens / world_size))
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Windows]:
        rng = np.random.default_rng([self._seed, self.epoch])
        windows = self._streams.training(self._context_tokens, rng)
        windows = [windows[i] for i in rng.permutation(len(windows))]
        batches = share_out(self._streams, windows, self._steps * self._world_size)
        start, self.start = self.start, 0
        yield from batches[self._rank :: self._world_size][start:]


class EvaluationSampler(Sampler[Windows]):
    """All windows with targets, dealt out to ranks batch by batch.

    Args:
        streams: Streams with targets.
        context_tokens: Capacity of a window.
        batch_tokens: Tokens of a batch at the most (one window may be more).
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, streams: Streams, context_tokens: int, batch_tokens: int, rank: int, world_size: int
    ) -> None:
        batches = fill(streams, streams.evaluation(context_tokens), batch_tokens)
        steps = -(-len(batches) // world_size)
        mine = batches[rank::world_size]
        self._batches = mine + [batches[-1]] * (steps - len(mine))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Windows]:
        return iter(self._batches)


class _Packed(Dataset[Batch]):
    """Packs the windows that a sampler names."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def __getitem__(self, windows: Sequence[tuple[int, Window]]) -> Batch:
        return pack(self._streams, windows)


class PackedLoader:
    """Packed batches, made by torch's DataLoader; the position inside an epoch is part of the checkpoint.

    Not a DataLoader itself: Lightning would rebuild one to put its own samplers in. Batches are counted where they are
    handed out, so what worker processes have prefetched does not count.

    Args:
        streams: Where windows come from.
        sampler: Says which windows go together.
        num_workers: Processes that prepare batches.
    """

    def __init__(
        self, streams: Streams, sampler: TrainSampler | EvaluationSampler, num_workers: int = 0
    ) -> None:
        self.batch_sampler = sampler  # Lightning looks here and tells it the epoch
        self._loader = DataLoader(_Packed(streams), batch_size=None, sampler=sampler, num_workers=num_workers)
        self._done = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._done = getattr(self.batch_sampler, "start", 0)
        for batch in self._loader:
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and how many of its batches have been handed out on this rank (the same on all)."""
        return {"epoch": getattr(self.batch_sampler, "epoch", 0), "batches": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that the state was saved at."""
        if isinstance(self.batch_sampler, TrainSampler):
            epoch, batches = state["epoch"], state["batches"]
            whole = batches >= len(self)  # saved at the end of an epoch: go on with the next one
            self.batch_sampler.set_epoch(epoch + 1 if whole else epoch)
            self.batch_sampler.start = 0 if whole else batches
