"""The controls: none, random raters, item-kNN; and that all are chosen in YAML by class path."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from jsonargparse import ArgumentParser
from sklearn.metrics.pairwise import cosine_similarity

from project.features import FEATURES, feature_matrix
from project.retrieval import (
    ItemKNN,
    LightGCN,
    NoRetriever,
    RandomRetriever,
    Retriever,
    TextEncoder,
)
from project.retrieval.base import OwnRows, Raters, top

CUTS = np.array([20.0, 45.0])


def test_none_keeps_the_rates(log_of: Callable, retrieved_of: Callable, co_likes: Retriever):
    """Without a retriever there are no neighbours, and the rates are those of any other retriever."""
    rows = log_of(0)
    none, other = retrieved_of(rows, NoRetriever(), CUTS), retrieved_of(rows, co_likes, CUTS)
    rates = ["row_id", "item_rate", "item_count", "user_rate", "user_count"]
    assert none["neighbour_count"].sum() == 0
    assert none["vote"].null_count() == rows.height
    assert none.select(rates).equals(other.select(rates))


def test_random_draws_distinct_raters_the_same_each_time():
    """A draw is N distinct raters, all where there are fewer, and depends on seed, candidate and time alone."""
    raters = Raters(np.arange(100, 120), np.arange(20))
    first = RandomRetriever(neighbours=5).select(0, 3, 7.0, raters).row.tolist()
    assert first == RandomRetriever(neighbours=5).select(9, 3, 7.0, raters).row.tolist()
    assert len(set(first)) == 5
    assert first != RandomRetriever(neighbours=5, seed=1).select(0, 3, 7.0, raters).row.tolist()
    assert first != RandomRetriever(neighbours=5).select(0, 3, 8.0, raters).row.tolist()
    assert sorted(RandomRetriever(neighbours=50).select(0, 3, 7.0, raters).row.tolist()) == list(
        range(100, 120)
    )


def test_random_raters_weigh_alike(log_of: Callable, retrieved_of: Callable):
    """The vote that is weighted by similarity, which prompts tell as a number, is the plain vote, not even odds."""
    rows = log_of(0)
    found = retrieved_of(rows, RandomRetriever(neighbours=5), CUTS)
    features = dict(zip(FEATURES, feature_matrix(found, 0.5).T, strict=True))
    assert found["neighbour_count"].sum() > 0
    np.testing.assert_allclose(features["weighted_vote_log_odds"], features["vote_log_odds"], atol=1e-6)


def test_random_is_uniform():
    """Over many seconds every one of 4 raters is drawn first about a quarter of the time."""
    raters = Raters(np.arange(4), np.arange(4))
    retriever = RandomRetriever(neighbours=1)
    drawn = [int(retriever.select(0, 0, float(second), raters).row[0]) for second in range(2000)]
    assert np.bincount(drawn) / 2000 == pytest.approx([0.25] * 4, abs=0.04)


def test_item_knn_equals_scikit_learn(log_of: Callable, retrieved_of: Callable):
    """Neighbours are the user's own rows, ordered by scikit-learn's cosine of the block's liked-by columns."""
    rows = log_of(1)
    found = retrieved_of(rows, ItemKNN(neighbours=3), CUTS)
    assert found["neighbour_count"].sum() > 0
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        starts = CUTS[row["timestamp"] >= CUTS]
        expected = []
        if starts.size:
            likes = np.zeros((12, 9))
            for edge in rows.filter(pl.col("timestamp") < starts[-1], pl.col("label") == 1).to_dicts():
                likes[edge["user"], edge["item"]] = 1
            cosine = cosine_similarity(likes.T)[row["item"]].astype(np.float32)
            own = rows.filter(
                pl.col("timestamp") < row["timestamp"], pl.col("user") == row["user"]
            ).to_dicts()
            ranked = sorted(own, key=lambda r: (-round(float(cosine[r["item"]]), 6), -r["row_id"]))
            expected = [
                (r["row_id"], cosine[r["item"]], r["label"]) for r in ranked if cosine[r["item"]] > 0
            ][:3]
        assert got["neighbours"] == [neighbour for neighbour, _, _ in expected]
        assert got["similarities"] == pytest.approx([similarity for _, similarity, _ in expected], abs=1e-6)
        assert got["answers"] == [label for _, _, label in expected]


@pytest.mark.parametrize("kind", [LightGCN, TextEncoder, ItemKNN, RandomRetriever, NoRetriever])
def test_yaml_chooses_a_retriever_by_class_path(kind: type[Retriever]):
    """Each retriever is one class path for jsonargparse, and its settings give the constructor's arguments back."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--retriever", type=Retriever)
    given = {} if kind is NoRetriever else {"neighbours": 7}
    chosen = {"class_path": f"project.retrieval.{kind.__name__}", "init_args": given}
    retriever = parser.instantiate(parser.parse_object({"retriever": chosen})).retriever
    settings = retriever.settings()
    assert type(retriever) is kind
    assert settings["class_path"] == f"{kind.__module__}.{kind.__name__}"
    assert settings["init_args"] == {**kind().settings()["init_args"], **given}


@pytest.mark.parametrize("seed", range(20))
def test_own_rows_are_those_of_the_whole_past(seed: int):
    """Repeated items, ties and few rows: rows, labels and similarities are those that all rows together give.

    What is looked at grows with distinct items: of 2,000 rows on 7 items at most 7 times 5 are kept.
    """
    rng = np.random.default_rng(seed)
    count, size = 5, int(rng.choice([1, 4, 30, 2000]))
    item, label = rng.integers(0, 7, size), rng.integers(0, 2, size)
    own = OwnRows(count)
    for row in range(size):
        own.add(row, int(item[row]), int(label[row]))
    similarity = rng.integers(-2, 3, 7).astype(np.float32) / 3
    rows, labels, found = own.nearest(similarity[own.items])
    expected = top(similarity[item], count)
    assert rows.tolist() == expected.tolist()
    assert labels.tolist() == label[expected].tolist()
    assert found.tolist() == similarity[item][expected].tolist()
    assert sum(map(len, own._rows)) <= 7 * count
