"""Writes recommendations for every user of a log, as the server gives them: `predict --recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import polars as pl
from rich.console import Console

from project.datamodule import InteractionData
from project.engine.predict import open_calibrated
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


def write_recommendations(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    top_n: int,
) -> Path:
    """Write scores/recommendations.parquet of a run: the best `top_n` items of each user, after all of the log."""
    # 1. the run, as it is served; nobody's history is asked for twice
    run, place, about = open_calibrated(trainer, model, data, checkpoint)
    model.to(trainer.strategy.root_device)
    ranker = Ranker(place.parent.parent, run, cache_mib=0, audit_share=0.0)
    # 2. lists
    users = data.split.interactions.users["user_id"].to_list()
    rows = list[tuple[Any, ...]]()
    for start in range(0, len(users), TOGETHER):
        together = users[start : start + TOGETHER]
        asked = [RecommendRequest(user, None, top_n=top_n) for user in together]
        for user, found in zip(together, ranker.rank_after_log(asked), strict=True):
            if found.error is not None:
                raise DataError(f"user {user!r}: {found.error}")
            for rank, k in enumerate(found.listed, 1):
                score = float(found.probabilities[k]), int(found.exit_layers[k])
                rows.append((user, rank, found.item_ids[k], *score, found.sources[k]))
    # 3. the table
    path = place.with_name(f"recommendations{tag_of(trainer)}.parquet")
    write_table(path, pl.DataFrame(rows, TABLE, orient="row"), about)
    Console().print(f"{len(rows)} items recommended to {len(users)} users: {path}")
    return path
