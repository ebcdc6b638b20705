"""The retrieval benchmark asks equals: the same requests, past and raters for all sides, and what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.benchmark.retrieval import (
    FEWEST,
    ROUNDS,
    InTurns,
    Side,
    other_retrievers,
    run_retrieval,
    sides_of,
    vote_worth,
)
from project.datamodule import InteractionData
from project.errors import DataError
from project.evaluation.baselines import baseline_rows, fit_baselines
from project.retrieval import ItemKNN, LightGCN, LLMEmbedding, TextEncoder, VectorRetriever
from project.retrieval.base import FloatArray, IntArray
from project.retrieval.walk import WalkRows, walk
from project.run import read_result


@pytest.fixture
def retrievers(data: InteractionData, tiny_model: Path) -> dict[str, VectorRetriever]:
    assert isinstance(data.retriever, LightGCN)
    return {
        "lightgcn": data.retriever,
        "text": TextEncoder(neighbours=3, encoder=str(tiny_model)),
        "llm": LLMEmbedding(neighbours=3, backbone=str(tiny_model), num_layers=1),
    }


def test_result(data: InteractionData, retrievers: dict[str, VectorRetriever], tmp_path: Path) -> None:
    """A row for each retriever's sums, LightGCN's first with ratio 1, and one for each that can encode the query."""
    result = run_retrieval(data, tmp_path, seconds=0.0, retrievers=retrievers)
    assert read_result(tmp_path / "results" / "benchmark-retrieval.json") == result
    assert result["protocol"]["hash"] == data.split.hash
    rows = result["retrieval"]
    sums, encoded = [(name, True) for name in retrievers], [("text", False), ("llm", False)]
    assert [(row["retriever"], row["cached"]) for row in rows] == sums + encoded
    assert rows[0]["ratio_to_lightgcn"] == rows[0]["total_ratio_to_lightgcn"] == 1
    assert rows[0]["vote_auc_above_lightgcn"] == {"value": 0, "interval": [0, 0]}
    for row in rows:
        low, high = row["spread"]
        assert 0 < row["vector_ms"] < row["ms_per_request"]
        assert low <= row["ms_per_request"] <= high
        assert row["ratio_spread"][0] <= row["ratio_to_lightgcn"] <= row["ratio_spread"][1]
        assert row["cpu_ratio_to_lightgcn"] > 0
        assert (row["requests"], row["rounds"]) == (FEWEST, ROUNDS)


def test_worth_is_the_baseline_of_the_same_retrieved(
    data: InteractionData, retrievers: dict[str, VectorRetriever]
) -> None:
    """vote_auc is the AUC that `baselines` gives to neighbour_vote on test, where that retriever is the data's."""
    worth = vote_worth(data, retrievers)
    found = baseline_rows(fit_baselines(data.split.rows, data.retrieved), data.split.rows)
    (baseline,) = (row for row in found if (row["name"], row["split"]) == ("neighbour_vote", "test"))
    assert worth["lightgcn"]["vote_auc"] == baseline["auc"]
    assert worth["lightgcn"]["vote_auc_interval"] == baseline["auc_interval"]
    assert worth["text"]["vote_auc"] != worth["llm"]["vote_auc"]
    gap = worth["text"]["vote_auc_above_lightgcn"]["value"]
    assert gap == pytest.approx(worth["text"]["vote_auc"] - worth["lightgcn"]["vote_auc"])


class Recorder(Side):
    """Keeps the histories it was asked with."""

    def query(self, item: IntArray, label: IntArray) -> FloatArray:
        self.asked = [*getattr(self, "asked", []), (item.tolist(), label.tolist())]
        return super().query(item, label)


def test_all_sides_get_the_strictly_earlier_past(
    data: InteractionData, retrievers: dict[str, VectorRetriever]
) -> None:
    """Every asked row reaches every side ROUNDS times, with its user's rows of earlier seconds, oldest first."""
    sides = [Recorder(name, retriever) for name, retriever in retrievers.items()]
    rows, items = data.split.rows, data.split.interactions.items
    asked = rows.filter(pl.col("split").cast(pl.String) == "test", pl.col("hist") > 0).head(5)
    turns = InTurns(retrievers, list(sides), rows["label"].to_numpy().astype(np.int64))
    query = rows["row_id"].is_in(asked["row_id"].implode()).to_numpy()
    log = WalkRows(**{**vars(WalkRows.from_log(rows)), "query": query})
    table = {name: np.ones((items.height, 3), np.float32) for name in retrievers}
    walk(log, turns, items, np.array([rows["timestamp"][0] + 1]), [table])
    expected = []
    for row in asked.to_dicts():
        past = rows.filter(pl.col("user") == row["user"], pl.col("timestamp") < row["timestamp"])
        expected += [(past["item"].to_list(), past["label"].to_list())] * ROUNDS
    for side in sides:
        assert side.asked == expected
        assert [len(seconds) for seconds in (*side.vector, *side.total)] == [5] * 2 * ROUNDS


def test_the_text_is_encoded(data: InteractionData, retrievers: dict[str, VectorRetriever]) -> None:
    """The encoding side's query is the encoding of the history's words, the summing side's is not."""
    summing, encoding = sides_of({"text": retrievers["text"]})
    items = data.split.interactions.items
    item, label = np.array([3, 5]), np.array([1, 0])
    retrievers["text"].begin(1, items)
    retrievers["text"].start_block({"weighted": np.ones((items.height, 32), np.float32)}, 1)
    text = f"liked: {items['title'][3]}. disliked: {items['title'][5]}."
    expected = retrievers["text"].reader.encode([text])[0]  # type: ignore[attr-defined]
    assert encoding.query(item, label) == pytest.approx(expected, abs=1e-6)
    assert summing.query(item, label).tolist() == [0.5] * 32  # 1 - .5, in every dimension


def test_rivals_are_asked_alike(data: InteractionData) -> None:
    """The configured LightGCN, and static exits with as many neighbours and raters; another retriever makes way for
    one.
    """
    data.retriever = LightGCN(neighbours=7, max_raters=50, dislike_weight=-0.1)
    static_exits = other_retrievers(data)
    assert static_exits["lightgcn"] is data.retriever
    assert isinstance(static_exits["llm"], LLMEmbedding)
    assert static_exits["llm"].backbone == data.tokenizer_name
    for static_exit in static_exits.values():
        assert (static_exit.neighbours, static_exit.max_raters, static_exit.dislike_weight) == (7, 50, -0.1)
    data.retriever = ItemKNN(neighbours=9)
    assert other_retrievers(data)["lightgcn"].settings() == LightGCN(neighbours=9).settings()


def test_nobody_to_ask(data: InteractionData, retrievers: dict[str, VectorRetriever], tmp_path: Path) -> None:
    """With one block no retriever was ever fitted."""
    data.refits = 1
    with pytest.raises(DataError, match=r"data\.refits is 1"):
        run_retrieval(data, tmp_path, seconds=0.0, retrievers=retrievers)


def test_one_interruption_does_not_count() -> None:
    """A round's figure is its median request in milliseconds: of 1, 2 and 900 s that is 2,000; rounds stay apart."""
    assert Side.milliseconds([[1.0, 900.0, 2.0], [3.0, 3.0, 3.0]]).tolist() == [2000, 3000]
