"""Who leaves: the head at which each row goes, by a confidence and a threshold at every head."""

from __future__ import annotations

import torch
from torch import Tensor


def leave(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Index (n,) of the first head whose confidence (n, K) reaches its threshold (K,); the last head takes everyone."""
    leaves = confidence >= thresholds.to(confidence)
    # the last head is never asked
    leaves[:, -1] = True
    return leaves.to(torch.int8).argmax(dim=1)  # argmax returns the first of equals
