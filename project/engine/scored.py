"""What the engine gives back, in the order it was asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from project.data.ragged import IntArray
from project.evaluation.metrics import probabilities

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
        seconds: prior (exit 0), pack (token ids, structure, cache look-up), trunk (layers, heads, decisions, gathers).
        syncs: Times the device was waited for.
    """

    requests: list[Scored]
    seconds: dict[str, float] = field(default_factory=lambda: {"prior": 0.0, "pack": 0.0, "trunk": 0.0})
    syncs: int = 0

    @property
    def token_layers(self) -> int:
        """Of all requests."""
        return sum(r.token_layers for r in self.requests)
