"""Keeps keys and values of streams that requests of a user share, each layer as far as a request needed it.

A new stream is compared with the kept one token by token, position and time group included: what their common prefix
computed is used, the rest is forgotten. So a history that grew is extended, and an older one is cut. A token whose
request needs no deeper layer stops there and keeps its hidden state; a later request can take it further.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from project.engine.requests import StreamTokens

ROOM = 1.25  # a stream's buffers are made so much larger than it is, since it will grow


class CachedStream:
    """What is kept of one stream: deeper layers have seen a prefix of what shallower ones have."""

    def __init__(self, layers: int) -> None:
        empty = np.zeros(0, dtype=np.int64)
        self.stream = StreamTokens(empty, empty, empty, empty)
        self._pairs: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._keyed = [0] * layers  # leading tokens whose keys and values each layer has
        self._reached = [0] * (layers + 1)  # leading tokens that have come to each depth
        self.waiting: dict[int, Tensor] = {}  # by depth, hidden states (f, H) of tokens that stopped there

    @property
    def bytes(self) -> int:
        """What keys, values and waiting states take, room to grow included."""
        tensors = [*(x for pair in self._pairs if pair is not None for x in pair), *self.waiting.values()]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    def adopt(self, stream: StreamTokens) -> int:
        """Keep what is common with `stream`, forget the rest; returns how many of its tokens came to depth 0 before."""
        kept = self.stream.common(stream)
        self.waiting = {
            depth: hidden[: kept - self._reached[depth + 1]]
            for depth, hidden in self.waiting.items()
            if kept > self._reached[depth + 1]
        }
        self._keyed = [min(seen, kept) for seen in self._keyed]
        known, *deeper = (min(seen, kept) for seen in self._reached)
        self._reached = [len(stream), *deeper]
        self.stream = stream
        return known

    def waits_unread(self, depth: int) -> bool:
        """Whether some token waits at this depth whose keys and values the next layer does not have."""
        waiting = len(self.waiting.get(depth, ()))
        return waiting > 0 and self._keyed[depth] < self._reached[depth + 1] + waiting

    def read(self, depth: int, tokens: int) -> int:
        """How many of the last `tokens` tokens have their keys and values in the layer behind this depth."""
        return min(max(self._keyed[depth] - len(self.stream) + tokens, 0), tokens)

    def stop(self, depth: int, hidden: Tensor) -> None:
        """Tokens (f, H) that have come to this depth wait here for a request that needs the next layer.

        Nothing more of the last layer is needed than its keys and values, so who has them there waits no more.
        """
        if self._reached[depth + 1] < len(self.stream) and len(hidden):
            self.waiting[depth] = self.resume(depth, hidden).clone()

    def resume(self, depth: int, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens at this depth: those that waited there, then `hidden` (f, H) which just came."""
        waiting = self.waiting.pop(depth, None)
        return hidden if waiting is None else torch.cat([waiting.to(hidden), hidden])

    def keep(self, layer: int, key: Tensor, value: Tensor, runs: bool) -> tuple[Tensor, Tensor]:
        """Keep keys and values (1, heads, f, dim) of the last f tokens; returns those of all tokens of the stream.

        `runs`: the tokens run the layer. If not, an exit has read them in front of it, and they may run it later.
        """
        stop = len(self.stream)
        start = stop - key.shape[2]
        pair = self._pairs[layer]
        if pair is None or pair[0].shape[2] < stop:
            # tokens before heads in memory, as the backbone makes them
            keys, values = (
                x.new_empty(1, int(stop * ROOM), x.shape[1], x.shape[3]).transpose(1, 2) for x in (key, value)
            )
            if pair is not None:
                keys[:, :, :start], values[:, :, :start] = pair[0][:, :, :start], pair[1][:, :, :start]
            self._pairs[layer] = keys, values
        else:
            keys, values = pair
        if stop > start:
            keys[:, :, start:stop], values[:, :, start:stop] = key, value
        self._keyed[layer] = stop
        if runs or layer == len(self._keyed) - 1:
            self._reached[layer + 1] = stop
        return keys[:, :, :stop], values[:, :, :stop]


class StreamCache:
    """Streams of users, whose tensors take at most `mib` MiB together; the least recently used is forgotten first."""

    def __init__(self, mib: float = 1024) -> None:
        self.capacity = mib * 2**20  # bytes
        self.bytes = 0
        self._kept: OrderedDict[Hashable, tuple[CachedStream, int]] = OrderedDict()  # streams and their bytes

    def __len__(self) -> int:
        return len(self._kept)

    def common(self, user: Hashable, stream: StreamTokens) -> int:
        """Number of leading tokens of a stream that are kept for a user."""
        return self._kept[user][0].stream.common(stream) if user in self._kept else 0

    def take(self, user: Hashable, layers: int) -> CachedStream:
        """What is known of a user's stream, taken out: a batch that fails leaves no stream in an unknown state."""
        stream, size = self._kept.pop(user) if user in self._kept else (CachedStream(layers), 0)
        self.bytes -= size
        return stream

    def give(self, user: Hashable, stream: CachedStream) -> None:
        """Keep a stream after its batch; forget others, at last itself, while there are more bytes than `capacity`."""
        self.take(user, 0)  # another one of theirs
        size = stream.bytes
        self._kept[user] = stream, size
        self.bytes += size
        while self.bytes > self.capacity:
            self.bytes -= self._kept.popitem(last=False)[1][1]
