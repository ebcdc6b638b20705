"""The user's own answers on items like the candidate: by definition, without leaks, the same for requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.features import FEATURES, feature_matrix
from project.retrieval import ItemKNN, LightGCN, VectorRetriever
from project.retrieval.features import request_retrieved, retrieved_tables

CUTS = np.array([20.0, 45.0])
ITEM_SIMILARITY = ["item_similarity", "item_similarity_weight"]
Retrieved = Callable[..., pl.DataFrame]


@pytest.fixture
def comparing(co_likes: VectorRetriever) -> VectorRetriever:
    co_likes.item_neighbours = 3
    return co_likes


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_definition(
    log_of: Retrieved, retrieved_of: Retrieved, comparing: VectorRetriever, seed: int
) -> None:
    """The three own earlier rows of largest positive cosine (ties: the later), each answer weighted by its cosine."""
    rows = log_of(seed)
    found = retrieved_of(rows, comparing, CUTS)
    answered = 0
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        starts = CUTS[row["timestamp"] >= CUTS]
        past = rows.filter(
            (pl.col("timestamp") < row["timestamp"]) & (pl.col("user") == row["user"])
        ).to_dicts()
        pairs: list[tuple[float, int]] = []
        if starts.size and past:
            likes = np.zeros((12, 9))
            for edge in rows.filter(pl.col("timestamp") < starts[-1]).to_dicts():
                likes[edge["user"], edge["item"]] += edge["label"]
            table = likes.T @ likes
            norms = np.maximum(np.linalg.norm(table, axis=1), 1e-9)
            unit = table / norms[:, None]
            pairs = [(float(unit[own["item"]] @ unit[row["item"]]), own["label"]) for own in past]
            order = sorted(range(len(pairs)), key=lambda k: (-round(pairs[k][0], 6), -k))
            pairs = [pairs[k] for k in order[:3] if pairs[k][0] > 0]
        weight = sum(cosine for cosine, _ in pairs)
        assert got["item_similarity_weight"] == pytest.approx(weight, abs=1e-5)
        if weight:
            answered += 1
            assert got["item_similarity"] == pytest.approx(sum(c * a for c, a in pairs) / weight, abs=1e-5)
        else:
            assert got["item_similarity"] is None
    assert answered > 50


def test_a_row_cannot_change_what_it_reads(
    log_of: Retrieved, retrieved_of: Retrieved, comparing: VectorRetriever
) -> None:
    """Flipping or deleting a row changes nothing up to its own second, and the same user's later rows do change."""
    changed = 0
    for seed in range(3):
        rows = log_of(seed, rows=90)
        before = retrieved_of(rows, comparing, CUTS)
        for row in rows.sample(6, seed=seed).to_dicts():
            here = pl.col("row_id") == row["row_id"]
            flipped = rows.with_columns(label=pl.when(here).then(1 - pl.col("label")).otherwise("label"))
            earlier = rows["timestamp"] <= row["timestamp"]
            for after in (
                retrieved_of(flipped, comparing, CUTS),
                retrieved_of(rows, comparing, CUTS, (row["row_id"],)),
            ):
                assert (
                    after.filter(earlier)
                    .select(ITEM_SIMILARITY)
                    .equals(before.filter(earlier).select(ITEM_SIMILARITY))
                )
                changed += not after.select(ITEM_SIMILARITY).equals(before.select(ITEM_SIMILARITY))
    assert changed > 10


def test_others_answers_are_not_read(
    log_of: Retrieved, retrieved_of: Retrieved, comparing: VectorRetriever
) -> None:
    """In the block before whose start nobody else changed, flipping another user's later rows changes no own answer."""
    rows = log_of(1)
    others = (pl.col("user") != 3) & (pl.col("timestamp") >= CUTS[1])
    flipped = rows.with_columns(label=pl.when(others).then(1 - pl.col("label")).otherwise("label"))
    mine = rows["user"] == 3
    before, after = (retrieved_of(table, comparing, CUTS).filter(mine) for table in (rows, flipped))
    assert before.select(ITEM_SIMILARITY).equals(after.select(ITEM_SIMILARITY))


