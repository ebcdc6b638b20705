"""Tests the ranker: it scores as `predict --engine early_exit` does, whatever was asked or happened before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from world import given

from project.serve.ranker import Ranked, Ranker, RankRequest

FRESH = {"item_id": "new", "title": "a dog at sea", "year": "2020"}
ITEMS = [f"i{k}" for k in range(20)]
PAST = [{"item_id": f"i{k % 20}", "label": k % 2, "time": 1000.0 + k // 2} for k in range(60)]
REQUESTS = [
    {"user_id": "u1", "candidates": ["i3", FRESH, "i0", "i3"]},
    {"user_id": "u2", "candidates": [*ITEMS, FRESH | {"item_id": "newer"}]},
    {"user_id": "nobody", "candidates": ["i1"]},
    {"history": [], "candidates": ["i1", "i2"]},
    {"history": PAST, "candidates": ITEMS[:7]},
    {"history": [FRESH | {"label": 1, "time": 1000.0}, *PAST[:3]], "candidates": ["new", "i7"]},
]
pytestmark = pytest.mark.slow


def asked(record: dict[str, Any], **about: Any) -> RankRequest:
    return RankRequest(record.get("user_id"), record.get("history"), record["candidates"], **about)


def close(found: Ranked, expected: Ranked) -> None:
    assert found.error is None
    np.testing.assert_array_equal(found.exit_layer, expected.exit_layer)
    np.testing.assert_allclose(found.probability, expected.probability, rtol=0, atol=1e-4)


def test_scores_are_those_of_predict(
    ranker: Ranker, served_run: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """Known, unseen and anonymous users, items that requests bring, a history beyond the window: alone and together."""
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps(r | {"request_id": str(k)}) for k, r in enumerate(REQUESTS)))
    run("predict", *given(served_run), "--data.requests", path, "--engine", "early_exit")
    scores = pl.read_parquet(served_run / "scores" / "predict-early_exit.parquet")
    requests = [asked(record) for record in REQUESTS]
    together = ranker.rank(requests)
    again = [ranker.rank([request])[0] for request in requests]  # prefixes are cached now
    for k, answers in enumerate(zip(together, again, strict=True)):
        expected = scores.filter(pl.col("request_id") == str(k))
        assert expected["error"].null_count() == len(expected)
        for answer in answers:
            assert answer.error is None
            np.testing.assert_array_equal(answer.exit_layer, expected["exit_layer"])
            np.testing.assert_allclose(answer.probability, expected["probability"], rtol=0, atol=1e-4)
    assert len(set(scores["exit_layer"])) >= 3
