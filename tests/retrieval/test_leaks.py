"""Tests that no row reads itself, its second, its future or a later split, and that a leak would be noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from example_logs import CoLikes, flip, items_table, make_log, retrieved
from sklearn.metrics import roc_auc_score

from project.retrieval import ItemKNN, LightGCN, Retriever, TextEncoder
from project.retrieval.past import WalkRows
from project.retrieval.walk import block_cuts, fit_snapshots, walk

KINDS = ["global_time", "user_time", "random", "leave_last"]
ITEM_SIMILARITY = ["item_similarity", "item_similarity_weight"]


def splits_of(rows: pl.DataFrame, kind: str, seed: int) -> np.ndarray:
    """Split codes as each kind of protocol would assign them."""
    time = rows["timestamp"].to_numpy()
    if kind == "global_time":
        return (time >= np.quantile(time, 0.6)).astype(int) + (
            time >= np.quantile(time, 0.8)
        )
    if kind == "random":
        return np.random.default_rng(seed).integers(0, 3, rows.height)
    rank = rows.select(
        pl.col("timestamp").rank("ordinal", descending=kind == "leave_last").over("user")
    )
    place = rank.to_series().to_numpy()
    if kind == "leave_last":
        return (place <= 2).astype(int) + (place <= 1)
    share = place / rows.select(pl.len().over("user")).to_series().to_numpy()
    return (share > 0.6).astype(int) + (share > 0.8)


@pytest.fixture(
    params=["co_likes", "item_similarity", "lightgcn", "item_knn", "text", "llm"]
)
def retriever(
    request: pytest.FixtureRequest,
    tiny_encoder: Path,
    tiny_model: Path,
) -> Retriever:
    found: Retriever = {
        "co_likes": CoLikes(neighbours=4),
        "item_similarity": CoLikes(neighbours=4, item_neighbours=3),
        "lightgcn": LightGCN(neighbours=4, dim=4, epochs=1),
        "item_knn": ItemKNN(neighbours=4),
        "text": TextEncoder(neighbours=4, encoder=str(tiny_encoder)),
        "llm": TextEncoder(neighbours=4, encoder=str(tiny_model)),
    }[request.param]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_cannot_change_its_own_features(retriever: Retriever, kind: str) -> None:
    """Flipping or deleting a row changes no retrieved features up to its own second, and some later."""
    changed = 0
    for seed in range(3):
        rows = make_log(seed, rows=90).filter(pl.col("user") > 0)
        readable = rows.filter(pl.Series(splits_of(rows, kind, seed)) <= 1 + seed % 2)
        before = retrieved(readable, retriever)
        columns = ITEM_SIMILARITY if "item_similarity" in before.columns else before.columns
        for row in readable.sample(2, seed=seed).to_dicts():
            until = readable["timestamp"] <= row["timestamp"]
            for after in (
                retrieved(flip(readable, pl.col("row_id") == row["row_id"]), retriever),
                retrieved(readable, retriever, silent=(row["row_id"],)),
            ):
                assert after.filter(until).equals(before.filter(until))
                changed += not after.select(columns).equals(before.select(columns))
    assert changed


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_earlier_readable_rows_of_others_with_the_candidate(
    kind: str,
) -> None:
    rows = make_log(3)
    codes = splits_of(rows, kind, 3)
    for last in range(3):
        readable = rows.filter(pl.Series(codes) <= last)
        found = retrieved(readable, CoLikes(neighbours=4))
        pairs = (
            found.select("row_id", "neighbours", "answers")
            .explode("neighbours", "answers")
            .drop_nulls()
        )
        joined = pairs.join(rows, on="row_id").join(
            readable, left_on="neighbours", right_on="row_id", suffix="_n"
        )
        assert joined.height == pairs.height > 0
        assert (joined["timestamp_n"] < joined["timestamp"]).all()
        assert (joined["item_n"] == joined["item"]).all()
        assert (joined["user_n"] != joined["user"]).all()
        assert (joined["label_n"] == joined["answers"]).all()


def vote_auc(rows: pl.DataFrame, found: pl.DataFrame) -> float:
    score = found.select(pl.coalesce("vote", "item_rate", 0.5)).to_series()
    return float(roc_auc_score(rows["label"], score))


def leaky_retrieved(
    rows: pl.DataFrame, retriever: Retriever, users: int, items: pl.DataFrame
) -> pl.DataFrame:
    """Retrieved features with all rows, the row itself included, observed before any query, and nobody dropped."""
    log, shift = WalkRows.from_log(rows), float(rows["timestamp"].max()) + 1  # type: ignore[arg-type]
    no, yes = np.zeros(rows.height, np.bool_), np.ones(rows.height, np.bool_)
    first = {**vars(log), "query": no}
    late = {"timestamp": log.timestamp + shift, "rater": no, "own": no, "query": yes}
    then = {**vars(log), **late, "person": log.person * 0 - 1}
    both = WalkRows(**{name: np.concatenate([first[name], then[name]]) for name in first})
    cuts = np.array([shift])
    return walk(
        both,
        retriever,
        items,
        cuts,
        fit_snapshots(rows, retriever, users, items, cuts).fitted,
    )


def strict_retrieved(
    rows: pl.DataFrame, retriever: Retriever, users: int, items: pl.DataFrame
) -> pl.DataFrame:
    cuts = block_cuts(rows["timestamp"].to_numpy(), 5)
    fitted = fit_snapshots(rows, retriever, users, items, cuts).fitted
    return walk(WalkRows.from_log(rows), retriever, items, cuts, fitted)


def test_a_leaky_graph_is_noticed_on_noise() -> None:
    """Labels are random: strict votes cannot predict them (AUC .5), leaky votes are better by more than .1."""
    users, items = 40, 30
    rows, retriever = (
        make_log(0, 1500, users, items),
        LightGCN(neighbours=5, dim=16, epochs=2),
    )
    strict, leaky = (
        vote_auc(rows, found(rows, retriever, users, items_table(items)))
        for found in (strict_retrieved, leaky_retrieved)
    )
    assert abs(strict - 0.5) < 0.05
    assert leaky > strict + 0.1


def test_strict_votes_find_structure() -> None:
    """Two groups of users with opposite answers: votes of similar users predict what a candidate's rate does not."""
    users, items = 40, 30
    like = ((pl.col("user") + pl.col("item")) % 2 == 0).cast(pl.Int8)
    rows = make_log(0, 3000, users, items).with_columns(label=like)
    found = strict_retrieved(
        rows, LightGCN(neighbours=5, dim=16, epochs=5), users, items_table(items)
    )
    late = rows["timestamp"].to_numpy() > 500
    assert vote_auc(rows.filter(late), found.filter(late)) > 0.95
    assert roc_auc_score(rows["label"], found["item_rate"].fill_null(0.5)) < 0.6


@pytest.mark.slow
@pytest.mark.real
def test_a_leaky_graph_is_noticed_on_movielens() -> None:
    """On ML-100K by time a leak lifts the validation AUC of the votes by more than .1.

    N is fixed at 10: the row itself is one vote of N, so the same leak shows less the more neighbours vote.
    """
    from project.data.logs import MovieLens100K
    from project.data.protocol import Protocol, apply_protocol, build_interactions

    protocol = Protocol(minimum_history=5, label="rating > 3")
    split = apply_protocol(build_interactions(MovieLens100K().read(), protocol), protocol)
    log, rows = (
        split.interactions,
        split.rows.filter(pl.col("split").cast(pl.String) != "test"),
    )
    targets = (rows["split"].cast(pl.String) == "valid") & (
        rows["role"].cast(pl.String) == "target"
    )
    auc = {}
    for name, made in (("strict", strict_retrieved), ("leaky", leaky_retrieved)):
        found = made(rows, LightGCN(neighbours=10, epochs=2), log.users.height, log.items)
        auc[name] = vote_auc(rows.filter(targets), found.filter(targets))
    assert 0.65 < auc["strict"] < 0.75
    assert auc["leaky"] > auc["strict"] + 0.1
