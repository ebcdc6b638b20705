"""Gradient equilibrium (Li et al. 2019, "Improved Techniques for Training Adaptive Deep Networks").

Unusual here: nothing changes in the forward pass. Where a head leaves the trunk, what flows back is rescaled, so that a
stage of layers learns from the mean of all heads above it, however many there are, not from their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaledGradient(torch.autograd.Function):
    """The input as it is; its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        """The input."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Scaled."""
        return ctx.factor * gradients[0], None


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """The tensor as it is; its gradient times `factor`."""
    scaled: Tensor = ScaledGradient.apply(value, factor)  # type: ignore[no-untyped-call]
    return scaled


def equilibrium_branch(hidden: Tensor, head: int, heads: int) -> tuple[Tensor, Tensor]:
    """What head and trunk go on with where a head leaves the trunk.

    With heads i = 1 ... K, the gradient of head i counts 1 / (K - i + 1) and what comes from beyond it
    (K - i) / (K - i + 1): the layers below head i then get 1 / (K - i + 1) of each of the heads i ... K, their mean. A
    head's own weights are not touched.

    Args:
        hidden: Hidden states at the branch.
        head: i - 1, from 0.
        heads: K.

    Returns:
        The hidden states for the head, and for the layers above.
    """
    left = heads - head
    return scale_gradient(hidden, 1 / left), scale_gradient(hidden, (left - 1) / left)
