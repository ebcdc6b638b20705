"""A run's folder: who makes it, where a command's files go, and when `latest` names it.

`Trainer.log_dir` broadcasts, so code that only rank 0 runs would wait for ever on it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from project.artefacts import read_checkpoint, replace_file, run_of_checkpoint

if TYPE_CHECKING:
    from project.datamodule import InteractionData


BEFORE_RESULTS = {"config.yaml", "hparams.yaml"}  # what a run's folder holds before anything was computed


class RunLogger(CSVLogger):
    """Lightning's CSV logger, whose folder version_N is made the moment its number is chosen.

    Two fits that start together get a folder each: `mkdir` succeeds once. A command that is refused before it computed
    anything leaves none.
    """

    _made: Path | None = None

    def _get_next_version(self) -> int:
        number: int = super()._get_next_version()
        while rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # other processes are told, see SaveConfig
            folder = Path(self.root_dir) / f"version_{number}"
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                self._made = folder
                break
        return number

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left, and remove the folder of a command that failed before it had anything.

        Args:
            status: Lightning's: success, failed.
        """
        super().finalize(status)
        made = self._made if status == "failed" else None
        if made and {path.name for path in made.rglob("*") if path.is_file()} <= BEFORE_RESULTS:
            shutil.rmtree(made, ignore_errors=True)


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's way to the disk: a checkpoint is written beside its target, then renamed, and never unpickled."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write all of it, or leave what is there."""
        del storage_options
        replace_file(Path(path), lambda part: torch.save(checkpoint, part))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """As `read_checkpoint`, whatever Lightning's callers ask for."""
        del map_location, weights_only
        return read_checkpoint(path)


def run_folder(trainer: pl.Trainer, ckpt_path: str | Path | None = None) -> Path:
    """The run of the checkpoint that a verb was given, else the folder of the CSV logger; safe on one process alone.

    Args:
        trainer: After it was made.
        ckpt_path: A checkpoint, for a verb that continues or reads a run.
    """
    if ckpt_path is not None:
        return run_of_checkpoint(ckpt_path)
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return Path(logger.log_dir)
    return Path(trainer.default_root_dir)


def point_latest(trainer: pl.Trainer) -> None:
    """Let the link `latest` name this fit's run; nothing where no logger makes run folders, or off rank 0."""
    run = run_folder(trainer)
    if not trainer.is_global_zero or run == Path(trainer.default_root_dir):
        return
    link = run.parent / "latest"
    part = link.with_name(f".latest.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(run.name, target_is_directory=True)
    os.replace(part, link)


def will_be_saved(trainer: pl.Trainer) -> bool:
    """Whether this validation's metric earns a checkpoint: what is not saved must not be what a result is about.

    Args:
        trainer: In the `on_validation_end` of fit; asked on all processes.
    """
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint) or saver.monitor is None:
        return True
    # with save_top_k 0 none is chosen by its metric: results are about the latest weights, as last.ckpt is
    if saver.save_top_k == 0:
        return True
    return saver.check_monitor_top_k(trainer, trainer.callback_metrics.get(saver.monitor))


def current_run(trainer: pl.Trainer) -> Path:
    """`run_folder` of the verb that is running; a resumed fit has a folder of its own."""
    return run_folder(trainer, None if trainer.state.fn == "fit" else trainer.ckpt_path)


def data_of(trainer: pl.Trainer) -> InteractionData:
    """The DataModule of the verb that is running."""
    return cast("InteractionData", trainer.datamodule)  # type: ignore[attr-defined]
