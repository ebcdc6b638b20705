"""Linear layers that read a packed copy of their weights, for CPUs.

oneDNN is asked directly. torch hands it no float32 product, and a weight that is handed over anew would be reordered in
every call; packed once, as torch's own compiler packs frozen weights, products of ten rows take a third to half of the
time, of eighty rows two thirds, of a thousand nine tenths. It costs the memory of a second copy.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Kind = TypeVar("Kind", bound=nn.Module)


class PackedLinear(nn.Linear):
    """A linear layer for inference. Its parameters are the other layer's; only its products are made otherwise.

    Args:
        linear: The layer, on a CPU. Whoever changes its weights packs them again.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without a gradient."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return out


def copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def packed(module: Kind) -> Kind:
    """A module whose linear layers are packed where that is possible; itself where none is, or all are already.

    Args:
        module: In eval mode. Stays as it is; its parameters are shared.
    """
    if not any(_packable(part) for part in module.modules()):
        return module
    found = copied(module)
    for name, child in found._modules.items():
        if isinstance(child, nn.Linear) and _packable(child):
            found._modules[name] = PackedLinear(child)
        elif child is not None:
            found._modules[name] = packed(child)
    return found


def _packable(part: nn.Module) -> bool:
    if type(part) is not nn.Linear or isinstance(part.weight, DTensor):
        return False
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn and part.weight.device.type == "cpu" and part.weight.dtype == torch.float32
