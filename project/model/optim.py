"""Sets learning rates by depth (Zhou et al., ACL 2025: shallow layers learn faster) and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from torch import nn

from project.errors import ConfigError
from project.model.backbone import Backbone, ItemEmbedding, NumberEmbedding

HEAD_FACTOR = 5.0  # how much faster a head learns than the layer below it
MINIMUM_SHARE = 0.1  # of the peak rate, at the last step
# of all steps, tens of an epoch's hundreds: Adam's first variances are of few batches
WARMUP_SHARE = 0.05
# PyTorch's default; at a rate of 3e-4 a thousand steps take .3 % off a matrix
WEIGHT_DECAY = 0.01


@dataclass
class OptimSettings:
    """Learning rates by depth, of AdamW.

    Layer l of L learns at learning_rate * (1 + depth_slope * (1 - l / L)), the embeddings at that of l = 0,
    a head at HEAD_FACTOR times the rate of the layer below it, numbers in prompts at HEAD_FACTOR times that of l = 0.

    Args:
        learning_rate: Peak learning rate of the deepest layer.
        depth_slope: How much faster shallow layers learn; 0: all the same, 1: the embeddings at twice the rate.
    """

    learning_rate: float = 3e-4
    depth_slope: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        possible = {
            # AdamW moves every weight by about this much a step
            "learning_rate": (0 <= self.learning_rate <= 1, "from 0 to 1"),
            # below, the embeddings' rate would be negative
            "depth_slope": (-1 <= self.depth_slope < math.inf, "of -1 or more"),
        }
        for name, (works, wanted) in possible.items():
            if not works:
                raise ConfigError(
                    f"model.optim.{name} is {getattr(self, name)}; expected a number {wanted}."
                )


def depth_rate(settings: OptimSettings, layer: int, layers: int) -> float:
    """Peak learning rate of layer `layer` (1 is the first, 0 the embeddings) of `layers`."""
    return settings.learning_rate * (1 + settings.depth_slope * (1 - layer / layers))


def parameter_groups(
    backbone: Backbone, heads: nn.ModuleDict, settings: OptimSettings
) -> list[dict[str, Any]]:
    """Groups for AdamW, named such as "layer_3/decay": every trainable parameter is in exactly one."""
    # 1. parts of the model, each with its rate, from the input to the heads
    layers = len(backbone.layers)
    words = backbone.embed_tokens
    parts: list[tuple[str, Iterable[nn.Parameter], float]]
    parts = [("embeddings", [words.weight], depth_rate(settings, 0, layers))]
    if isinstance(words, NumberEmbedding):
        learned = (
            [words.numbers] if words.context is None else [words.numbers, words.context]
        )
        parts.append(("numbers", learned, HEAD_FACTOR * depth_rate(settings, 0, layers)))
    if isinstance(words, ItemEmbedding):
        parts.append(("items", [words.projection], depth_rate(settings, 0, layers)))
    for k, layer in enumerate(backbone.layers, start=1):
        parts.append((f"layer_{k}", layer.parameters(), depth_rate(settings, k, layers)))
    for key, head in heads.items():
        parts.append(
            (
                f"head_{key}",
                head.parameters(),
                HEAD_FACTOR * depth_rate(settings, int(key), layers),
            )
        )
    # 2. of each part the matrices decay; norms and biases, which scale or shift, do not
    groups = []
    for name, parameters, rate in parts:
        trainable = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trainable if p.ndim > 1]
        others = [p for p in trainable if p.ndim <= 1]
        for kind, decay, params in (
            ("decay", WEIGHT_DECAY, matrices),
            ("plain", 0.0, others),
        ):
            if params:
                groups.append(
                    {
                        "name": f"{name}/{kind}",
                        "params": params,
                        "lr": rate,
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
    by_epochs = math.ceil(batches / trainer.accumulate_grad_batches) * max(1, epochs or 1)
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
