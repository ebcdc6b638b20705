"""Scores of one evaluation, gathered over batches and processes, each row once.

Samplers may hand a row to two processes; rows are told apart by row id, so every count is exact.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from project.artefacts import score_table

Floats = NDArray[np.float64]


class ScoreCollector(Metric):
    """Keeps (row id, target tokens, stream tokens, what the heads said) of every scored row."""

    full_state_update = False
    ids: list[Tensor]
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, row_id: Tensor, target_tokens: Tensor, stream_tokens: Tensor, values: Tensor) -> None:
        """Add n rows.

        Args:
            row_id: (n,).
            target_tokens: (n,).
            stream_tokens: (n,).
            values: (n, m) one column for each thing the heads say.
        """
        self.ids.append(torch.stack([row_id, target_tokens, stream_tokens], dim=1))
        self.values.append(values.float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Of all processes, by row id: (n, 3) ids and tokens, (n, m) values."""
        ids, values = dim_zero_cat(self.ids), dim_zero_cat(self.values)
        _, first = np.unique(ids[:, 0].cpu().numpy(), return_index=True)
        index = torch.from_numpy(first).to(ids.device)
        return ids[index], values[index]


def scores_of_rows(
    ids: Tensor, values: Tensor, rows: pl.DataFrame, counting: Floats, exit_layers: list[int]
) -> pl.DataFrame:
    """Score table of rows of the logs.

    Args:
        ids: (n, 3) from `ScoreCollector.compute`.
        values: (n, k) logits of all heads.
        rows: The n rows of the log.
        counting: (n,) logits of exit 0.
        exit_layers: The k layers.
    """
    columns = {name: rows[name] for name in ("row_id", "user", "split", "fold", "label")}
    return _table(columns, ids, values, counting, exit_layers)


def scores_of_candidates(
    ids: Tensor, values: Tensor, candidates: pl.DataFrame, counting: Floats, exit_layers: list[int]
) -> pl.DataFrame:
    """Score table of the candidates of requests, with their item ids.

    Args:
        ids: (n, 3) from `ScoreCollector.compute`; the id is the position in `candidates`.
        values: (n, k) as in `scores_of_rows`.
        candidates: `Requests.table()`.
        counting: (n,) logits of exit 0.
        exit_layers: The k layers.
    """
    about = candidates[ids[:, 0].cpu().numpy()]
    columns = {name: about[name] for name in ("request_id", "candidate_index")}
    table = _table(columns, ids, values, counting, exit_layers)
    return table.insert_column(3, about["item_id"])


def labelled_scores(scores: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """The score table of candidates with what a workload knows: user, label and row_id, in the workload's order.

    Args:
        scores: Score table of all candidates.
        table: `Workload.table` of the same requests.
    """
    known, keys = ["user", "label", "row_id"], ["request_id", "candidate_index"]
    joined = table.join(scores.drop(known), on=keys, how="left", maintain_order="left", validate="1:1")
    return joined.select(scores.columns)


def _table(
    columns: dict[str, pl.Series], ids: Tensor, values: Tensor, counting: Floats, exit_layers: list[int]
) -> pl.DataFrame:
    tokens = ids.cpu().numpy()
    columns |= {
        "target_tokens": pl.Series(tokens[:, 1]),
        "stream_tokens": pl.Series(tokens[:, 2]),
        "logit_0": pl.Series(counting),
    }
    return score_table(columns, values.cpu().numpy(), exit_layers)
