"""int8 weights move scores a little, and nothing else: not the cost, not the company, not the float module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_engine import EXITS, World, make_module, subset
from torch import nn

from project.engine import Engine
from project.engine.decisions import static_exits
from project.engine.int8 import Int8Linear, quantised
from project.errors import ConfigError
from project.exits.criteria import Ratio


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_off_by_its_rounding(bias: bool) -> None:
    """|error| <= sum |w| * 2 max|x| / 255 + sum |x| * max|w| / 254: at worst a step of x and half a step of w each."""
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=bias), torch.randn(2, 7, 48) * torch.logspace(-3, 3, 7)[:, None]
    with torch.inference_mode():
        error = (Int8Linear(linear)(x) - linear(x)).abs()
    weight, size = linear.weight.abs(), x.abs().amax(-1, keepdim=True)
    bound = size * 2 / 255 * weight.sum(1) + x.abs().sum(-1, keepdim=True) * weight.amax(1) / 254
    assert (error <= bound + 1e-6 * size).all()
    assert error.max() > 0


def test_a_token_does_not_see_its_company() -> None:
    """Beside tokens a thousand times larger, and alone: the same output; a token of zeros gives the bias."""
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(48, 20)), torch.randn(9, 48)
    x[0], x[1] = 0, 1000 * x[1]
    with torch.inference_mode():
        together = layer(x)
        alone = torch.cat([layer(x[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert layer.bias is not None
    torch.testing.assert_close(together[0], layer.bias.detach())


def test_scores_are_close_and_cost_is_the_same(world: World) -> None:
    """Off by less than a tenth of the logits' spread (root mean square) at every static depth; token-layers equal.

    This model's attention is far sharper than a trained one's.
    """
    small, plan = quantised(world.module), world.plan(Ratio(), 0.4)
    for layer in EXITS:
        exact, rounded = (
            Engine(m, static_exits(plan, layer)).score(world.requests) for m in (world.module, small)
        )
        assert rounded.token_layers == exact.token_layers
        a, b = (np.concatenate([r.logits for r in s.requests]) for s in (exact, rounded))
        assert 0 < np.sqrt(np.mean((a - b) ** 2)) < 0.1 * a.std()
    few = subset(world.requests[2], np.array([5, 3]))
    whole = rounded.requests[2].logits[[5, 3]]
    found = Engine(small, static_exits(plan, EXITS[-1])).score([few]).requests[0].logits
    # attention rounds differently in other company, and a last bit can tip an activation over half a step
    np.testing.assert_allclose(found, whole, atol=0.05 * a.std())


def test_the_float_module_stays_as_it_is() -> None:
    """Same weights, modules and outputs as before; what is not rounded is shared; linear layers shrink to a quarter."""
    module = make_module()
    assert module.trunk is not None
    before = {name: value.clone() for name, value in module.trunk.state_dict().items()}
    small = quantised(module)
    assert small.trunk is not None
    assert module.trunk.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.trunk.state_dict().items())
    assert not any(isinstance(m, Int8Linear) for m in module.modules())
    assert small.trunk.embed_tokens is module.trunk.embed_tokens
    assert small.heads is module.heads
    rounded = [m for m in small.trunk.modules() if isinstance(m, Int8Linear)]
    exact = [m for m in module.trunk.modules() if isinstance(m, nn.Linear)]
    assert len(rounded) == len(exact) == 5 * 7
    assert not any(isinstance(m, nn.Linear) for m in small.trunk.modules())
    floats = sum(4 * m.weight.numel() for m in exact)
    assert sum(m.nbytes for m in rounded) < 0.3 * floats  # one byte a weight, and a scale a row


def test_only_for_float32_on_a_cpu() -> None:
    """What was found, and what helps."""
    module = make_module()
    assert module.trunk is not None
    module.trunk.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu.*leave int8 out"):
        quantised(module)
