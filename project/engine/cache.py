"""Streams that several requests of a user share: keys and values per layer, as deep as somebody needed them.

Unusual here: nothing is invalidated by name. A new stream is compared with the kept one token by token, position and
group included; what their common prefix computed is used, the rest is forgotten. So a history that grew is extended,
an older one is cut, and a window that dropped its oldest half keeps the instruction alone. A token stops behind
the last layer that it ran, at times with its keys and values in the next one, which an exit has read; it keeps its
hidden state there, and goes on from it when a later request needs it deeper.
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
    """What is kept of one stream. Deeper layers have seen a prefix of what shallower ones have.

    Args:
        layers: Layers of the backbone.
    """

    def __init__(self, layers: int) -> None:
        empty = np.zeros(0, dtype=np.int64)
        self.stream = StreamTokens(empty, empty, empty, empty)
        self._pairs: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._keyed = [0] * layers  # tokens whose keys and values each layer has
        self._reached = [0] * (
            layers + 1
        )  # tokens that have come to each depth; they are keyed in front of it
        self._waiting: dict[int, Tensor] = {}  # hidden states (f, H) of tokens that stopped at this depth

    def adopt(self, stream: StreamTokens) -> None:
        """Keep what is common with `stream`, forget the rest."""
        kept = self.stream.common(stream)
        for depth, hidden in list(self._waiting.items()):
            first = self._reached[depth + 1]
            if kept > first:
                self._waiting[depth] = hidden[: kept - first]
            else:
                del self._waiting[depth]
        self._keyed = [min(seen, kept) for seen in self._keyed]
        self._reached = [min(seen, kept) for seen in self._reached]
        self.stream = stream

    def enter(self) -> int:
        """All tokens come to depth 0; returns how many of them were there before."""
        known, self._reached[0] = self._reached[0], len(self.stream)
        return known

    def waits(self, depth: int) -> bool:
        """Whether some token stopped at this depth, short of where others went."""
        return depth in self._waiting

    def waits_unread(self, depth: int) -> bool:
        """Whether some token waits at this depth whose keys and values the next layer does not have."""
        return self.waits(depth) and self._keyed[depth] < self._reached[depth + 1] + len(self._waiting[depth])

    def stops(self, start: int, end: int) -> set[int]:
        """Depths start, ..., end - 1 at which tokens wait."""
        return {depth for depth in self._waiting if start <= depth < end}

    def read(self, depth: int, tokens: int) -> int:
        """How many of the last `tokens` tokens have their keys and values in the layer behind this depth."""
        return min(max(self._keyed[depth] - len(self.stream) + tokens, 0), tokens)

    def stop(self, depth: int, hidden: Tensor) -> None:
        """Tokens (f, H) that have come to this depth and go no further for now; nobody goes further than the last."""
        if depth < len(self._keyed) - 1 and len(hidden):
            self._waiting[depth] = self.resume(depth, hidden).clone()

    def resume(self, depth: int, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens at this depth: those that waited there, then `hidden` (f, H) which just came."""
        waiting = self._waiting.pop(depth, None)
        return hidden if waiting is None else torch.cat([waiting.to(hidden), hidden])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values (1, heads, f, dim) of the last f tokens, which run a layer; returns all tokens'."""
        found = self._keep(layer, key, value)
        self._reached[layer + 1] = len(self.stream)
        return found

    def ahead(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same of tokens in front of a layer: who looks at them need not wait for them to run it."""
        return self._keep(layer, key, value)

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        stop = len(self.stream)
        start = stop - key.shape[2]
        keys, values = self._room(layer, start, stop, key, value)
        if stop > start:
            keys[:, :, start:stop], values[:, :, start:stop] = key, value
        self._keyed[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def _room(self, layer: int, start: int, stop: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        pair = self._pairs[layer]
        if pair is None or pair[0].shape[2] < stop:
            capacity = int(max(stop, len(self.stream)) * ROOM)
            # tokens before heads in memory, as the backbone makes them
            fresh = [x.new_empty(1, capacity, x.shape[1], x.shape[3]).transpose(1, 2) for x in (key, value)]
            for new, old in zip(fresh, pair or (), strict=False):
                new[:, :, :start] = old[:, :, :start]
            pair = (fresh[0], fresh[1])
            self._pairs[layer] = pair
        return pair


class StreamCache:
    """Streams of the users seen last.

    Args:
        capacity: Tokens of all streams together; the user who was away longest is forgotten first.
    """

    def __init__(self, capacity: int = 200_000) -> None:
        self.capacity = capacity
        self._kept: OrderedDict[Hashable, CachedStream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, user: Hashable, stream: StreamTokens, layers: int) -> CachedStream:
        """What is known of a user's stream, taken out; `give` brings it back once it is whole again.

        A batch that fails in between leaves nothing half done behind.

        Args:
            user: Key of the stream.
            stream: The stream as it is now.
            layers: Layers of the backbone.
        """
        found = self._kept.pop(user, None) or CachedStream(layers)
        found.adopt(stream)
        return found

    def give(self, user: Hashable, stream: CachedStream) -> None:
        """Keep a stream."""
        self._kept[user] = stream
        while sum(len(s.stream) for s in self._kept.values()) > self.capacity:
            self._kept.popitem(last=False)
