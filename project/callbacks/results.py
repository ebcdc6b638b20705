"""ResultFiles: writes score tables and result files, and prints the table that a person waits for.

Unusual here: beside the floors that are made on the spot stand those that the verb `floors` has made before for just
these data (see project.floors.kept), so a result may have another best floor once `floors --peers true` has run.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import polars
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from project.artefacts import result_head, write_json, write_table
from project.callbacks.exit_calibration import exit_calibration_of, features_of
from project.callbacks.run_folder import current_run, data_of, will_be_saved
from project.evaluation.adaptive import PlannedRows, adaptive_summary
from project.evaluation.exits import comparison, part_of, prior_rows
from project.evaluation.slices import exit_scores_of, floor_scores_of, plan_scores_of, slice_rows
from project.floors.against import AgainstFloor
from project.floors.kept import kept_networks
from project.floors.quick import Floor, fit_floors
from project.model.heads import heads_digest
from project.report.tables import render, render_seconds, shown

if TYPE_CHECKING:
    from project.data.packing import Batch
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


class ResultFiles(pl.Callback):
    """Writes results/<verb>.json and scores/<split>.parquet into the run folder.

    Args:
        tag: Added to the names of result files, to keep several of one verb apart.
        print_tables: Whether to print the table of exits and floors.
    """

    def __init__(self, tag: str | None = None, print_tables: bool = True) -> None:
        self.tag, self.print_tables = tag, print_tables
        self._started = 0.0
        self._scores: polars.DataFrame | None = None  # of the validation that the saved checkpoint comes from

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of training."""
        self._started = self._batch_ended = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log the deepest layer's learning rate, and targets a second of all processes; validation is not in it."""
        now = time.perf_counter()
        rates = {group["name"].split("/")[0]: group["lr"] for group in trainer.optimizers[0].param_groups}
        deepest = f"layer_{cast('ExitRecommender', pl_module).depth}"
        pl_module.log("train/learning_rate", rates.get(deepest, min(rates.values())))
        targets = len(batch.label) * trainer.world_size
        pl_module.log("train/targets_per_s", targets / (now - self._batch_ended))
        self._batch_ended = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of training; validation inside it has a clock of its own."""
        seconds = data_of(trainer).clock.seconds
        seconds["train"] = time.perf_counter() - self._started - seconds.get("validate", 0.0)
        if self._scores is not None:
            self._report(trainer, pl_module, self._scores, "fit", "valid")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of validation."""
        self._evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores of validation."""
        self._batch_ended = time.perf_counter()
        if trainer.sanity_checking:
            return
        self._stop_clock(trainer, "validate")
        if trainer.state.fn == "fit" and not will_be_saved(trainer):
            return
        self._scores = _scores(pl_module)
        self._write_scores(trainer, pl_module, "valid")
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, self._scores, "validate", "valid")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the test."""
        self._evaluation_started = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores and the result of the test."""
        self._stop_clock(trainer, "test")
        self._write_scores(trainer, pl_module, "test")
        self._report(trainer, pl_module, _scores(pl_module), "test", "test")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the scores of requests."""
        self._write_scores(trainer, pl_module, "predict")

    def _stop_clock(self, trainer: pl.Trainer, stage: str) -> None:
        seconds = data_of(trainer).clock.seconds
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - self._evaluation_started

    def _write_scores(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: str) -> None:
        # on every process: where heads are sharded, their digest is asked of all
        about = {"heads": heads_digest(pl_module.state_dict()), "protocol": data_of(trainer).split.hash}
        if not trainer.is_global_zero:
            return
        scores = _with_exits(trainer, cast("ExitRecommender", pl_module), _scores(pl_module))
        name = (
            f"{split}-{self.tag}" if self.tag and split != "valid" else split
        )  # calibrate reads valid by its name
        path = write_table(current_run(trainer) / "scores" / f"{name}.parquet", scores, about)
        if split == "predict" and self.print_tables:
            Console().print(f"{len(scores)} candidates scored: {path}")

    @rank_zero_only
    def _report(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        scores: polars.DataFrame,
        verb: str,
        split: str,
    ) -> None:
        data, module, folder = data_of(trainer), cast("ExitRecommender", pl_module), current_run(trainer)
        with data.clock.stage("floors"):
            read = ("valid", split) if split != "valid" else ("valid",)
            kept = kept_networks(data, read)
            floors = [*fit_floors(data.split.rows, data.evidence, read), *kept]
            chosen = int(module.chosen_exit)
            content = comparison(scores, data.split, floors, split, chosen if chosen > 0 else None)
            content["kept_floors"] = [floor.name for floor in kept]
        planned = _planned(trainer, module, scores, content)
        if planned is not None:
            content |= _adaptive(trainer, planned, scores, content, floors)
        with data.clock.stage("slices"):
            content["slices"] = _slices(scores, data, floors, content["exits"], planned)
        result = result_head(verb, data.split.manifest, str(folder / "config.yaml"), data.seed) | content
        result["warnings"] = data.warnings
        result["stage_seconds"] = {k: round(v, 1) for k, v in data.clock.seconds.items()}
        name = f"{verb}-{self.tag}" if self.tag else verb
        path = write_json(folder / "results" / f"{name}.json", result)
        _log_result(trainer, result, name)
        if self.print_tables:
            console = Console(width=120) if not Console().is_terminal else Console()
            console.print(
                shown(render(result, path.parent)), shown(render_seconds(result)), f"written: {path}"
            )


