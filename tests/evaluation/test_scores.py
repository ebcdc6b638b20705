"""Score tables: every row once however processes share them, and the slices of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from world import read_split

from project.data.protocol import Protocol
from project.evaluation.result import (
    ScoreCollector,
    scores_of,
    slice_masks,
    slice_rows,
)
from project.run import SCORE_COLUMNS


def add(collector: ScoreCollector, ids: list[int]) -> None:
    """Rows whose numbers differ: row r has r + 100 target tokens, r + 200 stream tokens, values r, -r, 2 r."""
    row = torch.tensor(ids)
    collector.update(
        row, row + 100, row + 200, torch.stack([row, -row, 2 * row], dim=1).float()
    )


def content(collector: ScoreCollector) -> tuple[list[list[int]], list[list[float]]]:
    ids, values = collector.compute()
    return ids.tolist(), values.tolist()


def test_golden() -> None:
    """Batches (5, 2) and (2, 9), row 2 twice: three rows, 2, 5, 9, each with its own tokens and values."""
    collector = ScoreCollector()
    add(collector, [5, 2])
    add(collector, [2, 9])
    expected = [[2, 102, 202], [5, 105, 205], [9, 109, 209]]
    assert content(collector) == (
        expected,
        [[2.0, -2.0, 4.0], [5.0, -5.0, 10.0], [9.0, -9.0, 18.0]],
    )
    collector.reset()  # nothing of the evaluation before is left
    one = torch.ones(1, dtype=torch.int64)
    collector.update(one, one, one, torch.ones(1, 1, dtype=torch.bfloat16))
    ids, values = collector.compute()
    assert ids.tolist() == [[1, 1, 1]]
    # half-precision values meet those of another process as one type
    assert values.dtype == torch.float32


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_however_rows_are_dealt_out(processes: int) -> None:
    """Any dealing of batches to processes, the short ones repeating a batch, gathers to the same scores."""
    rng = np.random.default_rng(processes)
    rows = rng.permutation(60).tolist()
    batches = [rows[i : i + 7] for i in range(0, 60, 7)]
    parts = [ScoreCollector() for _ in range(processes)]
    for rank, part in enumerate(parts):
        mine = batches[rank::processes]
        for batch in mine + [batches[-1]] * (-(-len(batches) // processes) - len(mine)):
            add(part, batch)
    # what torchmetrics' "cat" reduction does with the states of all processes
    gathered = ScoreCollector()
    gathered.ids = [x for part in reversed(parts) for x in part.ids]
    gathered.values = [x for part in reversed(parts) for x in part.values]
    gathered._update_count = 1
    ids, values = content(gathered)
    assert ids == [[r, r + 100, r + 200] for r in range(60)]
    assert values == [[r, -r, 2 * r] for r in range(60)]


def test_scores_of_rows(tiny_logs: Path) -> None:
    """A row's user, split, fold and label, its tokens, exit 0, the logits of exits 4 and 9 meet."""
    rows = read_split(tiny_logs, Protocol(minimum_history=1)).rows
    chosen = rows.filter(pl.col("role") == "target").sample(50, seed=0).sort("row_id")
    row_id, collector = chosen["row_id"], ScoreCollector()
    add(collector, row_id.sample(50, seed=1, shuffle=True).to_list())
    ids, values = collector.compute()
    about = rows[ids[:, 0].numpy()]
    scores = scores_of(ids, values, about, row_id.to_numpy() / 2, [4, 9])
    assert scores.columns == [*SCORE_COLUMNS, "logit_4", "logit_9"]
    for column in ("row_id", "user", "split", "fold", "label"):
        assert scores[column].to_list() == chosen[column].to_list()
    expected = {"target_tokens": row_id + 100, "stream_tokens": row_id + 200}
    expected |= {"logit_0": row_id / 2, "logit_4": row_id, "logit_9": -row_id}
    assert {c: scores[c].to_list() for c in expected} == {
        c: v.to_list() for c, v in expected.items()
    }
    assert scores["request_id"].null_count() == scores["candidate_index"].null_count() == 50


def test_scores_of_candidates() -> None:
    """Candidates keep the order of the requests; the item stands beside its place in the request."""
    named = {
        "request_id": ["b", "b", "a"],
        "candidate_index": [0, 1, 0],
        "item_id": ["x", "y", "x"],
    }
    collector = ScoreCollector()
    add(collector, [2, 0, 1])
    scores = scores_of(
        *collector.compute(), pl.DataFrame(named), np.array([0.5, 1.5, 2.5]), [1, 2]
    )
    assert scores.columns[:4] == ["row_id", "request_id", "candidate_index", "item_id"]
    assert scores.select(*named).to_dict(as_series=False) == named
    logits = scores.select("logit_0", "logit_1", "logit_2").rows()
    assert logits == [(0.5, 0.0, -0.0), (1.5, 1.0, -1.0), (2.5, 2.0, -2.0)]
    assert scores["row_id"].null_count() == scores["label"].null_count() == 3


HIST = [0, 4, 5, 20, 21, 3, 10, 200]
ITEM = [0, 1, 5, 6, 20, 21, 0, 90]  # strictly earlier rows of the item
LABEL = [1, 0, 1, 0, 1, 0, 1, 0]
ROWS = pl.DataFrame(
    {
        "row_id": range(10),
        # user 1 has a target in train, user 2 only a context row
        "user": [1, 2, 1, 1, 1, 1, 1, 2, 2, 2],
        "label": [1, 0, *LABEL],
        "split": ["train", "train"] + ["test"] * 8,
        "fold": pl.Series([None] * 10, dtype=pl.String),
        "role": ["target", "context"] + ["target"] * 8,
        "hist": [3, 3, *HIST],
        "hidden": [False] * 10,
    }
)
# another order than the rows
RETRIEVED = pl.DataFrame({"row_id": range(9, 1, -1), "item_count": ITEM[::-1]})
LOGITS = np.array([3.0, 2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -2.0])


def test_masks_golden():
    """Edges belong to the upper bucket; who has only context in train is cold; each family covers every row once."""
    held = {}
    for name, mask in slice_masks(ROWS[2:], ROWS, RETRIEVED).items():
        shown = ITEM if name.startswith("item") else HIST
        held[name] = [n for n, inside in zip(shown, mask.to_list(), strict=True) if inside]
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


def test_hidden_items_are_a_slice_where_there_are_any() -> None:
    rows = ROWS.with_columns(hidden=pl.col("row_id").is_in([3, 5]))
    masks = slice_masks(rows[2:], rows, RETRIEVED)
    assert list(masks)[-1] == "hidden_items"
    assert masks["hidden_items"].arg_true().to_list() == [1, 3]  # test starts with row 2


def test_aucs_are_those_of_the_rows():
    """history_5_20 scores 1, 0, .5 on labels 1, 0, 1: AUC 1; of an empty slice it is undefined."""
    few = RETRIEVED.with_columns(item_count=pl.lit(3))
    found = slice_rows(ROWS[2:], ROWS, few, {"exit 4": LOGITS, "plan": -LOGITS}, "test")
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["history_5_20"] == {
        "name": "history_5_20",
        "split": "test",
        "fold": None,
        "n": 3,
        "auc": {"exit 4": 1.0, "plan": 0.0},
    }
    # -1 liked, -2 not
    assert by_name["history_21_plus"]["auc"]["exit 4"] == 1.0
    # likes 3, 1, -1 above dislikes 2, 0: (2 + 1 + 0) / 6
    assert by_name["warm_users"]["auc"]["exit 4"] == 0.5
    assert (by_name["item_0"]["n"], by_name["item_0"]["auc"]["plan"]) == (0, None)
