"""Text similarity: strictly earlier rows of the user alone, equal to its formula, also for items no log knows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from project.retrieval import own_text
from project.retrieval.own_text import SHRINK, item_vectors, text_similarity
from project.retrieval.walk import WalkRows

ITEMS = pl.DataFrame(
    {
        "item": range(6),
        "item_id": list("abcdef"),
        "title": ["Alien", "Aliens", "Casablanca", "Alien Three", "The Sea", "!"],
        "genres": ["Horror", "Horror", "Romance", None, "", ""],
    }
)


def log(seed: int = 0, rows: int = 60) -> pl.DataFrame:
    """Rows of 4 users in time order, many at the same second."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "row_id": np.arange(rows),
            "user": rng.integers(0, 4, rows),
            "item": rng.integers(0, 6, rows),
            "timestamp": np.sort(rng.integers(0, 20, rows)).astype(float),
            "label": rng.integers(0, 2, rows),
        }
    )


def test_equals_its_formula_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum w (a - m) / (sum w + 1/2), w = cosine^2 over strictly earlier rows of the user, in blocks of any size."""
    rows, vectors = log(), item_vectors(ITEMS, ITEMS)
    cosine = (vectors @ vectors.T).toarray()
    assert np.allclose(np.diag(cosine), [1.0] * 6 + [0.0])
    for together in (2**22, 1):  # all at once, and one row at a time
        monkeypatch.setattr(own_text, "TOGETHER", together)
        table = text_similarity(WalkRows.from_log(rows), vectors)
        assert table["row_id"].to_list() == rows["row_id"].to_list()
        for row, found in zip(rows.to_dicts(), table.to_dicts(), strict=True):
            past = rows.filter((pl.col("user") == row["user"]) & (pl.col("timestamp") < row["timestamp"]))
            w = cosine[row["item"], past["item"].to_numpy()] ** 2
            a = past["label"].to_numpy().astype(float)
            assert found["text_weight"] == pytest.approx(w.sum(), abs=1e-6)
            if len(past):
                assert found["text"] == pytest.approx((w @ (a - a.mean())) / (w.sum() + SHRINK), abs=1e-6)
            else:
                assert found["text"] is None


def test_flipping_a_row_changes_only_later_rows_of_its_user() -> None:
    """A leak canary: its own row, its second, the past and other users stay as they were; something later moves."""
    rows, vectors = log(), item_vectors(ITEMS, ITEMS)
    at = 10
    flipped = rows.with_columns(
        label=pl.when(pl.col("row_id") == at).then(1 - pl.col("label")).otherwise("label")
    )
    before, after = (text_similarity(WalkRows.from_log(r), vectors) for r in (rows, flipped))
    moved = (before["text"] - after["text"]).fill_null(0.0).to_numpy() != 0
    later = (rows["user"] == rows["user"][at]) & (rows["timestamp"] > rows["timestamp"][at])
    assert moved.any()
    assert not (moved & ~later.to_numpy()).any()


def test_an_item_of_its_own_is_like_what_it_is_called() -> None:
    """A new item's text counts though the terms are the log's: "Alien Horror" is nearer to Alien than to Casablanca."""
    new = pl.DataFrame({"item": [6], "item_id": ["new"], "title": ["Alien Horror"], "genres": [""]})
    vectors = item_vectors(pl.concat([ITEMS, new]), ITEMS)
    near = (vectors[6] @ vectors.T).toarray()[0]
    assert near[0] > 0.3 > near[2]
