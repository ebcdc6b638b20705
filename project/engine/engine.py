"""Runs requests from exit to exit, and computes nothing more for candidates that have left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from project.arrays import F64, I64, Bool
from project.data.ragged import offsets_of, within
from project.data.requests import Workload
from project.engine.attention import Row, StreamBlock, Structure, stream_blocks, upload
from project.engine.cache import CachedStream, StreamCache
from project.engine.decisions import Decision, EveryHead
from project.engine.prepacked import prepacked
from project.engine.requests import PreparedRequest, Scored
from project.errors import ConfigError, DataError
from project.evaluation.result import labelled_scores, scores_of
from project.exits.calibration import Calibration
from project.exits.criteria import HeadOutputs
from project.exits.plan import ExitPlan
from project.exits.ranking import ScoredRequests
from project.model.attention import positioned
from project.model.backbone import State
from project.model.module import ExitRecommender

# From so many tokens on, an exit's layer runs at answer positions first: candidates that
# leave save the rest of the layer, for those that stay its fixed part runs twice. If half
# leave, break-even is that part, in tokens, over .39. On a CPU, packed float32 layers of
# SmolLM2-135M: their weights take as long to read as 24 tokens to multiply (218 GFLOP/s, 18
# GB/s in results/whole_backbone_alone/benchmark.json), so 62. On other devices kernel
# launches take most of the time; not measured.
READ_TOKENS, READ_TOKENS_ELSEWHERE = 64, 4096


class Engine:
    """Scores prepared requests with a module; a `Decision` says who leaves at its exits.

    The module is put into eval mode. On a CPU the backbone gets prepacked weights, a second copy of them; engines
    share it if each is given a module whose backbone has them already. Use one engine from one thread at a time.

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
        self.backbone = prepacked(module.backbone.eval(), module.in_bfloat16)
        self.heads = module.heads.eval()
        self.decision = decision
        self.cache = cache
        self.batch_tokens = batch_tokens
        weight: Tensor = self.backbone.embed_tokens.weight
        self.device = weight.device
        self.dtype = weight.dtype
        if read_tokens is None:
            read_tokens = (
                READ_TOKENS if self.device.type == "cpu" else READ_TOKENS_ELSEWHERE
            )
        self.read_tokens = read_tokens
        # cosines and sines by position, (positions, head dim)
        self._rotary: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def score(self, requests: Sequence[PreparedRequest]) -> list[Scored]:
        """Scores in the order of the requests; an unusable one gets an error and does not affect the others."""
        scored = dict[int, Scored]()  # by place of the request
        usable = list[int]()  # places
        for i, request in enumerate(requests):
            error = request.trouble(self.backbone.vocabulary)
            if error is None and len(request):
                usable.append(i)
            else:  # unusable, or nobody to score, which is no error
                scored[i] = Scored.failed(request, error)
        for members in self._batches(requests, usable):
            batch = EngineBatch(self, [requests[i] for i in members])
            scored.update(zip(members, batch.run(), strict=True))
        return [scored[i] for i in range(len(requests))]

    def _batches(
        self, requests: Sequence[PreparedRequest], usable: list[int]
    ) -> Iterator[list[int]]:
        """In their order; with a cache, requests of one user go one after the other: the later reads the earlier."""
        members = list[int]()
        users = set[object]()
        tokens = 0
        for i in usable:
            request = requests[i]
            size = len(request.stream) + len(request.candidates.values)
            again = (
                self.cache is not None
                and request.user is not None
                and request.user in users
            )
            if members and (again or tokens + size > self.batch_tokens):
                yield members
                members = []
                users = set()
                tokens = 0
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
            cos, sin = self.backbone.rotary_emb(
                self.backbone.embed_tokens.weight, position_ids=every[None]
            )
            self._rotary = cos[0], sin[0]
        at = upload(position, self.device)
        cos, sin = self._rotary
        return cos.index_select(0, at)[None], sin.index_select(0, at)[None]


