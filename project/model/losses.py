"""The loss of all exit heads together, normalised by the number of targets of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Literal["uniform", "linear", "sqrt", "inverse"]
SHAPES: dict[Weights, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "linear": lambda depth: depth,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
}


@dataclass
class LossSettings:
    """How the heads share the loss.

    Args:
        weights: Weight of a head by its depth: the same for all (uniform), in proportion to the depth
            (linear), to its square root (sqrt) or to one over the depth (inverse). Weights sum to 1.
        warmup_steps: Optimiser steps over which the weights go from uniform to their shape: every head starts
            as a reader of the last layer, so at first all have to learn.
    """

    weights: Weights = "uniform"
    warmup_steps: int = 0


def exit_weights(settings: LossSettings, exit_layers: Sequence[int], step: int) -> Tensor:
    """Weights of the heads in the loss.

    Args:
        settings: Shape and warm-up.
        exit_layers: Depth of each of the K heads, from 1.
        step: Optimiser steps done so far.

    Returns:
        (K,) float32, positive, summing to 1.
    """
    depth = torch.tensor(exit_layers, dtype=torch.float32)
    shape = SHAPES[settings.weights](depth)
    done = min(1.0, step / settings.warmup_steps) if settings.warmup_steps > 0 else 1.0
    return torch.lerp(torch.full_like(depth, 1 / len(depth)), shape / shape.sum(), done)


def exit_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, global_targets: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Weighted binary cross-entropy of all heads.

    A head of weight 0 is multiplied, not skipped: DDP waits for the gradients of every parameter.

    Args:
        logits: (n, K).
        labels: (n,) 0 or 1.
        weights: (K,), see `exit_weights`.
        global_targets: What the sums over targets are divided by.

    Returns:
        The loss, a scalar with gradient; and the loss of each head, (K,), detached.
    """
    expected = labels[:, None].expand_as(logits).to(logits.dtype)
    per_head = F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(0) / global_targets
    return (weights * per_head).sum(), per_head.detach()


def drift_loss(logits: Tensor, drift: Tensor, global_targets: Tensor | float) -> Tensor:
    """Cross-entropy of every head's drift against |p_last - p_here|, whose mean it estimates; the mean over heads.

    Gradients reach the drift outputs only.

    Args:
        logits: (n, K).
        drift: (n, K) logits of the expected drift; the last column is not read.
        global_targets: What the sum over targets is divided by.
    """
    if logits.shape[1] == 1:
        return logits.new_zeros(())
    p = logits.detach().sigmoid()
    expected = (p[:, -1:] - p[:, :-1]).abs()
    loss = F.binary_cross_entropy_with_logits(drift[:, :-1], expected, reduction="sum")
    return loss / ((logits.shape[1] - 1) * global_targets)
