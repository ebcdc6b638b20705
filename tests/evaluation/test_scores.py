"""ScoreCollector and the score tables made of it: every row once, in order of row id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from world import read_split

from project.data.protocol import Protocol
from project.evaluation.result import ScoreCollector, scores_of_candidates, scores_of_rows
from project.run import SCORE_COLUMNS


def add(collector: ScoreCollector, ids: list[int]) -> None:
    """Rows whose numbers tell them apart: row r has r + 100 target tokens, r + 200 stream tokens, values r, -r, 2 r."""
    row = torch.tensor(ids)
    collector.update(row, row + 100, row + 200, torch.stack([row, -row, 2 * row], dim=1).float())


def content(collector: ScoreCollector) -> tuple[list[list[int]], list[list[float]]]:
    ids, values = collector.compute()
    return ids.tolist(), values.tolist()


def test_golden() -> None:
    """Batches (5, 2) and (2, 9), row 2 twice: three rows, 2, 5, 9, each with its own tokens and values."""
    collector = ScoreCollector()
    add(collector, [5, 2])
    add(collector, [2, 9])
    assert content(collector) == (
        [[2, 102, 202], [5, 105, 205], [9, 109, 209]],
        [[2.0, -2.0, 4.0], [5.0, -5.0, 10.0], [9.0, -9.0, 18.0]],
    )


def test_one_evaluation_at_a_time() -> None:
    """After reset nothing of the evaluation before is left."""
    collector = ScoreCollector()
    add(collector, [5, 2])
    collector.compute()
    collector.reset()
    add(collector, [7])
    assert content(collector)[0] == [[7, 107, 207]]


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
    gathered = ScoreCollector()  # what torchmetrics' "cat" reduction does with the states of all processes
    gathered.ids = [x for part in reversed(parts) for x in part.ids]
    gathered.values = [x for part in reversed(parts) for x in part.values]
    gathered._update_count = 1
    ids, values = content(gathered)
    assert ids == [[r, r + 100, r + 200] for r in range(60)]
    assert values == [[r, -r, 2 * r] for r in range(60)]


def test_half_precision_is_kept_as_float32() -> None:
    """Half-precision values do not meet float32 ones of another process as another type."""
    collector = ScoreCollector()
    one = torch.ones(1, dtype=torch.int64)
    collector.update(one, one, one, torch.ones(1, 1, dtype=torch.bfloat16))
    assert collector.compute()[1].dtype == torch.float32


def computed(ids: list[int]) -> tuple[Tensor, Tensor]:
    collector = ScoreCollector()
    add(collector, ids)
    gathered: tuple[Tensor, Tensor] = collector.compute()
    return gathered


def test_scores_of_rows(tiny_logs: Path) -> None:
    """A row's user, split, fold and label, its tokens, exit 0, the logits of exits 4 and 9 meet."""
    rows = read_split(tiny_logs, Protocol(minimum_history=1)).rows
    chosen = rows.filter(pl.col("role") == "target").sample(50, seed=0).sort("row_id")
    row_id = chosen["row_id"]
    ids, values = computed(row_id.sample(50, seed=1, shuffle=True).to_list())
    scores = scores_of_rows(ids, values, chosen, row_id.to_numpy() / 2, [4, 9])
    assert scores.columns == [*SCORE_COLUMNS, "logit_4", "logit_9"]
    for column in ("row_id", "user", "split", "fold", "label"):
        assert scores[column].to_list() == chosen[column].to_list()
    expected = {
        "target_tokens": row_id + 100,
        "stream_tokens": row_id + 200,
        "logit_0": row_id / 2,
        "logit_4": row_id,
        "logit_9": -row_id,
    }
    assert {c: scores[c].to_list() for c in expected} == {c: v.to_list() for c, v in expected.items()}
    assert scores["request_id"].null_count() == scores["candidate_index"].null_count() == 50


def test_scores_of_candidates() -> None:
    """Candidates keep the order of the requests; the item stands beside its place in the request."""
    candidates = pl.DataFrame(
        {"request_id": ["b", "b", "a"], "candidate_index": [0, 1, 0], "item_id": ["x", "y", "x"]}
    )
    scores = scores_of_candidates(*computed([2, 0, 1]), candidates, np.array([0.5, 1.5, 2.5]), [1, 2])
    assert scores.columns[:4] == ["row_id", "request_id", "candidate_index", "item_id"]
    shown = scores.select("request_id", "candidate_index", "item_id", "logit_0", "logit_1", "logit_2").rows()
    assert shown == [
        ("b", 0, "x", 0.5, 0.0, -0.0),
        ("b", 1, "y", 1.5, 1.0, -1.0),
        ("a", 0, "x", 2.5, 2.0, -2.0),
    ]
    assert scores["row_id"].null_count() == scores["label"].null_count() == 3
