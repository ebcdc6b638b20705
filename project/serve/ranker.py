"""The interface of the ranker until branch serve-state is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from project.serve.store import EventStore

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RankRequest:
    """Candidates of a user, or of somebody with a history of their own: exactly one of both."""

    user_id: str | None
    history: Sequence[Mapping[str, Any]] | None
    candidates: Sequence[str | Mapping[str, Any]]
    deadline: float | None = None


@dataclass(frozen=True)
class Ranked:
    """What became of a request of n candidates, in their order."""

    probability: FloatArray
    exit_layer: IntArray
    token_layers: int
    full_depth_token_layers: int
    features: list[dict[str, float]]
    late: bool = False
    error: str | None = None
    audit: FloatArray | None = None


class Ranker:
    """A run, ready to rank. One thread at a time."""

    full_depth = False
    about: dict[str, Any]

    @classmethod
    def load(cls, run: Path, cache_mib: int = 256, audit_share: float = 0.01) -> Ranker:
        """From a folder."""
        raise NotImplementedError

    def follow(self, store: EventStore) -> None:
        """Observe what came to a store since the last call."""

    def rank(self, requests: Sequence[RankRequest]) -> list[Ranked]:
        """Answers as of now."""
        raise NotImplementedError

    def knows_user(self, user_id: str) -> bool:
        """Whether the log or an event has this user."""
        raise NotImplementedError

    def item_of_title(self, title: str) -> str | None:
        """The first item of this title."""
        raise NotImplementedError

    def history_of(self, user_id: str) -> list[dict[str, Any]]:
        """The log's rows of a user, then events."""
        raise NotImplementedError
