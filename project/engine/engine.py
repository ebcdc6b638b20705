"""Runs requests from exit to exit, and computes nothing more for candidates that have left."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import rotate_half

from project.arrays import I64, Bool
from project.data.ragged import offsets_of, within
from project.engine.attention import Row, StreamBlock, Structure, stream_blocks, upload
from project.engine.cache import CachedStream, StreamCache
from project.engine.decisions import Decision
from project.engine.requests import PreparedRequest, Scored, Scores
from project.errors import ConfigError, DataError
from project.evaluation.result import scores_of_candidates
from project.exits.calibration import Calibration
from project.exits.criteria import HeadOutputs
from project.model.backbone import State
from project.model.module import ExitRecommender

Kind = TypeVar("Kind", bound=nn.Module)

# From so many tokens on, an exit's layer runs at answer positions first: candidates that leave save the rest of the
# layer, for those that stay its fixed part runs twice. If half leave, break-even is that part, in tokens, over .39.
# On a CPU, packed float32 layers of SmolLM2-135M: their weights take as long to read as 24 tokens to multiply (218
# GFLOP/s, 18 GB/s in results/whole_backbone_alone/benchmark.json), so 62. On other devices kernel
# launches take most of the time; not measured.
READ_TOKENS, READ_TOKENS_ELSEWHERE = 64, 4096


class Engine:
    """Scores prepared requests with a module; a `Decision` says who leaves at its exits.

    The module is put into eval mode. On a CPU the engine packs the backbone's weights, a second copy of them; engines
    share it if each is given a module whose backbone is packed already. Use one engine from one thread at a time.

    `cache` keeps users' streams between requests; None runs every stream anew. A batch has at most `batch_tokens`
    tokens, but a request is never cut. `read_tokens` replaces READ_TOKENS; it moves scores by rounding only.
    """

    def __init__(
        self,
        module: ExitRecommender,
        decision: Decision,
        cache: StreamCache | None = None,
        batch_tokens: int = 16_384,
        read_tokens: float | None = None,
    ) -> None:
        assert module.backbone is not None
        if set(decision.layers) - {0, *module.exit_layers}:
            raise ConfigError(
                f"the exits to decide about are at layers {decision.layers}, but the model has {module.exit_layers}; "
                "run the command calibrate with this checkpoint"
            )
        self.backbone, self.heads = packed(module.backbone.eval()), module.heads.eval()
        self.decision, self.cache, self.batch_tokens = decision, cache, batch_tokens
        weight: Tensor = self.backbone.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        if read_tokens is None:
            read_tokens = READ_TOKENS if self.device.type == "cpu" else READ_TOKENS_ELSEWHERE
        self.read_tokens = read_tokens
        self._rotary: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Scores in the order of the requests; an unusable one gets an error and does not affect the others."""
        found, usable, scores = dict[int, Scored](), list[int](), Scores([])
        for i, request in enumerate(requests):
            error = request.trouble(self.backbone.vocabulary)
            if error is None and len(request):
                usable.append(i)
            else:  # unusable, or nobody to score, which is no error
                found[i] = Scored.refused(request, error)
        for members in self._batches(requests, usable):
            batch = EngineBatch(self, [requests[i] for i in members], scores)
            found.update(zip(members, batch.run(), strict=True))
        scores.requests = [found[i] for i in range(len(requests))]
        return scores

    def _batches(self, requests: Sequence[PreparedRequest], usable: list[int]) -> Iterator[list[int]]:
        """In their order; with a cache, requests of one user go one after the other: the later reads the earlier."""
        members, users, tokens = list[int](), set[object](), 0
        for i in usable:
            request = requests[i]
            size = len(request.stream) + len(request.candidates.values)
            again = self.cache is not None and request.user is not None and request.user in users
            if members and (again or tokens + size > self.batch_tokens):
                yield members
                members, users, tokens = [], set(), 0
            members.append(i)
            users.add(request.user)
            tokens += size
        if members:
            yield members

    def rotary(self, position: I64) -> tuple[Tensor, Tensor]:
        """Cosines and sines of T positions, (1, T, head dim) each, from a table that is made once."""
        farthest = int(position.max())
        if self._rotary is None or self._rotary[0].shape[0] <= farthest:
            every = torch.arange(2 * (farthest + 1), device=self.device)
            cos, sin = self.backbone.rotary_emb(self.backbone.embed_tokens.weight, position_ids=every[None])
            self._rotary = cos[0], sin[0]
        place = upload(position, self.device)
        cos, sin = (x.index_select(0, place)[None] for x in self._rotary)
        return cos, sin


