"""TrunkWeights: an evaluation with weights of another type than the checkpoint's.

Unusual here: the checkpoint knows nothing of it. Weights are restored as they are and converted right before the first
batch, so the same run is scored both ways, and its exit plan is that of its own weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import Precision

from project.engine.trunk_weights import Weights, with_weights

if TYPE_CHECKING:
    from project.model.module import ExitRecommender


class TrunkWeights(pl.Callback):
    """Converts the trunk before the first batch of `test`.

    Args:
        weights: Type of the trunk's weights.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before weights are loaded: autocast and half precision of the trainer's would round where these do not."""
        trainer.strategy.precision_plugin = Precision()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the checkpoint was restored."""
        module = cast("ExitRecommender", pl_module)
        module.trunk = with_weights(module, self.weights).trunk
