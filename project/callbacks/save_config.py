"""config.yaml of a run, `latest` beside it, and the configuration in W&B."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from project.callbacks.run_folder import run_folder


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml in the run folder, points `latest` at the run, and sends the configuration to W&B."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save for fit only: other verbs write into the run of their checkpoint."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on rank 0."""
        del pl_module, stage
        run = run_folder(trainer)
        link = run.parent / "latest"
        part = link.with_name(f".latest.{os.getpid()}")
        part.unlink(missing_ok=True)
        part.symlink_to(run.name, target_is_directory=True)
        os.replace(part, link)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(_plain(self.config.as_dict()), allow_val_change=True)


def _plain(value: Any) -> Any:
    """Containers as they are, everything else that is not a number, text or truth value as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
