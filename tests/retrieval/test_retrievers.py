"""Tests LightGCN and the controls (item-kNN, random raters, none): what each finds, and which settings it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from example_logs import CoLikes, flip, items_table, likes_before, make_log, retrieved
from sklearn.metrics.pairwise import cosine_similarity

from project.cache import content_key
from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.retrieval import (
    ItemKNN,
    LightGCN,
    MatrixFactorisation,
    NoRetriever,
)
from project.retrieval.base import Edges
from project.retrieval.lightgcn import LightGCNModel, like_graph
from project.retrieval.walk import fit_snapshots

EDGES = Edges(
    user=np.array([0, 0, 1, 2, 0]),
    item=np.array([0, 1, 1, 2, 0]),
    label=np.array([1, 1, 1, 0, 1]),
)


def test_adjacency_golden() -> None:
    """Likes (u0,i0) twice, (u0,i1), (u1,i1): degrees i0 1, i1 2, u0 2, u1 1; repeats and dislikes do not count."""
    graph = like_graph(EDGES, num_users=3, num_items=4)
    expected = torch.zeros(3, 4)
    expected[0, 0] = 0.5**0.5  # u0 - i0: 1 / sqrt(2 * 1)
    expected[0, 1] = 0.5  # u0 - i1: 1 / sqrt(2 * 2)
    expected[1, 1] = 0.5**0.5  # u1 - i1
    torch.testing.assert_close(torch.from_numpy(graph.adjacency.toarray()), expected)
    assert graph.seen_items.tolist() == [0, 1]


def test_propagation_equals_the_library_on_its_edge_list() -> None:
    """Forward and backward."""
    graph = like_graph(EDGES, 3, 4)
    ours = LightGCN(dim=5)._first_model(7)
    theirs = LightGCNModel(7, 5, 3)  # normalises edges itself
    theirs.load_state_dict(ours.state_dict())
    pairs = torch.stack([graph.item, graph.user])
    edges = torch.cat([pairs, pairs.flip(0)], dim=1)
    found = [ours.get_embedding(graph.adjacency), theirs.get_embedding(edges)]
    torch.testing.assert_close(*found)
    for vectors in found:
        vectors[:, :2].square().sum().backward()
    torch.testing.assert_close(ours.embedding.weight.grad, theirs.embedding.weight.grad)


def fitted(rows: pl.DataFrame) -> list[np.ndarray]:
    cuts = np.array([20.0, 40.0])
    snapshots = fit_snapshots(rows, LightGCN(dim=4, epochs=2), 12, items_table(), cuts)
    return [snapshot["weighted"] for snapshot in snapshots.fitted]


def test_tables_depend_on_earlier_rows_alone() -> None:
    """The global random state is neither read nor moved, nor the number of threads; later rows change later tables."""
    rows, threads = make_log(0), torch.get_num_threads()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        first = fitted(rows)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    np.testing.assert_equal(fitted(rows), first)
    late = fitted(flip(rows, pl.col("timestamp") >= 20))
    assert np.array_equal(first[0], late[0])
    assert not np.array_equal(first[1], late[1])


def begun(**settings: int) -> LightGCN:
    retriever = LightGCN(dim=4, epochs=1, **settings)
    retriever.begin(3, pl.DataFrame({"item": range(4)}))
    return retriever


def test_items_without_likes_are_zero_rows() -> None:
    """Items 2 (only disliked) and 3 (never rated); where nobody likes anything, all."""
    table = begun().item_table(EDGES, 1)
    assert (np.abs(table).sum(1) > 0).tolist() == [True, True, False, False]
    assert (
        not begun()
        .item_table(Edges(EDGES.user, EDGES.item, np.zeros(5, np.int64)), 1)
        .any()
    )


def test_training_goes_on_from_the_block_before() -> None:
    continued, new = begun(), begun()
    continued.item_table(EDGES, 1)
    assert not np.array_equal(continued.item_table(EDGES, 2), new.item_table(EDGES, 2))


def test_none_keeps_the_rates() -> None:
    rows = make_log(0)
    none, other = retrieved(rows, NoRetriever()), retrieved(rows, CoLikes(neighbours=4))
    rates = ["row_id", "item_rate", "item_count", "user_rate", "user_count"]
    assert none["neighbour_count"].sum() == 0
    assert none["vote"].null_count() == rows.height
    assert none.select(rates).equals(other.select(rates))


def test_item_knn_equals_scikit_learn() -> None:
    """Neighbours are the user's own rows, ordered by scikit-learn's cosine of the block's liked-by columns."""
    rows = make_log(1)
    found = retrieved(rows, ItemKNN(neighbours=3))
    assert found["neighbour_count"].sum() > 0
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        likes, best = likes_before(rows, row["timestamp"]), []
        if likes is not None:
            cosine = cosine_similarity((likes.T > 0).astype(float))[row["item"]].astype(
                np.float32
            )
            own = rows.filter(
                pl.col("timestamp") < row["timestamp"], pl.col("user") == row["user"]
            )
            triples = [
                (r, cosine[i], a)
                for r, i, a in own.select("row_id", "item", "label").rows()
            ]
            ranked = sorted(triples, key=lambda t: (-round(float(t[1]), 6), -t[0]))
            best = [t for t in ranked if t[1] > 0][:3]
        assert got["neighbours"] == [r for r, _, _ in best]
        assert got["similarities"] == pytest.approx([c for _, c, _ in best], abs=1e-6)
        assert got["answers"] == [a for _, _, a in best]


def test_keys_of_our_own_retrievers_stay() -> None:
    """No source in them; the keys are pinned, because another key makes every cache anew."""
    assert "source" not in LightGCN().settings()
    assert content_key(LightGCN().settings()) == "bd2dc81495707ca2"
    assert content_key(NoRetriever().settings()) == "ab0950c5f407967f"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((LightGCN, name, 0) for name in ("neighbours", "max_raters", "dim")),
        *(
            (LightGCN, name, -1)
            for name in ("layers", "epochs", "similar_every", "item_neighbours")
        ),
        (MatrixFactorisation, "dim", 0),
    ],
)
def test_impossible_settings_are_refused(kind: Any, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\..*\.{name} is {value}[;,] expected"):
        kind(**{name: value})
    LightGCN(layers=0, epochs=0)


def test_a_prompt_needs_the_features_it_shows(tmp_path: Path) -> None:
    logs = TableLogs(str(tmp_path / "logs.csv"), str(tmp_path / "items.csv"))
    item_similarity = Prompt(segment="{title} {item_similarity_percent}:")
    mf = Prompt(segment="{title}{item_number+mf_number}:")
    with pytest.raises(ConfigError, match=r"{item_similarity_percent}.*item_neighbours"):
        InteractionData(logs, retriever=LightGCN(), prompt=item_similarity)
    # the latter compares no items, and shows "?"
    for retriever in (LightGCN(item_neighbours=30), ItemKNN()):
        InteractionData(logs, retriever=retriever, prompt=item_similarity)
    with pytest.raises(ConfigError, match=r"{item_number\+mf_number}.*data\.mf is null"):
        InteractionData(logs, retriever=ItemKNN(), prompt=mf, mf=None)