class EngineBatch:
    """N candidates of R requests on their way through the exits; m of them are alive: they still run."""

    def __init__(self, engine: Engine, requests: list[PreparedRequest]) -> None:
        self.engine = engine
        self.requests = requests
        # 1. Of requests.
        counts = np.array([len(r) for r in requests])  # (R,) candidates
        # (R + 1,) where each request's candidates start among the N
        self.offsets = offsets_of(counts)
        # (R,) layers run, summed over tokens
        self.token_layers = np.zeros(len(requests), dtype=np.int64)
        # (R,) seconds of time.monotonic()
        self.deadline = np.array([r.deadline for r in requests])
        # (R,) length of the list that the decision makes; 0: every candidate by the plan
        self.list_of = np.array(
            [engine.decision.lists.length(r.list_of, len(r)) for r in requests]
        )
        # (R,) whether its deadline made a candidate leave
        self.late = np.zeros(len(requests), dtype=bool)
        self.streams: list[CachedStream | None] = [None] * len(requests)  # None: not cached
        # (R,) leading stream tokens that the cache has
        self.cached = np.zeros(len(requests), dtype=np.int64)
        if engine.cache is not None:
            for i, r in enumerate(requests):
                self.cached[i] = engine.cache.common(r.user, r.stream)
        # 2. Of all candidates.
        # (N,) which of the R requests it belongs to
        self.request_of = np.repeat(np.arange(len(requests)), counts)
        # (N,) -1 while it runs
        self.exit_layer = np.full(len(self.request_of), -1, dtype=np.int64)
        exit_0 = upload(np.concatenate([r.exit_0 for r in requests]), engine.device)
        # (N,) calibrated logit it left with; NaN while it runs
        self.final_logit = torch.full_like(exit_0, torch.nan)
        # 3. Of the candidates that are alive; these shrink at every exit, those on the
        # device by one gather.
        self.alive = np.arange(len(self.request_of))  # (m,) their positions among the N
        self.alive_at = upload(self.alive, engine.device)  # (m,) the same on the device
        # (m,) their requests, on the device
        self.owner = upload(self.request_of, engine.device)
        # (m, F) for criteria
        self.features = upload(
            np.concatenate([r.retrieved for r in requests]), engine.device
        )
        first = int(engine.decision.layers[0] == 0)
        self.logits = exit_0[:, None][:, :first]  # (m, heads so far) raw logits
        # 4. Of the row in which they run.
        self.row: Row
        self.structure: Structure
        # the layer, from 0, that the last exit read at answer slots before it ran whole
        self.read = -1
        # by request and first token that runs
        self.blocks: dict[tuple[int, int], list[StreamBlock]] = {}

    def run(self) -> list[Scored]:
        """From exit to exit, until nobody is left."""
        engine = self.engine
        decision = engine.decision
        # 1. Exit 0: its logits are known before the backbone runs.
        if decision.layers[0] == 0:
            self._decide(0)
        # 2. One row: stream tokens that are not cached, then the candidates that stayed.
        if len(self.alive):
            state = self._embed()
        depth = 0  # layers that the row has run
        for head, layer in enumerate(decision.layers):
            if layer == 0:
                continue
            if not len(self.alive):
                break
            # 3. Whole layers up to the one in front of the exit.
            state = self._run_layers(state, depth, layer - 1)
            depth = layer - 1
            # 4. The exit's own layer. Where candidates may leave it runs at the answer
            # slots alone: a candidate that leaves needs no more of it. It runs whole where
            # nobody can leave, or where tokens are few.
            known = decision.known(head, self._lists())
            is_last = head == len(decision.layers) - 1
            if known or (
                known is None and (is_last or self.row.starts[-1] >= engine.read_tokens)
            ):
                if any(stream.waits_unread(depth) for stream in self._row_streams()):
                    state = self._compact(state, depth)
                self._count(depth, layer)
                self.read = depth
                answers = answers_of_layer(
                    engine.backbone.layers[depth], state, self.structure
                )
            else:
                state = self._run_layers(state, depth, layer)
                depth = layer
                answers = state.hidden[0].index_select(0, self.structure.slots)
            # 5. The head: one more column of logits.
            column: Tensor = engine.heads[str(layer)](answers).double()[:, None]
            self.logits = torch.cat([self.logits, column], dim=1)
            # 6. Candidates leave by the decision, or since their request's deadline has
            # passed.
            stays = self._decide(head)
            # 7. The row of the survivors goes on from this depth, by one gather.
            state = self._compact(state, depth, stays)
        # 8. Responses.
        logits = self.final_logit.cpu().numpy()
        return [
            self._scored(i, logits[a:b], self.exit_layer[a:b])
            for i, (a, b) in enumerate(pairwise(self.offsets))
        ]

    def _scored(self, i: int, logits: F64, exit_layer: I64) -> Scored:
        """The scores of a request. Its stream goes back into the cache, as deep as it came, unless scores are NaN.

        At full depth all layers run all tokens that the cache has not. So this cost is what a server that always runs
        to full depth pays for the same requests, in the same order.
        """
        request = self.requests[i]
        stream = self.streams[i]
        spent = int(self.token_layers[i])
        missing = int(np.isnan(logits).sum())
        if missing:
            error = f"the model's scores of {missing} of {len(logits)} candidates are NaN"
            return Scored.failed(request, error, spent)
        cache = self.engine.cache
        if cache is not None and request.user is not None and stream is not None:
            cache.give(request.user, stream)
        cached = int(self.cached[i])
        tokens = len(request.candidates.values) + len(request.stream) - cached
        return Scored(
            request.request_id,
            logits,
            exit_layer,
            spent,
            late=bool(self.late[i]),
            list_of=int(self.list_of[i]),
            full_depth_token_layers=len(self.engine.backbone.layers) * tokens,
            cached=None if request.user is None else cached > 0,
        )

    def _embed(self) -> State:
        """The row at depth 0."""
        engine = self.engine
        # 1. Stream tokens that run: those that no cache has.
        ran = np.array([len(r.stream) for r in self.requests]) - self.cached  # (R,)
        for i in np.unique(self.request_of[self.alive]).tolist():
            request = self.requests[i]
            if engine.cache is not None and request.user is not None:
                stream = engine.cache.take(request.user, len(engine.backbone.layers))
                stream.adopt(request.stream, int(self.cached[i]))
                self.streams[i] = stream
        # 2. Token ids in the order of the row.
        lengths = np.concatenate([r.candidates.lengths for r in self.requests])  # (N,)
        self.row = Row.of(self.request_of[self.alive], ran, lengths[self.alive])
        tokens = [
            self.requests[i].stream.tokens[-n:] for i, n in self.row.stream_tokens() if n
        ]
        for i, (a, b) in zip(self.row.requests, self.row.members(), strict=True):
            tokens.append(
                self.requests[i].candidates.take(self.alive[a:b] - self.offsets[i]).values
            )
        return self._state(
            engine.backbone.embed_tokens(upload(np.concatenate(tokens), engine.device))
        )

    def _state(self, hidden: Tensor) -> State:
        """Hidden states of the row's tokens (T, H) with their positions and attention."""
        engine = self.engine
        row = self.row
        positions = list[I64]()
        blocks = list[list[StreamBlock]]()
        for i, ran in row.stream_tokens():
            stream = self.requests[i].stream
            first = len(stream) - ran
            positions.append(stream.position[first:])
            if (i, first) not in self.blocks:
                self.blocks[i, first] = stream_blocks(
                    stream, first, engine.device, engine.dtype
                )
            blocks.append(self.blocks[i, first])
        # candidates start where their request's stream ends
        shared = np.array([len(self.requests[i].stream) for i in row.requests])
        positions.append(within(row.own) + np.repeat(shared[row.owner], row.own))
        self.structure = Structure(
            row, engine.device, blocks, [self.streams[i] for i in row.requests]
        )
        rotary = engine.rotary(np.concatenate(positions))
        return State(hidden[None], self.structure, rotary)  # type: ignore[arg-type]

    def _row_streams(self) -> list[CachedStream]:
        """Cached streams of the row's requests."""
        return [
            stream for i in self.row.requests if (stream := self.streams[i]) is not None
        ]

    def _run_layers(self, state: State, start: int, stop: int) -> State:
        """Whole layers start, ..., stop - 1; stream tokens that wait on the way join the row where they wait."""
        waiting = {
            depth
            for stream in self._row_streams()
            for depth in stream.waiting
            if start <= depth < stop
        }
        for first, last in pairwise(sorted({start, stop} | waiting)):
            if first in waiting:
                state = self._compact(state, first)
            self._count(first, last)
            state = self.engine.backbone.run(state, first, last)
        return state

    def _count(self, first: int, last: int) -> None:
        """Count the row's tokens in layers first, ..., last - 1, without those that an exit read in layer `first`."""
        read = int(first == self.read)
        own = self.row.own * (last - first - read)
        np.add.at(self.token_layers, self.row.requests[self.row.owner], own)
        for i, ran in self.row.stream_tokens():
            stream = self.streams[i]
            seen = ran * read if stream is None else stream.read(first, ran)
            self.token_layers[i] += ran * (last - first) - seen

    def _decide(self, head: int) -> Bool:
        """Note which of the alive leave at this exit, and with which logit; returns those that stay, (m,)."""
        decision = self.engine.decision
        late = self._late()
        lists = self._lists()
        known = decision.known(head, lists)
        if known is False and not late.any():
            return ~late
        # 1. Who leaves, by the decision and by deadlines.
        logits = decision.calibration.apply(self.logits)
        leaves = np.full(len(self.alive), known is True)
        if known is None:
            outputs = HeadOutputs(decision.layers[: head + 1], logits, self.features)
            # the one wait for the device
            leaves = decision.leaves(self.owner, lists, outputs).cpu().numpy()
        self.late[self.request_of[self.alive[late & ~leaves]]] = True
        stays = ~(leaves | late)
        # 2. What they leave with.
        gone = upload(~stays, self.engine.device)
        self.final_logit[self.alive_at] = torch.where(
            gone, logits[:, -1], self.final_logit[self.alive_at]
        )
        self.exit_layer[self.alive[~stays]] = decision.layers[head]
        # 3. The state of those that stay.
        self.alive = self.alive[stays]
        if len(self.alive) and not stays.all():
            kept = upload(np.flatnonzero(stays), self.engine.device)
            self.alive_at = self.alive_at.index_select(0, kept)
            self.owner = self.owner.index_select(0, kept)
            self.features = self.features.index_select(0, kept)
            self.logits = self.logits.index_select(0, kept)
        return stays

    def _lists(self) -> I64:
        """Length of the list of each of the alive, (m,)."""
        return self.list_of[self.request_of[self.alive]]

    def _late(self) -> Bool:
        """Which of the alive are past their deadline, (m,); waits for the device where there is one."""
        deadline = self.deadline[self.request_of[self.alive]]
        if not np.isfinite(deadline).any():
            return np.zeros(len(deadline), dtype=bool)
        if self.engine.device.type != "cpu":
            torch.get_device_module(self.engine.device).synchronize()
        return deadline < time.monotonic()

    def _compact(self, state: State, depth: int, stays: Bool | None = None) -> State:
        """The state of the candidates that stay, (m,), None: all, and of the stream tokens that waited at this depth.

        Nothing is gathered where nothing changes. Streams of requests without a candidate wait here.
        """
        row = self.row
        cached = self._row_streams()
        if stays is None:
            stays = np.ones(len(row.own), dtype=bool)
        if stays.all() and not any(depth in stream.waiting for stream in cached):
            return state
        hidden = state.hidden[0]
        # of the row's requests, those with a candidate
        live = set(row.owner[stays].tolist())
        # 1. Streams: tokens that waited join those that came; those of requests that are
        # done wait.
        pieces = list[Tensor]()
        if cached:
            for place, (i, (a, b)) in enumerate(
                zip(row.requests, pairwise(row.streams), strict=True)
            ):
                stream = self.streams[i]
                if place in live:
                    pieces.append(
                        hidden[a:b] if stream is None else stream.resume(depth, hidden[a:b])
                    )
                elif stream is not None:
                    stream.stop(depth, hidden[a:b])
        if not live:
            return state
        # 2. Candidates, and streams where none is cached, by one gather.
        self.row = row.keep(stays)
        hidden = hidden.index_select(
            0, upload(row.index(stays, streams=not cached), self.engine.device)
        )
        if cached:
            self.row = replace(
                self.row, stream=np.array([len(piece) for piece in pieces], dtype=np.int64)
            )
            hidden = torch.cat([*pieces, hidden])
        return self._state(hidden)


