"""Seconds that a neighbour query takes, and the AUC of the neighbours' vote: `retrieval_times.py RUN OUT [SECONDS]`.

LightGCN as the run has it, a text encoder, and the backbone's hidden states, on the same requests in turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.arrays import F32, F64, I64
from project.config import open_run
from project.datamodule import InteractionData
from project.errors import DataError
from project.evaluation.baselines import (
    SINGLE_FEATURE,
    targets_of,
    targets_table,
    train_labels,
)
from project.features import FEATURES, feature_matrix
from project.metrics import auc
from project.report.tables import render
from project.retrieval import (
    LightGCN,
    RetrievedFeatures,
    Retriever,
    TextEncoder,
    VectorRetriever,
)
from project.retrieval.base import NO_NEIGHBOURS, Neighbours, Raters, Snapshot
from project.retrieval.compiled import inverse_norms, nearest
from project.retrieval.lightgcn import DISLIKE_WEIGHT
from project.retrieval.past import WalkRows
from project.retrieval.walk import walk
from project.run import result_head, write_json

ROUNDS = 3  # fewer do not show the spread
FEWEST = 8  # requests: fewer are not a sample
MOST = 200
REFERENCE = "lightgcn"


@dataclass
class Query:
    """One way to get a query's vector, and the time it took.

    A request has one time in seconds: the vector, the nearest raters and their vote.
    """

    name: str  # of the retriever
    retriever: VectorRetriever
    # the query sums item vectors that are kept; else it encodes the history as text
    cached: bool
    # items and labels, oldest first, to the vector (d,)
    vector_of: Callable[[I64, I64], F32]
    rounds: list[list[float]] = field(default_factory=lambda: [[] for _ in range(ROUNDS)])

    def measure(
        self, number: int, item: I64, label: I64, raters: Raters, labels: I64
    ) -> None:
        """One request in round `number`: vector, nearest raters, and the mean of their labels."""
        start = time.perf_counter()
        vector = self.vector_of(item, label)
        norm = inverse_norms(vector[None])[0]
        users = self.retriever._vectors
        count = self.retriever.neighbours
        places, _ = nearest(
            users, self.retriever._inverse, vector, norm, raters.user, count
        )
        if places.size:
            labels[raters.row[places]].mean()
        self.rounds[number].append(time.perf_counter() - start)

    def milliseconds(self) -> F64:
        """Medians over the requests of each round, (rounds,): one interruption must not count."""
        medians: F64 = 1e3 * np.median(np.array(self.rounds), axis=1)
        return medians


def queries_of(retrievers: Mapping[str, VectorRetriever]) -> list[Query]:
    """All retrievers with their item vectors, then those that can also encode a history."""
    summing = [Query(name, r, True, partial(summed, r)) for name, r in retrievers.items()]
    encoding = [
        Query(name, r, False, partial(encoded, r))
        for name, r in retrievers.items()
        if isinstance(r, TextEncoder)
    ]
    return [*summing, *encoding]


def summed(retriever: VectorRetriever, item: I64, label: I64) -> F32:
    """The vector (d,) of a user with these items and labels (rows,), as the retriever sums it."""
    assert retriever._weighted is not None
    vector: F32 = (
        np.where(label == 1, np.float32(1), np.float32(DISLIKE_WEIGHT))
        @ retriever._weighted[item]
    )
    return vector


def encoded(retriever: TextEncoder, item: I64, label: I64) -> F32:
    """The history's text as a vector (d,), as a system without item vectors encodes it at every request.

    Liked titles come first, then disliked ones, the latest first: where a text is cut, the oldest goes.
    """
    titles = retriever._items["title"]
    parts = list[str]()
    for answer, name in ((1, "liked"), (0, "disliked")):
        codes = item[label == answer][::-1]
        if codes.size:
            parts.append(f"{name}: {'; '.join(titles.gather(codes).to_list())}.")
    vector: F32 = retriever.reader.encode([" ".join(parts)])[0]
    return vector


class InTurns(Retriever):
    """Goes through the log as one retriever and hands every request to all queries, which are timed.

    Every request goes to all queries `ROUNDS` times in turn; the order rotates. No request is in block 0. Retrievers
    share neighbours and max_raters; `labels` are labels by position in the log, shape (rows,).
    """

    def __init__(
        self, retrievers: Mapping[str, VectorRetriever], queries: list[Query], labels: I64
    ) -> None:
        first = next(iter(retrievers.values()))
        super().__init__(first.neighbours, first.max_raters)
        self._retrievers, self._queries, self._labels = retrievers, queries, labels

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget everyone's past."""
        self._past: dict[int, tuple[list[int], list[int]]] = {}
        self._requests = 0
        for retriever in self._retrievers.values():
            retriever.begin(num_users, items)
        # models and item vectors are read now: no request should wait for them
        self.encoding_seconds(rows=1)

    def encoding_seconds(self, rows: int) -> float:
        """Time that all encodings together need for one query whose history has so many rows."""
        history = np.zeros(rows, np.int64), np.ones(rows, np.int64)
        start = time.perf_counter()
        for query in self._queries:
            if not query.cached:
                query.vector_of(*history)
        return time.perf_counter() - start

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """All retrievers start the block, each with its own item table, which has its name in the snapshot."""
        for name, retriever in self._retrievers.items():
            retriever.start_block({"weighted": snapshot[name]}, block)

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """Measure all queries on this request; what they find is not kept."""
        items, known = (np.array(part, np.int64) for part in self._past[user])
        for number in range(ROUNDS):
            turn = (self._requests + number) % len(self._queries)
            for query in self._queries[turn:] + self._queries[:turn]:
                query.measure(number, items, known, raters, self._labels)
        self._requests += 1
        return NO_NEIGHBOURS

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """All retrievers take in a row."""
        items, labels = self._past.setdefault(user, ([], []))
        items.append(item)
        labels.append(label)
        for retriever in self._retrievers.values():
            retriever.observe(row, user, item, label)


