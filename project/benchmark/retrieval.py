"""Benchmark of retrieval: what a query's vector costs, and what the neighbours are worth, for a graph and for texts.

Unusual here: the same request goes to all sides in turn, in rotating order; a figure is the median over rounds of a
round's median request, a ratio that of the rounds' ratios. On a busy machine long steps are interrupted and short ones
are not, so the ratio of processor times stands beside that of the clock. Worth is the AUC of the neighbours' vote
alone, on all test targets, from the evidence table that the retriever would give to a model, whose queries are sums; a
side that encodes the history repeats its retriever's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from project.artefacts import result_head, write_json
from project.benchmark.retrieval_sides import ROUNDS, InTurns, Side, merged, sides_of
from project.counting import FEATURES
from project.errors import DataError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import Floats, auc
from project.floors.quick import SINGLE_FEATURE, evidence_features, targets_of, train_labels
from project.report.tables import render, shown
from project.retrieval import LightGCN, LLMEmbedding, TextEncoder, VectorRetriever, evidence_tables
from project.retrieval.evidence import evidence_folder
from project.retrieval.walk import Snapshots, WalkRows, walk

if TYPE_CHECKING:
    from project.datamodule import InteractionData

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
        seconds: About how long to measure; evidence that is not in the cache comes on top.
        requests: Most targets of the test split in the sample.
        retrievers: By name, "lightgcn" first; None: `rivals_of(data)`.

    Raises:
        DataError: No test target can be asked.
    """
    retrievers = retrievers or rivals_of(data)
    # first of all, so that evidence is made where it is not in the cache
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


def rivals_of(data: InteractionData) -> dict[str, VectorRetriever]:
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
        tables = evidence_tables(data.split, retriever, data.refits, data.cache_dir)
        features = evidence_features(rows, tables, "test", base)
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
    folder = evidence_folder(data.split, retriever, data.refits, data.cache_dir)
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
