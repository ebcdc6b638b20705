"""What the ranker is asked and what it answers; whoever hands them on needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from project.arrays import F64, I64


@dataclass(frozen=True)
class RankRequest:
    """Candidates of a user, or of somebody with a history of their own: exactly one of both.

    An item is an id, or a mapping with item_id, title and other columns of the items table where it is new; a row of a
    history has label and time beside them, as `predict` has it.
    """

    user_id: str | None
    history: Sequence[Mapping[str, Any]] | None
    candidates: Sequence[str | Mapping[str, Any]]
    deadline: float | None = None  # time.monotonic() seconds: answer from the deepest head reached by then


@dataclass(frozen=True)
class Ranked:
    """What became of a request of n candidates, in their order. With an error the arrays are empty."""

    probability: F64  # (n,)
    exit_layer: I64  # (n,)
    token_layers: int
    full_depth_token_layers: int  # what the same would have cost without early exit
    features: list[
        dict[str, float]
    ]  # of each candidate, the retrieved features used; unknown ones are left out
    late: bool = False  # the deadline cut it
    error: str | None = None
    audit: F64 | None = None  # (n,) probabilities at full depth, if it was audited
    cached: bool | None = None  # some of the user's history was in memory; None: there is none to keep

    @classmethod
    def refused(cls, error: str) -> Ranked:
        """Of a request that cannot be ranked."""
        return cls(np.zeros(0), np.zeros(0, np.int64), 0, 0, [], error=error)


@dataclass(frozen=True)
class Answered:
    """A ranked request and how the inference process is."""

    ranked: Ranked
    items: list[str]  # ids of its candidates
    run: str
    full_depth: bool
    batch: int  # requests that were ranked together
