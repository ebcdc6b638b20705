"""What a trained model knows about exits beside its weights: exit 0 and the compared exit.

Both are buffers that start as NaN or -1, so they travel with every checkpoint and cannot be mistaken for something that
was fitted. The exit plan is the callback's (`ExitCalibration`).
"""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from project.counting import FEATURES, CountingPrior
from project.errors import NotFittedError


class ExitBuffers(pl.LightningModule):
    """A LightningModule with the buffers of its exits."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen_exit: Tensor
        self.prior: Tensor
        # the exit layer of the headline, by validation's tune fold; -1: not validated yet
        self.register_buffer("chosen_exit", torch.tensor(-1))
        # exit 0, fitted when training starts; NaN: not fitted yet
        self.register_buffer("prior", torch.full((2 + len(FEATURES),), torch.nan))

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
