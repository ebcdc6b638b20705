"""Two versions in one server: another run answers a share of users, or scores a share of requests as well.

Each has an inference process of its own, which follows the same store. The other version costs nobody an answer:
where it has none `--run` answers, and a counter says why.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from random import random
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from starlette.exceptions import HTTPException

from project.metrics import auc
from project.request import RankRequest, Scored
from project.serve.settings import ServeSettings, run_name
from project.serve.store import Event

PATIENCE = 10.0  # seconds after which `--run` answers a user of the other version
LISTED = 10  # items of a list, where the request names no number
PAIRS = 100_000  # of users and items, whose events are awaited
LATER = 10_000  # latest events that AUC is of
T = TypeVar("T")


class Version(Protocol):
    """An inference process."""

    ready: bool
    waiting: dict[int, Any]

    async def ask(self, payload: object) -> Any:
        """The answer to a payload."""


def takes(user_id: str | None, share: float, salt: str) -> bool:
    """Whether a user is among the share: always the same ones, who are also among a larger share."""
    digest = hashlib.sha256(f"{salt}\0{user_id}".encode()).digest()
    return user_id is not None and int.from_bytes(digest[:8], "big") < share * 2**64


class Versions:
    """Has a user's version answer, and compares it with the other.

    Args:
        settings: What `serve` was told: there is another run.
        main: Answers everybody but for the split.
        other: That of the other run.
        registry: Of metrics.
    """

    def __init__(
        self,
        settings: ServeSettings,
        main: Version,
        other: Version,
        registry: CollectorRegistry,
    ) -> None:
        assert settings.other is not None
        self._settings = settings
        self._main = main
        self._other = other
        # with another run other users are taken
        self._salt = run_name(settings.other.resolve())
        # the event loop alone would let go of them
        self._tasks = set[asyncio.Task[Any]]()
        self._names = ("", "")  # of the runs that are compared
        # (user id, item id) -> probabilities of both, oldest first
        self._pairs = dict[tuple[str, str], tuple[float, float]]()
        # probabilities of both, label
        self._later = deque[tuple[float, float, int]](maxlen=LATER)
        self._seconds = Histogram(
            "exitrec_version_seconds",
            "From the question to a version's answer",
            ["model", "asked"],
            registry=registry,
        )
        self._missed = Counter(
            "exitrec_other_missed",
            "Requests that --other did not answer",
            ["reason"],
            registry=registry,
        )
        self._overlap = Summary(
            "exitrec_shadow_overlap",
            "Share of --run's list that is in the other",
            registry=registry,
        )
        self._difference = Summary(
            "exitrec_shadow_difference",
            "Mean absolute difference of a request's probabilities",
            registry=registry,
        )
        gauge = partial(Gauge, registry=registry)
        self._auc = gauge(
            "exitrec_later_auc", "AUC of both on the same later events", ["model"]
        )
        later = gauge("exitrec_later_events", "Events that this AUC is of")
        later.set_function(lambda: len(self._later))
        ready = gauge("exitrec_other_ready", "1: --other is loaded")
        ready.set_function(lambda: other.ready)

    async def ask(self, request: RankRequest) -> Scored:
        """The answer of the user's version; of a share the other is asked as well, and compared."""
        # 1. users of the other version
        shadow = None
        if takes(request.user_id, self._settings.split, self._salt):
            asked = self._start(self._ask_other(request, "answer"))
            await asyncio.wait([asked], timeout=PATIENCE)
            if not asked.done():
                self._missed.labels("slow").inc()
            elif theirs := asked.result():
                return replace(theirs, other=True)
        # 2. the others
        elif random() < self._settings.shadow_share:
            shadow = self._start(self._ask_other(request, "shadow"))
        found = await self._ask(self._main, request, "answer")
        if shadow is not None:
            self._start(self._compare(request, found, shadow))
        return found

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, version: Version, request: RankRequest, asked: str) -> Scored:
        began = time.perf_counter()
        found: Scored = await version.ask(request)
        self._seconds.labels(found.run, asked).observe(time.perf_counter() - began)
        return found

    async def _ask_other(self, request: RankRequest, asked: str) -> Scored | None:
        """The other version's answer; None where it has none, which is counted."""
        most = self._settings.max_batch_requests
        if not self._other.ready:
            reason = "not loaded"
        elif asked == "shadow" and len(self._other.waiting) >= most:
            reason = "busy"
        else:
            try:
                found = await self._ask(self._other, request, asked)
                if not found.error:
                    return found
                reason = "invalid"
            except HTTPException as error:
                reason = "busy" if error.status_code == 429 else "failed"
        self._missed.labels(reason).inc()
        return None

    async def _compare(
        self, request: RankRequest, found: Scored, shadow: asyncio.Task[Scored | None]
    ) -> None:
        """Count how far both answers are apart, and await events of their pairs."""
        other = await shadow
        # after a promotion both are of one run
        if other is None or found.error or found.run == other.run:
            return
        # 1. lists, and probabilities of what both scored
        lists = list[set[str]]()
        chances = list[dict[str, float]]()
        for one in (found, other):
            best = one.listed or one.best_first(request.top_n or LISTED)
            lists.append({one.item_ids[place] for place in best})
            scores = zip(one.item_ids, one.probabilities.tolist(), strict=True)
            chances.append(dict(scores))
        mine, theirs = chances
        both = {item: (mine[item], theirs[item]) for item in mine if item in theirs}
        # 2. how far they are apart
        if both:
            self._overlap.observe(len(lists[0] & lists[1]) / len(lists[0]))
            apart = [abs(one - two) for one, two in both.values()]
            self._difference.observe(sum(apart) / len(apart))
        # 3. pairs, of the same two runs alone
        names = found.run, other.run
        if self._names != names:
            self._names = names
            self._pairs.clear()
            self._later.clear()
            self._auc.clear()
            for k, name in enumerate(names):
                self._auc.labels(name).set_function(partial(self._later_auc, k))
        if request.user_id is not None:
            for item, pair in both.items():
                self._pairs.pop((request.user_id, item), None)
                self._pairs[request.user_id, item] = pair
            while len(self._pairs) > PAIRS:
                del self._pairs[next(iter(self._pairs))]

    def _later_auc(self, version: int) -> float:
        found = auc([row[version] for row in self._later], [row[2] for row in self._later])
        return nan if found is None else found

    def observe(self, events: Sequence[Event]) -> None:
        """Events that came: those of awaited pairs count, once."""
        for event in events:
            pair = self._pairs.pop((event.user_id, event.item_id), None)
            if pair is not None:
                self._later.append((*pair, event.label))

    def forget(self, user_id: str) -> None:
        """Await no events of a user any more."""
        for pair in [pair for pair in self._pairs if pair[0] == user_id]:
            del self._pairs[pair]
