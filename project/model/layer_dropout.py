"""Layer dropout: in a training step some layers are not run, deep ones more often (Elhoushi et al. 2024, LayerSkip).

Unusual here: lots are drawn from (seed, epoch, batch), not from torch's generator, so all processes leave out the same
layers and a resumed epoch draws what it would have drawn. The parameters of a layer that is left out get a gradient of
zero: DDP waits for every parameter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from project.errors import ConfigError
from project.model.trunk import State, Trunk


def check_layer_dropout(rate: float) -> None:
    """Refuse a rate that cannot work.

    Raises:
        ConfigError: Below 0, or 1 and more.
    """
    if not 0 <= rate < 1:
        raise ConfigError(
            f"model.layer_dropout is {rate}; expected 0 (no layer is left out) or more, below 1."
        )


def skip_chances(rate: float, layers: int) -> list[float]:
    """Chance of each layer to be left out: rate * (exp(l * log 2 / (L - 1)) - 1), l = 0 ... L - 1.

    So the first layer always runs and the last is left out at `rate`; an only layer always runs.

    Args:
        rate: Of the last layer.
        layers: L.
    """
    return [rate * math.expm1(k * math.log(2) / max(1, layers - 1)) for k in range(layers)]


def skipped_layers(rate: float, layers: int, seed: int, epoch: int, batch: int) -> frozenset[int]:
    """Layers, from 0, that one training step leaves out; the same on all processes.

    Args:
        rate: Of the last layer.
        layers: L.
        seed: The run's seed.
        epoch: From 0.
        batch: From 0, inside the epoch.
    """
    lots = np.random.default_rng([seed, epoch, batch]).random(layers)
    return frozenset(k for k, chance in enumerate(skip_chances(rate, layers)) if lots[k] < chance)


def run_stage(trunk: Trunk, state: State, start: int, stop: int, skipped: frozenset[int]) -> State:
    """`trunk.run` from `start` to `stop` without the layers that are left out."""
    if skipped.isdisjoint(range(start, stop)):
        return trunk.run(state, start, stop)
    for layer in range(start, stop):
        if layer in skipped:
            state = replace(state, hidden=touched(state.hidden, trunk.layers[layer]))
        else:
            state = trunk.run(state, layer, layer + 1)
    return state


def touched(hidden: Tensor, layer: nn.Module) -> Tensor:
    """The hidden states as they are, with a gradient of zero for the parameters of a layer that was left out.

    Parameters that are cut over processes (FSDP2) are let alone: there nobody waits for them.
    """
    mine = [p for p in layer.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    return hidden + 0.0 * torch.stack([p.flatten()[0] for p in mine]).sum() if mine else hidden
