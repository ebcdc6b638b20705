"""Where a run's files go and what it reads, said without talking to other processes.

`Trainer.log_dir` broadcasts, so code that only rank 0 runs would wait for ever on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from project.artefacts import run_of_checkpoint

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData


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
