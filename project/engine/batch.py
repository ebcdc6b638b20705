"""One batch on its way through the trunk, from exit to exit.

At an exit: the layer gives the answer positions alone, the head runs on them, the decision is made on the device, one
transfer tells the host who left, and one index_select keeps the survivors' tokens, as they stand in front of the
layer, which they then run whole; a request without a survivor goes with its stream. Few tokens run it whole at once.

Unusual here: exit 0 decides before anything is packed, so who leaves there costs no token. A layer that is read at an
exit counts as run, for every token whose keys and values it made, though who leaves there asks nothing more of it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.data.ragged import IntArray, offsets_of, within
from project.engine.answers import answers_of_layer
from project.engine.attention import StreamBlock, Structure, stream_blocks
from project.engine.parts import Parts
from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored, Scores
from project.engine.stream_cache import CachedStream
from project.engine.survivors import Row
from project.exits.outputs import HeadOutputs
from project.model.trunk import State


class EngineBatch:
    """N candidates of R requests.

    Args:
        parts: Trunk, heads, decision and cache.
        requests: The R requests, all usable.
        scores: Gets seconds and syncs.
    """

    def __init__(self, parts: Parts, requests: list[PreparedRequest], scores: Scores) -> None:
        self.parts, self.requests, self.scores = parts, requests, scores
        counts = np.array([len(r) for r in requests])
        self.offsets = offsets_of(counts)
        self.request = np.repeat(np.arange(len(requests)), counts)
        self.alive = np.arange(len(self.request))
        self.exit_layer = np.full(len(self.request), -1, dtype=np.int64)
        self.token_layers = np.zeros(len(requests), dtype=np.int64)
        self.owner = self._upload(self.request)
        self.index = self._upload(self.alive)
        evidence = self._upload(np.concatenate([r.evidence for r in requests]))
        prior = self._upload(np.concatenate([r.prior for r in requests]))[:, None]
        first = prior if parts.decision.layers[0] == 0 else prior[:, :0]
        self.logits, self.evidence = first, evidence
        self.emitted = torch.full_like(prior[:, 0], torch.nan)
        self.row: Row
        self.structure: Structure  # of the row
        self.counted: IntArray  # per live request, its tokens for which the next layer was counted at an exit
        self.streams: list[CachedStream | None] = [None] * len(requests)
        self.blocks: dict[tuple[int, int], list[StreamBlock]] = {}

    def run(self) -> list[Scored]:
        """Through all exits, or until nobody is left."""
        start = time.perf_counter()
        if self.parts.decision.layers[0] == 0:
            self._decide(0)
        start = self._stop_clock("prior", start)
        if len(self.alive):
            self._pack()
            state = self._embed()
            start = self._stop_clock("pack", start)
            self._trunk(state)
            if self.parts.cache is not None:
                for request, stream in zip(self.requests, self.streams, strict=True):
                    if stream is not None and request.user is not None:
                        self.parts.cache.give(request.user, stream)
        logits = self.emitted.cpu().numpy()
        self.scores.syncs += 1
        self._stop_clock("trunk", start)
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [
            Scored(r.request_id, logits[a:b], self.exit_layer[a:b], int(spent))
            for r, (a, b), spent in zip(self.requests, spans, self.token_layers, strict=True)
        ]

    def _trunk(self, state: State) -> None:
        decision, depth = self.parts.decision, 0
        for head, layer in enumerate(decision.layers):
            if layer == 0:
                continue
            state, depth = self._layers(state, depth, layer - 1), layer - 1
            read = self._reads_first(head)
            if read:
                if any(stream.waits_unread(depth) for stream in self._live_streams()):
                    state = self._next(state, depth)
                answers = self._answers(state, depth)
            else:
                state, depth = self._layers(state, depth, layer), layer
                answers = state.hidden[0].index_select(0, self.structure.slots)
            self._speak(layer, answers)
            state = self._next(state, depth, self._decide(layer), read)
            if not len(self.alive):
                return

    def _reads_first(self, head: int) -> bool:
        """Whether answer positions are enough for now: who leaves needs no more of this head's layer."""
        decision = self.parts.decision
        known = decision.known(head)
        if known is None and head < len(decision.layers) - 1:
            return self.row.tokens >= self.parts.read_tokens
        return known is not False

    def _layers(self, state: State, start: int, stop: int) -> State:
        """Layers start, ..., stop - 1, whole, with the streams that wait on the way."""
        waiting = set[int]().union(*(stream.stops(start, stop) for stream in self._live_streams()))
        for first, last in pairwise(sorted({start, stop} | waiting)):
            if first in waiting:
                state = self._next(state, first)
            self.token_layers[self.row.requests] += self.row.tokens_of() * (last - first) - self.counted
            self.counted = np.zeros(len(self.row.requests), dtype=np.int64)
            state = self.parts.trunk.run(state, first, last)
        return state

    def _answers(self, state: State, layer: int) -> Tensor:
        """Hidden states (m, H) of the answer positions behind a layer."""
        self.token_layers[self.row.requests] += self.row.tokens_of() - self.counted
        return answers_of_layer(self.parts.trunk.layers[layer], state, self.structure)

    def _live_streams(self) -> list[CachedStream]:
        return [stream for i in self.row.requests if (stream := self.streams[i]) is not None]

    def _decide(self, layer: int) -> NDArray[np.bool_]:
        """Note who leaves at this exit, with which logit; returns who stays, of those who were alive."""
        decision = self.parts.decision
        head = decision.layers.index(layer)
        known = decision.known(head)
        if known is False:
            return np.ones(len(self.alive), dtype=bool)
        logits = decision.calibration.apply(self.logits)
        if known:
            leaves, stays = None, np.zeros(len(self.alive), dtype=bool)
            self.emitted[self.index] = logits[:, -1]
        else:
            outputs = HeadOutputs(decision.layers[: head + 1], logits, self.evidence)
            leaves = decision.leaves(self.owner, outputs)
            self.emitted[self.index] = torch.where(leaves, logits[:, -1], self.emitted[self.index])
            stays = ~leaves.cpu().numpy()  # the one wait for the device
            self.scores.syncs += 1
        self.exit_layer[self.alive[~stays]] = layer
        self.alive = self.alive[stays]
        if not stays.all() and len(self.alive):
            kept = self._upload(np.flatnonzero(stays))
            names = "owner", "index", "logits", "evidence"
            for name in names:
                setattr(self, name, getattr(self, name).index_select(0, kept))
        return stays

    def _speak(self, layer: int, answers: Tensor) -> None:
        """The head of a layer on answer positions (m, H): one more column of logits."""
        said = self.parts.heads[str(layer)](answers)
        self.logits = torch.cat([self.logits, said.double()[:, None]], dim=1)

    def _pack(self) -> None:
        """The row at depth 0: streams, or what of them is not cached, and the candidates that are alive."""
        cache = self.parts.cache
        lengths = np.array([len(r.stream) for r in self.requests])
        for i in np.unique(self.request[self.alive]).tolist():
            request = self.requests[i]
            if cache is not None and request.user is not None:
                stream = cache.take(request.user, request.stream, len(self.parts.trunk.layers))
                self.streams[i] = stream
                lengths[i] -= stream.enter()
        own = np.concatenate([r.candidates.lengths for r in self.requests])
        self.row = Row.of(self.request[self.alive], lengths, self.alive, own[self.alive])
        self.counted = np.zeros(len(self.row.requests), dtype=np.int64)

    def _embed(self) -> State:
        row = self.row
        tokens = [
            self.requests[i].stream.tokens[-f:] for i, f in zip(row.requests, row.stream, strict=True) if f
        ]
        for i, (a, b) in zip(row.requests.tolist(), row.members(), strict=True):
            lists = self.requests[i].candidates
            mine = row.candidates[a:b] - self.offsets[i]
            tokens.append(lists.values if len(mine) == len(lists) else lists.take(mine).values)
        ids = self._upload(np.concatenate(tokens))
        return self._state(self.parts.trunk.embed_tokens(ids))

    def _state(self, hidden: Tensor) -> State:
        """Of the row's tokens (T, H), with their positions and attention."""
        row = self.row
        positions, blocks = list[IntArray](), list[list[StreamBlock]]()
        for i, f in zip(row.requests.tolist(), row.stream.tolist(), strict=True):
            stream = self.requests[i].stream
            positions.append(stream.position[len(stream) - f :])
            blocks.append(self._blocks(i, len(stream) - f))
        shared = np.array([len(self.requests[i].stream) for i in row.requests])
        positions.append(within(row.own) + np.repeat(shared[row.owner], row.own))
        self.structure = Structure(row, self.parts.device, blocks, [self.streams[i] for i in row.requests])
        rotary = self.parts.rotary.at(np.concatenate(positions))
        return State(hidden[None], self.structure, rotary)  # type: ignore[arg-type]

    def _blocks(self, request: int, first: int) -> list[StreamBlock]:
        stream, key = self.requests[request].stream, (request, first)
        if first == len(stream):
            return []
        if key not in self.blocks:
            parts = self.parts
            self.blocks[key] = stream_blocks(stream, first, len(stream), parts.device, parts.dtype)
        return self.blocks[key]

    def _next(
        self, state: State, depth: int, stays: NDArray[np.bool_] | None = None, read: bool = False
    ) -> State:
        """The state of the survivors and of streams that waited here; without a gather where nothing changes.

        Args:
            state: Of the row at this depth.
            depth: Layers that have run.
            stays: (m,) who of the row; None: everyone.
            read: The next layer was read at this exit, so it is counted for the row already.
        """
        stays = np.ones(len(self.alive), dtype=bool) if stays is None else stays
        if not stays.all() or any(stream.waits(depth) for stream in self._live_streams()):
            state = self._moved(state, depth, stays)
        if len(self.alive):
            own = self.row.tokens_of() - self.row.stream
            tokens = zip(self.row.requests.tolist(), self.row.stream.tolist(), strict=True)
            known = [f * read if (s := self.streams[i]) is None else s.read(depth, f) for i, f in tokens]
            self.counted = own * read + np.array(known, dtype=np.int64)
        return state

    def _moved(self, state: State, depth: int, stays: NDArray[np.bool_]) -> State:
        hidden = state.hidden[0]
        cached = bool(self._live_streams())
        pieces = self._deepened(hidden, depth, stays) if cached else []
        if not len(self.alive):
            return state
        before, self.row = self.row, self.row.keep(stays)
        hidden = hidden.index_select(0, self._upload(before.index(stays, streams=not cached)))
        if cached:
            self.row = replace(self.row, stream=np.array([len(p) for p in pieces], dtype=np.int64))
            hidden = torch.cat([*pieces, hidden])
        return self._state(hidden)

    def _deepened(self, hidden: Tensor, depth: int, stays: NDArray[np.bool_]) -> list[Tensor]:
        """Per surviving request, its stream's tokens that stand at this depth; the others' wait in the cache."""
        live = set(np.unique(self.row.owner[stays]).tolist())
        edges, pieces = self.row.streams.tolist(), list[Tensor]()
        for place, request in enumerate(self.row.requests.tolist()):
            came, stream = hidden[edges[place] : edges[place + 1]], self.streams[request]
            if place in live:
                pieces.append(came if stream is None else stream.resume(depth, came))
            elif stream is not None:
                stream.stop(depth, came)
        return pieces

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.parts.device, non_blocking=True)

    def _stop_clock(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.scores.seconds[name] += now - start
        return now