def answers_of_layer(layer: nn.Module, state: State, structure: Structure) -> Tensor:
    """Hidden states of the answer slots behind a layer, (m, H): what the whole layer gives there, to rounding.

    `state` is of the T tokens in front of the layer; cached streams get the layer's keys and values.
    """
    block: Any = layer
    attention = block.self_attn
    hidden = state.hidden[0]
    slots = structure.slots
    normed = block.input_layernorm(hidden)

    def heads(projected: Tensor) -> Tensor:
        return projected.view(len(projected), -1, attention.head_dim)

    # 1. Queries of the slots; keys and values of all tokens.
    query = heads(attention.q_proj(normed.index_select(0, slots)))
    key = heads(attention.k_proj(normed))
    value = heads(attention.v_proj(normed))
    cos, sin = (x[0] for x in state.position_embeddings)
    at_slots = (x.index_select(0, slots) for x in (cos, sin))
    query = positioned(attention, "q_norm", query, *at_slots)
    key = positioned(attention, "k_norm", key, cos, sin).transpose(0, 1)[None]
    value = value.transpose(0, 1)[None]
    # 2. The rest of the layer at the slots.
    read = structure.attend_answers(
        attention.layer_idx, query, key, value, attention.scaling
    )
    answers = hidden.index_select(0, slots) + attention.o_proj(read.flatten(1))
    out: Tensor = answers + block.mlp(block.post_attention_layernorm(answers))
    return out


