"""Defines the interface of retrievers: fitted once per time block, then queried for neighbours row by row.

A retriever never sees the log. It is handed edges strictly before a block, then raters and a user's own rows strictly
before each request. An answer that names any other row is refused (`walk.walk`).
"""

import hashlib
import inspect
import marshal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.arrays import F32, F64, I64
from project.errors import ConfigError, ProjectError

Snapshot = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Edges:
    """Ratings strictly before a block, in time order; all arrays have shape (edges,)."""

    user: I64
    item: I64
    label: I64
    # NaN where a row has none
    rating: F64 = field(default_factory=lambda: np.empty(0))


class Raters(NamedTuple):
    """The raters of a candidate strictly earlier, oldest first, each user's latest row; shape (raters,) each.

    Later rows move them, so copy what you keep.
    """

    row: I64
    user: I64


class Neighbours(NamedTuple):
    """The rows behind a candidate's features, most similar first; arrays of shape (at most N,)."""

    row: I64
    similarity: F32


class SimilarUsers(NamedTuple):
    """Users with their similarity to a user, most similar first; arrays of shape (at most N,)."""

    user: I64
    similarity: F32


NO_NEIGHBOURS = Neighbours(np.empty(0, np.int64), np.empty(0, np.float32))
NO_SIMILAR_USERS = SimilarUsers(np.empty(0, np.int64), np.empty(0, np.float32))


class Retriever(ABC):
    """Finds rows that show what similar users thought of a candidate.

    To fit: `begin`, then `fit` once per block in time order; what it returns is stored. To answer: `begin`, then per
    block `start_block` with what `fit` returned, `select` and `observe` in time order. Items are codes
    0..items.height-1; the code items.height stands for any item that the log does not have. A subclass calls
    `super().__init__` and keeps every constructor argument under its own name: they are part of the cache's key. So is
    the source of a class that is not of this package.

    Attributes:
        similar_every: A user's history gets a list of what similar users liked after every so many of the user's
            rows; 0 is never. Only retrievers that compare users take it as an argument.
        item_neighbours: A candidate is also compared with so many items of the user's own past; 0 is with none. Only
            retrievers that compare items take it as an argument.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
    """

    similar_every: int = 0
    item_neighbours: int = 0

    def __init__(self, neighbours: int = 30, max_raters: int = 2000) -> None:
        self.neighbours = neighbours
        self.max_raters = max_raters
        self._require(1, "neighbours", "max_raters")

    def _require(self, least: int, *names: str) -> None:
        """Refuse arguments below `least`."""
        for name in names:
            if not getattr(self, name) >= least:
                key = f"data.retriever.init_args.{name}"
                raise ConfigError(
                    f"{key} is {getattr(self, name)}; expected {least} or more."
                )

    @abstractmethod
    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget everything; make room for users 0..num_users-1 and the items of the log's item table."""

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Fit on the ratings before block 1, 2, ... (there may be none); what it returns is stored."""
        return {}

    def start_block(self, snapshot: Snapshot, block: int) -> None:  # noqa: B027  # optional
        """Answer from this block's snapshot from now on; not called for block 0 or blocks without rows."""

    @abstractmethod
    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """Pick at most `neighbours` rows for a candidate item of a user, from what was observed so far.

        The rows are of `raters`, which leaves the user out, or the user's own that `observe` got; similarities are
        finite.
        """

    def most_similar(self, user: int, others: I64) -> SimilarUsers:
        """The users most similar to `user` among `others`, latest rating last; where similar_every is above 0."""
        return NO_SIMILAR_USERS

    def item_similarities(self, user: int, items: I64) -> F64:
        """The user's own answers on the items most similar to each candidate; where item_neighbours is above 0.

        (n, 2): the sum of the liked items' similarities, and that of all.
        """
        return np.zeros((items.size, 2))

    def observe(self, row: int, user: int, item: int, label: int) -> None:  # noqa: B027  # optional
        """Take in one row of a user's own past, once its time has passed."""

    def forget(self, user: int) -> None:  # noqa: B027  # optional
        """Drop a user's past, as if `observe` had never got it; `online.FeatureIndex` needs it where `observe` is."""

    def check(self) -> None:
        """Refuse a class whose methods take other arguments, or whose constructor kept one of its own back."""
        kind = type(self)
        for name, method in vars(Retriever).items():
            if name.startswith("_") or not inspect.isfunction(method):
                continue
            # 1. every method of the interface can be called with its arguments
            expected = list(inspect.signature(method).parameters)[1:]
            given = inspect.signature(getattr(self, name))
            try:
                given.bind(*expected)
            except TypeError:
                raise ConfigError(
                    f"data.retriever is {kind.__name__}, whose {name} takes ({', '.join(given.parameters)}); expected "
                    f"{name}({', '.join(expected)})."
                ) from None
        # 2. every argument is kept under its own name, as `settings` reads it
        names = argument_names(kind)
        for name in ("neighbours", "max_raters", *names):
            if not hasattr(self, name):
                raise ConfigError(
                    f"data.retriever is {kind.__name__}, which has no attribute {name}: arguments are part of the "
                    f"retrieved features cache's key. Write super().__init__(neighbours, max_raters), and self.{name} "
                    f"= {name} for an argument of its own, in its __init__."
                )

    def settings(self) -> dict[str, Any]:
        """What the answers depend on: class path, constructor arguments, digest of a source outside this package.

        Arguments about lists and own items are left out where they change nothing.
        """
        kind = type(self)
        unread = {
            name for name in ("similar_every", "item_neighbours") if not getattr(self, name)
        }
        names = [name for name in argument_names(kind) if name not in unread]
        return {
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "init_args": {name: getattr(self, name) for name in names},
            **own_source(kind),
        }