class EngineBatch:
    """N candidates of R requests on their way through the exits."""

    def __init__(self, engine: Engine, requests: list[PreparedRequest], scores: Scores) -> None:
        self.engine, self.requests, self.scores = engine, requests, scores
        counts = np.array([len(r) for r in requests])
        self.offsets = offsets_of(counts)  # (R + 1,) where each request's candidates start among the N
        self.request = np.repeat(np.arange(len(requests)), counts)  # (N,)
        self.exit_layer = np.full(len(self.request), -1, dtype=np.int64)
        self.token_layers = np.zeros(len(requests), dtype=np.int64)
        self.deadline = np.array([r.deadline for r in requests])
        self.late = np.zeros(len(requests), dtype=bool)
        self.alive = np.arange(len(self.request))  # the m candidates that are still running
        # of these, on the device: place among the N, request, features, and raw logits, a column a head
        self.index, self.owner = (upload(x, engine.device) for x in (self.alive, self.request))
        self.retrieved = upload(np.concatenate([r.retrieved for r in requests]), engine.device)
        exit_0 = upload(np.concatenate([r.exit_0 for r in requests]), engine.device)
        self.logits = exit_0[:, None] if engine.decision.layers[0] == 0 else exit_0.new_zeros(len(exit_0), 0)
        self.emitted = torch.full_like(exit_0, torch.nan)  # (N,) calibrated logits that candidates left with
        self.row: Row
        self.structure: Structure  # of the row
        self.read = -1  # the layer, from 0, that the last exit read at answer positions before it ran whole
        self.streams: list[CachedStream | None] = [None] * len(requests)
        self.blocks: dict[tuple[int, int], list[StreamBlock]] = {}

    def run(self) -> list[Scored]:
        """From exit to exit, until nobody is left."""
        engine, decision, start = self.engine, self.engine.decision, time.perf_counter()
        # 1. Exit 0: its logits are known before the backbone runs.
        if decision.layers[0] == 0:
            self._decide(0)
        start = self._stop_clock("exit_0", start)
        if len(self.alive):
            # 2. One row: stream tokens that are not cached, then the candidates that stayed.
            state = self._embed()
            start = self._stop_clock("pack", start)
        depth, last = 0, len(decision.layers) - 1
        for head, layer in enumerate(decision.layers):
            if layer == 0:
                continue
            if not len(self.alive):
                break
            # 3. Whole layers up to the one in front of the exit.
            state = self._run_layers(state, depth, layer - 1)
            depth = layer - 1
            # 4. The exit's own layer. Where candidates may leave it runs at the answer slots alone, since who leaves
            #    needs no more of it; it runs whole where nobody can leave, or where tokens are few (READ_TOKENS).
            known = decision.known(head)
            if known or (known is None and (head == last or self.row.tokens >= engine.read_tokens)):
                if any(stream.waits_unread(depth) for stream in self._live_streams()):
                    state = self._compact(state, depth)
                self._count(depth, layer)
                self.read = depth
                answers = answers_of_layer(engine.backbone.layers[depth], state, self.structure)
            else:
                state = self._run_layers(state, depth, layer)
                depth = layer
                answers = state.hidden[0].index_select(0, self.structure.slots)
            # 5. The head: one more column of logits.
            column: Tensor = engine.heads[str(layer)](answers).double()[:, None]
            self.logits = torch.cat([self.logits, column], dim=1)
            # 6. Who leaves, and with which logit: by the decision, or since the request's deadline has passed.
            stays = self._decide(head)
            # 7. The row of the survivors goes on from this depth, by one gather.
            state = self._compact(state, depth, stays)
        # 8. Results. Streams go back into the cache, as deep as they came; one that gave NaN is forgotten.
        logits = self.emitted.cpu().numpy()
        self._stop_clock("backbone", start)
        found = list[Scored]()
        for i, (request, (a, b)) in enumerate(zip(self.requests, pairwise(self.offsets), strict=True)):
            spent, late, stream = int(self.token_layers[i]), bool(self.late[i]), self.streams[i]
            if missing := int(np.isnan(logits[a:b]).sum()):
                error = f"the model's scores of {missing} of {b - a} candidates are NaN"
                found.append(Scored.refused(request, error, spent))
                continue
            if engine.cache is not None and stream is not None and request.user is not None:
                engine.cache.give(request.user, stream)
            found.append(Scored(request.request_id, logits[a:b], self.exit_layer[a:b], spent, late=late))
        return found

    def _embed(self) -> State:
        """The row at depth 0."""
        engine, requests = self.engine, self.requests
        lengths = np.array([len(r.stream) for r in requests])
        if engine.cache is not None:
            for i in np.unique(self.request[self.alive]).tolist():
                user = requests[i].user
                if user is not None:
                    stream = engine.cache.take(user, len(engine.backbone.layers))
                    lengths[i] -= stream.adopt(requests[i].stream)
                    self.streams[i] = stream
        own = np.concatenate([r.candidates.lengths for r in requests])
        self.row = row = Row.of(self.request[self.alive], lengths, own[self.alive])
        tokens = list[I64]()
        for i, ran in zip(row.requests, row.stream, strict=True):
            stream_tokens = requests[i].stream.tokens
            tokens.append(stream_tokens[len(stream_tokens) - ran :])
        for i, (a, b) in zip(row.requests, row.members(), strict=True):
            tokens.append(requests[i].candidates.take(self.alive[a:b] - self.offsets[i]).values)
        return self._state(engine.backbone.embed_tokens(upload(np.concatenate(tokens), engine.device)))

    def _state(self, hidden: Tensor) -> State:
        """Hidden states of the row's tokens (T, H) with their positions and attention."""
        engine, row, positions = self.engine, self.row, list[I64]()
        blocks = list[list[StreamBlock]]()
        for i, ran in zip(row.requests.tolist(), row.stream.tolist(), strict=True):
            stream = self.requests[i].stream
            first = len(stream) - ran
            positions.append(stream.position[first:])
            if (i, first) not in self.blocks:
                self.blocks[i, first] = stream_blocks(stream, first, engine.device, engine.dtype)
            blocks.append(self.blocks[i, first])
        shared = np.array([len(self.requests[i].stream) for i in row.requests])
        positions.append(within(row.own) + np.repeat(shared[row.owner], row.own))
        self.structure = Structure(row, engine.device, blocks, [self.streams[i] for i in row.requests])
        rotary = engine.rotary(np.concatenate(positions))
        return State(hidden[None], self.structure, rotary)  # type: ignore[arg-type]

    def _live_streams(self) -> list[CachedStream]:
        return [stream for i in self.row.requests if (stream := self.streams[i]) is not None]

    def _run_layers(self, state: State, start: int, stop: int) -> State:
        """Whole layers start, ..., stop - 1; stream tokens that wait on the way join the row where they wait."""
        waiting = {d for stream in self._live_streams() for d in stream.waiting if start <= d < stop}
        for first, last in pairwise(sorted({start, stop} | waiting)):
            if first in waiting:
                state = self._compact(state, first)
            self._count(first, last)
            state = self.engine.backbone.run(state, first, last)
        return state

    def _count(self, first: int, last: int) -> None:
        """Count the row's tokens in layers first, ..., last - 1, without those that an exit read in layer `first`."""
        row, read = self.row, first == self.read
        tokens = row.own_tokens * (last - first - read) + row.stream * (last - first)
        for place, (i, ran) in enumerate(zip(row.requests.tolist(), row.stream.tolist(), strict=True)):
            stream = self.streams[i]
            tokens[place] -= ran * read if stream is None else stream.read(first, ran)
        self.token_layers[row.requests] += tokens

    def _decide(self, head: int) -> Bool:
        """Note who leaves at this exit, and with which logit; returns who of the alive stays, (m,)."""
        decision, late = self.engine.decision, self._late()
        known = decision.known(head)
        if known is False and not late.any():
            return ~late
        logits = decision.calibration.apply(self.logits)
        leaves = np.full(len(self.alive), known is True)
        if known is None:
            outputs = HeadOutputs(decision.layers[: head + 1], logits, self.retrieved)
            leaves = decision.leaves(self.owner, outputs).cpu().numpy()  # the one wait for the device
        self.late[self.request[self.alive[late & ~leaves]]] = True
        stays = ~(leaves | late)
        gone = upload(~stays, self.engine.device)
        self.emitted[self.index] = torch.where(gone, logits[:, -1], self.emitted[self.index])
        self.exit_layer[self.alive[~stays]] = decision.layers[head]
        self.alive = self.alive[stays]
        if len(self.alive) and not stays.all():
            kept = upload(np.flatnonzero(stays), self.engine.device)
            self.index, self.owner, self.retrieved, self.logits = (
                x.index_select(0, kept) for x in (self.index, self.owner, self.retrieved, self.logits)
            )
        return stays

    def _late(self) -> Bool:
        """Which of the alive are past their deadline, (m,); waits for the device where there is one."""
        deadline = self.deadline[self.request[self.alive]]
        if not np.isfinite(deadline).any():
            return np.zeros(len(deadline), dtype=bool)
        if self.engine.device.type != "cpu":
            torch.get_device_module(self.engine.device).synchronize()
        return deadline < time.monotonic()

    def _compact(self, state: State, depth: int, stays: Bool | None = None) -> State:
        """The state of who stays, (m,), None: everyone, and of the stream tokens that waited at this depth.

        Nothing is gathered where nothing changes. Streams of requests that nobody is left of wait here.
        """
        row, cached = self.row, self._live_streams()
        stays = np.ones(len(row.own), dtype=bool) if stays is None else stays
        if stays.all() and not any(depth in stream.waiting for stream in cached):
            return state
        hidden, live, pieces = state.hidden[0], set(row.owner[stays].tolist()), list[Tensor]()
        if cached:
            spans = zip(row.requests.tolist(), pairwise(row.streams.tolist()), strict=True)
            for place, (i, (a, b)) in enumerate(spans):
                came, stream = hidden[a:b], self.streams[i]
                if place in live:
                    pieces.append(came if stream is None else stream.resume(depth, came))
                elif stream is not None:
                    stream.stop(depth, came)
        if not live:
            return state
        self.row = row.keep(stays)
        hidden = hidden.index_select(0, upload(row.index(stays, streams=not cached), self.engine.device))
        if cached:
            self.row = replace(self.row, stream=np.array([len(piece) for piece in pieces], dtype=np.int64))
            hidden = torch.cat([*pieces, hidden])
        return self._state(hidden)

    def _stop_clock(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.scores.seconds[name] += now - start
        return now


def answers_of_layer(layer: nn.Module, state: State, structure: Structure) -> Tensor:
    """Hidden states of the answer slots behind a layer, (m, H): what the whole layer gives there, to rounding.

    `state` is of the T tokens in front of the layer; cached streams get the layer's keys and values.
    """
    block: Any = layer
    attention = block.self_attn
    hidden, slots = state.hidden[0], structure.slots
    normed = block.input_layernorm(hidden)

    def heads(projected: Tensor) -> Tensor:
        return projected.view(len(projected), -1, attention.head_dim)

    # 1. Queries of the slots; keys and values of all tokens.
    query = heads(attention.q_proj(normed.index_select(0, slots)))
    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (x[0] for x in state.position_embeddings)
    query = _rotated(query, cos.index_select(0, slots), sin.index_select(0, slots))
    key, value = (x.transpose(0, 1)[None] for x in (_rotated(key, cos, sin), value))
    # 2. The rest of the layer at the slots.
    found = structure.attend_answers(attention.layer_idx, query, key, value, attention.scaling)
    answers = hidden.index_select(0, slots) + attention.o_proj(found.flatten(1))
    out: Tensor = answers + block.mlp(block.post_attention_layernorm(answers))
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, dim), turned by (T, dim)."""
    found: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]  # type: ignore[no-untyped-call]
    return found


class PackedLinear(nn.Linear):
    """A linear layer on a CPU that shares the other's parameters and multiplies by a packed copy of its weights."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without a gradient."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def packed(module: Kind) -> Kind:
    """A copy of a module in eval mode whose linear layers are packed where they can be; itself where none is left."""
    if not any(_packable(part) for part in module.modules()):
        return module
    found = copied(module)
    for name, child in found._modules.items():
        if isinstance(child, nn.Linear) and _packable(child):
            found._modules[name] = PackedLinear(child)
        elif child is not None:
            found._modules[name] = packed(child)
    return found


