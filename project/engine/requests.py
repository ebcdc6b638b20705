"""A request as tokens, and its scores."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from project.data.ragged import IntArray, Ragged, offsets_of, within
from project.data.requests import Requests
from project.data.stream import Streams, context_starts, time_groups
from project.features import feature_matrix
from project.metrics import probabilities

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scored:
    """What a request of n candidates gets.

    Attributes:
        request_id: Of the request.
        logits: (n,) calibrated logits that candidates left with; NaN where the request could not be scored.
        exit_layers: (n,) layers they left at; -1 where the request could not be scored.
        token_layers: Tokens times layers that ran for it, its stream's included.
        error: Why it could not be scored; None where it was.
    """

    request_id: str
    logits: Floats
    exit_layers: IntArray
    token_layers: int = 0
    error: str | None = None

    @property
    def probabilities(self) -> Floats:
        """(n,) clipped to [.001, .999]; NaN where the request could not be scored."""
        found: Floats = self.logits if self.error is not None else probabilities(self.logits)
        return found


@dataclass
class Scores:
    """Requests in the order they were given.

    Attributes:
        requests: One each.
        seconds: exit 0 (exit 0), pack (token ids, structure, cache look-up), backbone (layers, heads, decisions,
            gathers).
        syncs: Times the device was waited for.
    """

    requests: list[Scored]
    seconds: dict[str, float] = field(default_factory=lambda: {"exit_0": 0.0, "pack": 0.0, "backbone": 0.0})
    syncs: int = 0

    @property
    def token_layers(self) -> int:
        """Of all requests."""
        return sum(r.token_layers for r in self.requests)


@dataclass(frozen=True, eq=False)
class StreamTokens:
    """The stream of a request: the instruction, then context segments in time order.

    Attributes:
        tokens: (S,) token ids.
        segment: (S,) segment of each token, not decreasing.
        group: (S,) time group of each token, not decreasing; the instruction is group 0.
        position: (S,) position of each token for rotary embeddings.
    """

    tokens: IntArray
    segment: IntArray
    group: IntArray
    position: IntArray

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, lists: Ragged, group: IntArray) -> StreamTokens:
        """Segments one after the other.

        Args:
            lists: m token lists.
            group: (m,) time group of each, from 0, rising by 1 or staying. All segments of a group start at one
                position, the next group after the sum of their lengths.
        """
        lengths = lists.lengths
        sums = (
            np.bincount(group, weights=lengths).astype(np.int64)
            if len(group)
            else np.zeros(0, dtype=np.int64)
        )
        start = offsets_of(sums)[:-1][group]
        segment = np.repeat(np.arange(len(lists)), lengths)
        return cls(lists.values, segment, group[segment], start[segment] + within(lengths))

    def common(self, other: StreamTokens) -> int:
        """Number of leading tokens that stand alike in both: what of one's keys and values the other may use."""
        n = min(len(self), len(other))
        differs = np.zeros(n, dtype=bool)
        for f in fields(self):
            differs |= getattr(self, f.name)[:n] != getattr(other, f.name)[:n]
        return int(differs.argmax()) if differs.any() else n


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """One request of n candidates.

    Attributes:
        request_id: Its name in errors and results.
        stream: What all candidates see.
        candidates: n token lists, each up to its answer slot.
        exit_0: (n,) logits of exit 0, rounded to float32 as score tables have them.
        retrieved: (n, F) features, which criteria read.
        user: Whose stream this is, a key of the stream cache; None: never cached.
    """

    request_id: str
    stream: StreamTokens
    candidates: Ragged
    exit_0: Floats
    retrieved: Floats
    user: Hashable | None = None

    def __len__(self) -> int:
        return len(self.candidates)

    def trouble(self, vocabulary: range) -> str | None:
        """Why this request cannot be scored; None where it can.

        Args:
            vocabulary: Token ids that the backbone knows.
        """
        n, tokens = len(self), np.concatenate([self.stream.tokens, self.candidates.values])
        if self.exit_0.shape != (n,) or self.retrieved.ndim != 2 or len(self.retrieved) != n:
            found = f"exit 0 of shape {self.exit_0.shape} and retrieved features {self.retrieved.shape}"
            return f"{n} candidates, but {found}"
        if not (np.isfinite(self.exit_0).all() and np.isfinite(self.retrieved).all()):
            return "exit 0 or retrieved features holds NaN or infinity; expected finite numbers"
        if n and not self.candidates.lengths.all():
            return f"candidate {int(self.candidates.lengths.argmin())} has no token; expected at least one"
        if len(tokens) and not vocabulary.start <= tokens.min() <= tokens.max() < vocabulary.stop:
            return (
                f"token ids from {tokens.min()} to {tokens.max()}; the backbone knows {vocabulary.start} to "
                f"{vocabulary.stop - 1}"
            )
        return None


