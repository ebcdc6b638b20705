"""Scores of one evaluation, gathered over batches and processes, each row once.

Samplers may hand a row to two processes; rows are told apart by row id, so every count is exact.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from project.artefacts import score_table


class ScoreCollector(Metric):
    """Keeps (row id, target tokens, stream tokens, one logit per exit) of every scored row.

    Args:
        exits: Number of exits.
    """

    full_state_update = False
    ids: list[Tensor]
    logits: list[Tensor]

    def __init__(self, exits: int) -> None:
        super().__init__()
        self.exits = exits
        self.add_state("ids", default=[], dist_reduce_fx="cat")
        self.add_state("logits", default=[], dist_reduce_fx="cat")

    def update(self, row_id: Tensor, target_tokens: Tensor, stream_tokens: Tensor, logits: Tensor) -> None:
        """Add n rows.

        Args:
            row_id: (n,).
            target_tokens: (n,).
            stream_tokens: (n,).
            logits: (n, exits).
        """
        self.ids.append(torch.stack([row_id, target_tokens, stream_tokens], dim=1))
        self.logits.append(logits.float())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Of all processes, by row id: (m, 3) ids and tokens, (m, exits) logits."""
        ids, logits = dim_zero_cat(self.ids), dim_zero_cat(self.logits)
        _, first = np.unique(ids[:, 0].cpu().numpy(), return_index=True)
        index = torch.from_numpy(first).to(ids.device)
        return ids[index], logits[index]


def scores_of_rows(ids: Tensor, logits: Tensor, rows: pl.DataFrame, exit_layers: list[int]) -> pl.DataFrame:
    """Score table of rows of the logs.

    Args:
        ids: (m, 3) from `ScoreCollector.compute`.
        logits: (m, k).
        rows: `SplitInteractions.rows`, where row_id is the position.
        exit_layers: The k layers.
    """
    values = ids.cpu().numpy()
    about = rows[values[:, 0]]
    columns = {name: about[name] for name in ("row_id", "user", "split", "fold", "label")}
    columns |= {"target_tokens": pl.Series(values[:, 1]), "stream_tokens": pl.Series(values[:, 2])}
    return score_table(columns, logits.cpu().numpy(), exit_layers)


def scores_of_candidates(
    ids: Tensor, logits: Tensor, candidates: pl.DataFrame, exit_layers: list[int]
) -> pl.DataFrame:
    """Score table of the candidates of requests, with their item ids.

    Args:
        ids: (m, 3) from `ScoreCollector.compute`; the id is the position in `candidates`.
        logits: (m, k).
        candidates: `Requests.table()`.
        exit_layers: The k layers.
    """
    values = ids.cpu().numpy()
    about = candidates[values[:, 0]]
    columns = {name: about[name] for name in ("request_id", "candidate_index")}
    columns |= {"target_tokens": pl.Series(values[:, 1]), "stream_tokens": pl.Series(values[:, 2])}
    return score_table(columns, logits.cpu().numpy(), exit_layers).insert_column(3, about["item_id"])
