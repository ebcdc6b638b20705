"""The sides of the retrieval benchmark, and the one walk through the log on which all of them are asked in turn.

Unusual here: the walk is the one that makes evidence, so the raters' vectors are those of the request's own second. A
side is a retriever that keeps item vectors (a query is a weighted sum of them), or one that encodes the user's history
as text at every request; the raters it compares with have summed vectors either way.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.retrieval import Retriever, VectorRetriever
from project.retrieval.base import NO_NEIGHBOURS, FloatArray, IntArray, Neighbours, Raters, Snapshot
from project.retrieval.lightgcn import inverse_norms
from project.retrieval.text import ItemTextRetriever
from project.retrieval.walk import Snapshots

ROUNDS = 3  # fewer say nothing about spread


@dataclass
class Side:
    """One way to get a query's vector, and the time it took.

    Attributes:
        name: Of the retriever.
        retriever: Whose vectors are compared.
        vector: Seconds to get the vector, for each round a list over requests.
        cpu: The same in processor time of all threads, which other programs on the machine do not lengthen.
        total: Seconds with the nearest raters and their vote as well.
    """

    name: str
    retriever: VectorRetriever
    vector: list[list[float]] = field(default_factory=lambda: [[] for _ in range(ROUNDS)])
    cpu: list[list[float]] = field(default_factory=lambda: [[] for _ in range(ROUNDS)])
    total: list[list[float]] = field(default_factory=lambda: [[] for _ in range(ROUNDS)])

    @property
    def cached(self) -> bool:
        """Whether item vectors are kept."""
        return True

    def query(self, item: IntArray, label: IntArray) -> FloatArray:
        """The vector, shape (d,), of a history, oldest first, shape (rows,) each."""
        return self.retriever.history_vector(item, label)

    def measure(
        self, number: int, item: IntArray, label: IntArray, raters: Raters, answers: IntArray
    ) -> None:
        """Answer one request in round `number`: vector, nearest raters, and the mean of their answers."""
        start, cpu = time.perf_counter(), time.process_time()
        vector = self.query(item, label)
        between, cpu = time.perf_counter(), time.process_time() - cpu
        found = self.retriever.nearest(vector, inverse_norms(vector), raters)
        if found.row.size:
            answers[found.row].mean()
        end = time.perf_counter()
        self.vector[number].append(between - start)
        self.cpu[number].append(cpu)
        self.total[number].append(end - start)

    @staticmethod
    def milliseconds(seconds: list[list[float]]) -> NDArray[np.float64]:
        """Median over the requests of each round, shape (rounds,): one interruption is longer than a thousand sums."""
        medians: NDArray[np.float64] = 1e3 * np.median(np.array(seconds), axis=1)
        return medians


@dataclass
class EncodingSide(Side):
    """Encodes the history as text, at every request."""

    retriever: ItemTextRetriever

    @property
    def cached(self) -> bool:
        """Whether item vectors are kept."""
        return False

    def query(self, item: IntArray, label: IntArray) -> FloatArray:
        """The vector, shape (d,), of a history, oldest first, shape (rows,) each."""
        return self.retriever.encode_history(item, label)


def sides_of(retrievers: Mapping[str, VectorRetriever]) -> list[Side]:
    """All retrievers with their item vectors, then those that can also encode a history."""
    summing = [Side(name, retriever) for name, retriever in retrievers.items()]
    encoding = [
        EncodingSide(name, retriever)
        for name, retriever in retrievers.items()
        if isinstance(retriever, ItemTextRetriever)
    ]
    return [*summing, *encoding]


def merged(snapshots: Mapping[str, Snapshots]) -> list[Snapshot]:
    """What `InTurns` wants of each block: item tables by the retriever's name."""
    return [
        dict(zip(snapshots, (fitted["weighted"] for fitted in block), strict=True))
        for block in zip(*(found.fitted for found in snapshots.values()), strict=True)
    ]


class InTurns(Retriever):
    """Goes through the log as one retriever and hands every question to all sides, so that time can be taken.

    Every request asks all sides `ROUNDS` times in turn; the order rotates. Nobody asks before block 1.

    Args:
        retrievers: By name; they share neighbours and max_raters.
        sides: Who is measured.
        answers: Labels by position in the log, shape (rows,).
    """

    def __init__(
        self, retrievers: Mapping[str, VectorRetriever], sides: list[Side], answers: IntArray
    ) -> None:
        first = next(iter(retrievers.values()))
        super().__init__(first.neighbours, first.max_raters)
        self._retrievers, self._sides, self._answers = retrievers, sides, answers

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget everyone's past."""
        self._past: dict[int, tuple[list[int], list[int]]] = {}
        self._asked = 0
        for retriever in self._retrievers.values():
            retriever.begin(num_users, items)
        self.encoding_seconds(rows=1)  # models and item vectors are read now: no request should wait for them

    def encoding_seconds(self, rows: int) -> float:
        """Time that all encoding sides need for one query whose history has so many rows."""
        history = np.zeros(rows, np.int64), np.ones(rows, np.int64)
        start = time.perf_counter()
        for side in self._sides:
            if not side.cached:
                side.query(*history)
        return time.perf_counter() - start

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """All retrievers start the block, each with its own item table."""
        for name, retriever in self._retrievers.items():
            retriever.start_block({"weighted": snapshot[name]}, block)

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """Measure all sides on this request; what they find is not kept."""
        items, labels = (np.array(part, np.int64) for part in self._past[user])
        for number in range(ROUNDS):
            turn = (self._asked + number) % len(self._sides)
            for side in self._sides[turn:] + self._sides[:turn]:
                side.measure(number, items, labels, raters, self._answers)
        self._asked += 1
        return NO_NEIGHBOURS

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """All retrievers take in a row."""
        items, labels = self._past.setdefault(user, ([], []))
        items.append(item)
        labels.append(label)
        for retriever in self._retrievers.values():
            retriever.observe(row, user, item, label)
