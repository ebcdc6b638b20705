"""Gives linear layers prepacked weights: a second copy of them, as the device multiplies fastest.

On a CPU it is in the order that oneDNN multiplies in. Where a run computes in bfloat16 the copy is in bfloat16, on
every device; what goes in is rounded, what comes out has the type that went in, and everything between products stays
in float32, as under Lightning's bf16-mixed.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Kind = TypeVar("Kind", bound=nn.Module)


class PrepackedLinear(nn.Linear):
    """A linear layer that shares another's parameters and multiplies by a copy of its weights, made for that."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self._dtype = dtype
        self._onednn = _has_onednn(linear.weight)
        # the copy, as the kernel takes it
        self._prepacked = linear.weight.detach().to(dtype)
        if self._onednn:
            self._prepacked = torch.ops.mkldnn._reorder_linear_weight(self._prepacked, None)
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without a gradient."""
        rounded = x.to(self._dtype)
        if self._onednn:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                rounded, self._prepacked, self._bias, "none", [], ""
            )
        else:
            out = nn.functional.linear(rounded, self._prepacked, self._bias)
        return out.to(x.dtype)


def copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def prepacked(module: Kind, bfloat16: bool = False) -> Kind:
    """A copy of a module in eval mode whose linear layers have prepacked weights where they can have them.

    A module of which no layer can, or every layer that can has them already, is returned as it is.
    """
    if not any(_can_be_prepacked(part, bfloat16) for part in module.modules()):
        return module
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    found = copied(module)
    for name, child in found._modules.items():
        if isinstance(child, nn.Linear) and _can_be_prepacked(child, bfloat16):
            found._modules[name] = PrepackedLinear(child, dtype)
        elif child is not None:
            found._modules[name] = prepacked(child, bfloat16)
    return found


def _can_be_prepacked(part: nn.Module, bfloat16: bool) -> bool:
    if type(part) is not nn.Linear or isinstance(part.weight, DTensor):
        return False
    return part.weight.dtype == torch.float32 and (bfloat16 or _has_onednn(part.weight))


def _has_onednn(weight: Tensor) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and weight.device.type == "cpu"
