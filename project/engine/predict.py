"""`predict --engine early_exit`: loads a run, scores requests and writes their table in parts."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import polars as pl
from rich.console import Console

from project.data.download import resolve_model
from project.data.prompt import PromptEncoder
from project.data.requests import Refused, Request, Requests, read_requests, some_usable, without_long
from project.datamodule import InteractionData, check_reads
from project.engine.cache import StreamCache
from project.engine.decisions import RowExits
from project.engine.engine import Engine
from project.engine.requests import Scores, prepare_requests
from project.errors import ConfigError, NotCalibratedError, NotFittedError
from project.exits.plan import ExitPlan, Plans, plans_of
from project.model.backbone import Backbone
from project.model.heads import heads_digest
from project.model.module import ExitRecommender
from project.run import read_checkpoint, replace_file, run_of_checkpoint
from project.run_folder import tag_of

PART = 50_000  # candidates that are in memory at a time, 4.6 KB each


def load_weights(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    compared: bool = True,
) -> dict[str, Any]:
    """Give a module the weights of a run, calibrated or not; returns the checkpoint.

    `data` is what will be scored: it must be what the run was trained to read, and if scores are `compared` with
    labels of the log, their rows must be unseen (`check_reads`). A module without a backbone gets one.
    """
    content = read_checkpoint(checkpoint)
    if data is not None:
        check_reads(content.get("reads"), data, compared)
    if model.backbone is None:
        backbone = Backbone.from_pretrained(resolve_model(model.backbone_name), num_layers=model.depth)
        model.set_backbone(backbone, tokenizer)
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"], strict=False)  # on_load_checkpoint was stricter
    return content


def load_run(
    model: ExitRecommender,
    tokenizer: Any,
    checkpoint: str | Path,
    data: InteractionData | None = None,
    compared: bool = True,
) -> Plans:
    """`load_weights` of a calibrated run; returns its exit plans."""
    plans = plans_of(load_weights(model, tokenizer, checkpoint, data, compared))
    if plans is None:
        raise NotCalibratedError(
            "this checkpoint has no calibrated exits. Run `python -m project calibrate --config RUN/config.yaml "
            "--ckpt_path RUN/checkpoints/last.ckpt`."
        )
    return plans


def open_calibrated(
    trainer: L.Trainer,
    model: ExitRecommender,
    data: InteractionData,
    checkpoint: str | Path | None,
    engine: str = "early_exit",
) -> tuple[ExitPlan, Path, dict[str, str]]:
    """Load a run into `model`; returns its plan, where its table goes (without an ending), and what notes its origin.

    The tag of result files is the trainer's.
    """
    if checkpoint is None:
        raise NotFittedError(
            f"predict --engine {engine} needs --ckpt_path, a calibrated run's checkpoint; found none. `fit` makes one."
        )
    if trainer.world_size > 1 and engine != "ray":
        raise ConfigError(
            f"predict --engine {engine} runs in one process, found {trainer.world_size}; expected trainer.devices 1. "
            "Split data.requests into files, and run each with --results.tag of its own, or use --engine ray."
        )
    data.prepare_data()
    plan = load_run(model, data.tokenizer, checkpoint, data, compared=False).plan
    place = run_of_checkpoint(checkpoint) / "scores" / f"predict-{engine}{tag_of(trainer)}"
    return plan, place, {"heads": heads_digest(model.state_dict()), "protocol": data.split.hash}


def run_early_exit(
    trainer: L.Trainer, model: ExitRecommender, data: InteractionData, checkpoint: str | Path | None
) -> Path:
    """Score data.requests with the engine and the run's exit plan; write scores/predict-early_exit.parquet.

    The trainer says where to run, and the tag of result files.
    """
    plan, place, about = open_calibrated(trainer, model, data, checkpoint)
    requests = some_usable(with_room(read_requests(data.requests_file, data.split.interactions), data))
    device, path = trainer.strategy.root_device, place.with_name(f"{place.name}.parquet")
    engine = Engine(model.to(device), RowExits(plan, device), StreamCache())
    counts = score_requests(engine, model, data, requests, path, about)
    print_counts(counts, plan, path)
    return path


def score_requests(
    engine: Engine,
    model: ExitRecommender,
    data: InteractionData,
    requests: Requests,
    path: Path,
    about: dict[str, str],
) -> Counter[str]:
    """Write the table of requests, which notes what it is `about`; returns what was counted.

    It is made part by part, and is there when all of them are.
    """
    files, counts = list[Path](), Counter[str]()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        for part in parts_of(requests, PART):
            prepared = prepare_requests(model, data, part) if part.requests else []
            scores = engine.score(prepared)
            lengths = [len(r.logits) for r in scores.requests if r.error is None]
            counts["candidates"] += sum(lengths)
            counts["scored"] += len(lengths)
            counts["refused"] += len(part.refused) + len(prepared) - len(lengths)
            counts["tokens"] += sum(len(r.stream) + len(r.candidates.values) for r in prepared)
            counts["token_layers"] += scores.token_layers
            files.append(Path(folder) / f"{len(files)}.parquet")
            early_exit_table(scores, part).write_parquet(files[-1])
        table = pl.scan_parquet(files)
        replace_file(path, lambda file: table.sink_parquet(file, metadata=about))
    return counts


def with_room(requests: Requests, data: InteractionData) -> Requests:
    """The same requests, those refused whose prompts are too long."""
    encoder = PromptEncoder(data.tokenizer, data.prompt, requests.items)
    return without_long(requests, encoder, data.context_tokens)


def print_counts(counts: Mapping[str, int], plan: ExitPlan, path: Path) -> None:
    """Say what was scored, and where it is."""
    note = f" ({counts['refused']} more refused, see the column error)" if counts["refused"] else ""
    Console().print(
        f"{counts['candidates']} candidates of {counts['scored']} requests scored{note} with "
        f"{counts['token_layers']:,} token-layers of {plan.layers[-1] * counts['tokens']:,}: {path}"
    )


def parts_of(requests: Requests, candidates: int) -> Iterator[Requests]:
    """The same requests, refused ones at their places; a part ends at the request that reaches so many candidates."""
    refused, usable = {r.place: r for r in requests.refused}, iter(requests.requests)
    last = len(requests.requests) + len(refused) - 1
    part, size = list[Request | Refused](), 0
    for place in range(last + 1):
        part.append(refused.get(place) or next(usable))
        size += len(part[-1].candidates)
        if size >= candidates or place == last:
            yield replace(
                requests,
                requests=[r for r in part if isinstance(r, Request)],
                refused=tuple(replace(r, place=k) for k, r in enumerate(part) if isinstance(r, Refused)),
            )
            part, size = [], 0


def early_exit_table(scores: Scores, requests: Requests) -> pl.DataFrame:
    """One row a candidate, in the order of the requests; one row for a refused request that has no candidate.

    The scores are of all requests that were not refused. Columns: request_id, candidate_index, item_id, exit_layer,
    adaptive_logit, probability, error. What could not be scored has NaN, exit layer -1 and an error.
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