@contextmanager
def failures_named(retriever: Retriever) -> Iterator[None]:
    """What a retriever of one's own raises becomes one sentence that names class and method."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:
        # the outermost frame that belongs to the retriever is the method that was called
        frames = (frame for frame, _ in walk_tb(error.__traceback__))
        method = next(
            (f.f_code.co_name for f in frames if f.f_locals.get("self") is retriever), None
        )
        if method is None or not own_source(type(retriever)):
            raise
        raise ConfigError(
            f"data.retriever: {type(retriever).__name__}.{method} failed: {type(error).__name__}: {error}"
        ) from error


def argument_names(kind: type) -> list[str]:
    """Names of the constructor's arguments; where it passes **kwargs on, those of the base class too."""
    names: list[str] = []
    # from the class up to the base whose constructor takes no **kwargs
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names += [
                p.name
                for p in parameters
                if p.name != "self" and p.kind is not p.VAR_KEYWORD
            ]
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return names


def own_source(kind: type) -> dict[str, str]:
    """Digest of the files that define a class and its bases outside this package; empty if there are none.

    Classes of this package have none: `cache.FORMAT` stands for them, so a release finds the caches of the one before.
    """
    # the standard library belongs to Python's version, not to the retriever
    here = {__name__.split(".")[0], *sys.stdlib_module_names}
    foreign = [base for base in kind.__mro__ if base.__module__.split(".")[0] not in here]
    # two classes of one file count once
    parts = dict.fromkeys(_source(base) for base in foreign)
    return {"source": hashlib.sha256(b"".join(parts)).hexdigest()[:16]} if parts else {}


def _source(kind: type) -> bytes:
    """The file of a class; where it has none, as in a notebook, its methods' source lines or else their bytecode."""
    try:
        return Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        methods = [f for f in vars(kind).values() if inspect.isfunction(f)]
    try:
        codes = [inspect.getsource(f).encode() for f in methods]
    except OSError:
        codes = [marshal.dumps(f.__code__) for f in methods]
    return b"".join([kind.__qualname__.encode(), *codes])


def top(values: NDArray[np.floating[Any]], count: int) -> I64:
    """Positions of the `count` largest of values (n,), largest first; equal values: the later position first."""
    if values.size > count:
        # only values that reach the count-th largest are sorted; ties stay in
        kept = (values >= np.partition(values, -count)[-count]).nonzero()[0][::-1]
    else:
        kept = np.arange(values.size - 1, -1, -1)
    # a stable sort leaves the later position first among equals
    best: I64 = kept[(-values[kept]).argsort(kind="stable")[:count]]
    return best
