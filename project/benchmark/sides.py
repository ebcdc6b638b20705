"""One side of a benchmark: something that scores requests, and the seconds it took, round by round.

Unusual here: a side may be slow (one prompt per candidate costs fifty times ours), so it may be measured on the first
few requests and in fewer rounds than the others; every ratio is of the requests that both sides scored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored, Scores

Floats = NDArray[np.float64]
Unit = list[PreparedRequest]
"""Requests that are scored in one call."""


class Runner(Protocol):
    """Scores requests: the engine, or what it is compared with."""

    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        """Scores in the order of the requests, with seconds and token-layers."""
        ...


@dataclass
class Side:
    """One runner, what its scores are worth, and what it needed.

    Attributes:
        engine: Name in result files: pointwise, shared_prefix, packed, fixed_depth_<k>, early_exit, top_k.
        policy: Who leaves where, in words.
        runs: Scores requests.
        worth: What is known of its scores: auc, auc_drop and so on; lists of the best k have overlap and precision.
        most: Units it is measured on, the first ones; None: all.
        rounds: Rounds it is measured in; None: all.
        wall: Seconds, a list a round, an entry a unit.
        trunk: The trunk's share of them.
        scored: What the last round scored.
    """

    engine: str
    policy: str
    runs: Runner
    worth: dict[str, Any] = field(default_factory=dict)
    most: int | None = None
    rounds: int | None = None
    wall: list[list[float]] = field(default_factory=list)
    trunk: list[list[float]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)

    def start_round(self) -> bool:
        """Begin a round; False where this side has done all of its."""
        if self.rounds is not None and len(self.wall) >= self.rounds:
            return False
        self.wall.append([])
        self.trunk.append([])
        self.scored = []
        return True

    def takes(self, unit: int) -> bool:
        """Whether this unit is one of its."""
        return self.most is None or unit < self.most

    def score(self, unit: Unit) -> None:
        """Score one unit and note the time."""
        start = time.perf_counter()
        scores = self.runs.score(unit)
        self.wall[-1].append(time.perf_counter() - start)
        self.trunk[-1].append(scores.seconds["trunk"])
        self.scored += scores.requests

    @property
    def units(self) -> int:
        """Units it scored in a round."""
        return len(self.wall[0])

    def typical(self, which: str, units: int | None = None) -> Floats:
        """(units,) seconds of each unit, the median of its rounds.

        Args:
            which: wall or trunk.
            units: Of the first so many; None: of all it scored.
        """
        found: Floats = np.median(np.array(getattr(self, which)), axis=0)[:units]
        return found

    def totals(self, which: str, units: int | None = None) -> Floats:
        """(rounds,) seconds of all units, or of the first so many. Arguments as for `typical`."""
        found: Floats = np.array(getattr(self, which))[:, :units].sum(axis=1)
        return found

    def token_layers(self, requests: int | None = None) -> int:
        """Of all requests it scored, or of the first so many."""
        return sum(s.token_layers for s in self.scored[:requests])


def run_rounds(sides: Sequence[Side], units: Sequence[Unit], number: int) -> None:
    """One round: every unit is scored by all sides in turn before the next one; the order of the sides rotates.

    Args:
        sides: At least one.
        units: What is scored.
        number: Of the round, from 0.
    """
    running = [side for side in sides if side.start_round()]
    for k, unit in enumerate(units):
        turn = (number + k) % len(running)
        for side in running[turn:] + running[:turn]:
            if side.takes(k):
                side.score(unit)
