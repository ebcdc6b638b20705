"""Sets learning rates and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from torch import nn

from project.errors import ConfigError
from project.model.backbone import Backbone

HEAD_FACTOR = 5.0  # how much faster heads and numbers learn than the layers
MINIMUM_SHARE = 0.1  # of the peak rate, at the last step
# of all steps, tens of an epoch's hundreds: Adam's first variances are of few batches
WARMUP_SHARE = 0.05
# PyTorch's default; at a rate of 3e-4 a thousand steps take .3 % off a matrix
WEIGHT_DECAY = 0.01


@dataclass
class OptimSettings:
    """Learning rates of AdamW: heads and numbers in prompts learn at HEAD_FACTOR times that of the layers.

    Args:
        learning_rate: Peak learning rate of the layers.
    """

    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        # AdamW moves every weight by about this much a step
        if not 0 <= self.learning_rate <= 1:
            raise ConfigError(
                f"model.optim.learning_rate is {self.learning_rate}; expected a number from 0 to 1."
            )


def parameter_groups(
    backbone: Backbone, heads: nn.ModuleDict, settings: OptimSettings
) -> list[dict[str, Any]]:
    """Groups for AdamW, named such as "heads/decay": every trainable parameter is in exactly one."""
    # 1. parts of the model by how fast they learn
    parts = dict[str, list[nn.Parameter]](
        backbone=[], numbers=[], heads=[*heads.parameters()]
    )
    for name, parameter in backbone.named_parameters():
        number = name.endswith(".numbers")
        parts["numbers" if number else "backbone"].append(parameter)
    # 2. of each part the matrices decay; norms and biases, which scale or shift, do not
    groups = []
    for name, parameters in parts.items():
        factor = 1.0 if name == "backbone" else HEAD_FACTOR
        for kind, decay in (("decay", WEIGHT_DECAY), ("plain", 0.0)):
            params = [
                p for p in parameters if p.requires_grad and (p.ndim > 1) == (decay > 0)
            ]
            if params:
                groups.append(
                    {
                        "name": f"{name}/{kind}",
                        "params": params,
                        "lr": factor * settings.learning_rate,
                        "weight_decay": decay,
                    }
                )
    return groups


def planned_steps(trainer: L.Trainer, train_batches: int) -> int:
    """Optimiser steps of a fit by the trainer's limits; `train_batches` are those of an epoch on one process."""
    limit = trainer.limit_train_batches
    # a share or a number, as in Lightning
    batches = (
        int(train_batches * limit)
        if isinstance(limit, float)
        else min(train_batches, limit or 0)
    )
    epochs = trainer.max_epochs
    steps = trainer.max_steps
    # no end by epochs: then by steps
    if epochs in (None, -1):
        if steps == -1:
            raise ConfigError(
                "trainer.max_epochs and trainer.max_steps are both without limit; expected one of them: the learning "
                "rate falls along a cosine that has to end. Set trainer.max_epochs."
            )
        return steps
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * (epochs or 1)
    return by_epochs if steps == -1 else min(by_epochs, steps)


def cosine_with_warmup(total_steps: int) -> Callable[[int], float]:
    """Factor on every rate by step, for `LambdaLR`: linear warm-up to 1, half a cosine down to `MINIMUM_SHARE`.

    The rate of step 0, the first, is above 0.
    """
    warmup = round(WARMUP_SHARE * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        # 0 after the warm-up, 1 at the last step
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return MINIMUM_SHARE + (1 - MINIMUM_SHARE) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
