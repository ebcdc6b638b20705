"""An int8 layer is off by its rounding, and by nothing that stands beside a token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from project.engine.int8 import Int8Linear


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
