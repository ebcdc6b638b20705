"""`predict --engine early_exit`: requests scored by the engine, layers really not run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from lightning.pytorch import Callback
from rich.console import Console

from project.artefacts import run_of_checkpoint, write_table
from project.callbacks.results import ResultFiles
from project.engine.decisions import RowExits
from project.engine.engine import Engine
from project.engine.loading import load_run
from project.engine.prepared import prepare_requests
from project.engine.scored import Scores
from project.engine.stream_cache import StreamCache
from project.errors import NotFittedError
from project.model.heads import heads_digest

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from project.data.datamodule import InteractionData
    from project.data.requests import Requests
    from project.model.module import ExitRecommender


def run_early_exit(
    trainer: Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
) -> Path:
    """Score data.requests with the engine and the run's exit plan; write scores/predict-early_exit.parquet.

    Args:
        trainer: Says where to run, and the tag of result files.
        model: Made from the run's configuration.
        data: Logs and requests.
        checkpoint: The run's checkpoint.

    Raises:
        NotFittedError: No checkpoint.
    """
    if checkpoint is None:
        raise NotFittedError(
            "predict --engine early_exit needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` makes "
            "one."
        )
    data.prepare_data()
    plans = load_run(model, data.tokenizer, checkpoint, data, judged=False)
    device = trainer.strategy.root_device
    model.to(device)
    prepared = prepare_requests(model, data)
    scores = Engine(model, RowExits(plans.plan, device), StreamCache()).score(prepared)
    assert data.requests is not None
    table = early_exit_table(scores, data.requests)
    about = {"heads": heads_digest(model.state_dict()), "protocol": data.split.hash}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    tags = [c.tag for c in callbacks if isinstance(c, ResultFiles) and c.tag]
    name = "-".join(["predict-early_exit", *tags])
    path = write_table(run_of_checkpoint(checkpoint) / "scores" / f"{name}.parquet", table, about)
    full = plans.plan.layers[-1] * sum(len(r.stream) + len(r.candidates.values) for r in prepared)
    Console().print(f"{_counted(table)} with {scores.token_layers:,} token-layers of {full:,}: {path}")
    return path


def _counted(table: pl.DataFrame) -> str:
    """How much of what was asked has a score."""
    scored = table.filter(pl.col("error").is_null())
    requests = scored["request_id"].n_unique()
    refused = table["request_id"].n_unique() - requests
    note = f" ({refused} more refused, see the column error)" if refused else ""
    return f"{len(scored)} candidates of {requests} requests scored{note}"


def early_exit_table(scores: Scores, requests: Requests) -> pl.DataFrame:
    """One row a candidate, in the order of the requests; one row for a refused request that has no candidate.

    Args:
        scores: Of all requests that were not refused.
        requests: What was asked.

    Returns:
        request_id, candidate_index, item_id, exit_layer, adaptive_logit, probability, error. What could not be scored
        has NaN, exit layer -1 and an error.
    """
    found, refused = scores.requests, requests.refused
    places = np.setdiff1d(np.arange(len(found) + len(refused)), [r.place for r in refused])
    scored = requests.table().with_columns(
        exit_layer=pl.Series(np.concatenate([r.exit_layers for r in found]), dtype=pl.Int64),
        adaptive_logit=pl.Series(np.concatenate([r.logits for r in found])).cast(pl.Float32),
        probability=pl.Series(np.concatenate([r.probabilities for r in found])).cast(pl.Float32),
        error=pl.Series([r.error for r in found for _ in r.logits], dtype=pl.String),
        place=pl.Series(np.repeat(places, [len(r.logits) for r in found])),
    )
    rows = [
        (r.request_id, index, item, -1, np.nan, np.nan, r.error, r.place)
        for r in refused
        for index, item in (enumerate(r.candidates) if r.candidates else [(None, None)])
    ]
    table = pl.concat([scored, pl.DataFrame(rows, schema=scored.schema, orient="row")])
    return table.sort("place", maintain_order=True).drop("place")