def _packable(part: nn.Module) -> bool:
    if type(part) is not nn.Linear or isinstance(part.weight, DTensor):
        return False
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn and part.weight.device.type == "cpu" and part.weight.dtype == torch.float32


class EveryHead:
    """A `Decision`: nobody leaves before the last head; calibrated outputs of all heads are kept, batch by batch."""

    def __init__(self, calibration: Calibration) -> None:
        self.layers, self.calibration = calibration.layers, calibration
        self.outputs: list[HeadOutputs] = []

    def known(self, head: int) -> bool | None:
        """Nobody leaves before the last head, where `leaves` must be called to keep the outputs."""
        return None if head == len(self.layers) - 1 else False

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """(m,) all True, at the last head."""
        self.outputs.append(outputs)
        return torch.ones_like(request, dtype=torch.bool)


def score_every_head(
    model: ExitRecommender,
    requests: Sequence[PreparedRequest],
    batch_tokens: int = 16_384,
    candidates: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Score table of all candidates of requests, as `predict` writes it (to rounding).

    `candidates` is `Requests.table()` of the same requests, for the column item_id; None leaves it empty. A request
    that cannot be scored is a DataError.
    """
    raw = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(len(model.exit_layers), 1)
    decision = EveryHead(Calibration(tuple(model.exit_layers), raw))
    for scored in Engine(model, decision, batch_tokens=batch_tokens).score(requests).requests:
        if scored.error is not None:
            raise DataError(f"request {scored.request_id!r} cannot be scored: {scored.error}.")
    if candidates is None:
        rows = [(r.request_id, k, None) for r in requests for k in range(len(r))]
        schema = {"request_id": pl.String, "candidate_index": pl.Int64, "item_id": pl.String}
        candidates = pl.DataFrame(rows, schema=schema, orient="row")
    tokens = [(int(own), len(r.stream)) for r in requests for own in r.candidates.lengths]
    ids = torch.tensor([(row, *pair) for row, pair in enumerate(tokens)], dtype=torch.int64).reshape(-1, 3)
    exit_0 = np.array([logit for r in requests for logit in r.exit_0])
    logits = [torch.zeros(0, len(model.exit_layers)), *(outputs.logits.cpu() for outputs in decision.outputs)]
    return scores_of_candidates(ids, torch.cat(logits), candidates, exit_0, model.exit_layers)
