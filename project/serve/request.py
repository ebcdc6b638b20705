"""What the ranker is asked and what it answers; whoever hands them on needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RankRequest:
    """Candidates of a user, or of somebody with a history of their own: exactly one of both.

    A row of a history is an item id or an item's columns, with label and time, as `predict` has them.
    """

    user_id: str | None
    history: Sequence[Mapping[str, Any]] | None
    candidates: Sequence[str | Mapping[str, Any]]  # item ids, or items with a title and other columns
    deadline: float | None = None  # time.monotonic() seconds: answer from the deepest head reached by then


@dataclass(frozen=True)
class Ranked:
    """What became of a request of n candidates, in their order. With an error the arrays are empty."""

    probability: NDArray[np.float64]  # (n,)
    exit_layer: NDArray[np.int64]  # (n,)
    token_layers: int
    full_depth_token_layers: int  # what the same would have cost without early exit
    features: list[
        dict[str, float]
    ]  # of each candidate, the retrieved features used; unknown ones are left out
    late: bool = False  # the deadline cut it
    error: str | None = None
    audit: NDArray[np.float64] | None = None  # (n,) probabilities at full depth, if it was audited
    cached: bool | None = None  # some of the user's history was in memory; None: there is none to keep