def measure(run: Path, seconds: float) -> dict[str, Any]:
    """The result, measured for about so many seconds; features that are not in the cache take time of their own."""
    # 1. votes of every retriever, which makes the retrieved features that the cache lacks
    _, data = open_run(run)
    retrievers = other_retrievers(data)
    accuracy = vote_accuracy(data, retrievers)
    # 2. all item tables of a block in one snapshot, by the retriever's name
    fitted = {
        name: RetrievedFeatures(data.split, r, data.refits, data.cache_dir).snapshots()
        for name, r in retrievers.items()
    }
    cuts = fitted[REFERENCE].cuts
    snapshots: list[Snapshot] = [
        {name: found.fitted[block]["weighted"] for name, found in fitted.items()}
        for block in range(cuts.size)
    ]
    # 3. as many test targets as there is time for, by the cost of one with a history of
    # median length
    rows, queries = data.split.rows, queries_of(retrievers)
    turns = InTurns(retrievers, queries, rows["label"].to_numpy().astype(np.int64))
    sample = _sample(data, cuts)
    turns.begin(data.split.interactions.users.height, data.split.interactions.items)
    cost = turns.encoding_seconds(int(sample["hist"].median()))  # type: ignore[arg-type]
    sample = sample.head(max(FEWEST, int(seconds / max(cost * ROUNDS, 1e-9))))
    # 4. one walk through the log, which times every query at every request
    log = replace(
        WalkRows.from_log(rows),
        query=rows["row_id"].is_in(sample["row_id"].implode()).to_numpy(),
    )
    walk(log, turns, data.split.interactions.items, cuts, snapshots)
    about = (
        f"Timed on {sample.height} requests of test for one candidate, {float(sample['hist'].mean()):.0f} earlier rows "
        "on average: the query's vector, the nearest raters and their vote. Vote AUC: of that vote alone on all rows "
        "of test."
    )
    head = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    return head | {
        "rows": [_times(query, queries[0], accuracy[query.name]) for query in queries],
        "about": about,
    }


def other_retrievers(data: InteractionData) -> dict[str, VectorRetriever]:
    """LightGCN as configured, a text encoder, and the backbone's hidden states, with as many neighbours and raters."""
    own = data.retriever
    shared: dict[str, Any] = {"neighbours": own.neighbours, "max_raters": own.max_raters}
    return {
        REFERENCE: own if isinstance(own, LightGCN) else LightGCN(**shared),
        "text": TextEncoder(**shared),
        "llm": TextEncoder(encoder=data.tokenizer_name, **shared),
    }


def vote_accuracy(
    data: InteractionData, retrievers: Mapping[str, VectorRetriever]
) -> dict[str, float | None]:
    """AUC of each retriever's neighbour vote on all test targets."""
    rows = data.split.rows
    base = float(train_labels(rows).mean())
    labels = targets_of(rows, "test")["label"].to_numpy()
    found = {}
    for name, retriever in retrievers.items():
        tables = RetrievedFeatures(
            data.split, retriever, data.refits, data.cache_dir
        ).tables()
        features = feature_matrix(targets_table(rows, tables, "test"), base)
        found[name] = auc(
            features[:, FEATURES.index(SINGLE_FEATURE["neighbour_vote"])], labels
        )
    return found


def _sample(data: InteractionData, cuts: F64) -> pl.DataFrame:
    """At most MOST test targets in random order, of users with earlier rows, in blocks after the first."""
    usable = (pl.col("hist") > 0) & (pl.col("timestamp") >= cuts.min(initial=np.inf))
    targets = targets_of(data.split.rows, "test").filter(usable)
    if targets.is_empty():
        raise DataError(
            f"found no test target whose user has earlier rows and before which a retriever "
            f"was fitted: data.refits is {data.refits} for {data.split.rows.height} rows; expected more."
        )
    return targets.sample(min(MOST, targets.height), shuffle=True, seed=data.seed)


def _times(query: Query, reference: Query, vote_auc: float | None) -> dict[str, Any]:
    """Milliseconds a request, the median of the rounds, and their ratio to the reference's: LightGCN's sums."""
    return {
        "retriever": query.name,
        "query": "item vectors summed" if query.cached else "history encoded",
        "ms a request": float(np.median(query.milliseconds())),
        "over LightGCN": float(np.median(query.milliseconds() / reference.milliseconds())),
        "vote AUC": vote_auc,
    }


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), float(sys.argv[3]) if len(sys.argv) > 3 else 60.0)
    print(render(found), write_json(Path(sys.argv[2]), found), sep="\n")
