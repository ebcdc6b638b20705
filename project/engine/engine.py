"""The engine: a request runs from exit to exit, and what has left is not computed any more."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import rotate_half

from project.data.ragged import IntArray, offsets_of, within
from project.engine.attention import RotaryTable, Row, StreamBlock, Structure, stream_blocks
from project.engine.cache import CachedStream, StreamCache
from project.engine.decisions import Decision
from project.engine.requests import PreparedRequest, Scored, Scores
from project.errors import ConfigError, DataError
from project.evaluation.result import scores_of_candidates
from project.exits.calibration import Calibration
from project.exits.criteria import HeadOutputs
from project.model.backbone import Backbone, State

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Kind = TypeVar("Kind", bound=nn.Module)


class PackedLinear(nn.Linear):
    """A linear layer for inference. Its parameters are the other layer's; only its products are made otherwise.

    Args:
        linear: The layer, on a CPU. Whoever changes its weights packs them again.
    """

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
    """A module whose linear layers are packed where that is possible; itself where none is, or all are already.

    Args:
        module: In eval mode. Stays as it is; its parameters are shared.
    """
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


@dataclass(frozen=True, eq=False)
class Parts:
    """Of one engine.

    Attributes:
        backbone: In eval mode.
        heads: Modules by layer, as text.
        decision: Who leaves where.
        cache: Users' streams; None: every stream runs anew.
        rotary: Of the backbone.
        read_tokens: Tokens of a row from which the layer of an exit is read before it runs whole.
    """

    backbone: Backbone
    heads: nn.ModuleDict
    decision: Decision
    cache: StreamCache | None
    rotary: RotaryTable
    read_tokens: float

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        found: torch.device = self.backbone.embed_tokens.weight.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        found: torch.dtype = self.backbone.embed_tokens.weight.dtype
        return found


def answers_of_layer(layer: nn.Module, state: State, structure: Structure) -> Tensor:
    """Hidden states of the answer positions behind a layer, (m, H): what the whole layer gives there, to rounding.

    Args:
        layer: A decoder layer of a family that the backbone supports.
        state: T tokens in front of it.
        structure: Of these tokens; streams that are cached get the layer's keys and values.
    """
    block: Any = layer
    attention = block.self_attn
    hidden, slots = state.hidden[0], structure.slots
    normed = block.input_layernorm(hidden)
    query = _heads(attention.q_proj(normed.index_select(0, slots)), attention.head_dim)
    key, value = (
        _heads(project(normed), attention.head_dim) for project in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (x[0] for x in state.position_embeddings)
    query = _rotated(query, cos.index_select(0, slots), sin.index_select(0, slots))
    key = _rotated(key, cos, sin)
    key, value = (x.transpose(0, 1)[None] for x in (key, value))
    found = structure.attend_answers(attention.layer_idx, query, key, value, attention.scaling)
    answers = hidden.index_select(0, slots) + attention.o_proj(found.flatten(1))
    out: Tensor = answers + block.mlp(block.post_attention_layernorm(answers))
    return out


def _heads(projected: Tensor, dim: int) -> Tensor:
    return projected.view(len(projected), -1, dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, dim), turned by (T, dim)."""
    found: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]  # type: ignore[no-untyped-call]
    return found


