"""The folder of a run: how it is made and found, which one `latest` names, and how checkpoints are written there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from project.run import Checkpoint, read_checkpoint, replace_file, run_of_checkpoint

# what a run's folder holds before anything was computed
BEFORE_RESULTS = {"config.yaml", "hparams.yaml"}


class RunLogger(CSVLogger):
    """Lightning's CSV logger, whose folder version_N is made the moment its number is chosen: `mkdir` succeeds once."""

    _made: Path | None = None

    def _get_next_version(self) -> int:
        number: int = super()._get_next_version()
        while rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # other processes get it from SaveConfig
            folder = Path(self.root_dir) / f"version_{number}"
            try:
                folder.mkdir(parents=True)
                self._made = folder
                break
            except FileExistsError:
                number += 1
        return number

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left; remove the folder of a command that failed before it had computed anything."""
        super().finalize(status)
        made = self._made if status == "failed" else None
        if (
            made
            and {path.name for path in made.rglob("*") if path.is_file()} <= BEFORE_RESULTS
        ):
            shutil.rmtree(made, ignore_errors=True)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints are written beside their target and renamed, and never unpickled."""

    def save_checkpoint(
        self,
        checkpoint: Checkpoint,
        path: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Write all of it, or leave what is there."""
        replace_file(Path(path), lambda part: torch.save(checkpoint, part))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> Checkpoint:
        """As `read_checkpoint`, whatever Lightning's callers set."""
        return read_checkpoint(path)


def run_folder(trainer: L.Trainer, ckpt_path: str | Path | None = None) -> Path:
    """The run of a checkpoint, else the folder of the CSV logger."""
    if ckpt_path is not None:
        return run_of_checkpoint(ckpt_path)
    found = (
        Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)
    )
    return next(found, Path(trainer.default_root_dir))


def point_latest(trainer: L.Trainer) -> None:
    """Let the link `latest` name this fit's run; nothing where no logger makes run folders, or off rank 0."""
    run = run_folder(trainer)
    if not trainer.is_global_zero or run == Path(trainer.default_root_dir):
        return
    link = run.parent / "latest"
    part = link.with_name(f".latest.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(run.name, target_is_directory=True)
    os.replace(part, link)


def current_run(trainer: L.Trainer) -> Path:
    """`run_folder` of the command that is running; a resumed fit has a folder of its own."""
    return run_folder(trainer, None if trainer.state.fn == "fit" else trainer.ckpt_path)


def tag_of(trainer: L.Trainer) -> str:
    """The ending of the names of score tables and results: `-TAG`, or nothing."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    # ResultFiles has the tag; its module draws pictures, which scoring does not need
    tags = [tag for callback in callbacks if (tag := getattr(callback, "tag", None))]
    return "".join(f"-{tag}" for tag in tags[:1])
