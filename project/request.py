"""One request: what HTTP, a line of a file and Python ask, and the scores that come back. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any, NamedTuple, Protocol

import numpy as np

from project.arrays import F64, I64
from project.errors import DataError, did_you_mean
from project.metrics import probabilities

LATEST = 1e10  # seconds: the year 2286; milliseconds are more
STEP = 1e-4  # seconds between rows of a history without times


class Item(NamedTuple):
    """An item by id, by title, or a new one."""

    item_id: str = ""  # empty: the item of this title, or a new one whose id is its title
    title: str = ""
    # name and text: further columns of the items table
    columns: tuple[tuple[str, str], ...] = ()
    # name and value: context of a candidate alone, such as its position and price
    context: tuple[tuple[str, Any], ...] = ()


class HistoryRow(NamedTuple):
    """An item that somebody answered."""

    item: str | Item  # text is an id
    label: int | None = None  # 0 or 1; None: the protocol's rule makes it of the rating
    # seconds since 1970; None in all rows: the order of the list counts
    time: float | None = None
    rating: float | None = None


def id_of(item: str | Item) -> str:
    """The id of an item; empty where its title alone is given."""
    return item if isinstance(item, str) else item.item_id


@dataclass(frozen=True)
class RankRequest:
    """Candidates of a user, or of somebody with a history of their own; `DataError` where it cannot be one."""

    # whose history is read: the log's rows, and events where a server has them
    user_id: str | None
    # of somebody unknown; beside a user_id: if nobody has that name
    history: Sequence[HistoryRow] | None
    candidates: Sequence[str | Item]  # n items to score; text is an id
    # time.monotonic() seconds: the deepest exit reached by then answers
    deadline: float | None = None
    # the best so many are listed; candidates that cannot be among them leave
    top_n: int | None = None
    exhaustive: bool = False  # every candidate is scored by the plan, whatever top_n is
    # context of all candidates: columns that the log lists under `context`
    context: Mapping[str, Any] | None = None
    # attributes of somebody unknown, or in place of the log's
    user: Mapping[str, Any] | None = None
    # seconds: strictly earlier rows are read; None: all of log and history
    time: float | None = None
    request_id: str = ""  # its name in results and errors

    def __post_init__(self) -> None:
        """Raise `DataError` that names the field."""
        rows = self.history or ()
        times = [self.time, *(row.time for row in rows)]
        if self.user_id is None and self.history is None:
            raise DataError("expected either user_id or history, found neither.")
        if not (self.candidates or isinstance(self, RecommendRequest)):
            raise DataError("candidates is empty; expected at least one candidate.")
        for row in rows:
            if row.label not in ((0, 1) if row.rating is None else (0, 1, None)):
                raise DataError(
                    f"history: label is {row.label!r}; expected label 0 or 1, or a rating."
                )
            number = isinstance(row.rating, int | float) and -inf < row.rating < inf
            if row.rating is not None and (type(row.rating) is bool or not number):
                raise DataError(
                    f"history: rating is {shown(row.rating)}; expected a number."
                )
        for time in times:
            if time is not None and not abs(time) < LATEST:
                raise DataError(
                    f"time is {str(time)[:40]}; expected seconds since 1970, no milliseconds."
                )
        if len({row.time is None for row in rows}) > 1:
            raise DataError(
                "history: some rows have a time, others have none; give every row its time, or none."
            )
        if self.top_n is not None and not (type(self.top_n) is int and self.top_n >= 1):
            raise DataError(
                f"top_n is {shown(self.top_n)}; expected a number of 1 or more."
            )
        if type(self.exhaustive) is not bool:
            raise DataError(
                f"exhaustive is {shown(self.exhaustive)}; expected true or false."
            )
        for name in ("context", "user"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise DataError(
                    f"{name} is {shown(getattr(self, name))}; expected names and values."
                )
        if any(isinstance(row.item, Item) and row.item.context for row in rows):
            raise DataError(
                "history: a row has context, but nothing reads it; leave it out."
            )

    @property
    def list_of(self) -> int:
        """Length of the list that is asked for; 0: every candidate's score."""
        return 0 if self.exhaustive else self.top_n or 0

    def asked_at(self, end: float) -> float:
        """Seconds at which the candidates are asked: `time`, else after `end` and after the history."""
        if self.time is not None:
            return self.time
        return (
            max([end, *(row.time for row in self.history or () if row.time is not None)])
            + 1
        )

    def past(self, now: float) -> list[tuple[str, int, float, float]]:
        """Item id, label, seconds and rating (NaN: none) of the history's rows before `now`; labels are known.

        Rows without a time stand just before `now`, in the order of the list.
        """
        rows = self.history or ()
        found = list[tuple[str, int, float, float]]()
        for place, row in enumerate(rows, -len(rows)):
            assert row.label is not None
            second = now + place * STEP if row.time is None else row.time
            if second < now:
                rating = nan if row.rating is None else float(row.rating)
                found.append((id_of(row.item), row.label, second, rating))
        return found

    def texts(self) -> Iterator[str]:
        """Every text that it brings: ids, titles, names and values of columns."""
        yield self.user_id or ""
        for given in (self.context or {}, self.user or {}):
            for pair in given.items():
                yield from map(str, pair)
        for item in (*self.candidates, *(row.item for row in self.history or ())):
            yield id_of(item)
            if isinstance(item, Item):
                yield item.title
                for column in (*item.columns, *item.context):
                    yield from map(str, column)


