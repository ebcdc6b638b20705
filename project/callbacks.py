"""Callbacks: what happens beside training and scoring: configuration, exit plan, results, report and bundle."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import numpy as np
import polars as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.markdown import Markdown

from project.arrays import F64
from project.bundle import write_bundle
from project.data.requests import Workload, catalogue_requests
from project.engine.engine import score_labelled, score_workload
from project.engine.requests import PreparedRequest, prepare_requests
from project.errors import ProjectError
from project.evaluation.moment import moment_requests
from project.evaluation.recall import candidate_recall
from project.evaluation.result import (
    PlannedRows,
    adaptive_summary,
    fold_of,
    own_metric,
    scored_result,
    scored_rows,
)
from project.exits.budget import calibrate
from project.exits.criteria import StaticExit
from project.exits.plan import (
    CHECKPOINT_KEY,
    ExitSettings,
    Plans,
    admit,
    plans_of,
)
from project.exits.ranking import (
    CANDIDATES,
    Lists,
    ScoredRequests,
    certify_lists,
    fit_lists,
    no_lists,
)
from project.metrics import OwnMetric
from project.model.heads import heads_digest
from project.report.report import write_report
from project.report.tables import render, render_seconds
from project.results import CalibrateResult
from project.run import (
    Checkpoint,
    read_checkpoint,
    replace_file,
    result_head,
    write_json,
    write_table,
)
from project.run_folder import current_run, point_latest, run_folder
from project.tracking import log_config, log_report, log_result

if TYPE_CHECKING:
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
        # by fold, requests that lists are fitted and certified on: the same for every checkpoint
        self._prepared: dict[str, list[PreparedRequest]] = {}

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
                trainer,
                module,
                data_of(trainer),
                _scores(module),
                current_run(trainer),
                heads_digest(module.state_dict()),
                fitting=True,
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
        heads: str,
        fitting: bool = False,
    ) -> CalibrateResult:
        """Make the plan of validation's score table, keep it, log it and write results/calibrate.json.

        `heads` is the digest of those that made the scores.
        """
        path = folder / "results" / "calibrate.json"
        # of a result of any version: what was certified stays certified
        issued = (
            json.loads(path.read_text(encoding="utf-8"))["ledger"] if path.exists() else ()
        )
        # 1. the plan, and what is certified of it
        with data.clock.stage("calibrate"):
            features = data.features_of(scores, module.feature_baseline().base)
            plans, document = calibrate(
                scores, features, self.settings, data.split.hash, issued, heads, fitting
            )
        # 2. lists of the best k by the plan's heads
        with data.clock.stage("lists"):
            lists = self._lists(trainer, module, data, plans)
        document["lists"] = lists.document
        promises = [row["certificate"] for row in lists.document["lengths"]]
        if any(promise and promise["passed"] is not None for promise in promises):
            # the fold was read, whether or not the plan's own certificate did
            document["ledger"] = admit(
                document["ledger"], self.settings, heads, data.split.hash, fitting
            )
        self.plans = plans = replace(plans, lists=lists)
        # 3. what the plan does on tune
        tune = (scores["fold"] == "tune").to_numpy()
        rows = PlannedRows(plans.plan, scores.filter(tune), features[tune])
        result: CalibrateResult = {
            **result_head(
                "calibrate", data.split.manifest, str(folder / "config.yaml"), data.seed
            ),
            **document,
            "adaptive": adaptive_summary(plans, rows, "valid"),
        }
        if trainer.is_global_zero:
            write_json(path, result)
        self._log(trainer, plans, scores, features)
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
        if (
            isinstance(settings.criterion, StaticExit)
            or not settings.lists
            or trainer.world_size > 1
        ):
            return Lists()

        def scored(fold: str) -> ScoredRequests:
            if fold not in self._prepared:
                self._prepared[fold] = prepare_requests(module, data, drawn[fold].requests)
            return score_workload(module, drawn[fold], self._prepared[fold], plans.plan)

        # 1. requests, always the same: another draw would be another try of the certificate
        drawn = dict[str, Workload]()
        for fold in ("tune", "certify"):
            try:
                drawn[fold] = catalogue_requests(
                    data.split, fold, settings.lists, CANDIDATES, seed=0
                )
            except ProjectError as error:
                return Lists(document=no_lists(f"no lists: {error}"))
        # 2. the fold certify is read where the plan's certificate may read it
        lists = fit_lists(scored("tune"))
        if settings.certificate is not None and plans.certificate is not None:
            users = drawn["certify"].table["user"].n_unique()
            delta = settings.certificate.delta
            certify_lists(lists, users, delta, lambda: scored("certify"))
        return lists

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Checkpoint
    ) -> None:
        """Keep the plans, if there are any."""
        if self.plans is not None:
            checkpoint[CHECKPOINT_KEY] = self.plans.state()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Checkpoint
    ) -> None:
        """Take up the plans of a run."""
        self.plans = plans_of(checkpoint)

    def write_into(self, checkpoint: Path) -> None:
        """Replace the exit plans of a saved checkpoint, whole or not at all."""
        assert self.plans is not None
        content = read_checkpoint(checkpoint) | {CHECKPOINT_KEY: self.plans.state()}
        replace_file(checkpoint, lambda part: torch.save(content, part))

    @staticmethod
    def _log(trainer: L.Trainer, plans: Plans, scores: pl.DataFrame, features: F64) -> None:
        """`select/exit/...` on the select fold, which calibration has not seen."""
        fold = (scores["fold"] == "select").to_numpy()
        if not fold.any():
            return
        rows = PlannedRows(plans.plan, scores.filter(fold), features[fold], draws=2)
        summary = rows.summary(plans.static_exit)
        certificate = plans.certificate
        values = {
            "mean_depth": summary["mean_depth"],
            "token_layer_speedup": summary["token_layer_speedup"],
            "auc": summary["auc"],
            "auc_drop": summary["auc_drop"],
            "certificate_bound": None if certificate is None else certificate["bound"],
        }
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
            own_metric(metric, {"": np.zeros(4)}, [0, 1, 0, 1], [0, 0, 1, 1])
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
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of training, validation left out; write the result of fit."""
        seconds = data_of(trainer).clock.seconds
        seconds["train"] = (
            time.perf_counter() - self._started - seconds.get("validate", 0.0)
        )
        if self._scores is not None:
            self._report(trainer, pl_module, self._scores, "fit", "valid")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of validation or test."""
        self._evaluation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the scores of validation; in validate, its result, too."""
        if trainer.sanity_checking:
            return
        self._stop_clock(trainer, "validate")
        if trainer.state.fn == "fit" and not will_be_saved(trainer):
            return
        self._scores = _scores(pl_module)
        self._write_scores(trainer, pl_module, "valid")
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, self._scores, "validate", "valid")

    on_test_start = on_validation_start

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
        seconds[stage] += time.perf_counter() - self._evaluation_started

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
        scores = _scores(pl_module)
        plans = exit_calibration_of(trainer).plans
        if plans is not None:  # where each row leaves, and the logit it leaves with
            base = cast("ExitRecommender", pl_module).feature_baseline().base
            features = data_of(trainer).features_of(scores, base)
            layer, logit = plans.plan.emitted(plans.plan.outputs(scores, features))
            scores = scores.with_columns(
                exit_layer=pl.Series(layer.numpy()).cast(pl.Int64),
                adaptive_logit=pl.Series(logit.numpy()).cast(pl.Float32),
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
        data = data_of(trainer)
        module = cast("ExitRecommender", pl_module)
        folder = current_run(trainer)
        calibration = exit_calibration_of(trainer)
        chosen = int(module.chosen_exit)
        # 1. the same rows as candidates of one moment; several processes cannot run the engine
        # on one of them
        moment = workload = None
        if trainer.world_size == 1:
            with data.clock.stage("inside users"):
                with suppress(ProjectError):  # a split without such requests
                    workload = moment_requests(data.split, fold_of(split) or split)
                if workload is not None:
                    prepared = prepare_requests(module, data, workload.requests)
                    moment = score_labelled(module, workload, prepared)
        # 2. exits, baselines, plan and slices
        content = scored_rows(
            data,
            scores,
            split,
            chosen if chosen > 0 else None,
            calibration.plans,
            module.feature_baseline().base,
            self.metric,
            moment,
        )
        # 3. whether recommendations would find what was liked
        if command == "test":
            with suppress(ProjectError), data.clock.stage("candidates"):
                content["candidates"] = candidate_recall(data)
        head = result_head(
            command, data.split.manifest, str(folder / "config.yaml"), data.seed
        )
        result = scored_result(head, content, data, calibration.refused)
        # 4. the result file, W&B, the terminal, the report
        name = f"{command}-{self.tag}" if self.tag else command
        path = write_json(folder / "results" / f"{name}.json", result)
        log_result(trainer, result, name)
        console = Console(width=120) if not Console().is_terminal else Console()
        console.print(
            Markdown(render(result, path.parent)),
            Markdown(render_seconds(result)),
            f"written: {path}",
        )
        if command != "validate":
            page = write_report(folder)
            Console().print(f"report: {page}", soft_wrap=True)
            log_report(trainer, folder, command)


def _scores(module: L.LightningModule) -> pl.DataFrame:
    scores = cast("ExitRecommender", module).scores
    assert scores is not None
    return scores
