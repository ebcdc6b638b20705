"""The criterion that learns how far a row's probability will still move: a small network per head.

Unusual here: all heads' networks are one batched network, fitted together and deterministically in a second;
features that say nothing (later heads, constants, heads without drift) get weight zero instead of a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.criteria import Criterion
from project.exits.outputs import HeadOutputs


class Learned(Criterion):
    """Minus the predicted drift |p_last - p_k|, from the heads so far and the evidence.

    Args:
        hidden: Hidden units per head.
        steps: Full-batch optimiser steps.
        decay: Weight decay: how much is paid for a weight, relative to the loss of one row in a thousand.
        seed: Seed of the initial weights.
    """

    learns = True
    _fitted = ("center", "scale", "weight_1", "bias_1", "weight_2", "bias_2")
