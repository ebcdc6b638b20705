"""config.yaml of a run, `latest` beside it, and the configuration in W&B."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from project.callbacks.run_folder import point_latest, run_folder


class SaveConfig(SaveConfigCallback):
    """Saves config.yaml in the run folder, points `latest` at a finished run, sends the configuration to W&B."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save for fit only: other verbs write into the run of their checkpoint."""
        for logger in trainer.loggers:  # rank 0 has made its folder, the others follow
            if isinstance(logger, CSVLogger):
                version = logger.version if trainer.is_global_zero else None
                logger._version = trainer.strategy.broadcast(version)
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on rank 0."""
        del pl_module, stage
        run = run_folder(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(_plain(self.config.as_dict()), allow_val_change=True)
                if logger._wandb_init.get("name") is None:
                    logger.experiment.name = f"{run.parent.name}/{run.name}"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that saves no checkpoint has results at its end."""
        point_latest(trainer)


def _plain(value: Any) -> Any:
    """Containers as they are, everything else that is not a number, text or truth value as text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
