"""The retrieval benchmark: the same requests, past and raters for all contenders; what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.arrays import F32, I64
from project.benchmark.retrieval import (
    FEWEST,
    ROUNDS,
    Contender,
    InTurns,
    contenders_of,
    other_retrievers,
    run_retrieval,
    vote_accuracy,
)
from project.datamodule import InteractionData
from project.errors import DataError
from project.evaluation.baselines import baseline_rows, fit_baselines
from project.retrieval import ItemKNN, LightGCN, TextEncoder, VectorRetriever
from project.retrieval.past import WalkRows
from project.retrieval.walk import walk
from project.run import read_result


@pytest.fixture
def retrievers(data: InteractionData, tiny_model: Path) -> dict[str, VectorRetriever]:
    assert isinstance(data.retriever, LightGCN)
    return {
        "lightgcn": data.retriever,
        "text": TextEncoder(neighbours=3, encoder=str(tiny_model)),
        "llm": TextEncoder(neighbours=3, encoder=str(tiny_model), num_layers=1),
    }


def record(contender: Contender) -> list[tuple[list[int], list[int]]]:
    """Keeps the histories of a contender's queries."""
    seen, query = [], contender.query

    def recorded(item: I64, label: I64) -> F32:
        seen.append((item.tolist(), label.tolist()))
        return query(item, label)

    contender.query = recorded
    return seen


def test_result(
    data: InteractionData,
    retrievers: dict[str, VectorRetriever],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A row for each retriever's sums, LightGCN's first with ratio 1, and one for each that can encode the query."""
    result = run_retrieval(data, tmp_path, seconds=0.0, retrievers=retrievers)
    assert read_result(tmp_path / "results" / "benchmark-retrieval.json") == result
    assert result["protocol"]["hash"] == data.split.hash
    rows = result["retrieval"]
    assert [(row["retriever"], row["cached"]) for row in rows] == [
        ("lightgcn", True),
        ("text", True),
        ("llm", True),
        ("text", False),
        ("llm", False),
    ]
    assert rows[0]["ratio_to_lightgcn"] == rows[0]["total_ratio_to_lightgcn"] == 1
    assert rows[0]["vote_auc_above_lightgcn"] == {"value": 0, "interval": [0, 0]}
    for row in rows:
        low, high = row["spread"]
        assert 0 < row["vector_ms"] < row["ms_per_request"]
        assert low <= row["ms_per_request"] <= high
        assert row["ratio_spread"][0] <= row["ratio_to_lightgcn"] <= row["ratio_spread"][1]
        assert row["cpu_ratio_to_lightgcn"] > 0
        assert (row["requests"], row["rounds"]) == (FEWEST, ROUNDS)
    assert "history encoded" in " ".join(capsys.readouterr().out.split())


def test_accuracy_is_the_baselines(data: InteractionData, retrievers: dict[str, VectorRetriever]) -> None:
    """vote_auc is the AUC that `baselines` gives to neighbour_vote on test, where that retriever is the data's."""
    accuracy = vote_accuracy(data, retrievers)
    baselines = fit_baselines(data.split.rows, data.retrieved)
    (baseline,) = (
        row
        for row in baseline_rows(baselines, data.split.rows)
        if (row["name"], row["split"]) == ("neighbour_vote", "test")
    )
    assert accuracy["lightgcn"]["vote_auc"] == baseline["auc"]
    assert accuracy["lightgcn"]["vote_auc_interval"] == baseline["auc_interval"]
    assert accuracy["text"]["vote_auc"] != accuracy["llm"]["vote_auc"]
    gap = accuracy["text"]["vote_auc_above_lightgcn"]["value"]
    assert gap == pytest.approx(accuracy["text"]["vote_auc"] - accuracy["lightgcn"]["vote_auc"])


def test_all_contenders_get_the_strictly_earlier_past(
    data: InteractionData, retrievers: dict[str, VectorRetriever]
) -> None:
    """Every query row reaches every contender ROUNDS times, with its user's rows of earlier seconds, oldest first."""
    contenders = contenders_of(retrievers)[: len(retrievers)]
    queries = [record(contender) for contender in contenders]
    rows, items = data.split.rows, data.split.interactions.items
    queried = rows.filter(pl.col("split").cast(pl.String) == "test", pl.col("hist") > 0).head(5)
    turns = InTurns(retrievers, contenders, rows["label"].to_numpy().astype(np.int64))
    query = rows["row_id"].is_in(queried["row_id"].implode()).to_numpy()
    log = WalkRows(**{**vars(WalkRows.from_log(rows)), "query": query})
    table = {name: np.ones((items.height, 3), np.float32) for name in retrievers}
    walk(log, turns, items, np.array([rows["timestamp"][0] + 1]), [table])
    expected = []
    for row in queried.to_dicts():
        past = rows.filter(pl.col("user") == row["user"], pl.col("timestamp") < row["timestamp"])
        expected += [(past["item"].to_list(), past["label"].to_list())] * ROUNDS
    for contender, seen in zip(contenders, queries, strict=True):
        assert seen == expected
        assert [len(times) for times in contender.rounds] == [5] * ROUNDS


def test_the_text_is_encoded(data: InteractionData, retrievers: dict[str, VectorRetriever]) -> None:
    """The encoding contender's query is the encoding of the history's words, the summing one's is not."""
    summing, encoding = contenders_of({"text": retrievers["text"]})
    items = data.split.interactions.items
    item, label = np.array([3, 5]), np.array([1, 0])
    retrievers["text"].begin(1, items)
    retrievers["text"].start_block({"weighted": np.ones((items.height, 32), np.float32)}, 1)
    text = f"liked: {items['title'][3]}. disliked: {items['title'][5]}."
    expected = retrievers["text"].reader.encode([text])[0]  # type: ignore[attr-defined]
    assert encoding.query(item, label) == pytest.approx(expected, abs=1e-6)
    assert summing.query(item, label).tolist() == [0.5] * 32  # 1 - .5, in every dimension


def test_all_retrievers_have_the_same_settings(data: InteractionData) -> None:
    """The configured LightGCN, and encoders with as many neighbours and raters; any other retriever is replaced."""
    data.retriever = LightGCN(neighbours=7, max_raters=50)
    retrievers = other_retrievers(data)
    assert retrievers["lightgcn"] is data.retriever
    assert isinstance(retrievers["llm"], TextEncoder)
    assert retrievers["llm"].encoder == data.tokenizer_name
    for retriever in retrievers.values():
        assert (retriever.neighbours, retriever.max_raters) == (7, 50)
    data.retriever = ItemKNN(neighbours=9)
    assert other_retrievers(data)["lightgcn"].settings() == LightGCN(neighbours=9).settings()


def test_no_request_to_measure(
    data: InteractionData, retrievers: dict[str, VectorRetriever], tmp_path: Path
) -> None:
    """With one block no retriever was ever fitted: the key, what was found, what is expected."""
    data.refits = 1
    with pytest.raises(DataError, match=r"data\.refits is 1 for \d+ rows; expected more"):
        run_retrieval(data, tmp_path, seconds=0.0, retrievers=retrievers)


def test_one_interruption_does_not_count() -> None:
    """A round's figure is its median request in milliseconds: of 1, 2 and 900 s that is 2,000; rounds stay apart."""
    contender = contenders_of({"lightgcn": LightGCN()})[0]
    contender.rounds = [[(seconds, 0.0, 0.0) for seconds in part] for part in ([1.0, 900.0, 2.0], [3.0] * 3)]
    assert contender.milliseconds()[0].tolist() == [2000, 3000]
