"""The workloads of the engine's benchmark: how many candidates, whose history, what is cached, how many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from project.exits.cost import Stream

REQUESTS = {1: 48, 8: 24, 64: 16, 256: 4}
"""Candidates of a request -> most requests in the timed sample."""
TUNED = {8: 96, 64: 60, 256: 16}
"""Candidates of a request -> requests of the fold tune that margins are made on."""
FIXED_HISTORY = 50


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        candidates: Candidates of a request.
        stream: cold, or warm: all histories' keys and values are cached at full depth before the clock starts.
        history: Latest rows that make the history; None: as logged.
        at_once: Requests in one call.
        plain: Time transformers' own forward too: each way to do it by name.
    """

    candidates: int
    stream: Stream
    history: int | None = None
    at_once: int = 1
    plain: tuple[str, ...] = ()

    @property
    def usual(self) -> bool:
        """History as logged, requests one by one: where they get plans and lists of their own."""
        return self.history is None and self.at_once == 1

    @property
    def short(self) -> bool:
        """Whether only the sides that matter most are timed: the others say nothing new here, or take too long."""
        return not self.usual or self.candidates > 64

    @property
    def requests(self) -> int:
        """Most requests in the sample, a multiple of `at_once`."""
        return REQUESTS.get(self.candidates, 8) // self.at_once * self.at_once

    def row(self) -> dict[str, object]:
        """What a result file says of it."""
        kind = "history as logged" if self.history is None else f"{self.history}-item history"
        return {
            "candidates": self.candidates,
            "stream": self.stream,
            "history": self.history,
            "workload": f"catalogue, {kind}",
        }


def cases(sizes: Sequence[int]) -> list[Case]:
    """All workloads of these sizes.

    One prompt per candidate over a long logged history takes minutes a request at 64 candidates, so there it is timed
    on the fixed history alone, as the comparison's usual setting is; at 256 transformers is not timed at all.

    Args:
        sizes: Candidates of a request.
    """
    found = []
    for size in sizes:
        shared = ("shared_prefix",) if size <= 64 else ()
        alone = ("pointwise", *shared) if size < 64 else shared
        found += [Case(size, "cold", plain=alone), Case(size, "warm", plain=shared)]
        if size == 64:
            found.append(Case(size, "cold", FIXED_HISTORY, plain=("pointwise", "shared_prefix")))
            found.append(Case(size, "warm", FIXED_HISTORY, plain=("shared_prefix",)))
        if size in (1, 8):
            found.append(Case(size, "warm", at_once=8))
    return found