def _scores(module: pl.LightningModule) -> polars.DataFrame:
    scores = cast("ExitRecommender", module).scores
    assert scores is not None
    return scores


def _with_exits(trainer: pl.Trainer, module: ExitRecommender, scores: polars.DataFrame) -> polars.DataFrame:
    """The score table with where each row leaves and the logit it leaves with, where there is a plan."""
    calibration = exit_calibration_of(trainer)
    if calibration.found is None:
        return scores
    plan = calibration.found.plan
    layer, logit = plan.emitted(plan.outputs(scores, features_of(module, data_of(trainer), scores)))
    return scores.with_columns(
        exit_layer=polars.Series(layer.numpy()).cast(polars.Int64),
        adaptive_logit=polars.Series(logit.numpy()).cast(polars.Float32),
    )


def _planned(
    trainer: pl.Trainer, module: ExitRecommender, scores: polars.DataFrame, content: dict[str, Any]
) -> PlannedRows | None:
    """The reported rows under the exit plan, where there is one."""
    calibration, exits = exit_calibration_of(trainer), content["exits"]
    if calibration.found is None or not exits:
        return None
    part = part_of(scores, exits[0]["split"], exits[0].get("fold"))
    features = features_of(module, data_of(trainer), part)
    return PlannedRows(calibration.found.plan, part, features, calibration.stream)


def _adaptive(
    trainer: pl.Trainer,
    planned: PlannedRows,
    scores: polars.DataFrame,
    content: dict[str, Any],
    floors: list[Floor],
) -> dict[str, Any]:
    """What the exit plan does to the reported rows; completes the rows of `exits`."""
    calibration, data, exits = exit_calibration_of(trainer), data_of(trainer), content["exits"]
    assert calibration.found is not None
    split, fold = exits[0]["split"], exits[0].get("fold")
    part = part_of(scores, split, fold)
    shares = planned.exits()
    for row in exits:
        row |= shares.get(row["layer"], {})
    issued = calibration.issued
    promise = (issued["risk"], issued["unit"]) if "risk" in issued else None
    summary = adaptive_summary(calibration.found, planned, promise)
    found: dict[str, Any] = {}
    best = next((f for f in floors if f.name == content["best_floor"]), None)
    if best is not None:
        against = AgainstFloor(best, part["row_id"].to_numpy(), data.split.rows)
        summary["floor_difference"] = against.difference(planned.logit)
        if content["chosen_exit"] is not None:
            plans = [planned, planned.under(calibration.found.without)]
            found["chosen_exit_by_prior"] = _by_prior(content["chosen_exit"], plans, against)
    return {
        "adaptive": {"split": split, **({"fold": fold} if fold else {}), **summary},
        "certificate": calibration.issued,
        **found,
    }


def _by_prior(layer: int, plans: list[PlannedRows], against: AgainstFloor) -> dict[str, Any]:
    """The chosen exit under plans with counting and without; one plan where a run has no prior."""
    heads = {
        "counting" if rows.plan.prior else "none": rows.calibrated[:, rows.plan.layers.index(layer)]
        for rows in plans
    }
    return {"layer": layer, **prior_rows(heads, against)}


def _slices(
    scores: polars.DataFrame,
    data: InteractionData,
    floors: list[Floor],
    exits: list[dict[str, Any]],
    planned: PlannedRows | None,
) -> list[dict[str, Any]]:
    """Slices of the reported rows, for exits, baselines and the plan; with limited batches, of what was scored."""
    if not exits:
        return []
    part = exits[0]["split"], exits[0].get("fold")
    scored = polars.col("row_id").is_in(scores["row_id"].implode())
    rows = data.split.rows.filter((polars.col("split") != part[0]) | scored)
    judged = exit_scores_of(scores, rows, [e["layer"] for e in exits], *part)
    judged += floor_scores_of(floors, rows, *part)
    depth = None
    if planned is not None:
        logits, depth = plan_scores_of(part_of(scores, *part), planned.logit, planned.layer, rows, *part)
        judged.append(({"plan": True}, logits))
    return slice_rows(rows, data.evidence, judged, *part, depth=depth)


def _log_result(trainer: pl.Trainer, result: dict[str, Any], name: str) -> None:
    """The table and the few numbers that runs are compared by, to W&B."""
    passed = (result.get("certificate") or {}).get("passed")
    summary = {
        f"{name}/minus_best_baseline": (result.get("floor_difference") or {}).get("value"),
        f"{name}/chosen_exit": result["chosen_exit"],
        "certificate/passed": "not tested" if passed is None else passed,
    }
    # the last two: under the exit plan, if there is one
    columns = ["auc", "log_loss", "brier", "ece", "exit_share", "auc_leaving"]
    fold = next((r["fold"] for r in result["exits"] if "fold" in r), None)
    rows = [[f"exit {r['layer']}", *map(r.get, columns)] for r in result["exits"]]
    rows += [[r["name"], *map(r.get, columns)] for r in result["floors"]]
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update({k: v for k, v in summary.items() if v is not None})
            logger.log_table(
                f"{name}/{fold}/exits" if fold else f"{name}/exits", columns=["scores", *columns], data=rows
            )