def score_every_head(
    model: ExitRecommender,
    requests: Sequence[PreparedRequest],
    batch_tokens: int = 16_384,
) -> pl.DataFrame:
    """Score table of all candidates of requests, as `predict` writes it (to rounding) but for item ids.

    A request that cannot be scored is a DataError.
    """
    raw = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(
        len(model.exit_layers), 1
    )
    decision = EveryHead(Calibration(tuple(model.exit_layers), raw))
    for scored in Engine(model, decision, batch_tokens=batch_tokens).score(requests):
        if scored.error is not None:
            raise DataError(
                f"request {scored.request_id!r} cannot be scored: {scored.error}."
            )
    rows = [(r.request_id, k) for r in requests for k in range(len(r))]
    schema = {"request_id": pl.String, "candidate_index": pl.Int64}
    candidates = pl.DataFrame(rows, schema=schema, orient="row")
    tokens = [(int(own), len(r.stream)) for r in requests for own in r.candidates.lengths]
    ids = torch.tensor(
        [(row, *pair) for row, pair in enumerate(tokens)], dtype=torch.int64
    ).reshape(-1, 3)
    exit_0 = np.array([logit for r in requests for logit in r.exit_0])
    logits = [
        torch.zeros(0, len(model.exit_layers)),
        *(outputs.logits.cpu() for outputs in decision.outputs),
    ]
    return scores_of(ids, torch.cat(logits), candidates, exit_0, model.exit_layers)


def score_labelled(
    model: ExitRecommender, workload: Workload, prepared: Sequence[PreparedRequest]
) -> tuple[pl.DataFrame, F64]:
    """Labelled scores of every head for the prepared requests of a workload, and features (n, F) of its candidates."""
    scores = labelled_scores(score_every_head(model, prepared), workload.table)
    return scores, np.concatenate([one.retrieved for one in prepared])


def score_workload(
    model: ExitRecommender,
    workload: Workload,
    prepared: Sequence[PreparedRequest],
    plan: ExitPlan,
) -> ScoredRequests:
    """Calibrated scores of every head for the prepared requests of a workload."""
    scores, features = score_labelled(model, workload, prepared)
    request = np.repeat(np.arange(len(prepared)), [len(one) for one in prepared])
    return ScoredRequests(
        torch.from_numpy(request),
        scores["user"].to_numpy()[np.unique(request, return_index=True)[1]],
        plan.outputs(scores, features),
        scores["target_tokens"].to_torch(),
        scores["stream_tokens"].to_torch(),
        scores["label"].fill_null(-1).to_numpy().astype(np.int8),
    )
