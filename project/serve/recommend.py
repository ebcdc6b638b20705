"""Writes recommendations for every user of a log, as the server gives them: `predict --recommend`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import polars as pl
from rich.console import Console

from project.datamodule import InteractionData
from project.engine.predict import Run, open_calibrated
from project.errors import DataError
from project.model.module import ExitRecommender
from project.request import RecommendRequest
from project.run import write_table
from project.run_folder import tag_of
from project.serve.ranker import Ranker

# a row a listed item, `rank` from 1
TABLE = {
    "user_id": pl.String,
    "rank": pl.Int64,
    "item_id": pl.String,
    "probability": pl.Float32,
    "exit_layer": pl.Int64,
    "source": pl.String,
}
TOGETHER = 32  # users that are scored together


def recommendations(run: Run, users: Sequence[str] | None, **asked: Any) -> pl.DataFrame:
    """Lists of users after all of the log, in their order, or of all; `asked` are fields of `RecommendRequest`."""
    # the run, as it is served; nobody's history is asked for twice
    ranker = Ranker(run.folder, run, cache_mib=0, audit_share=0.0)
    if users is None:
        users = run.data.split.interactions.users["user_id"].to_list()
    rows = list[tuple[Any, ...]]()
    for start in range(0, len(users), TOGETHER):
        together = users[start : start + TOGETHER]
        requests = [RecommendRequest(user, None, **asked) for user in together]
        for user, found in zip(together, ranker.rank_after_log(requests), strict=True):
            if found.error is not None:
                raise DataError(f"user {user!r}: {found.error}")
            for rank, k in enumerate(found.listed, 1):
                score = float(found.probabilities[k]), int(found.exit_layers[k])
                rows.append((user, rank, found.item_ids[k], *score, found.sources[k]))
    return pl.DataFrame(rows, TABLE, orient="row")


def write_recommendations(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    top_n: int,
) -> Path:
    """Write scores/recommendations.parquet of a run: the best `top_n` items of each user, after all of the log."""
    run, place, about = open_calibrated(trainer, model, data, checkpoint)
    model.to(trainer.strategy.root_device)
    table = recommendations(run, None, top_n=top_n)
    path = place.with_name(f"recommendations{tag_of(trainer)}.parquet")
    write_table(path, table, about)
    listed = table["user_id"].n_unique()
    Console().print(f"{len(table)} items recommended to {listed} users: {path}")
    return path
