from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from project.layout import Layout
from project.model.attention import segments_attention

HEADS, KV_HEADS, DIM = 6, 2, 8


def inputs(
    layout: Layout, seed: int, dtype: torch.dtype = torch.float32, kv_heads: int = KV_HEADS
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.shape
    return [
        torch.randn(rows, length, heads * DIM, generator=generator)
        .to(dtype)
        .view(rows, length, heads, DIM)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The same attention with the rule written out; padding gives zero."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, layout.dense_mask()[:, None], scale=0.3)
    return out.transpose(1, 2) * (layout.sequence >= 0)[:, :, None, None]


def blocked(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    out, weights = segments_attention(nn.Identity(), query, key, value, None, layout=layout, scaling=0.3)
    assert weights is None
    return out


@pytest.mark.parametrize("block_tokens", [5, 16, 256])
@pytest.mark.parametrize("seed", range(6))
def test_equals_dense_mask(random_layout: Callable[..., Layout], seed: int, block_tokens: int) -> None:
    """Blocks give the dense mask's output and gradients: ties, packed sequences, candidates, padding."""
    layout = random_layout(seed, block_tokens=block_tokens)
    tensors = inputs(layout, seed)
    expected, found = dense(*tensors, layout), blocked(*tensors, layout)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert found.shape == (2, layout.shape[1], HEADS, DIM)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_without_grouped_queries(random_layout: Callable[..., Layout]) -> None:
    """As many key-value heads as heads work as well."""
    layout = random_layout(3)
    tensors = inputs(layout, 0, kv_heads=HEADS)
    torch.testing.assert_close(blocked(*tensors, layout), dense(*tensors, layout), atol=1e-5, rtol=1e-5)


def test_bfloat16(random_layout: Callable[..., Layout]) -> None:
    """bfloat16 stays bfloat16 and within its rounding (3 digits) of float32."""
    layout = random_layout(1)
    tensors = inputs(layout, 0, torch.bfloat16)
    found = blocked(*tensors, layout)
    assert found.dtype == torch.bfloat16
    expected = dense(*(t.float() for t in tensors), layout)
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_padding_is_zero(random_layout: Callable[..., Layout]) -> None:
    """Padding gets zeros and passes no gradient."""
    layout = random_layout(0)
    padding = layout.sequence < 0
    assert padding.any()
    tensors = inputs(layout, 0)
    out = blocked(*tensors, layout)
    assert (out[padding] == 0).all()
    out.sum().backward()
    assert all((t.grad.transpose(1, 2)[padding] == 0).all() for t in tensors if t.grad is not None)


def test_invisible_keys_do_not_matter(random_layout: Callable[..., Layout]) -> None:
    """Changing everything a query does not see leaves its output bit for bit the same."""
    layout = random_layout(4)
    query, key, value = (t.detach() for t in inputs(layout, 0))
    at = int((layout.sequence[0] >= 0).nonzero().max())
    hidden = ~layout.dense_mask()[0, at]
    assert hidden.any()
    before = blocked(query, key, value, layout)[0, at]
    key[0, :, hidden] = 100.0
    value[0, :, hidden] = -100.0
    assert torch.equal(blocked(query, key, value, layout)[0, at], before)
