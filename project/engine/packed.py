"""Linear layers that read a packed copy of their weights, for CPUs.

Unusual here: oneDNN is asked directly. torch hands it no float32 product, and a weight that is handed over anew would
be reordered in every call; packed once, as torch's own compiler packs frozen weights, products of ten rows take a third
to half of the time, of eighty rows two thirds, of a thousand nine tenths. It costs the memory of a second copy.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from project.engine.copies import with_linears

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


def packed(module: Kind) -> Kind:
    """A module whose linear layers are packed where that is possible; itself where none is, or all are already.

    Args:
        module: In eval mode. Stays as it is; its parameters are shared.
    """
    return with_linears(module, lambda linear: PackedLinear(linear) if _packable(linear) else linear)


def _packable(linear: nn.Linear) -> bool:
    weight = linear.weight
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if weight.device.type != "cpu" or isinstance(weight, DTensor) or not onednn:
        return False
    if weight.dtype == torch.bfloat16:
        supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return supported
    return weight.dtype == torch.float32
