"""Keeps keys and values of streams that requests of a user share, each layer as far as a request needed it.

A new stream is compared with the kept one token by token, position and time group included: what their common prefix
computed is used, the rest is forgotten. So a history that grew is extended, and an older one is cut. A token whose
request needs no deeper layer stops there and keeps its hidden state; a later request can take it further.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from project.cache import Recent
from project.engine.requests import StreamTokens

ROOM = 1.25  # buffers are made so much larger than the stream, since it will grow


class CachedStream:
    """What is kept of one stream of S tokens: deeper layers have seen a prefix of what shallower ones have."""

    def __init__(self, layers: int) -> None:
        empty = np.zeros(0, dtype=np.int64)
        # its tokens with their positions and time groups, which say what a next stream has
        # in common with it
        self.stream = StreamTokens(empty, empty, empty, empty)
        # by layer, keys and values (1, heads, room, dim), of which the first S are filled;
        # None: none yet
        self._pairs: list[tuple[Tensor, Tensor] | None] = [None] * layers
        # by layer, how many leading tokens' keys and values it has
        self._keyed = [0] * layers
        # by depth, how many leading tokens have come to it
        self._reached = [0] * (layers + 1)
        # by depth, hidden states (f, H) of tokens that stopped there
        self.waiting: dict[int, Tensor] = {}

    @property
    def bytes(self) -> int:
        """What keys, values and waiting states take, room to grow included."""
        tensors = list(self.waiting.values())
        for pair in self._pairs:
            tensors += pair or ()
        return sum(x.untyped_storage().nbytes() for x in tensors)

    def adopt(self, stream: StreamTokens, kept: int) -> None:
        """Keep the `kept` leading tokens that are common with `stream`, and forget the others."""
        # 1. Tokens that wait at a depth follow those that reached the next one.
        for depth, hidden in list(self.waiting.items()):
            left = kept - self._reached[depth + 1]
            if left > 0:
                self.waiting[depth] = hidden[:left]
            else:
                del self.waiting[depth]
        # 2. Counts of leading tokens.
        self._keyed = [min(seen, kept) for seen in self._keyed]
        self._reached = [min(seen, kept) for seen in self._reached]
        # 3. All tokens of the new stream come to depth 0 now.
        self._reached[0] = len(stream)
        self.stream = stream

    def waits_unread(self, depth: int) -> bool:
        """Whether some token waits at this depth whose keys and values the next layer does not have."""
        waiting = len(self.waiting.get(depth, ()))
        return waiting > 0 and self._keyed[depth] < self._reached[depth + 1] + waiting

    def read(self, depth: int, tokens: int) -> int:
        """How many of the last `tokens` tokens have their keys and values in the layer behind this depth."""
        return min(max(self._keyed[depth] - len(self.stream) + tokens, 0), tokens)

    def stop(self, depth: int, hidden: Tensor) -> None:
        """Keep the last tokens (f, H) at this depth, where they came, for a request that needs the next layer.

        The last layer only needs a token's keys and values. A token whose keys are cached there is finished and is not
        kept waiting.
        """
        if self._reached[depth + 1] < len(self.stream) and len(hidden):
            self.waiting[depth] = self.resume(depth, hidden).clone()

    def resume(self, depth: int, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens at this depth: those that waited there, then `hidden` (f, H), which came last."""
        waiting = self.waiting.pop(depth, None)
        return hidden if waiting is None else torch.cat([waiting.to(hidden), hidden])

    def keep(
        self, layer: int, key: Tensor, value: Tensor, runs: bool
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values (1, heads, f, dim) of the last f tokens; returns those of all tokens of the stream.

        `runs`: the tokens run the layer. If not, an exit has read them in front of it, and they may run it later.
        """
        stop = len(self.stream)
        start = stop - key.shape[2]  # tokens before have theirs already
        # 1. Room for all tokens.
        pair = self._pairs[layer]
        if pair is None or pair[0].shape[2] < stop:
            keys = _with_room(key, stop)
            values = _with_room(value, stop)
            if pair is not None:
                keys[:, :, :start] = pair[0][:, :, :start]
                values[:, :, :start] = pair[1][:, :, :start]
            self._pairs[layer] = pair = keys, values
        # 2. The new ones.
        keys, values = pair
        if stop > start:
            keys[:, :, start:stop] = key
            values[:, :, start:stop] = value
        # 3. How far the stream has come. Behind the last layer nothing reads a token: its
        # keys are enough.
        self._keyed[layer] = stop
        if runs or layer == len(self._keyed) - 1:
            self._reached[layer + 1] = stop
        return keys[:, :, :stop], values[:, :, :stop]


def _with_room(x: Tensor, tokens: int) -> Tensor:
    """An empty tensor like x (1, heads, f, dim) for so many tokens and more, tokens before heads in memory as in x."""
    return x.new_empty(1, int(tokens * ROOM), x.shape[1], x.shape[3]).transpose(1, 2)


class StreamCache(Recent[CachedStream]):
    """Streams of users, whose tensors take at most `mib` MiB together; the least recently used is forgotten first."""

    def __init__(self, mib: float = 1024) -> None:
        super().__init__(mib)

    def common(self, user: Hashable, stream: StreamTokens) -> int:
        """Number of leading tokens of a stream that are kept for a user."""
        kept = self.look(user)
        return 0 if kept is None else kept.stream.common(stream)

    def take(self, user: Hashable, layers: int) -> CachedStream:
        """What is known of a user's stream, taken out: a batch that fails leaves no stream in an unknown state."""
        return self.pop(user) or CachedStream(layers)

    def give(self, user: Hashable, stream: CachedStream) -> None:
        """Keep a stream after its batch, instead of another one of the user's."""
        self.put(user, stream, stream.bytes)
