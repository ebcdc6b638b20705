"""Low-rank adapters on the trunk (Hu et al., LoRA, 2021) through peft, and which parameters are frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from project.errors import ConfigError
from project.model.trunk import Trunk


@dataclass
class LoraSettings:
    """Adapters that are trained instead of the trunk's own weights.

    Args:
        rank: Rank of the adapters.
        alpha: Scale; an adapter's output is multiplied by alpha / rank.
        dropout: Share of an adapter's inputs dropped in training.
        target_modules: Linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )

    def __post_init__(self) -> None:
        """Refuse what no adapter can have."""
        if self.rank < 1:
            raise ConfigError(
                f"model.lora.rank is {self.rank}; expected 1 or more, or model.lora null for none."
            )
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"model.lora.alpha is {self.alpha}; expected a number above 0.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout is {self.dropout}; expected a share from 0 to below 1.")


def add_lora(trunk: Trunk, settings: LoraSettings) -> None:
    """Put adapters on the trunk's linear layers, in place, and freeze everything else in it.

    At first an adapter adds nothing: one of its two factors starts at zero.

    Raises:
        ConfigError: If a target names no linear layer of the trunk.
    """
    linear = sorted({n.split(".")[-1] for n, m in trunk.layers.named_modules() if isinstance(m, nn.Linear)})
    unknown = sorted(set(settings.target_modules) - set(linear))
    if unknown or not settings.target_modules:
        raise ConfigError(
            f"model.lora.target_modules is {settings.target_modules}; expected some of the trunk's linear "
            f"layers: {', '.join(linear)}."
        )
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides it by r
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    inject_adapter_in_model(config, trunk)  # freezes all that is no adapter


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained: what a checkpoint leaves to the base model."""
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
