"""Retrievers side by side: seconds a neighbour query, and what their votes are worth."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from project.errors import DataError
from project.evaluation.baselines import SINGLE_FEATURE, retrieved_features, targets_of, train_labels
from project.evaluation.bootstrap import UserBootstrap
from project.features import FEATURES
from project.metrics import Floats, auc
from project.report.tables import render, shown
from project.retrieval import (
    LightGCN,
    LLMEmbedding,
    Retriever,
    TextEncoder,
    VectorRetriever,
    retrieved_tables,
)
from project.retrieval.base import NO_NEIGHBOURS, FloatArray, IntArray, Neighbours, Raters, Snapshot
from project.retrieval.features import retrieved_folder
from project.retrieval.lightgcn import inverse_norms
from project.retrieval.text import ItemTextRetriever
from project.retrieval.walk import Snapshots, WalkRows, walk
from project.run import result_head, write_json

if TYPE_CHECKING:
    from project.datamodule import InteractionData

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


REFERENCE = "lightgcn"
FEWEST = 8  # requests: fewer are not a sample


def run_retrieval(
    data: InteractionData,
    folder: Path,
    seconds: float,
    requests: int = 200,
    retrievers: Mapping[str, VectorRetriever] | None = None,
) -> dict[str, Any]:
    """Measure and write results/benchmark-retrieval.json.

    Args:
        data: Logs, protocol and blocks.
        folder: Run folder of the result file.
        seconds: About how long to measure; retrieved features that is not in the cache comes on top.
        requests: Most targets of the test split in the sample.
        retrievers: By name, "lightgcn" first; None: `other_retrievers(data)`.

    Raises:
        DataError: No test target can be asked.
    """
    retrievers = retrievers or other_retrievers(data)
    # first of all, so that retrieved features is made where it is not in the cache
    worth = vote_worth(data, retrievers)
    fitted = {name: _snapshots(data, retriever) for name, retriever in retrievers.items()}
    cuts = fitted[REFERENCE].cuts
    rows, sides = data.split.rows, sides_of(retrievers)
    turns = InTurns(retrievers, sides, rows["label"].to_numpy().astype(np.int64))
    asked = _sample(data, cuts, requests)
    asked = asked.head(_affordable(turns, data, asked, seconds))
    log = replace(WalkRows.from_log(rows), query=rows["row_id"].is_in(asked["row_id"].implode()).to_numpy())
    walk(log, turns, data.split.interactions.items, cuts, merged(fitted), "requests")
    about = {"requests": asked.height, "rounds": ROUNDS, "history_rows": float(asked["hist"].mean())}  # type: ignore[arg-type]
    result = result_head("benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed)
    result["retrieval"] = [side_row(side, sides[0]) | worth[side.name] | about for side in sides]
    path = write_json(folder / "results" / "benchmark-retrieval.json", result)
    Console(width=150).print(shown(render(result)), f"written: {path}")
    return result


def other_retrievers(data: InteractionData) -> dict[str, VectorRetriever]:
    """LightGCN as configured, a text encoder, and the backbone's hidden states, with as many neighbours and raters."""
    own = data.retriever
    graph = own if isinstance(own, LightGCN) else LightGCN(own.neighbours, own.max_raters)
    shared = (graph.neighbours, graph.max_raters, graph.dislike_weight)
    return {
        REFERENCE: graph,
        "text": TextEncoder(*shared),
        "llm": LLMEmbedding(*shared, backbone=data.tokenizer_name),
    }


def vote_worth(data: InteractionData, retrievers: Mapping[str, VectorRetriever]) -> dict[str, dict[str, Any]]:
    """AUC of each retriever's neighbour vote on all test targets, and what it is above LightGCN's, users resampled.

    Args:
        data: Logs, protocol and blocks.
        retrievers: By name, "lightgcn" among them.
    """
    rows = data.split.rows
    base = float(train_labels(rows).mean())
    votes = dict[str, Floats]()
    for name, retriever in retrievers.items():
        tables = retrieved_tables(data.split, retriever, data.refits, data.cache_dir)
        features = retrieved_features(rows, tables, "test", base)
        votes[name] = features[:, FEATURES.index(SINGLE_FEATURE["neighbour_vote"])]
    test = targets_of(rows, "test")
    labels, bootstrap = test["label"].to_numpy(), UserBootstrap(test["user"].to_numpy(), seed=data.seed)
    return {
        name: {
            "vote_auc": auc(vote, labels),
            "vote_auc_interval": bootstrap.auc_interval(vote, labels),
            "vote_auc_above_lightgcn": bootstrap.difference_interval(vote, votes[REFERENCE], labels),
        }
        for name, vote in votes.items()
    }


def _snapshots(data: InteractionData, retriever: VectorRetriever) -> Snapshots:
    folder = retrieved_folder(data.split, retriever, data.refits, data.cache_dir)
    return Snapshots.load(folder / "snapshots.npz")


def _sample(data: InteractionData, cuts: NDArray[np.float64], requests: int) -> pl.DataFrame:
    """Test targets in random order, of users with a past, in blocks that have one."""
    usable = pl.lit(False) if not cuts.size else (pl.col("hist") > 0) & (pl.col("timestamp") >= cuts[0])
    targets = targets_of(data.split.rows, "test").filter(usable)
    if targets.is_empty():
        raise DataError(
            f"benchmark --only retrieval found no test target whose user has earlier rows and before which a retriever "
            f"was fitted: data.refits is {data.refits} for {data.split.rows.height} rows; expected more."
        )
    return targets.sample(min(requests, targets.height), shuffle=True, seed=data.seed)


def _affordable(turns: InTurns, data: InteractionData, asked: pl.DataFrame, seconds: float) -> int:
    """How many requests can be asked in the time there is, judged by one whose history is of median length."""
    log = data.split.interactions
    turns.begin(log.users.height, log.items)
    cost = turns.encoding_seconds(int(asked["hist"].median()))  # type: ignore[arg-type]
    return max(FEWEST, int(seconds / max(cost * ROUNDS, 1e-9)))


def side_row(side: Side, reference: Side) -> dict[str, Any]:
    """What was measured of a side: milliseconds a request, and how many times the reference's.

    Args:
        side: What is described.
        reference: LightGCN's sums.
    """
    vector, total = side.milliseconds(side.vector), side.milliseconds(side.total)
    ratios = vector / side.milliseconds(reference.vector)
    cpu = side.milliseconds(side.cpu) / side.milliseconds(reference.cpu)
    totals = total / side.milliseconds(reference.total)
    return {
        "retriever": side.name,
        "cached": side.cached,
        "vector_ms": float(np.median(vector)),
        "ms_per_request": float(np.median(total)),
        "spread": [float(total.min()), float(total.max())],
        "ratio_to_lightgcn": float(np.median(ratios)),
        "ratio_spread": [float(ratios.min()), float(ratios.max())],
        "cpu_ratio_to_lightgcn": float(np.median(cpu)),
        "total_ratio_to_lightgcn": float(np.median(totals)),
    }
