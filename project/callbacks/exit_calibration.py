"""ExitCalibration: turns the scores of validation into an exit plan, and keeps it with the checkpoint.

The score table is gathered from all processes before this runs, so every process fits the same plan. In `fit` a plan
that cannot be made is a warning, not the end of a training; whoever needs a plan later gets an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import polars
import torch
from lightning.pytorch.utilities import rank_zero_warn

from project.artefacts import read_checkpoint, replace_file, result_head, write_json
from project.callbacks.run_folder import current_run, data_of, will_be_saved
from project.counting import counting_features
from project.errors import ProjectError
from project.evaluation.adaptive import PlannedRows, adaptive_summary
from project.exits.calibrate import calibrate
from project.exits.plan import Floats, Plans
from project.exits.settings import ExitSettings

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender


@dataclass(eq=False)
class ExitCalibration(ExitSettings, pl.Callback):
    """Calibrates exits on the tune fold of every validation and certifies them on the certify fold.

    Its arguments are the settings themselves, so that YAML says `exits.criterion`.
    """

    def __post_init__(self) -> None:
        """Start without a plan."""
        super().__post_init__()
        self.found: Plans | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate while training, where a checkpoint is going to be saved; validate only reports."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not will_be_saved(trainer):
            return
        module = cast("ExitRecommender", pl_module)
        assert module.scores is not None
        try:
            self.calibrate(trainer, module, data_of(trainer), module.scores, current_run(trainer))
        except ProjectError as error:
            # the plan of an earlier validation is not this checkpoint's
            self.found = None
            rank_zero_warn(f"exits are not calibrated: {error}", category=UserWarning)

    def calibrate(
        self,
        trainer: pl.Trainer,
        module: ExitRecommender,
        data: InteractionData,
        scores: polars.DataFrame,
        folder: Path,
    ) -> dict[str, Any]:
        """Make the plan of validation scores, keep it, log it and write results/calibrate.json.

        Args:
            trainer: Its loggers are told.
            module: Its exit 0 makes features of evidence.
            data: Evidence and protocol of the scores.
            scores: Score table of validation.
            folder: The run.
        """
        with data.clock.stage("calibrate"):
            features = features_of(module, data, scores)
            plans = calibrate(scores, features, self, data.split.hash, _previous(folder))
        self.found = plans
        head = result_head("calibrate", data.split.manifest, str(folder / "config.yaml"), data.seed)
        tune = (scores["fold"] == "tune").to_numpy()
        rows = PlannedRows(plans.plan, scores.filter(tune), features[tune], self.stream)
        adaptive = (
            {"split": "valid", "fold": "tune"} | adaptive_summary(plans, rows) | plans.document["adaptive"]
        )
        result = head | plans.document | {"adaptive": adaptive}
        if trainer.is_global_zero:
            write_json(folder / "results" / "calibrate.json", result)
        self._log(trainer, scores, features)
        return result

    @property
    def issued(self) -> dict[str, Any]:
        """The certificate as results/calibrate.json has it; empty without a plan."""
        return {} if self.found is None else self.found.document["certificate"] or {}

    def state_dict(self) -> dict[str, Any]:
        """The plans; empty before calibration."""
        return {} if self.found is None else self.found.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        if state_dict:
            self.found = Plans.from_state(state_dict)

    def write_into(self, checkpoint: Path) -> None:
        """Replace the exit plans of a saved checkpoint, whole or not at all."""
        content = read_checkpoint(checkpoint)
        content.setdefault("callbacks", {})[self.state_key] = self.state_dict()
        replace_file(checkpoint, lambda part: torch.save(content, part))

    def _log(self, trainer: pl.Trainer, scores: polars.DataFrame, features: Floats) -> None:
        """`select/exit/...` on the select fold, which calibration has not seen."""
        assert self.found is not None
        fold = (scores["fold"] == "select").to_numpy()
        if not fold.any():
            return
        rows = PlannedRows(self.found.plan, scores.filter(fold), features[fold], self.stream, draws=2)
        summary = rows.summary(self.found.rival)
        values = {k: summary[k] for k in ("mean_depth", "token_layer_speedup", "auc", "auc_drop")}
        values["certificate_bound"] = self.issued.get("bound")
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"select/exit/{k}": v for k, v in values.items() if v is not None}, trainer.global_step
            )


def exit_calibration_of(trainer: pl.Trainer) -> ExitCalibration:
    """The callback of a trainer made by the command line, which always has one."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(c for c in callbacks if isinstance(c, ExitCalibration))


def features_of(module: ExitRecommender, data: InteractionData, scores: polars.DataFrame) -> Floats:
    """Counting features (n, F) of the rows of a score table: of one split, or of the requests at hand."""
    if scores["row_id"].null_count():
        assert data.candidate_evidence is not None
        evidence = data.candidate_evidence
    else:
        evidence = data.evidence_of(data.split.rows[scores["row_id"].to_numpy()])
    return counting_features(evidence, module.counting_prior().base)


def _previous(folder: Path) -> dict[str, Any] | None:
    path = folder / "results" / "calibrate.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