class EngineBatch:
    """N candidates of R requests.

    Args:
        parts: Backbone, heads, decision and cache.
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
        retrieved = self._upload(np.concatenate([r.retrieved for r in requests]))
        exit_0 = self._upload(np.concatenate([r.exit_0 for r in requests]))[:, None]
        first = exit_0 if parts.decision.layers[0] == 0 else exit_0[:, :0]
        self.logits, self.retrieved = first, retrieved
        self.emitted = torch.full_like(exit_0[:, 0], torch.nan)
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
        start = self._stop_clock("exit_0", start)
        if len(self.alive):
            self._pack()
            state = self._embed()
            start = self._stop_clock("pack", start)
            self._backbone(state)
            if self.parts.cache is not None:
                for request, stream in zip(self.requests, self.streams, strict=True):
                    if stream is not None and request.user is not None:
                        self.parts.cache.give(request.user, stream)
        logits = self.emitted.cpu().numpy()
        self.scores.syncs += 1
        self._stop_clock("backbone", start)
        spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
        return [
            Scored(r.request_id, logits[a:b], self.exit_layer[a:b], int(spent))
            for r, (a, b), spent in zip(self.requests, spans, self.token_layers, strict=True)
        ]

    def _backbone(self, state: State) -> None:
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
            state = self.parts.backbone.run(state, first, last)
        return state

    def _answers(self, state: State, layer: int) -> Tensor:
        """Hidden states (m, H) of the answer positions behind a layer."""
        self.token_layers[self.row.requests] += self.row.tokens_of() - self.counted
        return answers_of_layer(self.parts.backbone.layers[layer], state, self.structure)

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
            outputs = HeadOutputs(decision.layers[: head + 1], logits, self.retrieved)
            leaves = decision.leaves(self.owner, outputs)
            self.emitted[self.index] = torch.where(leaves, logits[:, -1], self.emitted[self.index])
            stays = ~leaves.cpu().numpy()  # the one wait for the device
            self.scores.syncs += 1
        self.exit_layer[self.alive[~stays]] = layer
        self.alive = self.alive[stays]
        if not stays.all() and len(self.alive):
            kept = self._upload(np.flatnonzero(stays))
            names = "owner", "index", "logits", "retrieved"
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
                stream = cache.take(request.user, request.stream, len(self.parts.backbone.layers))
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
        return self._state(self.parts.backbone.embed_tokens(ids))

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


# From so many tokens on, an exit's layer runs at answer positions first: who leaves saves the rest of the layer,
# who stays pays its fixed part twice. If half of the candidates leave, break-even is that part, in tokens, over .39.
# On a CPU, packed float32 layers of SmolLM2-135M: their weights take as long to read as 24 tokens to multiply (218
# GFLOP/s, 18 GB/s in results/whole_backbone_alone/benchmark.json), so 62. Elsewhere launches decide; not measured.
READ_TOKENS, READ_TOKENS_ELSEWHERE = 64, 4096


class Engine:
    """Scores prepared requests with a module whose exits somebody decides about.

    The module is put into eval mode. On a CPU the engine packs the backbone's weights (`packed`), which is a second
    copy of them; engines share it if each is given the same module whose backbone is packed already. Use one engine
    from one thread at a time.

    Args:
        module: With its backbone and heads.
        decision: Who leaves where.
        cache: Keeps users' streams between requests; None runs every stream anew.
        batch_tokens: Tokens of a batch at most; one request may be more.
        read_tokens: Where candidates may leave and so many tokens run, the exit's layer is read at answer positions
            before it runs whole; None: 64 on a CPU, 4,096 elsewhere. Moves scores by rounding only.

    Raises:
        ConfigError: The decision is about exits that the module does not have.
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
        unknown = set(decision.layers) - {0, *module.exit_layers}
        if unknown:
            raise ConfigError(
                f"the exits to decide about are at layers {decision.layers}, but the model has {module.exit_layers}; "
                "run the command calibrate with this checkpoint"
            )
        self.cache, self.batch_tokens = cache, batch_tokens
        backbone, heads = packed(module.backbone.eval()), module.heads.eval()
        if read_tokens is None:
            on_cpu = backbone.embed_tokens.weight.device.type == "cpu"
            read_tokens = READ_TOKENS if on_cpu else READ_TOKENS_ELSEWHERE
        self._parts = Parts(backbone, heads, decision, cache, RotaryTable(backbone), read_tokens)
        self._vocabulary = backbone.vocabulary

    @torch.inference_mode()
    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Score requests; one that is unusable gets an error of its own and costs the others nothing.

        Args:
            requests: In any order, several of one user included.
        """
        found: dict[int, Scored] = {}
        usable = list[int]()
        for i, request in enumerate(requests):
            error = request.trouble(self._vocabulary)
            if error is None and len(request):
                usable.append(i)
            else:
                nothing = np.full(len(request), np.nan), np.full(len(request), -1)
                found[i] = Scored(request.request_id, *nothing, error=error)
        scores = Scores([])
        for members in self._batches(requests, usable):
            batch = EngineBatch(self._parts, [requests[i] for i in members], scores)
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


class EveryHead:
    """A decision (`project.engine.decisions.Decision`): nobody leaves before the last head, raw outputs are kept.

    Args:
        exit_layers: The k layers that have a head; exit 0 is not asked.

    Attributes:
        layers: (k,) layers of the heads.
        calibration: The identity.
        heard: Outputs of the candidates of every batch, in the order they were asked.
    """

    def __init__(self, exit_layers: Sequence[int]) -> None:
        identity = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(len(exit_layers), 1)
        self.layers = tuple(exit_layers)
        self.calibration = Calibration(self.layers, identity)
        self.heard: list[HeadOutputs] = []

    def known(self, head: int) -> bool | None:
        """Nobody leaves before the last head, which wants to be asked: it hears the outputs."""
        return None if head == len(self.layers) - 1 else False

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """(m,) all True, at the last head."""
        self.heard.append(outputs)
        return torch.ones_like(request, dtype=torch.bool)


def score_every_head(
    model: ExitRecommender,
    requests: Sequence[PreparedRequest],
    batch_tokens: int = 16_384,
    candidates: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Score table of all candidates of requests, as `predict` writes it (to rounding).

    Args:
        model: With backbone, heads and exit 0; is put into eval mode.
        requests: As `prepare_requests` made them.
        batch_tokens: Tokens of a batch at most; one request may be more.
        candidates: `Requests.table()` of the same requests, for the column item_id; None leaves it empty.

    Raises:
        DataError: A request that cannot be scored; names it.
    """
    decision = EveryHead(model.exit_layers)
    scores = Engine(model, decision, batch_tokens=batch_tokens).score(requests)
    failed = next((s for s in scores.requests if s.error is not None), None)
    if failed is not None:
        raise DataError(f"request {failed.request_id!r} cannot be scored: {failed.error}.")
    nothing = torch.zeros(0, len(model.exit_layers))
    said = [o.logits.cpu() for o in decision.heard]
    counts = np.array([len(r) for r in requests], dtype=np.int64)
    own, stream, exit_0 = (
        np.concatenate([np.zeros(0, dtype=kind), *parts])
        for kind, parts in (
            (np.int64, [r.candidates.lengths for r in requests]),
            (np.int64, [np.repeat([len(r.stream) for r in requests], counts)]),
            (np.float64, [r.exit_0 for r in requests]),
        )
    )
    ids = torch.from_numpy(np.stack([np.arange(len(own)), own, stream], axis=1))
    known = _candidates(requests) if candidates is None else candidates
    return scores_of_candidates(ids, torch.cat([nothing, *said]), known, exit_0, model.exit_layers)


def _candidates(requests: Sequence[PreparedRequest]) -> pl.DataFrame:
    rows = [(r.request_id, k, None) for r in requests for k in range(len(r))]
    schema = {"request_id": pl.String, "candidate_index": pl.Int64, "item_id": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")
