"""Callbacks: what happens beside training and scoring: configuration, exit plan, results, report and bundle."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
import numpy as np
import polars as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console

from project.arrays import F64
from project.bundle import write_bundle
from project.data.requests import Workload, catalogue_requests
from project.engine.engine import score_workload
from project.engine.requests import PreparedRequest, prepare_requests
from project.errors import ProjectError
from project.evaluation.baselines import (
    AgainstBaseline,
    Baseline,
    fit_baselines,
    targets_of,
)
from project.evaluation.networks import kept_networks
from project.evaluation.result import (
    PlannedRows,
    adaptive_summary,
    baseline_scores_of,
    comparison,
    exit_scores_of,
    own_metric,
    part_of,
    plan_scores_of,
    slice_rows,
    with_and_without_exit_0,
)
from project.exits.budget import calibrate
from project.exits.plan import (
    CHECKPOINT_KEY,
    ExitSettings,
    Plans,
    admit,
    certified_settings,
    plans_of,
)
from project.exits.ranking import CANDIDATES, Lists, fit_lists
from project.metrics import OwnMetric
from project.model.heads import heads_digest
from project.report.report import write_report
from project.report.tables import render, render_seconds, shown
from project.run import read_checkpoint, replace_file, result_head, write_json, write_table
from project.run_folder import current_run, point_latest, run_folder
from project.tracking import log_config, log_pictures, log_result

if TYPE_CHECKING:
    from project.data.batch import Batch
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


def will_be_saved(trainer: L.Trainer) -> bool:
    """Whether a checkpoint is saved after this validation of fit: results are about saved weights only."""
    saver = trainer.checkpoint_callback
    # without a metric, or with save_top_k 0, last.ckpt has the latest weights
    if (
        not isinstance(saver, ModelCheckpoint)
        or saver.monitor is None
        or saver.save_top_k == 0
    ):
        return True
    return saver.check_monitor_top_k(trainer, trainer.callback_metrics.get(saver.monitor))


def data_of(trainer: L.Trainer) -> InteractionData:
    """The DataModule of the command that is running."""
    return cast("InteractionData", trainer.datamodule)  # type: ignore[attr-defined]


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml in the run folder, points `latest` at a finished run, sends the configuration to W&B."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save for fit only: other commands write into the run of their checkpoint."""
        for logger in trainer.loggers:  # rank 0 has made its folder, the others follow
            if isinstance(logger, CSVLogger):
                version = logger.version if trainer.is_global_zero else None
                logger._version = trainer.strategy.broadcast(version)
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str
    ) -> None:
        """Called once, on rank 0."""
        log_config(trainer, self.config.as_dict())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A fit that saves no checkpoint has results at its end."""
        point_latest(trainer)


class ExitCalibration(L.Callback):
    """Calibrates exits on the tune fold of every validation and certifies them on the certify fold.

    The plans lie in the checkpoint under a key of their own, where `plans_of` finds them.
    """

    def __init__(self, settings: ExitSettings) -> None:
        self.settings = settings
        self.plans: Plans | None = None
        self.refused: str | None = None  # why there is no plan
        # requests that lists are fitted and certified on; they are the same for every checkpoint
        self._requests: list[tuple[Workload, list[PreparedRequest]]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate while training, where a checkpoint is going to be saved; validate only reports."""
        if (
            trainer.sanity_checking
            or trainer.state.fn != "fit"
            or not will_be_saved(trainer)
        ):
            return
        module = cast("ExitRecommender", pl_module)
        try:
            self.calibrate(
                trainer, module, data_of(trainer), _scores(module), current_run(trainer)
            )
        except ProjectError as error:
            # the plan of an earlier validation does not belong to this checkpoint
            self.plans = None
            self.refused = str(error)
            rank_zero_warn(f"exits are not calibrated: {error}", category=UserWarning)

    def calibrate(
        self,
        trainer: L.Trainer,
        module: ExitRecommender,
        data: InteractionData,
        scores: pl.DataFrame,
        folder: Path,
        checkpoint: str | None = None,
    ) -> dict[str, Any]:
        """Make the plan of validation's score table, keep it, log it and write results/calibrate.json.

        `checkpoint` is the digest of the heads that made the scores; None: the module's, while it is fitted.
        """
        path = folder / "results" / "calibrate.json"
        previous = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        with data.clock.stage("calibrate"):
            features = data.features_of(scores, module.feature_baseline().base)
            heads = checkpoint or heads_digest(module.state_dict())
            fitting = checkpoint is None
            plans = calibrate(
                scores, features, self.settings, data.split.hash, previous, heads, fitting
            )
        with data.clock.stage("lists"):
            lists = self._lists(trainer, module, data, plans)
        plans.document["lists"] = lists.document
        promises = [row["certificate"] for row in lists.document.get("lengths", [])]
        if any(promise and promise["passed"] is not None for promise in promises):
            # the fold was read, whether or not the plan's own certificate did
            tried = certified_settings(self.settings) | {"checkpoint": heads}
            plans.document["ledger"] = admit(
                plans.document["ledger"], tried, data.split.hash, fitting
            )
        self.plans = plans = replace(plans, lists=lists)
        tune = (scores["fold"] == "tune").to_numpy()
        rows = PlannedRows(
            plans.plan, scores.filter(tune), features[tune], self.settings.prefix_cached
        )
        result = result_head(
            "calibrate", data.split.manifest, str(folder / "config.yaml"), data.seed
        )
        result |= plans.document
        result["adaptive"] = {"split": "valid", "fold": "tune"} | adaptive_summary(
            plans, rows
        )
        if trainer.is_global_zero:
            write_json(path, result)
        self._log(trainer, scores, features)
        return result

    def _lists(
        self,
        trainer: L.Trainer,
        module: ExitRecommender,
        data: InteractionData,
        plans: Plans,
    ) -> Lists:
        """Margins of lists of the best k by the plan's heads; none where the split allows no requests of its folds."""
        settings = self.settings
        if not settings.lists or trainer.world_size > 1:
            return Lists()
        # 1. requests, always the same: another draw would be another try of the certificate
        if not self._requests:
            for fold in ("tune", "certify"):
                try:
                    drawn = catalogue_requests(
                        data.split, fold, settings.lists, CANDIDATES, seed=0
                    )
                except ProjectError as error:
                    return Lists(document={"error": f"no lists: {error}"})
                prepared = prepare_requests(module, data, drawn.requests)
                self._requests.append((drawn, prepared))
        # 2. scores of this checkpoint; the certify fold is read where the plan's certificate may be
        tune, certify = self._requests
        scored = score_workload(module, *tune, plans.plan)
        promise = settings.certificate
        if promise is None or plans.document["certificate"] is None:
            return fit_lists(scored)
        return fit_lists(
            scored, score_workload(module, *certify, plans.plan), promise.delta
        )

    @property
    def issued(self) -> dict[str, Any]:
        """The certificate as results/calibrate.json has it; empty without a plan."""
        return {} if self.plans is None else self.plans.document["certificate"] or {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the plans, if there are any."""
        if self.plans is not None:
            checkpoint[CHECKPOINT_KEY] = self.plans.state()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the plans of a run."""
        self.plans = plans_of(checkpoint)

    def write_into(self, checkpoint: Path) -> None:
        """Replace the exit plans of a saved checkpoint, whole or not at all."""
        assert self.plans is not None
        content = read_checkpoint(checkpoint) | {CHECKPOINT_KEY: self.plans.state()}
        replace_file(checkpoint, lambda part: torch.save(content, part))

    def _log(self, trainer: L.Trainer, scores: pl.DataFrame, features: F64) -> None:
        """`select/exit/...` on the select fold, which calibration has not seen."""
        assert self.plans is not None
        fold = (scores["fold"] == "select").to_numpy()
        if not fold.any():
            return
        rows = PlannedRows(
            self.plans.plan,
            scores.filter(fold),
            features[fold],
            self.settings.prefix_cached,
            draws=2,
        )
        summary = rows.summary(self.plans.static_exit)
        values = {
            k: summary[k] for k in ("mean_depth", "token_layer_speedup", "auc", "auc_drop")
        }
        values["certificate_bound"] = self.issued.get("bound")
        known = {f"select/exit/{k}": v for k, v in values.items() if v is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, trainer.global_step)


def exit_calibration_of(trainer: L.Trainer) -> ExitCalibration:
    """The callback of a trainer made by the command line, which always has one."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, ExitCalibration))


class ResultFiles(L.Callback):
    """Writes results/<command>.json, scores/<split>.parquet, report/ and, when training starts, bundle/ into the run.

    Args:
        tag: Added to the names of result files, to keep several of one command apart.
        metric: A function of your own by its path: it gets labels, probabilities and users, (n,) each, of an exit, a
            baseline or the plan, and returns a number; null computes none.
    """

    def __init__(self, tag: str | None = None, metric: OwnMetric | None = None) -> None:
        self.tag, self.metric = tag, metric
        # on made-up rows, so that a mistake is found before training
        if metric is not None:
            own_metric(
                metric, [({}, np.zeros(4))], np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
            )
        # of the validation that the saved checkpoint comes from
        self._scores: pl.DataFrame | None = None

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the bundle: what predict and export need of the data, so that a run can be moved."""
        write_bundle(
            cast("ExitRecommender", pl_module),
            data_of(trainer),
            run_folder(trainer) / "bundle",
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of training."""
        self._started = self._batch_ended = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log the deepest layer's learning rate, and the targets a second of all processes, without validation."""
        now = time.perf_counter()
        rates = {
            group["name"].split("/")[0]: group["lr"]
            for group in trainer.optimizers[0].param_groups
        }
        deepest = f"layer_{cast('ExitRecommender', pl_module).depth}"
        pl_module.log("train/learning_rate", rates.get(deepest, min(rates.values())))
        targets = len(batch.label) * trainer.world_size
        pl_module.log("train/targets_per_s", targets / (now - self._batch_ended))
        self._batch_ended = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of training, validation left out; write the result of fit."""
        seconds = data_of(trainer).clock.seconds
        seconds["train"] = (
            time.perf_counter() - self._started - seconds.get("validate", 0.0)
        )
        if self._scores is not None:
            self._report(trainer, pl_module, self._scores, "fit", "valid")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of validation."""
        self._evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores of validation; in validate, its result, too."""
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

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the test."""
        self._evaluation_started = time.perf_counter()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores and the result of the test."""
        self._stop_clock(trainer, "test")
        self._write_scores(trainer, pl_module, "test")
        self._report(trainer, pl_module, _scores(pl_module), "test", "test")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores of requests."""
        self._write_scores(trainer, pl_module, "predict")

    def _stop_clock(self, trainer: L.Trainer, stage: str) -> None:
        seconds = data_of(trainer).clock.seconds
        seconds[stage] = (
            seconds.get(stage, 0.0) + time.perf_counter() - self._evaluation_started
        )

    def _write_scores(
        self, trainer: L.Trainer, pl_module: L.LightningModule, split: str
    ) -> None:
        # on every process: where heads are sharded, all take part in their digest
        about = {
            "heads": heads_digest(pl_module.state_dict()),
            "protocol": data_of(trainer).split.hash,
        }
        if not trainer.is_global_zero:
            return
        scores = _with_exits(
            trainer, cast("ExitRecommender", pl_module), _scores(pl_module)
        )
        # calibrate reads valid by its name
        name = f"{split}-{self.tag}" if self.tag and split != "valid" else split
        path = write_table(
            current_run(trainer) / "scores" / f"{name}.parquet", scores, about
        )
        if split == "predict":
            Console().print(f"{len(scores)} candidates scored: {path}")

    @rank_zero_only
    def _report(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        scores: pl.DataFrame,
        command: str,
        split: str,
    ) -> None:
        data, module, folder = (
            data_of(trainer),
            cast("ExitRecommender", pl_module),
            current_run(trainer),
        )
        # 1. Exits beside the baselines.
        with data.clock.stage("baselines"):
            read = ("valid", split) if split != "valid" else ("valid",)
            kept = kept_networks(data, read)
            baselines = [*fit_baselines(data.split.rows, data.retrieved, read), *kept]
            chosen = int(module.chosen_exit)
            content = comparison(
                scores, data.split, baselines, split, chosen if chosen > 0 else None
            )
            content["kept_baselines"] = [baseline.name for baseline in kept]
        # 2. The plan on the same rows.
        planned = _planned(trainer, module, scores, content)
        if planned is not None:
            content |= _adaptive(trainer, planned, content, baselines)
        # 3. Slices by how much was known of item and user, and a metric of one's own.
        with data.clock.stage("slices"):
            content |= _slices(
                scores, data, baselines, content["exits"], planned, self.metric
            )
        # 4. The result file, W&B, the terminal, the report.
        result = (
            result_head(
                command, data.split.manifest, str(folder / "config.yaml"), data.seed
            )
            | content
        )
        result |= {
            "warnings": data.warnings,
            "not_calibrated": exit_calibration_of(trainer).refused,
        }
        result["stage_seconds"] = {k: round(v, 1) for k, v in data.clock.seconds.items()}
        name = f"{command}-{self.tag}" if self.tag else command
        path = write_json(folder / "results" / f"{name}.json", result)
        log_result(trainer, result, name)
        console = Console(width=120) if not Console().is_terminal else Console()
        console.print(
            shown(render(result, path.parent)),
            shown(render_seconds(result)),
            f"written: {path}",
        )
        if command != "validate":
            page = write_report(folder)
            Console().print(f"report: {page}", soft_wrap=True)
            log_pictures(trainer, page.parent)


def _scores(module: L.LightningModule) -> pl.DataFrame:
    scores = cast("ExitRecommender", module).scores
    assert scores is not None
    return scores


def _with_exits(
    trainer: L.Trainer, module: ExitRecommender, scores: pl.DataFrame
) -> pl.DataFrame:
    """The score table with where each row leaves and the logit it leaves with, where there is a plan."""
    calibration = exit_calibration_of(trainer)
    if calibration.plans is None:
        return scores
    plan = calibration.plans.plan
    layer, logit = plan.emitted(
        plan.outputs(
            scores, data_of(trainer).features_of(scores, module.feature_baseline().base)
        )
    )
    return scores.with_columns(
        exit_layer=pl.Series(layer.numpy()).cast(pl.Int64),
        adaptive_logit=pl.Series(logit.numpy()).cast(pl.Float32),
    )


def _planned(
    trainer: L.Trainer,
    module: ExitRecommender,
    scores: pl.DataFrame,
    content: dict[str, Any],
) -> PlannedRows | None:
    """The reported rows under the exit plan, where there is one."""
    calibration, exits = exit_calibration_of(trainer), content["exits"]
    if calibration.plans is None or not exits:
        return None
    part = part_of(scores, exits[0]["split"], exits[0].get("fold"))
    features = data_of(trainer).features_of(part, module.feature_baseline().base)
    return PlannedRows(
        calibration.plans.plan, part, features, calibration.settings.prefix_cached
    )


def _adaptive(
    trainer: L.Trainer,
    planned: PlannedRows,
    content: dict[str, Any],
    baselines: list[Baseline],
) -> dict[str, Any]:
    """What the exit plan does to the reported rows; completes the rows of `exits`."""
    calibration, data, exits = (
        exit_calibration_of(trainer),
        data_of(trainer),
        content["exits"],
    )
    assert calibration.plans is not None
    shares = planned.exits()
    for row in exits:
        row |= shares.get(row["layer"], {})
    summary = adaptive_summary(calibration.plans, planned, calibration.issued.get("risk"))
    found: dict[str, Any] = {}
    best = next((f for f in baselines if f.name == content["best_baseline"]), None)
    if best is not None:
        against = AgainstBaseline(best, planned.row_id, data.split.rows)
        summary["baseline_difference"] = against.difference(planned.logit)
        if content["chosen_exit"] is not None:
            plans = [planned, planned.under(calibration.plans.without)]
            found["chosen_exit_by_exit_0"] = _by_exit_0(
                content["chosen_exit"], plans, against
            )
    where = {key: exits[0][key] for key in ("split", "fold") if key in exits[0]}
    return {
        "adaptive": where | summary,
        "certificate": calibration.issued,
        **found,
    }


def _by_exit_0(
    layer: int, plans: list[PlannedRows], against: AgainstBaseline
) -> dict[str, Any]:
    """The chosen exit under the plans with exit 0 and without; a run without exit 0 has the second alone."""
    heads = {
        "with_exit_0" if rows.plan.exit_0 else "without_exit_0": rows.calibrated[
            :, rows.plan.layers.index(layer)
        ]
        for rows in plans
    }
    return {"layer": layer, **with_and_without_exit_0(heads, against)}


def _slices(
    scores: pl.DataFrame,
    data: InteractionData,
    baselines: list[Baseline],
    exits: list[dict[str, Any]],
    planned: PlannedRows | None,
    metric: OwnMetric | None,
) -> dict[str, Any]:
    """`slices` and `own_metric` of the reported rows, for exits, baselines and the plan.

    With limited batches they are of what was scored.
    """
    if not exits:
        return {"slices": []}
    part = exits[0]["split"], exits[0].get("fold")
    scored = pl.col("row_id").is_in(scores["row_id"].implode())
    rows = data.split.rows.filter((pl.col("split") != part[0]) | scored)
    scored_by = exit_scores_of(scores, rows, [e["layer"] for e in exits], *part)
    scored_by += baseline_scores_of(baselines, rows, *part)
    depth = None
    if planned is not None:
        logits, depth = plan_scores_of(
            part_of(scores, *part), planned.logit, planned.layer, rows, *part
        )
        scored_by.append(({"plan": True}, logits))
    found: dict[str, Any] = {
        "slices": slice_rows(rows, data.retrieved, scored_by, *part, depth=depth)
    }
    if metric is not None:
        targets = targets_of(rows, *part)
        found["own_metric"] = own_metric(
            metric, scored_by, *(targets[x].to_numpy() for x in ("label", "user"))
        )
    return found
