"""The trunk with int8 weights, for CPUs: another lever beside exits.

Unusual here: activations are scaled token by token, not by the range of whatever happens to be in the batch, so a
score still does not depend on its company, nor on who left before. torch's dynamic kernel measures one range per call;
every call therefore holds one row more, from -1 to 1, and all other rows are divided by their largest magnitude.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from project.errors import ConfigError

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Kind = TypeVar("Kind", bound=nn.Module)

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


def quantised(module: ExitRecommender) -> ExitRecommender:
    """A module whose trunk has int8 linear layers; `Engine(quantised(module), ...)` is an int8 engine.

    Embeddings, norms and heads are shared with the module given, which stays as it is.

    Args:
        module: With its trunk, float32 on a CPU.

    Raises:
        ConfigError: The trunk is elsewhere or of another type.
    """
    assert module.trunk is not None
    weight = module.trunk.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ConfigError(
            f"int8 is for a float32 trunk on a CPU; found {str(weight.dtype).removeprefix('torch.')} on "
            f"{weight.device}. Add --trainer.accelerator cpu, or leave int8 out."
        )
    found = _copied(module)
    found.trunk = _replaced(module.trunk)
    return found


def _engines() -> list[str]:
    return list(torch.backends.quantized.supported_engines)


def _copied(module: Kind) -> Kind:
    """A module with a list of children of its own, which are those of the other."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found


def _replaced(module: Kind) -> Kind:
    """With int8 layers; what holds no linear layer is the module itself."""
    if not any(type(part) is nn.Linear for part in module.modules()):
        return module
    found = _copied(module)
    for name, child in found._modules.items():
        if type(child) is nn.Linear:
            found._modules[name] = Int8Linear(child)
        elif child is not None:
            found._modules[name] = _replaced(child)
    return found
