"""Laying out weights changes where numbers stand in memory, not what they are."""

from __future__ import annotations

import io

import torch
from example_engine import make_module

from project.engine.weights import lay_out


def test_only_strides_change() -> None:
    """Same state, outputs to rounding, checkpoints that load; a second time nothing moves."""
    module = make_module()
    assert module.trunk is not None
    layers = module.trunk.layers
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    expected = layers[0].mlp(x)
    lay_out(layers)
    weight = layers[0].mlp.up_proj.weight
    assert weight.shape == (48, 32)
    assert weight.stride() == (1, 48)
    torch.testing.assert_close(layers[0].mlp(x), expected)
    place = weight.data_ptr()
    lay_out(layers)
    assert weight.data_ptr() == place
    stored = io.BytesIO()
    torch.save(layers.state_dict(), stored)
    stored.seek(0)
    found = torch.load(stored, weights_only=True)
    assert found.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())
    layers.load_state_dict(before)
    torch.testing.assert_close(layers[0].mlp(x), expected)


def test_weights_can_still_be_trained() -> None:
    """A step of gradient descent moves a laid out weight as it moves a plain one."""
    moved = []
    for change in (False, True):
        module = make_module()
        assert module.trunk is not None
        if change:
            lay_out(module.trunk.layers)
        linear = module.trunk.layers[0].mlp.up_proj
        linear(torch.ones(2, 32)).square().sum().backward()
        torch.optim.SGD([linear.weight], lr=0.1).step()
        moved.append(linear.weight.detach().clone())
    torch.testing.assert_close(*moved)
