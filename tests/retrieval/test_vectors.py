"""User vectors: equal to brute force, one table a block, zero vectors."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from project.retrieval import VectorRetriever
from project.retrieval.base import Edges, Raters
from project.retrieval.lightgcn import inverse_norms


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_equal_brute_force(
    log_of: Callable[..., pl.DataFrame],
    retrieved_of: Callable[..., pl.DataFrame],
    co_likes: VectorRetriever,
    seed: int,
):
    """Every row's neighbours and cosines equal the definition: one table a block, strictly earlier rows."""
    rows, cuts = log_of(seed), np.array([20.0, 45.0])
    found = retrieved_of(rows, co_likes, cuts)
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        expected = brute_force(rows, row, cuts, co_likes)
        assert got["neighbours"] == [neighbour for neighbour, _ in expected]
        assert got["similarities"] == pytest.approx([cosine for _, cosine in expected], abs=1e-5)


def brute_force(
    rows: pl.DataFrame, row: dict, cuts: np.ndarray, retriever: VectorRetriever
) -> list[tuple[int, float]]:
    """(row_id, cosine) of the nearest raters, by filters on the log alone."""
    starts = cuts[cuts <= row["timestamp"]]
    if not starts.size:
        return []
    likes = np.zeros((12, 9))
    before = rows.filter(pl.col("timestamp") < starts[-1])
    for edge in before.to_dicts():
        likes[edge["user"], edge["item"]] += edge["label"]
    weighted = likes.T @ likes / np.sqrt(np.maximum(likes.sum(0), 1))[:, None]
    past = rows.filter(pl.col("timestamp") < row["timestamp"])
    vectors = np.zeros((12, 9))
    latest = {}
    for earlier in past.to_dicts():
        vectors[earlier["user"]] += (1 if earlier["label"] else -0.5) * weighted[earlier["item"]]
        if earlier["item"] == row["item"] and earlier["user"] != row["user"]:
            latest[earlier["user"]] = earlier["row_id"]
    norms = np.linalg.norm(vectors, axis=1)
    own = row["user"]
    cosines = [
        (neighbour, float(vectors[user] @ vectors[own] / norms[user] / norms[own]))
        for user, neighbour in latest.items()
        if norms[user] > 0 and norms[own] > 0
    ]
    # rounded: mathematically equal cosines are ordered by later row
    return sorted(cosines, key=lambda pair: (-round(pair[1], 6), -pair[0]))[: retriever.neighbours]


def test_a_history_given_at_once_is_the_one_observed(
    log_of: Callable[..., pl.DataFrame], items_of: Callable[..., pl.DataFrame], co_likes: VectorRetriever
):
    """history_vector, then nearest, finds what select finds for a user who was observed row by row."""
    rows = log_of(2)
    user, item, label = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
    co_likes.begin(12, items_of())
    co_likes.start_block(co_likes.fit(Edges(user, item, label), 1), 1)
    for row, edge in enumerate(zip(user.tolist(), item.tolist(), label.tolist(), strict=True)):
        co_likes.observe(row, *edge)
    raters, own = Raters(np.arange(11) + 100, np.arange(1, 12)), user == 0
    assert own.sum() > 3
    vector = co_likes.history_vector(item[own], label[own])
    found = co_likes.nearest(vector, inverse_norms(vector), raters)
    expected = co_likes.select(0, 0, 1.0, raters)
    assert found.row.tolist() == expected.row.tolist()
    assert found.similarity == pytest.approx(expected.similarity, abs=1e-6)


def test_a_dislike_weight_of_zero_leaves_only_likes(
    log_of: Callable[..., pl.DataFrame], retrieved_of: Callable[..., pl.DataFrame], co_likes: VectorRetriever
):
    """With weight 0 a user who only disliked has no vector, so no neighbours."""
    rows = log_of(0).with_columns(label=pl.when(pl.col("user") == 0).then(0).otherwise("label").cast(pl.Int8))
    co_likes.dislike_weight = 0.0
    found = retrieved_of(rows, co_likes, np.array([20.0]))
    asked = rows["user"] == 0
    assert found.filter(asked)["neighbour_count"].sum() == 0
    assert found.filter(~asked)["neighbour_count"].sum() > 0
