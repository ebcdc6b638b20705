"""`predict` with the engine: a run is loaded, requests are scored, a table is written in parts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from lightning.pytorch import Callback
from rich.console import Console

from project.callbacks import ExitCalibration, ResultFiles
from project.data.download import resolve_model
from project.data.prompt import PromptEncoder
from project.data.requests import Refused, Request, Requests, read_requests, without_long
from project.datamodule import check_reads
from project.engine.cache import StreamCache
from project.engine.decisions import RowExits
from project.engine.engine import Engine
from project.engine.requests import Scores, prepare_requests
from project.errors import ConfigError, NotCalibratedError, NotFittedError
from project.exits.plan import Plans
from project.model.backbone import Backbone
from project.model.heads import heads_digest
from project.run import read_checkpoint, replace_file, run_of_checkpoint

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


def load_run(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    measured: bool = True,
) -> Plans:
    """Give a module the weights of a calibrated run; returns its exit plans.

    Args:
        model: Made from the run's configuration; gets its backbone here if it has none.
        tokenizer: Of the backbone.
        checkpoint: The run's checkpoint.
        data: What will be scored, which must be what the run was trained to read; None: nothing will.
        measured: Whether scores will be compared with the log's labels, see `check_reads`.

    Raises:
        CheckpointError: The checkpoint was made for another configuration.
        NotCalibratedError: It has no exit plan.
    """
    plans = plans_of(load_weights(model, tokenizer, checkpoint, data, measured))
    if plans is None:
        raise NotCalibratedError(
            "this checkpoint has no calibrated exits. Run `python -m project calibrate --config RUN/config.yaml "
            "--ckpt_path RUN/checkpoints/last.ckpt`."
        )
    return plans


def plans_of(checkpoint: Mapping[str, Any]) -> Plans | None:
    """The exit plans in a loaded checkpoint; None where the run was never calibrated."""
    calibration = ExitCalibration()
    calibration.load_state_dict(checkpoint.get("callbacks", {}).get(calibration.state_key, {}))
    return calibration.found


def load_weights(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    measured: bool = True,
) -> dict[str, Any]:
    """Give a module the weights of a run, calibrated or not; returns the checkpoint. Arguments as in `load_run`.

    Raises:
        CheckpointError: The checkpoint was made for another configuration.
    """
    content = read_checkpoint(checkpoint)
    if data is not None:
        check_reads(content.get("reads"), data, measured)
    if model.backbone is None:
        backbone = Backbone.from_pretrained(resolve_model(model.backbone_name), num_layers=model.depth)
        model.set_backbone(backbone, tokenizer)
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"], strict=False)  # on_load_checkpoint was stricter
    return content


PART = 50_000  # candidates that are in memory at a time, 4.6 KB each


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
        ConfigError: More than one process.
    """
    if checkpoint is None:
        raise NotFittedError(
            "predict --engine early_exit needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` makes "
            "one."
        )
    if trainer.world_size > 1:
        raise ConfigError(
            f"predict --engine early_exit runs in one process, found {trainer.world_size}; expected trainer.devices 1. "
            "Split data.requests into files, and run each with --results.tag of its own."
        )
    data.prepare_data()
    plans = load_run(model, data.tokenizer, checkpoint, data, measured=False)
    device = trainer.strategy.root_device
    model.to(device)
    asked = read_requests(data.requests_file, data.split.interactions)
    asked = without_long(asked, PromptEncoder(data.tokenizer, data.prompt, asked.items), data.context_tokens)
    engine = Engine(model, RowExits(plans.plan, device), StreamCache())
    about = {"heads": heads_digest(model.state_dict()), "protocol": data.split.hash}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    tags = [c.tag for c in callbacks if isinstance(c, ResultFiles) and c.tag]
    name = "-".join(["predict-early_exit", *tags])
    path = run_of_checkpoint(checkpoint) / "scores" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = layers = 0
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as folder:
        files = list[Path]()
        for part in parts_of(asked, PART):
            prepared = prepare_requests(model, data, part) if part.requests else []
            scores = engine.score(prepared)
            tokens += sum(len(r.stream) + len(r.candidates.values) for r in prepared)
            layers += scores.token_layers
            files.append(Path(folder) / f"{len(files)}.parquet")
            early_exit_table(scores, part).write_parquet(files[-1])
        table = pl.scan_parquet(files)
        replace_file(path, lambda file: table.sink_parquet(file, metadata=about))
    counted = _counted(pl.scan_parquet(path))
    Console().print(f"{counted} with {layers:,} token-layers of {plans.plan.layers[-1] * tokens:,}: {path}")
    return path


def _counted(table: pl.LazyFrame) -> str:
    """How much of what was asked has a score."""
    scored = pl.col("error").is_null()
    counts = table.select(
        scored.sum().alias("candidates"),
        pl.col("request_id").filter(scored).n_unique().alias("requests"),
        pl.col("request_id").n_unique().alias("all"),
    ).collect()
    candidates, requests, everything = counts.row(0)
    refused = everything - requests
    note = f" ({refused} more refused, see the column error)" if refused else ""
    return f"{candidates} candidates of {requests} requests scored{note}"


def parts_of(asked: Requests, candidates: int) -> Iterator[Requests]:
    """The same requests, refused ones at their places, in parts of about so many candidates.

    Args:
        asked: What is asked.
        candidates: A part ends at the request that reaches this number.
    """
    refused = {r.place: r for r in asked.refused}
    usable = iter(asked.requests)
    part, size = list[Request | Refused](), 0
    for place in range(len(asked.requests) + len(refused)):
        part.append(refused.get(place) or next(usable))
        size += len(part[-1].candidates)
        if size >= candidates:
            yield _part(asked, part)
            part, size = [], 0
    if part:
        yield _part(asked, part)


def _part(asked: Requests, part: list[Request | Refused]) -> Requests:
    refused = tuple(replace(r, place=k) for k, r in enumerate(part) if isinstance(r, Refused))
    return replace(asked, requests=[r for r in part if isinstance(r, Request)], refused=refused)


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
    none = np.zeros(0)
    scored = requests.table().with_columns(
        exit_layer=pl.Series(np.concatenate([none, *(r.exit_layers for r in found)])).cast(pl.Int64),
        adaptive_logit=pl.Series(np.concatenate([none, *(r.logits for r in found)])).cast(pl.Float32),
        probability=pl.Series(np.concatenate([none, *(r.probabilities for r in found)])).cast(pl.Float32),
        error=pl.Series([r.error for r in found for _ in r.logits], dtype=pl.String),
        place=pl.Series(np.repeat(places, [len(r.logits) for r in found]), dtype=pl.Int64),
    )
    rows = [
        (r.request_id, index, item, -1, np.nan, np.nan, r.error, r.place)
        for r in refused
        for index, item in (enumerate(r.candidates) if r.candidates else [(None, None)])
    ]
    table = pl.concat([scored, pl.DataFrame(rows, schema=scored.schema, orient="row")])
    return table.sort("place", maintain_order=True).drop("place")
