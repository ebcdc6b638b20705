"""Learning rates by depth (Zhou et al., ACL 2025: shallow layers learn faster) and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from project.errors import ConfigError
from project.model.backbone import Backbone, NumberEmbedding


@dataclass
class OptimSettings:
    """Learning rates by depth, schedule and weight decay of AdamW.

    Layer l of L learns at learning_rate * (1 + depth_slope * (1 - l / L)), the embeddings at that of l = 0,
    a head at head_factor times the rate of the layer below it, numbers in prompts at head_factor times that of l = 0.

    Args:
        learning_rate: Peak learning rate of the deepest layer.
        depth_slope: How much faster shallow layers learn; 0: all alike, 1: the embeddings at twice the rate.
        head_factor: How much faster a head learns than the layer below it.
        weight_decay: Decay of weight matrices; norms and biases have none.
        warmup_share: Share of all steps in which the rates grow from 0 to their peak.
        minimum_share: Share of the peak that is left at the last step.
        betas: Decay of AdamW's running means of the gradient and of its square.
    """

    learning_rate: float = 2e-4
    depth_slope: float = 0.0
    head_factor: float = 5.0
    weight_decay: float = 0.01
    warmup_share: float = 0.05
    minimum_share: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name, least in (
            ("learning_rate", 0),
            ("head_factor", 0),
            ("weight_decay", 0),
            ("depth_slope", -1),
        ):
            value = getattr(self, name)
            most = (
                1 if name == "learning_rate" else math.inf
            )  # AdamW moves every weight by about this much a step
            if not least <= value <= most or value == math.inf:
                why = ", so that no layer's rate is negative" if least < 0 else ""
                wanted = "a number from 0 to 1" if most == 1 else f"a number of {least} or more{why}"
                raise ConfigError(f"model.optim.{name} is {value}; expected {wanted}.")
        for name in ("warmup_share", "minimum_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"model.optim.{name} is {value}; expected a share from 0 to 1.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"model.optim.betas is {self.betas}; expected two numbers from 0 to below 1, such as [0.9, 0.999]."
            )


def depth_rate(settings: OptimSettings, layer: int, layers: int) -> float:
    """Peak learning rate of layer `layer` (1 is the first, 0 the embeddings) of `layers`."""
    return settings.learning_rate * (1 + settings.depth_slope * (1 - layer / layers))


def parameter_groups(
    backbone: Backbone, heads: nn.ModuleDict, settings: OptimSettings
) -> list[dict[str, Any]]:
    """Groups for AdamW; every trainable parameter of backbone and heads is in exactly one.

    Args:
        backbone: The backbone; frozen parameters are left out.
        heads: Exit heads by their layer, as text.
        settings: Learning rates and weight decay.

    Returns:
        Dictionaries with params, lr, weight_decay and a readable name such as "layer_3/decay".
    """
    groups = []
    for name, parameters, rate in _parts(backbone, heads, settings):
        trainable = [p for p in parameters if p.requires_grad]
        for suffix, decay, params in (
            ("decay", settings.weight_decay, [p for p in trainable if p.ndim > 1]),
            ("plain", 0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if params:
                groups.append(
                    {"name": f"{name}/{suffix}", "params": params, "lr": rate, "weight_decay": decay}
                )
    return groups


def _parts(
    backbone: Backbone, heads: nn.ModuleDict, settings: OptimSettings
) -> Iterator[tuple[str, Iterable[nn.Parameter], float]]:
    depth, words = len(backbone.layers), backbone.embed_tokens
    yield "embeddings", [words.weight], depth_rate(settings, 0, depth)
    if isinstance(words, NumberEmbedding):
        yield "numbers", [words.numbers], settings.head_factor * depth_rate(settings, 0, depth)
    for layer, module in enumerate(backbone.layers, start=1):
        yield f"layer_{layer}", module.parameters(), depth_rate(settings, layer, depth)
    for key, head in heads.items():
        yield f"head_{key}", head.parameters(), settings.head_factor * depth_rate(settings, int(key), depth)


def planned_steps(trainer: Trainer, train_batches: int) -> int:
    """Optimiser steps that a fit will take, from the trainer's limits.

    Args:
        trainer: Its max_epochs, max_steps, limit_train_batches and accumulate_grad_batches count.
        train_batches: Batches of a whole epoch on one process.

    Raises:
        ConfigError: If neither max_epochs nor max_steps ends the training.
    """
    limit = trainer.limit_train_batches
    batches = int(train_batches * limit) if isinstance(limit, float) else min(train_batches, limit or 0)
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs in (None, -1) and steps == -1:
        raise ConfigError(
            "trainer.max_epochs and trainer.max_steps are both without limit; expected one of them: the learning rate "
            "falls along a cosine that has to end. Set trainer.max_epochs."
        )
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * max(1, epochs or 1)
    if epochs in (None, -1):
        return steps
    return by_epochs if steps == -1 else min(by_epochs, steps)


def cosine_with_warmup(total_steps: int, settings: OptimSettings) -> Callable[[int], float]:
    """Factor on every learning rate by step: linear warm-up to 1, then a half cosine down to `minimum_share`.

    Args:
        total_steps: Optimiser steps of the whole training.
        settings: Shares of warm-up and minimum.

    Returns:
        A function of the step (0 is the first) for `LambdaLR`. The first step already moves.
    """
    warmup = round(settings.warmup_share * total_steps)
    baseline = settings.minimum_share

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return baseline + (1 - baseline) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
