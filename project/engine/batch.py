"""One batch on its way through the trunk, from exit to exit.

At an exit: the head runs on answer positions only, the decision is made on the device, one transfer tells the host who
left, and one index_select keeps the survivors' tokens; a request without a survivor goes with its stream.

Unusual here: exit 0 decides before anything is packed, so who leaves there costs no token.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.data.ragged import IntArray, offsets_of
from project.engine.attention import StreamBlock, Structure, stream_blocks
from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored, Scores
from project.engine.stream_cache import CachedStream
from project.engine.survivors import Row
from project.exits.outputs import HeadOutputs
from project.model.trunk import State

if TYPE_CHECKING:
    from project.engine.engine import Engine


class EngineBatch:
    """N candidates of R requests.

    Args:
        engine: Trunk, heads, decision and cache.
        requests: The R requests, all usable.
        scores: Gets seconds and syncs.
    """

    def __init__(self, engine: Engine, requests: list[PreparedRequest], scores: Scores) -> None:
        self.engine, self.requests, self.scores = engine, requests, scores
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
        first = prior if engine.decision.layers[0] == 0 else prior[:, :0]
        self.logits, self.drift, self.evidence = first, torch.full_like(first, torch.nan), evidence
        self.emitted = torch.full_like(prior[:, 0], torch.nan)
        self.row: Row
        self.streams: list[CachedStream | None] = [None] * len(requests)
        self.blocks: dict[tuple[int, int], list[StreamBlock]] = {}

    def run(self, stages: list[tuple[int, int]]) -> list[Scored]:
        """Through all stages, or until nobody is left."""
        start = time.perf_counter()
        if self.engine.decision.layers[0] == 0:
            self._decide(0)
        start = self._stop_clock("prior", start)
        if len(self.alive):
            self._pack()
            state = self._embed()
            start = self._stop_clock("pack", start)
            self._trunk(state, stages)
            if self.engine.cache is not None:
                for request, stream in zip(self.requests, self.streams, strict=True):
                    if stream is not None and request.user is not None:
                        self.engine.cache.give(request.user, stream)
        logits = self.emitted.cpu().numpy()
        self.scores.syncs += 1
        self._stop_clock("trunk", start)
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [
            Scored(r.request_id, logits[a:b], self.exit_layer[a:b], int(spent))
            for r, (a, b), spent in zip(self.requests, spans, self.token_layers, strict=True)
        ]

    def _trunk(self, state: State, stages: list[tuple[int, int]]) -> None:
        for start, stop in stages:
            state = self.engine.trunk.run(state, start, stop)
            self.token_layers[self.row.requests] += self.row.tokens_of() * (stop - start)
            stays = np.ones(len(self.alive), dtype=bool)
            if stop in self.engine.decision.layers:
                self._speak(stop, state.hidden[0])
                stays = self._decide(stop)
            state = self._next(state, stop, stays)
            if not len(self.alive):
                break

    def _decide(self, layer: int) -> NDArray[np.bool_]:
        """Note who leaves at this exit, with which logit; returns who stays, of those who were alive."""
        decision = self.engine.decision
        head = decision.layers.index(layer)
        known = decision.known(head)
        if known is False:
            return np.ones(len(self.alive), dtype=bool)
        logits = decision.calibration.apply(self.logits)
        if known:
            leaves, stays = None, np.zeros(len(self.alive), dtype=bool)
            self.emitted[self.index] = logits[:, -1]
        else:
            outputs = HeadOutputs(decision.layers[: head + 1], logits, self.evidence, self.drift)
            leaves = decision.leaves(self.owner, outputs)
            self.emitted[self.index] = torch.where(leaves, logits[:, -1], self.emitted[self.index])
            stays = ~leaves.cpu().numpy()  # the one wait for the device
            self.scores.syncs += 1
        self.exit_layer[self.alive[~stays]] = layer
        self.alive = self.alive[stays]
        if not stays.all() and len(self.alive):
            kept = self._upload(np.flatnonzero(stays))
            names = "owner", "index", "logits", "drift", "evidence"
            for name in names:
                setattr(self, name, getattr(self, name).index_select(0, kept))
        return stays

    def _speak(self, layer: int, hidden: Tensor) -> None:
        """The head of a layer on answer positions (tokens, H): one more column of logits and drift."""
        said = self.engine.heads[str(layer)](hidden.index_select(0, self._upload(self.row.slots)))
        drift = said.drift.sigmoid().double()
        if layer == max(int(k) for k in self.engine.heads):  # the last word expects no drift
            drift = torch.full_like(drift, torch.nan)
        self.logits = torch.cat([self.logits, said.logits.double()[:, None]], dim=1)
        self.drift = torch.cat([self.drift, drift[:, None]], dim=1)

    def _pack(self) -> None:
        """The row at depth 0: streams, or what of them is not cached, and the candidates that are alive."""
        cache = self.engine.cache
        lengths = np.array([len(r.stream) for r in self.requests])
        for i in np.unique(self.request[self.alive]).tolist():
            request = self.requests[i]
            if cache is not None and request.user is not None:
                stream = cache.take(request.user, request.stream, len(self.engine.trunk.layers))
                self.streams[i] = stream
                first, stop = stream.span(0)
                lengths[i] = stop - first
        own = np.concatenate([r.candidates.lengths for r in self.requests])
        self.row = Row.of(self.request[self.alive], lengths, self.alive, own[self.alive])

    def _embed(self) -> State:
        row = self.row
        tokens = [
            self.requests[i].stream.tokens[-f:] for i, f in zip(row.requests, row.stream, strict=True) if f
        ]
        for i in row.requests.tolist():
            mine = row.candidates[row.owner == np.searchsorted(row.requests, i)] - self.offsets[i]
            lists = self.requests[i].candidates
            tokens.append(lists.values if len(mine) == len(lists) else lists.take(mine).values)
        structure = self._structure(0)
        return self.engine.trunk.embed(self._upload(np.concatenate(tokens))[None], structure)  # type: ignore[arg-type]

    def _structure(self, depth: int) -> Structure:
        """Positions and attention of the row."""
        row = self.row
        positions, blocks = list[IntArray](), list[list[StreamBlock]]()
        for i, f in zip(row.requests.tolist(), row.stream.tolist(), strict=True):
            stream = self.requests[i].stream
            positions.append(stream.position[len(stream) - f :])
            blocks.append(self._blocks(i, len(stream) - f))
        own = np.arange(row.own.sum()) - np.repeat(offsets_of(row.own)[:-1], row.own)
        shared = np.array([len(self.requests[i].stream) for i in row.requests])
        positions.append(own + np.repeat(shared[row.owner], row.own))
        place = self._upload(np.concatenate(positions))[None]
        return Structure(row, place, blocks, [self.streams[i] for i in row.requests])

    def _blocks(self, request: int, first: int) -> list[StreamBlock]:
        key = (request, first)
        if key not in self.blocks:
            stream, dtype = self.requests[request].stream, self.engine.trunk.embed_tokens.weight.dtype
            self.blocks[key] = stream_blocks(stream, first, len(stream), self.engine.device, dtype)
        return self.blocks[key]

    def _next(self, state: State, depth: int, stays: NDArray[np.bool_]) -> State:
        """The state of the survivors; without a gather where nobody left."""
        hidden = state.hidden[0]
        live = [self.streams[i] for i in self.row.requests]
        if stays.all() and not any(stream is not None and stream.waits(depth) for stream in live):
            return state
        cached = any(stream is not None for stream in live)
        pieces = self._deepened(hidden, depth, stays) if cached else []
        if not len(self.alive):
            return state
        before, self.row = self.row, self.row.keep(stays)
        hidden = hidden.index_select(0, self._upload(before.index(stays, streams=not cached)))
        if cached:
            self.row = replace(self.row, stream=np.array([len(p) for p in pieces], dtype=np.int64))
            hidden = torch.cat([*pieces, hidden])
        structure = self._structure(depth)
        rotary = self.engine.trunk.rotary_emb(hidden[None], position_ids=structure.position)
        return State(hidden[None], structure, rotary)  # type: ignore[arg-type]

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
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.engine.device, non_blocking=True)

    def _stop_clock(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.scores.seconds[name] += now - start
        return now
