"""The loss of all exit heads together, normalised by the number of targets of all processes.

Unusual here: every term is a sum over targets divided by the targets of all processes, the pairwise term too (a target
counts once, by the mean over its partners), so processes with uneven batches add up to one process with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from project.errors import ConfigError

Weights = Literal["uniform", "linear", "sqrt", "inverse"]
SHAPES: dict[Weights, Callable[[Tensor], Tensor]] = {
    "uniform": torch.ones_like,
    "linear": lambda depth: depth,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
}


@dataclass
class DistillSettings:
    """Self-distillation: earlier heads also learn what the last head says, which does not learn from them.

    Args:
        weight: How much it counts beside the answers; every head by its weight in the loss.
        temperature: Logits are divided by it on both sides: above 1 the last head's doubts show more.
    """

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not (0 <= self.weight < math.inf and 0 < self.temperature < math.inf):
            raise ConfigError(
                f"model.loss.distill has weight {self.weight} and temperature {self.temperature}; expected a weight of "
                "0 or more and a temperature above 0, or null for no distillation."
            )


@dataclass
class LossSettings:
    """How the heads share the loss, and what it has beside the answers.

    Args:
        weights: Weight of a head by its depth: the same for all (uniform), in proportion to the depth
            (linear), to its square root (sqrt) or to one over the depth (inverse). Weights sum to 1.
        warmup_steps: Optimiser steps over which the weights go from uniform to their shape: every head starts
            as a reader of the last layer, so at first all have to learn.
        distill: Let earlier heads also learn what the last head says; null: they do not.
        gradient_equilibrium: Rescale gradients where a head leaves the trunk, so that every stage of layers learns from
            the mean of all heads above it, not from their sum (Li et al. 2019).
        pairwise: Weight of a logistic loss on pairs of a liked and a disliked target of one user's window; 0: none. It
            is about order inside a user, as user-AUC is (Rendle et al. 2009, BPR).
    """

    weights: Weights = "uniform"
    warmup_steps: int = 0
    distill: DistillSettings | None = None
    gradient_equilibrium: bool = False
    pairwise: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.warmup_steps < 0:
            raise ConfigError(f"model.loss.warmup_steps is {self.warmup_steps}; expected 0 (none) or more.")
        if not 0 <= self.pairwise < math.inf:
            raise ConfigError(f"model.loss.pairwise is {self.pairwise}; expected 0 (none) or more.")


def exit_weights(settings: LossSettings, exit_layers: Sequence[int], step: int) -> Tensor:
    """Weights of the heads in the loss.

    Args:
        settings: Shape and warm-up.
        exit_layers: Depth of each of the K heads, from 1.
        step: Optimiser steps done so far.

    Returns:
        (K,) float32, positive, summing to 1.
    """
    depth = torch.tensor(exit_layers, dtype=torch.float32)
    shape = SHAPES[settings.weights](depth)
    done = min(1.0, step / settings.warmup_steps) if settings.warmup_steps > 0 else 1.0
    return torch.lerp(torch.full_like(depth, 1 / len(depth)), shape / shape.sum(), done)


def exit_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, global_targets: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Weighted binary cross-entropy of all heads.

    A head of weight 0 is multiplied, not skipped: DDP waits for the gradients of every parameter.

    Args:
        logits: (n, K).
        labels: (n,) 0 or 1.
        weights: (K,), see `exit_weights`.
        global_targets: What the sums over targets are divided by.

    Returns:
        The loss, a scalar with gradient; and the loss of each head, (K,), detached.
    """
    expected = labels[:, None].expand_as(logits).to(logits.dtype)
    per_head = F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(0) / global_targets
    return (weights * per_head).sum(), per_head.detach()


def extra_losses(
    settings: LossSettings,
    logits: Tensor,
    labels: Tensor,
    sequence: Tensor,
    weights: Tensor,
    global_targets: Tensor | float,
) -> dict[str, Tensor]:
    """What the loss has beside the answers, each already with its weight; empty where all is switched off.

    Args:
        settings: The switches.
        logits: (n, K).
        labels: (n,) 0 or 1.
        sequence: (n,) whose window a target is in; targets of one window stand together.
        weights: (K,), see `exit_weights`.
        global_targets: What sums over targets are divided by.
    """
    found = {}
    if settings.distill is not None:
        found["distill_loss"] = settings.distill.weight * distill_loss(
            logits, weights, settings.distill.temperature, global_targets
        )
    if settings.pairwise > 0:
        pairs = pairwise_loss(logits, labels, sequence, weights, global_targets)
        found["pairwise_loss"] = settings.pairwise * pairs
    return found


def distill_loss(
    logits: Tensor, weights: Tensor, temperature: float, global_targets: Tensor | float
) -> Tensor:
    """Cross-entropy of earlier heads against the last head's probability, T^2 times (Hinton et al. 2015).

    Of multi-exit networks by Phuong & Lampert 2019. No gradient reaches the last head: the teacher is detached.

    Args:
        logits: (n, K).
        weights: (K,), the last one is not read.
        temperature: T, what logits are divided by on both sides; T^2 keeps the size of the gradient.
        global_targets: What the sum over targets is divided by.
    """
    taught = logits[:, :-1] / temperature
    teacher = (logits.detach()[:, -1:] / temperature).sigmoid().expand_as(taught)
    loss = F.binary_cross_entropy_with_logits(taught, teacher, reduction="none").sum(0) / global_targets
    return temperature**2 * (weights[:-1] * loss).sum()


def pairwise_loss(
    logits: Tensor, labels: Tensor, sequence: Tensor, weights: Tensor, global_targets: Tensor | float
) -> Tensor:
    """-log sigmoid(liked - disliked) of the pairs of a window; 0 for a window with one class.

    A window of m targets counts m times the mean over its pairs: every target once, by the mean over its partners.

    Args:
        logits: (n, K).
        labels: (n,) 0 or 1.
        sequence: (n,) whose window a target is in; targets of one window stand together.
        weights: (K,).
        global_targets: What the sum over targets is divided by.
    """
    total = logits.sum(0) * 0.0  # a batch without pairs still has a gradient
    sizes = torch.unique_consecutive(sequence, return_counts=True)[1].tolist()
    for scores, answers in zip(torch.split(logits, sizes), torch.split(labels, sizes), strict=True):
        liked, disliked = scores[answers == 1], scores[answers == 0]
        if len(liked) and len(disliked):
            pairs = F.softplus(disliked[None] - liked[:, None])
            total = total + len(scores) * pairs.mean((0, 1))
    return (weights * total).sum() / global_targets
