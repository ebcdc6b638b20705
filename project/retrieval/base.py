"""The one protocol every retriever fits: fitted once per time block, then asked for neighbours row by row.

A retriever never sees the log. It is handed edges that lie strictly before a block, then raters and a user's own rows
strictly before each question, and a row of an answer that it was not handed is refused (`walk.check_rows`): it cannot
leak the future even by mistake.

Classes of this package have no digest in `settings`, `walk.FORMAT` stands for them. So a release finds the caches of
the one before, while a retriever that somebody is writing is asked again after every change.
"""

import hashlib
import inspect
import marshal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.errors import ConfigError

PACKAGE = __name__.split(".")[0]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Snapshot = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Edges:
    """Ratings strictly before a block, in time order; all arrays have shape (edges,)."""

    user: IntArray
    item: IntArray
    label: IntArray


class Raters(NamedTuple):
    """Who rated a candidate strictly earlier, oldest first, each user's latest row; shape (raters,) each."""

    row: IntArray
    user: IntArray


class Neighbours(NamedTuple):
    """The rows a candidate's retrieved features consists of, most similar first; arrays of shape (at most N,)."""

    row: IntArray
    similarity: FloatArray


class SimilarUsers(NamedTuple):
    """Users with their similarity to the one who asks, most similar first; arrays of shape (at most N,)."""

    user: IntArray
    similarity: FloatArray


class ItemSimilarity(NamedTuple):
    """A user's own answers on items like a candidate, each counted by its similarity: of `weight`, `likes` is liked."""

    likes: float
    weight: float


NO_ITEM_SIMILARITY = ItemSimilarity(0.0, 0.0)
NO_NEIGHBOURS = Neighbours(np.empty(0, np.int64), np.empty(0, np.float32))
NO_SIMILAR_USERS = SimilarUsers(np.empty(0, np.int64), np.empty(0, np.float32))


class Retriever(ABC):
    """Finds rows that tell what similar users thought of a candidate.

    The order of calls is `begin`, then `fit` once per block in time order (its result is stored), and for
    reading `begin`, then per block `start_block` with what `fit` returned, `select` and `observe` in time
    order. Items are codes 0..items.height-1; the code items.height stands for any item the log does not have.
    A subclass calls `super().__init__` and keeps every constructor argument under its own name: they are part of the
    retrieved features cache's key. So is its source, if it is not of this package.

    Attributes:
        similar_every: A user's stream gets a list of what similar users liked after every so many of the user's
            rows; 0 is never. Only retrievers that compare users can be asked, and take it as an argument.
        similar_items: Most items on such a list.
        item_neighbours: A candidate is also compared with so many items of the user's own past; 0 is with none. Only
            retrievers that compare items can be asked, and take it as an argument.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
    """

    similar_every: int = 0
    similar_items: int = 0
    item_neighbours: int = 0

    def __init__(self, neighbours: int = 30, max_raters: int = 2000) -> None:
        for name, value in (("neighbours", neighbours), ("max_raters", max_raters)):
            if value < 1:
                raise ConfigError(
                    f"data.retriever.init_args.{name} is {value}, expected 1 or more: set it to at least 1."
                )
        self.neighbours = neighbours
        self.max_raters = max_raters

    @abstractmethod
    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget everything; make room for users 0..num_users-1 and the items of the log's item table."""

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Fit on the ratings before block `block` (1, 2, ...; block 0 has no past); the result is stored.

        Ratings of later splits are left out, so there may be none.
        """
        return {}

    def start_block(self, snapshot: Snapshot, block: int) -> None:  # noqa: B027  # optional
        """Answer from this block's snapshot from now on; not called for block 0 or blocks without rows."""

    @abstractmethod
    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """Pick at most `neighbours` rows for a candidate item of a user, from what was observed so far.

        Args:
            user: code of the user who is asking.
            item: code of the candidate.
            timestamp: time of the question, seconds.
            raters: who rated the candidate strictly earlier, the asking person left out.

        Returns:
            Rows of `raters.row`, or rows that `observe` was told of this user; similarities are finite.
        """

    def most_similar(self, user: int, others: IntArray) -> SimilarUsers:
        """The users most like `user` by what was observed so far; asked only where similar_every is above 0.

        Args:
            user: code of the user who is asking.
            others: codes of the users whose ratings may be read, latest rating last, the asking person left out.
        """
        return NO_SIMILAR_USERS

    def item_similarity(self, user: int, item: int) -> ItemSimilarity:
        """The user's own answers on the items most like a candidate; asked only where item_neighbours is above 0.

        Args:
            user: code of the user who is asking.
            item: code of the candidate.
        """
        return NO_ITEM_SIMILARITY

    def observe(self, row: int, user: int, item: int, label: int) -> None:  # noqa: B027  # optional
        """Take in one row of a user's own past, once its time has passed."""

    def settings(self) -> dict[str, Any]:
        """Class path and constructor arguments, and the digest of a source of one's own: what makes answers equal.

        The arguments about lists of similar users' items, and about own items, are left out where there are none: they
        change nothing.
        """
        kind = type(self)
        names = argument_names(self)
        if not self.similar_every:
            names = [name for name in names if not name.startswith("similar_")]
        if not self.item_neighbours:
            names = [name for name in names if name != "item_neighbours"]
        return {
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "init_args": {name: getattr(self, name) for name in names},
            **own_source(kind),
        }