def prepare_requests(
    model: ExitRecommender, data: InteractionData, requests: Requests | None = None
) -> list[PreparedRequest]:
    """Histories, retrieved features, exit 0 and token ids of requests, in their order.

    Args:
        model: Its exit 0.
        data: The logs that requests refer to.
        requests: What is asked; None reads the file data.requests.
    """
    if requests is not None:
        data.give_requests(requests)
    data.setup("predict")
    assert data.requests is not None
    assert data.candidate_retrieved is not None
    exit_0 = model.feature_baseline()
    features = feature_matrix(data.candidate_retrieved, exit_0.base)
    return prepare(
        data.streams("predict"), data.requests, data.context_tokens, features, exit_0.of_features(features)
    )


def prepare(
    streams: Streams, requests: Requests, context_tokens: int, features: Floats, exit_0: Floats
) -> list[PreparedRequest]:
    """What the engine needs of requests, in their order.

    Args:
        streams: Made of them by `request_streams`.
        requests: The c candidates' requests.
        context_tokens: Capacity of a window; a longer history has dropped its oldest half, once or more often.
        features: (c, F) features of all candidates, in the order of `requests.table()`.
        exit_0: (c,) their logits of exit 0.
    """
    counts = np.array([len(r.candidates) for r in requests.requests], dtype=np.int64)
    ends = np.cumsum(counts)
    found: dict[int, tuple[StreamTokens, Ragged, IntArray]] = {}
    for s in range(len(streams)):
        rows = np.arange(streams.offsets[s], streams.offsets[s + 1])
        scored = rows[streams.target[rows]]
        if len(scored):
            request = int(np.searchsorted(ends, streams.row_id[scored[0]], side="right"))
            stream = _stream(streams, rows, context_tokens)
            found[request] = stream, _until_slot(streams, scored), streams.row_id[scored]
    none = Ragged.of([])
    empty = StreamTokens.of(none, np.zeros(0, dtype=np.int64)), none, np.zeros(0, dtype=np.int64)
    logits = exit_0.astype(np.float32).astype(np.float64)
    prepared = []
    for i, asked in enumerate(requests.requests):
        stream, candidates, rows = found.get(i, empty)
        prepared.append(
            PreparedRequest(asked.request_id, stream, candidates, logits[rows], features[rows], asked.user_id)
        )
    return prepared


def _stream(streams: Streams, rows: IntArray, context_tokens: int) -> StreamTokens:
    """The context of the last time group of a stream's rows, as `evaluation_windows` has it."""
    groups = time_groups(streams.timestamp[rows])
    start = context_starts(streams.tokens.lengths[rows], groups, context_tokens)[-2]
    context = rows[start : groups[-2]]
    context = context[streams.context[context]]
    time = streams.timestamp[context]
    group = np.concatenate([[0], 1 + np.cumsum(np.diff(time, prepend=time[:1]) != 0)]).astype(np.int64)
    return StreamTokens.of(streams.tokens.take(np.concatenate([[streams.instruction], context])), group)


def _until_slot(streams: Streams, rows: IntArray) -> Ragged:
    lists = streams.tokens.take(rows)
    return Ragged(
        lists.values[within(lists.lengths) <= np.repeat(streams.slots[rows], lists.lengths)],
        offsets_of(streams.slots[rows] + 1),
    )
