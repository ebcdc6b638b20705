"""Turns requests into tokens for the engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from project.arrays import F64, I64
from project.data.ragged import Ragged, offsets_of, within
from project.data.requests import Requests
from project.data.stream import context_starts, time_groups
from project.datamodule import InteractionData
from project.features import FEATURES, FeatureBaseline, Retrieved, feature_matrix
from project.model.module import ExitRecommender
from project.request import Scored as Scored


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
        same = np.all(
            [getattr(self, f.name)[:n] == getattr(other, f.name)[:n] for f in fields(self)],
            axis=0,
        )
        return n if same.all() else int(same.argmin())


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """One request of n candidates as the engine reads it."""

    request_id: str
    stream: StreamTokens  # of S tokens: the instruction and the history
    candidates: Ragged  # n token lists, each up to its answer slot
    exit_0: F64  # (n,) logits of exit 0, rounded to float32 as score tables have them
    retrieved: F64  # (n, F) features that criteria read
    user: Hashable | None = None  # key of the stream in a cache; None: never cached
    # time.monotonic() seconds; past it, everyone leaves at the next exit
    deadline: float = np.inf
    list_of: int = 0  # length of the list that is asked for; 0: every candidate's score

    def __len__(self) -> int:
        return len(self.candidates)

    def trouble(self, vocabulary: range) -> str | None:
        """Why this request cannot be scored by a backbone that knows these token ids; None where it can."""
        n = len(self)
        tokens = np.concatenate([self.stream.tokens, self.candidates.values])
        if (
            self.exit_0.shape != (n,)
            or self.retrieved.ndim != 2
            or len(self.retrieved) != n
        ):
            shapes = f"exit 0 of shape {self.exit_0.shape} and retrieved features {self.retrieved.shape}"
            return f"{n} candidates, but {shapes}"
        if not (np.isfinite(self.exit_0).all() and np.isfinite(self.retrieved).all()):
            return (
                "exit 0 or a retrieved feature is NaN or infinite; expected finite numbers"
            )
        if n and not self.candidates.lengths.all():
            return f"candidate {int(self.candidates.lengths.argmin())} has no token; expected at least one"
        if (
            len(tokens)
            and not vocabulary.start <= tokens.min() <= tokens.max() < vocabulary.stop
        ):
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
    # 1. histories, retrieved features and token ids of all requests
    data.setup("predict")
    assert data.requests is not None
    assert data.candidate_retrieved is not None
    model.know(data)
    streams = data.streams("predict")
    # 2. exit 0 of all candidates of all requests
    features, exit_0 = criteria_and_exit_0(
        model.feature_baseline(), Retrieved.of(data.candidate_retrieved)
    )
    # 3. a request each; it has at least one candidate, so it has exactly one stream
    prepared = list[PreparedRequest]()
    for request, own, (start, stop) in zip(
        data.requests.requests,
        streams.instructions.tolist(),
        pairwise(streams.offsets),
        strict=True,
    ):
        rows = np.arange(start, stop)
        scored = rows[streams.target[rows]]
        context = rows[streams.context[rows]]
        candidates = streams.row_id[scored]
        instruction = streams.tokens[own]
        history = streams.tokens.take(context)
        prepared.append(
            PreparedRequest(
                request.request_id,
                shared_prefix(
                    instruction, history, streams.timestamp[context], data.context_tokens
                ),
                until_slots(streams.tokens.take(scored), streams.slots[scored]),
                exit_0[candidates],
                features[candidates],
                request.user_id,
                np.inf if request.deadline is None else request.deadline,
                request.list_of,
            )
        )
    return prepared


def criteria_and_exit_0(baseline: FeatureBaseline, retrieved: Retrieved) -> tuple[F64, F64]:
    """Features (n, F) that criteria read, and logits (n,) of exit 0, rounded to float32 as score tables have them."""
    features = feature_matrix(retrieved, baseline.base, baseline.terms)
    exit_0 = baseline.of_features(features).astype(np.float32).astype(np.float64)
    return features[:, : len(FEATURES)], exit_0


def shared_prefix(
    instruction: I64, history: Ragged, timestamp: F64, context_tokens: int
) -> StreamTokens:
    """What candidates later than all of a history see: the instruction, and as many of the latest segments as fit.

    `history` are m segments in order of time, `timestamp` (m,) their seconds. As `evaluation_windows` has it.
    """
    start = context_starts(history.lengths, time_groups(timestamp), context_tokens)[-1]
    time = timestamp[start:]
    group = np.concatenate(
        [[0], 1 + np.cumsum(np.diff(time, prepend=time[:1]) != 0)]
    ).astype(np.int64)
    first = history.offsets[start]
    offsets = np.concatenate([[0], history.offsets[start:] - first + len(instruction)])
    return StreamTokens.of(
        Ragged(np.concatenate([instruction, history.values[first:]]), offsets), group
    )


def until_slots(lists: Ragged, slots: I64) -> Ragged:
    """Segments without what follows their answer slots (n,)."""
    before = within(lists.lengths) <= np.repeat(slots, lists.lengths)
    return Ragged(lists.values[before], offsets_of(slots + 1))