@dataclass(frozen=True)
class RecommendRequest(RankRequest):
    """The best of all items that may be listed: the ranker finds `candidates` of a user, and the `sources` of each."""

    candidates: Sequence[str | Item] = ()
    # column of the items table -> a value, values one of which it has, or {"min", "max"}
    filter: Mapping[str, Any] = field(default_factory=dict)
    allow: Sequence[str] | None = None  # ids of the only items that may be listed
    deny: Sequence[str] = ()  # ids of items that are not listed
    # column -> how many items of one value are listed
    at_most: Mapping[str, int] = field(default_factory=dict)
    include_answered: bool = False  # items of the history may be listed, too
    sources: Sequence[str] = ()  # n


class Candidates(Protocol):
    """Any form of a request."""

    @property
    def request_id(self) -> str:
        """Its name."""

    @property
    def candidates(self) -> Sized:
        """The n that are to be scored."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of a request of n candidates, in their order; NaN and layer -1 where it could not be scored."""

    request_id: str
    logits: F64  # (n,) calibrated logits that the candidates left with
    exit_layers: I64  # (n,)
    token_layers: int = 0  # tokens times layers that ran, the history's included
    error: str | None = None  # why it could not be scored
    late: bool = False  # past the deadline, candidates left whom the plan would have kept
    # length k of the list whose margins decided; 0: the plan decided for every candidate
    list_of: int = 0
    full_depth_token_layers: int = 0  # what the same would have cost without early exit
    # some of the user's history was in memory; None: there is none to keep
    cached: bool | None = None
    # a ranker adds
    item_ids: Sequence[str] = ()  # n
    titles: Sequence[str] = ()  # n
    # (n,) retrieved features by name; NaN: unknown
    features: Mapping[str, F64] = field(default_factory=dict)
    audit: F64 | None = None  # (n,) probabilities at full depth, if it was audited
    # texts of new items that have to be embedded first: it was not scored yet
    waits_for: Sequence[str] = ()
    # of a recommendation: n sources of the candidates, and places of the listed, best first
    sources: Sequence[str] = ()
    listed: Sequence[int] = ()
    # the inference process adds
    run: str = ""
    full_depth: bool = False  # the drift alarm is on
    batch: int = 1  # requests that were scored together
    # an equal part of what scoring them took: CPU seconds of all threads, and seconds
    cpu_seconds: float = 0.0
    busy_seconds: float = 0.0
    other: bool = False  # the HTTP process adds: the server's other version answered

    @classmethod
    def failed(
        cls, request: Candidates, error: str | None, token_layers: int = 0
    ) -> Scored:
        """Of a request that could not be scored."""
        n = len(request.candidates)
        unscored = np.full(n, np.nan)
        return cls(request.request_id, unscored, np.full(n, -1), token_layers, error)

    @property
    def left_at(self) -> dict[int, int]:
        """How many candidates left at each layer, ascending."""
        layers, counts = np.unique(self.exit_layers, return_counts=True)
        return dict(zip(layers.tolist(), counts.tolist(), strict=True))

    def best_first(self, top_n: int | None = None) -> list[int]:
        """Places of the best candidates; ties in the order of the request.

        In a list those that stayed longer come first: the others left since they could not reach it.
        """
        stayed = self.exit_layers if self.list_of else np.zeros(len(self.logits))
        order: list[int] = np.lexsort((-self.logits, -stayed)).tolist()
        return order[:top_n]

    @property
    def probabilities(self) -> F64:
        """(n,) clipped to [.001, .999]; NaN where the request could not be scored."""
        found: F64 = self.logits if self.error is not None else probabilities(self.logits)
        return found


# What JSON holds


def check_names(found: Iterable[str], known: Sequence[str], what: str) -> None:
    """Raise `DataError` about the first name that is not known; `what` it is."""
    for name in found:
        if name not in known:
            near = did_you_mean(name, known)
            raise DataError(f"{what} {shown(name)}{near}; expected {', '.join(known)}.")


def text_of(name: str, value: Any) -> str:
    """A value of a column as the items table has it: a list becomes "a, b"."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and -inf < value < inf:
        return str(value)
    if isinstance(value, list) and not any(isinstance(part, list) for part in value):
        return ", ".join(text_of(name, part) for part in value)
    raise DataError(
        f"{name} is {shown(value)}; expected text, a number, or a list of these."
    )


def shown(value: Any) -> str:
    """A value in an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
