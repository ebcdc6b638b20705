from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from project.errors import ConfigError
from project.model.layer_dropout import check_layer_dropout, run_stage, skip_chances, skipped_layers
from project.model.trunk import Trunk


def test_chances() -> None:
    """Golden: with rate .2 and three layers 0, .2 * (sqrt(2) - 1) and .2; an only layer always runs."""
    assert skip_chances(0.2, 3) == pytest.approx([0.0, 0.2 * (2**0.5 - 1), 0.2])
    assert skip_chances(0.5, 1) == [0.0]


def test_lots() -> None:
    """As often as the chances say, the same for the same seed, epoch and batch, others for another of them."""
    lots = [skipped_layers(0.3, 6, 0, epoch, batch) for epoch in range(2) for batch in range(1000)]
    share = [np.mean([layer in lot for lot in lots]) for layer in range(6)]
    assert share == pytest.approx(skip_chances(0.3, 6), abs=0.04)
    assert lots[:1000] != lots[1000:]
    assert lots == [skipped_layers(0.3, 6, 0, epoch, batch) for epoch in range(2) for batch in range(1000)]
    assert lots[:1000] != [skipped_layers(0.3, 6, 1, 0, batch) for batch in range(1000)]


def test_left_out(tiny_config: Callable[..., Any], random_layout: Callable[..., Any]) -> None:
    """Without layer 2 the states are those of layers 1 and 3 alone; its parameters get zeros, as DDP needs."""
    torch.manual_seed(0)
    trunk = Trunk.from_config(tiny_config())
    layout = random_layout(0)
    tokens = torch.randint(0, 64, layout.shape, generator=torch.Generator().manual_seed(0))
    found = run_stage(trunk, trunk.embed(tokens, layout), 0, 3, frozenset({1}))
    expected = trunk.run(trunk.run(trunk.embed(tokens, layout), 0, 1), 2, 3)
    assert torch.equal(found.hidden, expected.hidden)
    found.hidden.square().sum().backward()
    gradients = [[p.grad for p in layer.parameters()] for layer in trunk.layers]
    assert all((g == 0).all() for g in gradients[1])
    assert all((g != 0).any() for g in (*gradients[0], *gradients[2]))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refuses(rate: float) -> None:
    """A rate outside [0, 1) names the key."""
    with pytest.raises(ConfigError, match=r"model\.layer_dropout"):
        check_layer_dropout(rate)
