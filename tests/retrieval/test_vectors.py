"""Tests user vectors by brute force: neighbours, answers on similar items, lists of what similar users liked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from example_logs import (
    NUM_ITEMS,
    CoLikes,
    flip,
    likes_before,
    make_log,
    make_split,
    request,
    retrieved,
    user_vectors,
)

from project.retrieval import LightGCN, RetrievedFeatures, VectorRetriever

LISTS = {"similar_every": 3}


@pytest.fixture(autouse=True)
def short_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two items that three users like, in a log of twelve."""
    monkeypatch.setattr("project.retrieval.lightgcn.SIMILAR_USERS", 3)
    monkeypatch.setattr("project.retrieval.past.SIMILAR_ITEMS", 2)


@pytest.mark.parametrize("seed", range(2))
def test_neighbours_equal_brute_force(seed: int) -> None:
    """One table a block, strictly earlier rows; who has no vector yet has no neighbours."""
    rows = make_log(seed)
    found = retrieved(rows, CoLikes(neighbours=4))
    for row, got in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        likes = likes_before(rows, row["timestamp"])
        expected: list[tuple[int, float]] = []
        if likes is not None:
            past = rows.filter(pl.col("timestamp") < row["timestamp"])
            unit = user_vectors(past, likes)
            cosine = unit @ unit[row["user"]]
            raters = past.filter(
                pl.col("item") == row["item"], pl.col("user") != row["user"]
            )
            latest = dict(raters.select("user", "row_id").iter_rows())
            pairs = [
                (latest[u], cosine[u])
                for u in latest
                if unit[u].any() and unit[row["user"]].any()
            ]
            # rounded: mathematically equal cosines are ordered by later row
            expected = sorted(pairs, key=lambda pair: (-round(pair[1], 6), -pair[0]))[:4]
        assert got["neighbours"] == [neighbour for neighbour, _ in expected]
        assert got["similarities"] == pytest.approx(
            [cosine for _, cosine in expected], abs=1e-5
        )


@pytest.mark.parametrize("seed", range(2))
def test_item_similarity_equals_brute_force(seed: int) -> None:
    """The three own earlier rows of largest positive cosine (ties: the later), each answer weighted by its cosine."""
    rows, answered = make_log(seed), 0
    for row, got in zip(
        rows.to_dicts(), retrieved(rows, CoLikes(item_neighbours=3)).to_dicts(), strict=True
    ):
        likes = likes_before(rows, row["timestamp"])
        own = rows.filter(
            pl.col("timestamp") < row["timestamp"], pl.col("user") == row["user"]
        )
        pairs: list[tuple[float, int]] = []
        if likes is not None:
            table = likes.T @ likes
            unit = table / np.maximum(np.linalg.norm(table, axis=1), 1e-9)[:, None]
            pairs = [
                (float(unit[i] @ unit[row["item"]]), a)
                for i, a in own.select("item", "label").rows()
            ]
            order = sorted(range(len(pairs)), key=lambda k: (-round(pairs[k][0], 6), -k))
            pairs = [pairs[k] for k in order[:3] if pairs[k][0] > 0]
        weight = sum(cosine for cosine, _ in pairs)
        mean = sum(c * a for c, a in pairs) / weight if weight else None
        assert got["item_similarity_weight"] == pytest.approx(weight, abs=1e-5)
        assert got["item_similarity"] == (
            None if mean is None else pytest.approx(mean, abs=1e-5)
        )
        answered += mean is not None
    assert answered > 50


def brute_force_list(
    rows: pl.DataFrame, row: dict[str, Any], retriever: VectorRetriever
) -> list[int] | None:
    """The list after a row: rows up to its second, one table a block, nothing rated already."""
    now = row["timestamp"]
    own = rows.filter(pl.col("user") == row["user"], pl.col("timestamp") <= now)
    before, likes = own.filter(pl.col("timestamp") < now).height, likes_before(rows, now)
    if (
        likes is None
        or own.height // 3 == before // 3
        or own["row_id"][-1] != row["row_id"]
    ):
        return None
    past = rows.filter(pl.col("timestamp") <= now)
    unit = user_vectors(past, likes)
    cosine = (unit @ unit[row["user"]]).round(5)
    liked = {
        (user, item): label
        for user, item, label in past.select("user", "item", "label").iter_rows()
    }
    latest = dict(past.select("user", "row_id").iter_rows())
    likers = [
        u
        for u in latest
        if u != row["user"] and any(liked.get((u, i)) for i in range(NUM_ITEMS))
    ]
    others = sorted(likers, key=lambda u: -latest[u])[: retriever.max_raters]
    nearest = sorted(
        (u for u in others if cosine[u] > 0), key=lambda u: (-cosine[u], -latest[u])
    )
    score = {
        i: sum(cosine[u] for u in nearest[:3] if liked.get((u, i)))
        for i in set(range(NUM_ITEMS)) - set(own["item"])
    }
    new = sorted((i for i in score if score[i] > 0), key=lambda i: (-round(score[i], 4), i))
    return new[:2] or None


