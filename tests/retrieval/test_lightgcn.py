"""LightGCN: the graph, equality with PyG's own propagation, warm starts, determinism, zero rows."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
import torch

from project.errors import ConfigError
from project.retrieval import LightGCN
from project.retrieval.base import Edges
from project.retrieval.lightgcn import like_graph
from project.retrieval.walk import fit_snapshots

EDGES = Edges(user=np.array([0, 0, 1, 2, 0]), item=np.array([0, 1, 1, 2, 0]), label=np.array([1, 1, 1, 0, 1]))


def test_adjacency_golden():
    """Likes (u0,i0) twice, (u0,i1), (u1,i1): degrees i0 1, i1 2, u0 2, u1 1; repeats and dislikes count not."""
    graph = like_graph(EDGES, num_users=3, num_items=4)
    expected = torch.zeros(7, 7)
    expected[0, 4] = expected[4, 0] = 0.5**0.5  # i0 - u0: 1 / sqrt(1 * 2)
    expected[1, 4] = expected[4, 1] = 0.5  # i1 - u0: 1 / sqrt(2 * 2)
    expected[1, 5] = expected[5, 1] = 0.5**0.5  # i1 - u1
    torch.testing.assert_close(graph.adjacency.to_dense(), expected)
    assert graph.seen_items.tolist() == [0, 1]


def test_propagation_equals_the_library_on_its_edge_list():
    """CSR with our weights gives what torch_geometric's LightGCN gives for a plain edge list."""
    graph = like_graph(EDGES, 3, 4)
    ours = LightGCN(dim=5)._first_model(7)
    theirs = type(ours)(7, 5, 3)  # normalises edges itself
    theirs.load_state_dict(ours.state_dict())
    pairs = torch.stack([graph.item, graph.user])
    edges = torch.cat([pairs, pairs.flip(0)], dim=1)
    torch.testing.assert_close(ours.get_embedding(graph.adjacency), theirs.get_embedding(edges))


def fitted(rows: pl.DataFrame, items: pl.DataFrame, **settings: int) -> list[np.ndarray]:
    retriever = LightGCN(dim=4, epochs=2, **settings)
    snapshots = fit_snapshots(rows, retriever, 12, items, np.array([20.0, 40.0]))
    return [snapshot["weighted"] for snapshot in snapshots.fitted]


def test_same_seed_same_tables_whatever_the_global_generator(log_of: Callable, items_of: Callable):
    """Tables depend on the seed given alone; the global random state is neither read nor moved."""
    rows, items = log_of(0), items_of()
    torch.manual_seed(1)
    first, state = fitted(rows, items), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(np.array_equal(a, b) for a, b in zip(first, fitted(rows, items), strict=True))
    assert not np.array_equal(first[0], fitted(rows, items, seed=1)[0])


def test_a_table_depends_on_rows_before_its_block_alone(log_of: Callable, items_of: Callable):
    """Changing every row from a cut on leaves the tables up to that cut's block as they were."""
    rows = log_of(0)
    late = rows.with_columns(
        label=pl.when(pl.col("timestamp") >= 20).then(1 - pl.col("label")).otherwise("label")
    )
    before, after = fitted(rows, items_of()), fitted(late, items_of())
    assert np.array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


def test_items_without_likes_are_zero_rows():
    """Items 2 (only disliked) and 3 (never rated) have no vector; the others have."""
    retriever = LightGCN(dim=4, epochs=1)
    retriever.begin(3, pl.DataFrame({"item": range(4)}))
    table = retriever.item_table(EDGES, 1)
    assert (np.abs(table).sum(1) > 0).tolist() == [True, True, False, False]


def test_no_likes_yet_is_an_all_zero_table():
    """A block whose past has dislikes only gives zero vectors, not an error."""
    retriever = LightGCN(dim=4)
    retriever.begin(3, pl.DataFrame({"item": range(4)}))
    past = Edges(EDGES.user, EDGES.item, np.zeros(5, np.int64))
    assert not retriever.item_table(past, 1).any()


def test_training_goes_on_from_the_block_before():
    """The second block's table differs from a cold fit of the same block: it is warm-started."""
    warm, cold = LightGCN(dim=4, epochs=1), LightGCN(dim=4, epochs=1)
    for retriever in (warm, cold):
        retriever.begin(3, pl.DataFrame({"item": range(4)}))
    warm.item_table(EDGES, 1)
    assert not np.array_equal(warm.item_table(EDGES, 2), cold.item_table(EDGES, 2))


def test_training_lowers_the_loss(log_of: Callable, items_of: Callable):
    """After fitting, BPR's loss on the fitted likes is lower than at the first embeddings."""
    rows = log_of(0)
    edges = Edges(*(rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label")))
    graph, losses = like_graph(edges, 12, 9), []
    negative = torch.arange(graph.item.numel()) % 9
    for epochs in (1, 100):
        retriever = LightGCN(dim=8, epochs=epochs, learning_rate=0.02, regularisation=0.0)
        retriever.begin(12, items_of())
        retriever.item_table(edges, 1)
        losses.append(
            retriever._loss(retriever._model, graph, torch.arange(graph.item.numel()), negative).item()
        )
    assert losses[1] < losses[0] - 0.05


def test_threads_are_put_back(log_of: Callable, items_of: Callable):
    """Fitting uses one thread and restores the number it found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fitted(log_of(0), items_of())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["neighbours", "max_raters"])
def test_zero_neighbours_is_refused(name: str):
    """Settings that cannot work name the YAML key."""
    from project.errors import ConfigError

    with pytest.raises(ConfigError, match=rf"data\.retriever\.init_args\.{name} is 0"):
        LightGCN(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim", -1),
        ("layers", -1),
        ("epochs", -1),
        ("batch_size", 0),
        ("learning_rate", -1.0),
        ("regularisation", float("nan")),
    ],
)
def test_refuses_settings(name: str, value: float):
    """A number that cannot train names its key; no epoch and no layer can."""
    with pytest.raises(ConfigError, match=rf"data\.retriever\.init_args\.{name} is {value}; expected"):
        LightGCN(**{name: value})
    LightGCN(layers=0, epochs=0, regularisation=0.0)