class OwnRows:
    """One user's past by item: finds the rows on the items most similar to a candidate without looking at all rows.

    Rows of one item are equally similar, and of equals the later come first, so the latest `count` of each item are
    enough. A question costs the distinct items, not the rows.

    Args:
        count: Most rows that are asked for.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._place: dict[int, int] = {}
        self._rows: list[list[tuple[int, int]]] = []
        self._items = np.empty(4, np.int64)

    @property
    def items(self) -> IntArray:
        """(distinct items,) in the order in which they came first."""
        return self._items[: len(self._rows)]

    def add(self, row: int, item: int, label: int) -> None:
        """A row later than all before."""
        place = self._place.setdefault(item, len(self._rows))
        if place == len(self._rows):
            if place == self._items.size:
                self._items = np.concatenate([self._items, np.empty_like(self._items)])
            self._items[place] = item
            self._rows.append([])
        rows = self._rows[place]
        rows.append((row, label))
        del rows[: -self._count]

    def nearest(self, similarity: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
        """The `count` most similar rows, most similar first, of equals the later: rows, labels and similarities.

        Args:
            similarity: (distinct items,) of `items`.
        """
        order = top(similarity, self._count)
        enough = int(np.searchsorted(np.cumsum([len(self._rows[i]) for i in order]), self._count))
        if enough < order.size:  # what is less similar than the item that fills the places has none
            order = np.flatnonzero(similarity >= similarity[order[enough]])
        found = [
            (s, *row)
            for i, s in zip(order.tolist(), similarity[order].tolist(), strict=True)
            for row in self._rows[i]
        ]
        found = sorted(found, reverse=True)[: self._count]
        rows, labels = (np.array([f[k] for f in found], np.int64) for k in (1, 2))
        return rows, labels, np.array([f[0] for f in found], similarity.dtype)


def top(values: NDArray[np.floating[Any]], count: int) -> IntArray:
    """Positions of the `count` largest values, largest first; equal values: the later position first.

    Args:
        values: shape (n,), no NaN.
        count: how many, at least 1.
    """
    if values.size > count:
        kept = np.flatnonzero(values >= np.partition(values, -count)[-count])[::-1]
    else:
        kept = np.arange(values.size - 1, -1, -1)
    return kept[np.argsort(-values[kept], kind="stable")[:count]]


def argument_names(retriever: object) -> list[str]:
    """Names of the constructor's arguments, each of which is an attribute.

    Raises:
        ConfigError: An argument is not kept, or the constructor of the base class was not called.
    """
    kind = type(retriever)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in ("neighbours", "max_raters"):
        if not hasattr(retriever, name):
            raise ConfigError(
                f"data.retriever is {kind.__name__}, which has no attribute {name}: its __init__ does not call that of "
                "Retriever. Write super().__init__(neighbours, max_raters) as its first line."
            )
    lost = [name for name in names if not hasattr(retriever, name)]
    if lost:
        raise ConfigError(
            f"data.retriever is {kind.__name__}, which does not keep its argument {lost[0]}: arguments are part of the "
            f"retrieved features cache's key. Write self.{lost[0]} = {lost[0]} in its __init__."
        )
    return names


def own_source(kind: type) -> dict[str, str]:
    """The digest of the files that define a class and its bases outside this package; empty if there are none."""
    foreign = [base for base in kind.__mro__ if _root(base) not in {PACKAGE, *sys.stdlib_module_names}]
    if not foreign:
        return {}
    digest = hashlib.sha256()
    for source in dict.fromkeys(_source(base) for base in foreign):
        digest.update(source)
    return {"source": digest.hexdigest()[:16]}


def _root(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _source(kind: type) -> bytes:
    """A class typed into a notebook has no file, only the lines of its methods, or what Python made of them."""
    try:
        return Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        methods = [(name, f) for name, f in vars(kind).items() if inspect.isfunction(f)]
        return b"".join([kind.__qualname__.encode(), *(name.encode() + _lines(f) for name, f in methods)])


def _lines(function: FunctionType) -> bytes:
    try:
        return inspect.getsource(function).encode()
    except OSError:
        return marshal.dumps(function.__code__)
