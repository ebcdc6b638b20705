"""Int8Trunk: an evaluation with int8 weights, of a checkpoint that was trained with float32 ones.

Unusual here: the checkpoint knows nothing of it. Weights are restored as they are and rounded right before the first
batch, so the same run is scored both ways, and its exit plan is the one of float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl

from project.engine.int8 import quantised

if TYPE_CHECKING:
    from project.model.module import ExitRecommender


class Int8Trunk(pl.Callback):
    """Replaces the trunk's linear layers before the first batch of `test`."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the checkpoint was restored."""
        module = cast("ExitRecommender", pl_module)
        module.trunk = quantised(module).trunk
