"""Turns requests into tokens for the engine, and holds the scores that come back."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from itertools import pairwise

import numpy as np

from project.arrays import F64, I64
from project.data.ragged import Ragged, offsets_of, within
from project.data.requests import Requests
from project.data.stream import context_starts, time_groups
from project.datamodule import InteractionData
from project.features import feature_matrix
from project.metrics import probabilities
from project.model.module import ExitRecommender


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a request of n candidates; NaN and layer -1 where it could not be scored."""

    request_id: str
    logits: F64  # (n,) calibrated logits that the candidates left with
    exit_layers: I64  # (n,)
    token_layers: int = 0  # tokens times layers that ran, the stream's included
    error: str | None = None  # why it could not be scored
    late: bool = False  # past the deadline, candidates left whom the decision would have had stay

    @classmethod
    def refused(cls, request: PreparedRequest, error: str | None, token_layers: int = 0) -> Scored:
        """Of a request that could not be scored; without an error, of one without candidates."""
        n = len(request)
        return cls(request.request_id, np.full(n, np.nan), np.full(n, -1), token_layers, error)

    @property
    def probabilities(self) -> F64:
        """(n,) clipped to [.001, .999]; NaN where the request could not be scored."""
        found: F64 = self.logits if self.error is not None else probabilities(self.logits)
        return found


@dataclass
class Scores:
    """Scored requests in the order they were given, and what the engine needed for them."""

    requests: list[Scored]
    # backbone: layers, heads, decisions, gathers; not the packing of token ids, masks and cached streams
    seconds: dict[str, float] = field(default_factory=lambda: {"backbone": 0.0})

    @property
    def token_layers(self) -> int:
        """Tokens times layers that ran, of all requests."""
        return sum(r.token_layers for r in self.requests)


@dataclass(frozen=True, eq=False)
class StreamTokens:
    """The prefix that a request's candidates share: the instruction, then the history's segments in time order."""

    tokens: I64  # (S,) token ids
    segment: I64  # (S,) not decreasing
    group: I64  # (S,) time group, not decreasing; the instruction is group 0
    position: I64  # (S,) for rotary embeddings

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, lists: Ragged, group: I64) -> StreamTokens:
        """Lists of m segments one after the other, with their time groups (m,), from 0, rising by 1 or staying.

        All segments of a group start at one position, the next group after the sum of their lengths.
        """
        lengths = lists.lengths
        start = offsets_of(np.bincount(group, weights=lengths).astype(np.int64))[:-1][group]
        segment = np.repeat(np.arange(len(lists)), lengths)
        return cls(lists.values, segment, group[segment], start[segment] + within(lengths))

    def common(self, other: StreamTokens) -> int:
        """Number of leading tokens that are equal in both: their keys and values are equal, too."""
        n = min(len(self), len(other))
        same = np.ones(n, dtype=bool)
        for f in fields(self):
            same &= getattr(self, f.name)[:n] == getattr(other, f.name)[:n]
        return n if same.all() else int(same.argmin())


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """One request of n candidates."""

    request_id: str
    stream: StreamTokens
    candidates: Ragged  # n token lists, each up to its answer slot
    exit_0: F64  # (n,) logits of exit 0, rounded to float32 as score tables have them
    retrieved: F64  # (n, F) features that criteria read
    user: Hashable | None = None  # key of the stream in a cache; None: never cached
    deadline: float = np.inf  # time.monotonic() seconds; past it, everyone leaves at the next exit

    def __len__(self) -> int:
        return len(self.candidates)

    def trouble(self, vocabulary: range) -> str | None:
        """Why this request cannot be scored by a backbone that knows these token ids; None where it can."""
        n, tokens = len(self), np.concatenate([self.stream.tokens, self.candidates.values])
        if self.exit_0.shape != (n,) or self.retrieved.ndim != 2 or len(self.retrieved) != n:
            shapes = f"exit 0 of shape {self.exit_0.shape} and retrieved features {self.retrieved.shape}"
            return f"{n} candidates, but {shapes}"
        if not (np.isfinite(self.exit_0).all() and np.isfinite(self.retrieved).all()):
            return "exit 0 or a retrieved feature is NaN or infinite; expected finite numbers"
        if n and not self.candidates.lengths.all():
            return f"candidate {int(self.candidates.lengths.argmin())} has no token; expected at least one"
        if len(tokens) and not vocabulary.start <= tokens.min() <= tokens.max() < vocabulary.stop:
            known = f"{vocabulary.start} to {vocabulary.stop - 1}"
            return f"token ids from {tokens.min()} to {tokens.max()}; the backbone knows {known}"
        return None


def prepare_requests(
    model: ExitRecommender, data: InteractionData, requests: Requests | None = None
) -> list[PreparedRequest]:
    """Histories, retrieved features, exit 0 and token ids of requests, in their order.

    Without `requests`, those of the file data.requests.
    """
    if requests is not None:
        data.give_requests(requests)
    data.setup("predict")
    assert data.requests is not None
    assert data.candidate_retrieved is not None
    model.know_items(data)
    baseline = model.feature_baseline()
    features = feature_matrix(data.candidate_retrieved, baseline.base)  # of all candidates of all requests
    exit_0 = baseline.of_features(features).astype(np.float32).astype(np.float64)
    streams, prepared = data.streams("predict"), []
    # every request has at least one candidate, so it has exactly one stream
    for request, (start, stop) in zip(data.requests.requests, pairwise(streams.offsets), strict=True):
        rows = np.arange(start, stop)
        scored, context = rows[streams.target[rows]], rows[streams.context[rows]]
        candidates = streams.row_id[scored]
        prepared.append(
            PreparedRequest(
                request.request_id,
                shared_prefix(
                    streams.tokens[streams.instruction],
                    streams.tokens.take(context),
                    streams.timestamp[context],
                    data.context_tokens,
                ),
                until_slots(streams.tokens.take(scored), streams.slots[scored]),
                exit_0[candidates],
                features[candidates],
                request.user_id,
            )
        )
    return prepared


def shared_prefix(instruction: I64, history: Ragged, timestamp: F64, context_tokens: int) -> StreamTokens:
    """What candidates later than all of a history see: the instruction, and as many of the latest segments as fit.

    `history` are m segments in order of time, `timestamp` (m,) their seconds. As `evaluation_windows` has it.
    """
    start = context_starts(history.lengths, time_groups(timestamp), context_tokens)[-1]
    time = timestamp[start:]
    group = np.concatenate([[0], 1 + np.cumsum(np.diff(time, prepend=time[:1]) != 0)]).astype(np.int64)
    first = history.offsets[start]
    offsets = np.concatenate([[0], history.offsets[start:] - first + len(instruction)])
    return StreamTokens.of(Ragged(np.concatenate([instruction, history.values[first:]]), offsets), group)


def until_slots(lists: Ragged, slots: I64) -> Ragged:
    """Segments without what follows their answer slots (n,)."""
    return Ragged(
        lists.values[within(lists.lengths) <= np.repeat(slots, lists.lengths)], offsets_of(slots + 1)
    )
