"""WandbArtifacts: the run's checkpoints and its report as versioned artifacts of Weights & Biases.

Unusual here: nothing happens without a W&B logger, and an offline run keeps its copies until `wandb sync` uploads them,
so a checkpoint that `calibrate` rewrites in the meantime arrives as it was logged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from project.artefacts import read_checkpoint
from project.callbacks.run_folder import current_run

PATTERNS = ("report/*.md", "report/*.html", "report/*.png", "results/*.json")


class WandbArtifacts(pl.Callback):
    """Logs checkpoints (aliases `best`, `latest`), report and result files of a run that Weights & Biases tracks.

    Args:
        checkpoints: Whether to log checkpoints after fit: their size is that of the trained weights and of the
            optimizer's state.
        report: Whether to log report and result files after fit and test.
    """

    def __init__(self, checkpoints: bool = True, report: bool = True) -> None:
        self.checkpoints, self.report = checkpoints, report

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log checkpoints and report: all other callbacks are done with training."""
        for logger in _loggers(trainer):
            for path, aliases in aliased(trainer) if self.checkpoints else []:
                _log(logger, "model", {"model.ckpt": path}, aliases, {"global_step": _step(path)})
            if self.report:
                _log_report(logger, current_run(trainer), "fit")

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the report, which now has test's numbers."""
        for logger in _loggers(trainer):
            if self.report:
                _log_report(logger, current_run(trainer), "test")


def aliased(trainer: pl.Trainer) -> list[tuple[Path, list[str]]]:
    """Checkpoints of a fit with their aliases; the latest comes last, and is also the best if no other is.

    Args:
        trainer: After training.
    """
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint):
        return []
    best, last = saver.best_model_path, saver.last_model_path or saver.best_model_path
    if not last:  # nothing was ever saved
        return []
    if not best or _step(best) == _step(last):
        return [(Path(last), ["best", "latest"])]
    return [(Path(best), ["best"]), (Path(last), ["latest"])]


def _step(checkpoint: str | Path) -> int:
    return int(read_checkpoint(checkpoint, mmap=True)["global_step"])


def _loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _log_report(logger: WandbLogger, run: Path, verb: str) -> None:
    found = [path for pattern in PATTERNS for path in sorted(run.glob(pattern))]
    if found:
        files = {str(path.relative_to(run)): path for path in found}
        _log(logger, "report", files, [verb, "latest"], {"run": str(run)})


def _log(
    logger: WandbLogger, kind: str, files: dict[str, Path], aliases: list[str], about: dict[str, Any]
) -> None:
    """One version of the artifact `<kind>-<W&B's id of the run>`; Lightning names its own so: `best` is of this run."""
    from wandb import Artifact

    artifact = Artifact(f"{kind}-{logger.experiment.id}", type=kind, metadata=about)
    for inside, path in files.items():
        artifact.add_file(str(path), name=inside)  # "mutable": W&B copies it
    logger.experiment.log_artifact(artifact, aliases=aliases)
