"""What a trained model knows about exits beside its weights: exit 0, the compared exit, thresholds, calibration.

Unusual here: all of it are buffers that start as NaN (or -1), so it travels with every checkpoint and cannot be
mistaken for something that was fitted.
"""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from project.counting import FEATURES, CountingPrior
from project.errors import NotFittedError
from project.exits.plan import ExitPlan


class ExitBuffers(pl.LightningModule):
    """A LightningModule with the buffers of its exits.

    Args:
        heads: Number of heads, exit 0 included.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.chosen_exit: Tensor
        self.prior: Tensor
        self.exit_thresholds: Tensor
        self.exit_calibration: Tensor
        # the exit layer of the headline, by validation's tune fold; -1: not validated yet
        self.register_buffer("chosen_exit", torch.tensor(-1))
        # exit 0, fitted when training starts; NaN: not fitted yet
        self.register_buffer("prior", torch.full((2 + len(FEATURES),), torch.nan))
        # exit 0 first; NaN: never calibrated
        self.register_buffer("exit_thresholds", torch.full((heads,), torch.nan))
        self.register_buffer("exit_calibration", torch.full((heads, 3), torch.nan))

    def keep_exits(self, plan: ExitPlan) -> None:
        """Keep thresholds and calibration of an exit plan as buffers; without a prior nobody leaves at exit 0.

        Args:
            plan: Made for this model's exit layers.
        """
        first = 0 if plan.prior else 1
        self.exit_thresholds.fill_(torch.inf)
        self.exit_calibration.fill_(torch.nan)
        self.exit_thresholds[first:] = plan.policy.thresholds
        self.exit_calibration[first:] = plan.calibration.values

    def forget_exits(self) -> None:
        """Thresholds and calibration as if never calibrated."""
        self.exit_thresholds.fill_(torch.nan)
        self.exit_calibration.fill_(torch.nan)

    def on_validation_start(self) -> None:
        """Refuse to score a model that was never trained, before the first batch."""
        self.counting_prior()

    def on_test_start(self) -> None:
        """As for validation."""
        self.counting_prior()

    def on_predict_start(self) -> None:
        """As for validation."""
        self.counting_prior()

    def counting_prior(self) -> CountingPrior:
        """Exit 0 as it was fitted.

        Raises:
            NotFittedError: If neither `fit` ran nor a checkpoint was loaded.
        """
        values = self.prior.cpu().numpy()
        if np.isnan(values).any():
            raise NotFittedError(
                "this model has never been trained: its exit 0 has no weights. Give `--ckpt_path` a checkpoint of "
                "a run, or make one with `python -m project fit --config ...`."
            )
        return CountingPrior.from_array(values)
