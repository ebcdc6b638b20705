"""Verbs that need data but no training loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from lightning.pytorch import Trainer
from rich.console import Console

from project.artefacts import (
    read_checkpoint,
    result_head,
    run_of_checkpoint,
    table_about,
    write_json,
)
from project.callbacks.exit_calibration import exit_calibration_of
from project.data.identity import check_reads
from project.errors import ConfigError
from project.evaluation.slices import floor_scores_of, slice_rows
from project.floors.kept import kept_networks, trained_networks
from project.floors.networks import LEFT_OUT, networks_installed
from project.floors.quick import best_floor, fit_floors, floor_rows
from project.model.heads import heads_digest
from project.model.module import ExitRecommender, check_origin
from project.report.tables import render, shown

if TYPE_CHECKING:
    from project.datamodule import InteractionData


def run_floors(data: InteractionData, folder: Path, peers: bool = False) -> dict[str, Any]:
    """Score all floors on validation and test, and write results/floors.json.

    Networks are kept: under the same hash they are not trained again, and fit, validate and test find them.

    Args:
        data: Logs, protocol and evidence.
        folder: Run folder of the result file.
        peers: Also train and score the networks of `project.floors.networks`, where the extra is installed; those that
            were trained before are shown without asking.
    """
    if peers and not networks_installed():
        print(LEFT_OUT)
    split, networks = data.split, kept_networks(data)
    if peers and networks_installed():
        with data.clock.stage("peers"):
            networks = trained_networks(data)
    with data.clock.stage("floors"):
        floors = [*fit_floors(split.rows, data.evidence), *networks]
        rows = floor_rows(floors, split.rows)
        best = best_floor(floors, split.rows)
        slices = [
            found
            for part in (("valid", "tune"), ("test", None))
            for found in slice_rows(
                split.rows, data.evidence, floor_scores_of(floors, split.rows, *part), *part
            )
        ]
    result = result_head("floors", split.manifest, str(folder / "config.yaml"), data.seed)
    result |= {"floors": rows, "best_floor": best.name if best else None, "slices": slices}
    result["warnings"] = data.warnings
    result["stage_seconds"] = {k: round(v, 1) for k, v in data.clock.seconds.items()}
    path = write_json(folder / "results" / "floors.json", result)
    Console(width=120).print(shown(render(result)), f"written: {path}")
    return result


def run_calibrate(
    trainer: Trainer, model: ExitRecommender, data: InteractionData, ckpt_path: str | None, rescore: bool
) -> dict[str, Any]:
    """Calibrate the exits of a trained checkpoint and write the plan into it.

    Args:
        trainer: Has the callback ExitCalibration.
        model: The checkpoint's configuration.
        data: Logs whose validation is used.
        ckpt_path: The checkpoint.
        rescore: Score validation anew even where the run's score table fits.

    Raises:
        ConfigError: Without a checkpoint.
        CheckpointError: If the checkpoint has other exit layers than the configuration.
    """
    if ckpt_path is None:
        raise ConfigError(
            "calibrate needs --ckpt_path, a trained run's checkpoint; found none. `fit` writes one."
        )
    callback, folder = exit_calibration_of(trainer), run_of_checkpoint(ckpt_path)
    table = folder / "scores" / "valid.parquet"
    checkpoint = read_checkpoint(ckpt_path)
    wanted = {"heads": heads_digest(checkpoint["state_dict"]), "protocol": data.split.hash}
    known = table_about(table) if table.exists() else {}
    if rescore or any(known.get(key) != value for key, value in wanted.items()):
        trainer.validate(model, datamodule=data, ckpt_path=ckpt_path, verbose=False, weights_only=True)
        scores = model.scores
        assert scores is not None
    else:
        check_origin(checkpoint, model.exit_layers, model.backbone)
        check_reads(checkpoint.get("reads"), data)
        model.prior.copy_(checkpoint["state_dict"]["prior"])
        scores = pl.read_parquet(table, glob=False)
    result = callback.calibrate(trainer, model, data, scores, folder)
    if trainer.is_global_zero:
        callback.write_into(Path(ckpt_path))
        said = [result["certificate_words"], (result["certified"] or {}).get("words")]
        Console(width=120).print(*filter(None, said), f"written: {ckpt_path}", sep="\n")
    return result
