"""ExitPlots: the report with its pictures at the end of fit and test, also sent to Weights & Biases."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from project.callbacks.run_folder import current_run
from project.report.document import write_report


class ExitPlots(pl.Callback):
    """Writes report/report.md, report.html and its pictures into the run folder.

    Args:
        enabled: Whether to; `python -m project report RUN` does it later, too.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the tune fold."""
        self._write(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report test."""
        self._write(trainer)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer) -> None:
        folder = current_run(trainer)
        if not self.enabled or not any((folder / "results").glob("*.json")):
            return
        page = write_report(folder)
        Console().print(f"report: {page}", soft_wrap=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for picture in sorted(page.parent.glob("*.png")):
                    logger.log_image(f"report/{picture.stem}", [str(picture)])
