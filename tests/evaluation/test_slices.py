"""Slices of a hand-made split: which rows each holds, and that its metrics are those of its rows alone."""

from __future__ import annotations

import numpy as np
import polars as pl

from project.evaluation.baselines import Baseline
from project.evaluation.result import (
    baseline_scores_of,
    exit_scores_of,
    plan_scores_of,
    slice_masks,
    slice_rows,
)
from project.metrics import head_metrics
from project.run import score_table

HIST = [0, 4, 5, 20, 21, 3, 10, 200]
ITEM = [0, 1, 5, 6, 20, 21, 0, 90]  # strictly earlier rows of the item
LABEL = [1, 0, 1, 0, 1, 0, 1, 0]
ROWS = pl.DataFrame(
    {
        "row_id": range(10),
        "user": [1, 2, 1, 1, 1, 1, 1, 2, 2, 2],  # user 1 has a target in train, user 2 only a context row
        "label": [1, 0, *LABEL],
        "split": ["train", "train"] + ["test"] * 8,
        "fold": pl.Series([None] * 10, dtype=pl.String),
        "role": ["target", "context"] + ["target"] * 8,
        "hist": [3, 3, *HIST],
    }
)
RETRIEVED = {
    "test": pl.DataFrame({"row_id": range(9, 1, -1), "item_count": ITEM[::-1]})
}  # another order than the rows
LOGITS = np.array([3.0, 2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -2.0])


def test_masks_golden():
    """Edges belong to the upper bucket; who has only context in train is cold; each family covers every row once."""
    masks = {name: mask.to_list() for name, mask in slice_masks(ROWS, RETRIEVED, "test").items()}
    shown = {"item": ITEM}
    held = {
        name: [n for n, inside in zip(shown.get(name.split("_")[0], HIST), mask, strict=True) if inside]
        for name, mask in masks.items()
    }
    assert held == {
        "warm_users": [0, 4, 5, 20, 21],
        "cold_users": [3, 10, 200],
        "history_0_4": [0, 4, 3],
        "history_5_20": [5, 20, 10],
        "history_21_plus": [21, 200],
        "item_0": [0, 0],
        "item_1_5": [1, 5],
        "item_6_20": [6, 20],
        "item_21_plus": [21, 90],
    }


def test_plan_has_its_depth_in_each_slice():
    """item_1_5 are rows 3 and 4, which leave at layers 2 and 6: mean depth 4; without rows it is None."""
    part = pl.DataFrame({"row_id": range(9, 1, -1)})  # the plan's rows come in an order of their own
    layers = np.array([0, 2, 6, 6, 6, 0, 0, 0])
    logits, depth = plan_scores_of(part, LOGITS[::-1], layers[::-1], ROWS, "test")
    assert logits.tolist() == LOGITS.tolist()
    found = slice_rows(
        ROWS, RETRIEVED, [({"layer": 4}, LOGITS), ({"plan": True}, logits)], "test", draws=5, depth=depth
    )
    by_name = {entry["name"]: entry["rows"] for entry in found}
    assert by_name["item_1_5"][1]["mean_depth"] == 4.0
    assert by_name["item_1_5"][1]["auc"] == by_name["item_1_5"][0]["auc"]
    assert "mean_depth" not in by_name["item_1_5"][0]
    few = {"test": RETRIEVED["test"].with_columns(item_count=pl.lit(3))}
    nobody = slice_rows(ROWS, few, [({"plan": True}, logits)], "test", draws=5, depth=depth)[5]
    assert (nobody["name"], nobody["rows"][0]["mean_depth"]) == ("item_0", None)


def test_metrics_are_those_of_the_rows():
    """history_5_20 scores 1, 0, .5 on labels 1, 0, 1: AUC 1. Baselines and exits stand side by side; empty says so."""
    baseline = Baseline(
        "lr_rates", pl.DataFrame({"row_id": range(2, 10), "split": ["test"] * 8, "logit": LOGITS})
    )
    columns = {"row_id": list(range(9, 1, -1)), "split": ["test"] * 8}  # another order than the rows
    exits = exit_scores_of(score_table(columns, LOGITS[::-1, None], [4]), ROWS, [4], "test")
    found = slice_rows(
        ROWS, RETRIEVED, exits + baseline_scores_of([baseline], ROWS, "test"), "test", draws=20
    )
    bucket = next(entry for entry in found if entry["name"] == "history_5_20")
    assert {k: bucket[k] for k in ("split", "n", "users", "positives")} == {
        "split": "test",
        "n": 3,
        "users": 2,
        "positives": 2,
    }
    assert [row.get("layer", row.get("name")) for row in bucket["rows"]] == [4, "lr_rates"]
    for row in bucket["rows"]:
        assert row["auc"] == 1.0
        assert row | head_metrics(LOGITS[[2, 3, 6]], [1, 0, 1], [1, 1, 2]) == row
    assert found[4]["rows"][0]["auc"] == 1.0  # history_21_plus: -1 liked, -2 not
    assert (
        found[0]["rows"][0]["auc"] == 0.5
    )  # warm_users: likes 3, 1, -1 above dislikes 2, 0: (2 + 1 + 0) / 6


def test_empty_slice_is_undefined():
    """Without cold users the entry stays, with n = 0 and undefined metrics."""
    warm = ROWS.filter(pl.col("user") == 1)
    found = slice_rows(warm, RETRIEVED, [({"name": "any"}, np.zeros(5))], "test", draws=5)
    cold = next(entry for entry in found if entry["name"] == "cold_users")
    assert cold["n"] == 0
    assert cold["rows"][0]["auc"] is None
    assert cold["rows"][0]["auc_interval"] is None