def test_requests_are_answered_like_the_log(
    log_of: Retrieved, split_of: Retrieved, comparing: VectorRetriever, tmp_path: Path
) -> None:
    """A user's own history as a request gives what the log has for the same rows, bit for bit."""
    rows = log_of(2)
    split = split_of(rows, (np.arange(rows.height) * 3) // rows.height)
    log = retrieved_tables(split, comparing, 4, tmp_path)["test"]
    asked = rows.filter(pl.col("user").is_in([1, 4])).sample(fraction=1, shuffle=True, seed=0)
    columns = (asked[name].to_numpy() for name in ("user", "item", "timestamp", "label"))
    user, item, timestamp, label = columns
    found = request_retrieved(
        split,
        comparing,
        4,
        tmp_path,
        user.astype(np.int64),
        item.astype(np.int64),
        timestamp,
        label.astype(np.int64),
        np.ones(asked.height, np.bool_),
    )
    expected = asked.select("row_id").join(log, on="row_id", maintain_order="left")
    assert found.select(ITEM_SIMILARITY).equals(expected.select(ITEM_SIMILARITY))
    assert expected["item_similarity"].drop_nulls().len() > 5


def test_the_column_is_there_only_when_asked_for(
    log_of: Retrieved, split_of: Retrieved, co_likes: VectorRetriever, tmp_path: Path
) -> None:
    """Off is as it was: no column, the same cache folder; on is another folder."""
    rows = log_of(0)
    split = split_of(rows, (np.arange(rows.height) * 3) // rows.height)
    off = retrieved_tables(split, LightGCN(dim=4, epochs=1), 4, tmp_path)["test"]
    on = retrieved_tables(split, LightGCN(dim=4, epochs=1, item_neighbours=5), 4, tmp_path)["test"]
    assert set(on.columns) - set(off.columns) == set(ITEM_SIMILARITY)
    assert on.select(off.columns).equals(off)
    assert "item_neighbours" not in LightGCN().settings()["init_args"]
    assert LightGCN(item_neighbours=5).settings()["init_args"]["item_neighbours"] == 5


def test_the_feature_of_counting(without_neighbours: pl.DataFrame) -> None:
    """.75 of weight 4 at base .5: log((3 + 2.5) / (1 + 2.5)); nothing alike, or no column: 0."""
    table = without_neighbours.with_columns(
        item_similarity=pl.Series([0.75, None]), item_similarity_weight=pl.Series([4.0, 0.0])
    )
    at = FEATURES.index("item_similarity_log_odds")
    np.testing.assert_allclose(feature_matrix(table, 0.5)[:, at], [np.log(5.5 / 3.5), 0], atol=1e-6)
    np.testing.assert_allclose(feature_matrix(table.drop(ITEM_SIMILARITY), 0.5)[:, at], [0, 0], atol=1e-12)


def test_a_prompt_that_tells_it_needs_it(tmp_path: Path) -> None:
    """The error names both keys and the way out, before anything is read; a number below 0 is refused."""
    logs = TableLogs(str(tmp_path / "logs.csv"), str(tmp_path / "items.csv"))
    prompt = Prompt(segment="{title} alike{item_similarity_percent}:")
    with pytest.raises(
        ConfigError, match=r"tells \{item_similarity_percent\}, but the item_neighbours of data\.retriever"
    ):
        InteractionData(logs, retriever=LightGCN(), prompt=prompt)
    for retriever in (LightGCN(item_neighbours=30), ItemKNN()):  # the latter compares no items, and says "?"
        InteractionData(logs, retriever=retriever, prompt=prompt)
    with pytest.raises(ConfigError, match=r"tells \{mf_number\}, but data\.mf is null"):
        InteractionData(logs, retriever=ItemKNN(), prompt=Prompt(segment="{title}{mf_number}:"), mf=None)
    with pytest.raises(ConfigError, match=r"item_neighbours is -1; expected 0 or more"):
        LightGCN(item_neighbours=-1)
