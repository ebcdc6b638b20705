"""A linear layer with int8 weights, for CPUs.

Unusual here: activations are scaled token by token, not by the range of whatever happens to be in the batch, so a
score still does not depend on its company, nor on who left before. torch's dynamic kernel measures one range per call;
every call therefore holds one row more, from -1 to 1, and all other rows are divided by their largest magnitude.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

LEVELS = 127
SMALLEST = 1e-12  # a token of zeros is divided by this


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale an output channel, and int8 activations, one scale a token.

    Symmetric, rounded to nearest. Products are summed in int32, so a token's output depends on that token alone.

    Args:
        linear: The layer in floating point; is not changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().contiguous()
        scale = (weight.abs().amax(dim=1).clamp_min(SMALLEST) / LEVELS).double()
        zero = torch.zeros(len(scale), dtype=torch.int64)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "onednn" if "onednn" in _engines() else before
        try:
            with warnings.catch_warnings():
                # quantised tensors leave torch in favour of torchao, whose eager int8 is slower than float on a CPU
                warnings.filterwarnings("ignore", ".*quantized tensor creation functions.*")
                rounded = torch.quantize_per_channel(weight, scale, zero, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(rounded, None)
        finally:
            torch.backends.quantized.engine = before
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return self.in_features * self.out_features + 4 * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) float32 -> (..., out) float32."""
        rows = x.reshape(-1, self.in_features)
        size = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_min(SMALLEST)
        anchored = rows.new_empty(len(rows) + 1, self.in_features)
        torch.div(rows, size, out=anchored[1:])
        anchored[0] = 0
        anchored[0, :1], anchored[0, 1:2] = -1, 1
        out: Tensor = torch.ops.quantized.linear_dynamic(anchored, self._packed, False)[1:].mul_(size)
        if self.bias is not None:
            out.add_(self.bias)
        return out.view(*x.shape[:-1], self.out_features)


def _engines() -> list[str]:
    return list(torch.backends.quantized.supported_engines)
