"""ExitCalibration: turns the scores of validation into an exit plan, and keeps it with the checkpoint.

Unusual here: the score table is gathered from all processes before this runs, so every process fits the same plan;
requests that thresholds are priced on are few, and every process scores all of them. In `fit` a plan that cannot be
made is a warning, not the end of a training; whoever needs a plan later gets an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import polars
import torch
from lightning.pytorch.utilities import rank_zero_warn

from project.artefacts import read_checkpoint, replace_file, result_head, write_json
from project.callbacks.run_folder import current_run, data_of, will_be_saved
from project.counting import counting_features
from project.data.workloads import Workload, catalogue_requests
from project.engine.every_head import score_every_head
from project.engine.prepared import PreparedRequest, prepare_requests
from project.errors import ConfigError, NotCalibratedError, ProjectError
from project.evaluation.adaptive import PlannedRows
from project.evaluation.scores import labelled_scores
from project.exits.budget import AskedScores
from project.exits.calibrate import calibrate
from project.exits.plan import ExitPlan, Floats
from project.exits.settings import ExitSettings

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData
    from project.model.module import ExitRecommender


@dataclass(frozen=True)
class Plans:
    """The plans of a run.

    Attributes:
        plan: In use.
        rival: Layer of its honest rival.
        without: The same run's without exit 0.
        rival_without: Layer of that plan's rival.
        certified: The fastest plan that the certificate reached; None where its first test failed, or in a checkpoint
            of a version that did not look for one.
    """

    plan: ExitPlan
    rival: int
    without: ExitPlan
    rival_without: int
    certified: ExitPlan | None = None

    def summary(self, rows: PlannedRows, promise: tuple[str, str] | None = None) -> dict[str, Any]:
        """The `adaptive` part of a result file.

        Args:
            rows: Labelled rows under `plan`.
            promise: Name and unit of the certified risk, to be measured on them.
        """

        def measured(rows: PlannedRows, rival: int) -> dict[str, Any]:
            return {**rows.summary(rival), **({} if promise is None else {"risk": rows.risk(*promise)})}

        certified = None if self.certified is None else measured(rows.under(self.certified), self.rival)
        without = rows.under(self.without).summary(self.rival_without)
        return {**measured(rows, self.rival), "without_exit_0": without, "certified": certified}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "plan": self.plan.state(),
            "rival": self.rival,
            "without": self.without.state(),
            "rival_without": self.rival_without,
            "certified": None if self.certified is None else self.certified.state(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Plans:
        """From what `state` gave."""
        plan, without = (ExitPlan.from_state(state[key]) for key in ("plan", "without"))
        known = state.get("certified")
        certified = None if known is None else ExitPlan.from_state(known)
        return cls(plan, state["rival"], without, state["rival_without"], certified)


@dataclass(eq=False)
class ExitCalibration(ExitSettings, pl.Callback):
    """Calibrates exits on the tune fold of every validation and certifies them on the certify fold.

    Its arguments are the settings themselves, so that YAML says `exits.criterion`.
    """

    def __post_init__(self) -> None:
        """Start without a plan."""
        super().__post_init__()
        self.found: Plans | None = None
        self.issued: dict[str, Any] = {}  # the certificate as results/calibrate.json has it
        self._workload: Workload | None = (
            None  # requests of the fold tune, and what the engine needs of them:
        )
        self._prepared: list[PreparedRequest] = []  # they do not change while weights do

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse requests of the fold tune that cannot be made before anything is trained."""
        if stage == "fit" and self.candidates > 1:
            self._tune_requests(data_of(trainer))

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
            self.found, self.issued = None, {}
            module.forget_exits()
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
            module: Gets thresholds and calibration as buffers; scores requests where exits.candidates is above 1.
            data: Evidence and protocol of the scores.
            scores: Score table of validation.
            folder: The run.
        """
        with data.clock.stage("calibrate"):
            asked = None if self.candidates == 1 else self._asked(module, data)
            features = features_of(module, data, scores)
            found = calibrate(scores, features, self, data.split.hash, _previous(folder), asked)
        self.found = Plans(found.plan, found.rival, found.without, found.rival_without, found.certified)
        self.issued = found.document["certificate"] or {}
        module.keep_exits(found.plan)
        head = result_head("calibrate", data.split.manifest, str(folder / "config.yaml"), data.seed)
        tune = (scores["fold"] == "tune").to_numpy()
        rows = PlannedRows(found.plan, scores.filter(tune), features[tune], self.stream)
        adaptive = self.found.summary(rows)
        result = head | found.document | {"adaptive": {"split": "valid", "fold": "tune", **adaptive}}
        if trainer.is_global_zero:
            write_json(folder / "results" / "calibrate.json", result)
        self._log(trainer, scores, features)
        return result

    def require_plan(self) -> ExitPlan:
        """The plan.

        Raises:
            NotCalibratedError: If there is none; names the command that makes one.
        """
        if self.found is None:
            raise NotCalibratedError(
                "this checkpoint has no calibrated exits. Run `python -m project calibrate --config RUN/config.yaml "
                "--ckpt_path RUN/checkpoints/last.ckpt`."
            )
        return self.found.plan

    def state_dict(self) -> dict[str, Any]:
        """Plans, rivals and certificate; empty before calibration."""
        if self.found is None:
            return {}
        return {**self.found.state(), "certificate": json.dumps(self.issued)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        if state_dict:
            self.found = Plans.from_state(state_dict)
            self.issued = json.loads(state_dict["certificate"])

    def write_into(self, checkpoint: Path, module: ExitRecommender) -> None:
        """Replace the exit plan of a saved checkpoint, whole or not at all."""
        content = read_checkpoint(checkpoint)
        content.setdefault("callbacks", {})[self.state_key] = self.state_dict()
        for name in ("exit_thresholds", "exit_calibration"):
            content["state_dict"][name] = getattr(module, name).cpu()
        replace_file(checkpoint, lambda part: torch.save(content, part))

    def _tune_requests(self, data: InteractionData) -> Workload:
        """The catalogue requests that thresholds are priced on."""
        if self._workload is None:
            try:
                self._workload = catalogue_requests(
                    data.split, "tune", self.requests, self.candidates, data.seed
                )
            except ConfigError as error:
                raise ConfigError(
                    f"exits.candidates is {self.candidates}, so thresholds are priced on requests of the fold tune; "
                    f"they cannot be made: {error} Or set exits.candidates to 1."
                ) from error
        return self._workload

    def _asked(self, module: ExitRecommender, data: InteractionData) -> AskedScores:
        """Scores of these requests' candidates by every head, under the module's weights."""
        workload = self._tune_requests(data)
        if not self._prepared:
            self._prepared = prepare_requests(module, data, workload.requests)
        scores = score_every_head(module, self._prepared, candidates=workload.requests.table())
        features = np.concatenate([r.evidence for r in self._prepared])
        return AskedScores(labelled_scores(scores, workload.table), features, data.seed)

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
