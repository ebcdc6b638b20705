"""Weights & Biases: what of a run goes there beside curves and checkpoints: configuration, numbers and reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger

from project.results import ScoredResult
from project.run_folder import run_folder


def wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    """The trainer's loggers that are W&B's."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def log_config(trainer: L.Trainer, config: Mapping[str, object]) -> None:
    """Send the configuration, and name the run there as its folder is named."""
    run = run_folder(trainer)
    for logger in wandb_loggers(trainer):
        logger.log_hyperparams(dict(config))
        if logger._wandb_init.get("name") is None:
            logger.experiment.name = f"{run.parent.name}/{run.name}"


def log_result(trainer: L.Trainer, result: ScoredResult, name: str) -> None:
    """Send the table of a result, and the few numbers that runs are compared by."""
    loggers = wandb_loggers(trainer)
    if not loggers:
        return
    certificate = result["certificate"]
    passed = None if certificate is None else certificate["passed"]
    difference = result["baseline_difference"]
    plan = result["adaptive"]
    shares = {} if plan is None else plan["exit_shares"]
    summary = {
        f"{name}/minus_best_baseline": difference and difference["value"],
        f"{name}/chosen_exit": result["chosen_exit"],
        "certificate/passed": "not tested" if passed is None else passed,
    }
    columns = ["scores", "auc", "log_loss", "brier", "ece", "exit_share", "auc_leaving"]
    names = [f"exit {row['layer']}" for row in result["exits"]]
    names += [row["name"] for row in result["baselines"]]
    rows = []
    for name_of, row in zip(names, [*result["exits"], *result["baselines"]], strict=True):
        metrics = [row["auc"], row["log_loss"], row["brier"], row["ece"]]
        share = shares.get(name_of.removeprefix("exit "))
        rows.append([name_of, *metrics, share, row.get("auc_leaving")])
    folds = [row["fold"] for row in result["exits"] if row["fold"]]
    for logger in loggers:
        logger.experiment.summary.update(
            {key: value for key, value in summary.items() if value is not None}
        )
        place = "/".join([name, *folds[:1], "exits"])
        logger.log_table(place, columns=columns, data=rows)


def log_report(trainer: L.Trainer, run: Path, command: str) -> None:
    """Send a run's pictures, and as an artifact its report and result files."""
    patterns = ("report/*.md", "report/*.html", "report/*.png", "results/*.json")
    found = [path for pattern in patterns for path in sorted(run.glob(pattern))]
    for logger in wandb_loggers(trainer):
        from wandb import Artifact

        # named by W&B's id of the run, as Lightning names its own: `best` is of this run
        artifact = Artifact(f"report-{logger.experiment.id}", type="report")
        for path in found:
            if path.suffix == ".png":
                logger.log_image(f"report/{path.stem}", [str(path)])
            # "mutable": W&B copies it
            artifact.add_file(str(path), name=str(path.relative_to(run)))
        logger.experiment.log_artifact(artifact, aliases=[command, "latest"])
