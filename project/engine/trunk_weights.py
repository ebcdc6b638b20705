"""The trunk with weights of another type than the run's, bfloat16 or int8: another lever beside exits.

Unusual here: parameters are converted, buffers are not. The rotary embedding's frequencies stay float32, since angles
made of bfloat16 ones are a radian off after a thousand tokens; heads stay float32 too, so that scores do not tie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from project.engine.copies import copied, with_linears
from project.engine.int8 import Int8Linear
from project.engine.packed import PackedLinear
from project.errors import ConfigError

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Kind = TypeVar("Kind", bound=nn.Module)

Weights = Literal["float32", "bfloat16", "int8"]
ADAPTERS = "lora_A", "lora_B"  # peft reads their weights' type, and they are small


def with_weights(module: ExitRecommender, weights: Weights | None) -> ExitRecommender:
    """A module with weights of this type in its trunk; `Engine(with_weights(module, "int8"), ...)` is an int8 engine.

    The module given stays as it is; its heads, and what holds nothing to convert, are shared.

    Args:
        module: With its trunk, not packed yet (`project.engine.packed`): packed products would stay as they are.
        weights: Their type. bfloat16 is for embeddings, linear layers and norms, and hidden states follow; int8 is for
            linear layers alone, adapters excepted. None, or the type they have: the module itself.

    Raises:
        ConfigError: int8 for a trunk that is not float32 on a CPU; another type for one that is cut over processes.
    """
    assert module.trunk is not None
    own = module.trunk.embed_tokens.weight
    name = str(own.dtype).removeprefix("torch.")
    if weights in (None, name):
        return module
    assert not any(isinstance(part, PackedLinear) for part in module.trunk.modules()), "pack afterwards"
    if isinstance(own, DTensor):
        raise ConfigError(
            f"--weights {weights} was asked of a trunk that is cut over {own.device_mesh.size()} processes; expected "
            "it whole. Add --trainer.strategy auto, or leave --weights out."
        )
    if weights == "int8" and (own.device.type != "cpu" or own.dtype != torch.float32):
        raise ConfigError(
            f"int8 is for a float32 trunk on a CPU; found {name} on {own.device}. Add --trainer.accelerator cpu, or "
            "leave int8 out."
        )
    found = copied(module)
    trunk = module.trunk
    found.trunk = (
        with_linears(trunk, Int8Linear, leave=ADAPTERS)
        if weights == "int8"
        else _converted(trunk, getattr(torch, str(weights)))
    )
    return found


def _converted(module: Kind, dtype: torch.dtype) -> Kind:
    """With parameters of this type; what holds no parameter is the module itself."""
    if next(module.parameters(), None) is None:
        return module
    found = copied(module)
    found._parameters = {
        name: None if own is None else nn.Parameter(own.detach().to(dtype), requires_grad=False)
        for name, own in module._parameters.items()
    }
    for name, child in module._modules.items():
        found._modules[name] = None if child is None else _converted(child, dtype)
    return found
