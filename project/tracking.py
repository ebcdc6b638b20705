"""Weights & Biases: the logger, and what of a run goes there: configuration, numbers, checkpoints and reports."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from project.results import ScoredResult
from project.run_folder import run_folder

CLOUD = "https://api.wandb.ai"


class Tracking(WandbLogger):
    """Weights & Biases, online where a key is known, offline elsewhere; `wandb sync` uploads an offline run later.

    Args:
        project: Name of the project there.
        save_dir: Folder in which W&B makes its own folder `wandb`.
        offline: Whether to stay offline; default: where no key is known and WANDB_MODE does not say otherwise.
        log_model: Whether to send the best and the latest checkpoint of a fit; a run without a key sends none.
        **kwargs: As for Lightning's WandbLogger.
    """

    def __init__(
        self,
        project: str,
        save_dir: str = "runs",
        offline: bool | None = None,
        log_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if offline is None:
            offline = "WANDB_MODE" not in os.environ and not key_is_known()
            if offline:
                rank_zero_info(
                    "W&B: no key is known, so this run is offline; `wandb sync` uploads it later"
                )
        super().__init__(
            project=project,
            save_dir=save_dir,
            offline=offline,
            # Lightning sends no checkpoints of an offline run
            log_model=log_model and not offline,
            **kwargs,
        )


def key_is_known() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, in WANDB_IDENTITY_TOKEN_FILE, or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    # the netrc file has keys by host
    host = urlparse(os.environ.get("WANDB_BASE_URL", CLOUD)).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
    files = {str(path.relative_to(run)): path for path in found}
    for logger in wandb_loggers(trainer):
        for picture in found:
            if picture.suffix == ".png":
                logger.log_image(f"report/{picture.stem}", [str(picture)])
        _log_artifact(logger, "report", files, [command, "latest"])


def _log_artifact(
    logger: WandbLogger, kind: str, files: Mapping[str, Path], aliases: list[str]
) -> None:
    """One version of the artifact `<kind>-<W&B's id of the run>`; Lightning names its own so: `best` is of this run."""
    from wandb import Artifact

    artifact = Artifact(f"{kind}-{logger.experiment.id}", type=kind)
    for inside, path in files.items():
        artifact.add_file(str(path), name=inside)  # "mutable": W&B copies it
    logger.experiment.log_artifact(artifact, aliases=aliases)
