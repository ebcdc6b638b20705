"""Gives linear layers on a CPU prepacked weights: a second copy of them, in the order that oneDNN multiplies in."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Kind = TypeVar("Kind", bound=nn.Module)


class PrepackedLinear(nn.Linear):
    """A linear layer on a CPU that shares another's parameters and multiplies by a prepacked copy of its weights."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self._prepacked = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without a gradient."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._prepacked, self.bias, "none", [], ""
        )
        return out


def copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def prepacked(module: Kind) -> Kind:
    """A copy of a module in eval mode whose linear layers have prepacked weights where they can have them.

    A module of which no layer can, or every layer that can has them already, is returned as it is.
    """
    if not any(_can_be_prepacked(part) for part in module.modules()):
        return module
    found = copied(module)
    for name, child in found._modules.items():
        if isinstance(child, nn.Linear) and _can_be_prepacked(child):
            found._modules[name] = PrepackedLinear(child)
        elif child is not None:
            found._modules[name] = prepacked(child)
    return found


def _can_be_prepacked(part: nn.Module) -> bool:
    if type(part) is not nn.Linear or isinstance(part.weight, DTensor):
        return False
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        onednn and part.weight.device.type == "cpu" and part.weight.dtype == torch.float32
    )