@pytest.mark.parametrize(
    ("seed", "max_raters"), [(0, 2000), (1, 2000), (2, 2000), (0, 1), (1, 4)]
)
def test_lists_equal_brute_force(seed: int, max_raters: int) -> None:
    rows, retriever = make_log(seed), CoLikes(neighbours=4, max_raters=max_raters, **LISTS)
    found = retrieved(rows, retriever)["similar_after"].to_list()
    assert found == [brute_force_list(rows, row, retriever) for row in rows.to_dicts()]
    assert sum(x is not None for x in found) > 5


def test_a_list_is_dated_by_its_second() -> None:
    """Canary: flipping or deleting a row changes no list of an earlier second, and some of its own second or later."""
    changed, retriever = np.zeros(2, int), CoLikes(neighbours=4, **LISTS)
    for seed in range(3):
        rows = make_log(seed)
        before = retrieved(rows, retriever)["similar_after"]
        for row in rows.filter(pl.col("timestamp") > 20).sample(4, seed=seed).to_dicts():
            flipped = retrieved(flip(rows, pl.col("row_id") == row["row_id"]), retriever)
            deleted = retrieved(rows, retriever, silent=(row["row_id"],))
            earlier = rows["timestamp"] < row["timestamp"]
            for k, after in enumerate(
                found["similar_after"] for found in (flipped, deleted)
            ):
                assert after.filter(earlier).equals(before.filter(earlier))
                changed[k] += not after.equals(before)
    assert changed.min() > 3


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        (LISTS, {"similar_after": pl.List(pl.Int32)}),
        (
            {"item_neighbours": 5},
            {"item_similarity": pl.Float32, "item_similarity_weight": pl.Float32},
        ),
    ],
    ids=["similar", "item_similarity"],
)
def test_off_changes_nothing(settings: dict[str, int], columns: dict[str, Any]) -> None:
    """What is switched on adds columns and changes no other; off, it is neither in the table nor in the cache's key."""
    rows = make_log(1)
    off, on = (
        retrieved(rows, CoLikes(neighbours=4)),
        retrieved(rows, CoLikes(neighbours=4, **settings)),
    )
    assert on.select(off.columns).equals(off)
    assert dict(on.drop(off.columns).schema) == columns
    assert not settings.keys() & LightGCN().settings()["init_args"].keys()
    assert settings.items() <= LightGCN(**settings).settings()["init_args"].items()


@pytest.mark.parametrize(
    "retriever", [CoLikes(neighbours=4, **LISTS), LightGCN(dim=4, epochs=1, **LISTS)]
)
def test_a_history_has_the_lists_of_the_log(
    retriever: VectorRetriever, tmp_path: Path
) -> None:
    """Users' rows as history, in any order, with candidates: the lists of the log, and none after a candidate."""
    rows = make_log(2)
    split = make_split(rows, np.digitize(rows["timestamp"].to_numpy(), [40, 60]))
    features = RetrievedFeatures(split, retriever, 4, tmp_path)
    log = features.tables()["test"]
    chosen = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(
        fraction=1, shuffle=True, seed=0
    )
    n, late = chosen.height, chosen.with_columns(timestamp=pl.lit(1e3))
    asked = pl.concat([request(chosen), request(late, own=False)])
    found = features.of_requests(asked)["similar_after"]
    expected = chosen.join(
        log.select("row_id", "similar_after"), on="row_id", maintain_order="left"
    )
    # the order inside a second is free: a list belongs to its end
    groups = ["user", "timestamp"]
    first, again = (
        table.drop_nulls("similar_after").sort(groups).select(*groups, "similar_after")
        for table in (expected, chosen.with_columns(similar_after=found.head(n)))
    )
    assert first.equals(again)
    assert first.height > 3
    assert found.tail(n).null_count() == n
