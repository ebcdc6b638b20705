"""Runs the blocks of a layout with scaled_dot_product_attention: structured attention.

It is registered with transformers' attention interface as "segments", so that the library's own decoder layers call it;
the layout reaches it as a keyword argument of the layer.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import rotate_half

from project.layout import Layout

SEGMENTS = "segments"


def positioned(attention: Any, norm: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (..., T, heads, dim), normed and turned by (..., T, dim) as their layer does it."""
    if hasattr(attention, norm):  # Qwen3
        x = getattr(attention, norm)(x)
    if getattr(attention, "use_rope", True):  # SmolLM3 has layers without
        x = x * cos[..., None, :] + rotate_half(x) * sin[..., None, :]  # type: ignore[no-untyped-call]
    return x


def segments_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention under the visibility rule of `layout`, in the signature of transformers' attention functions.

    `query` is (B, heads, T, dim), `key` and `value` (B, key-value heads, T, dim), rotary embedding applied. Returns
    (B, T, heads, dim), zero at padding, and no attention weights.
    """
    attend = getattr(layout, "attend", None)
    # the engine's structure of a batch, which may hold cached keys and values
    if attend is not None:
        return attend(module.layer_idx, query, key, value, scaling), None
    heads, length, dim = query.shape[1:]
    # With a mask, CUDA has no fused kernel for grouped queries; the CPU's takes them as
    # they are.
    if query.device.type != "cpu":
        key, value = (one_per_query_head(x, heads) for x in (key, value))
    grouped = key.shape[1] != heads
    rows = []
    for row in range(query.shape[0]):
        blocks = [block for block in layout.blocks if block.row == row]
        # 1. Cut the row once, at all edges of its blocks: the backward pass of a cut is one
        # concatenation, whereas
        #    every slice of a tensor costs a zero tensor of the full length.
        spans = [span for block in blocks for span in (block.queries, *block.keys)]
        edges = sorted({0, length}.union(*spans))
        # the piece that begins at an edge
        at = {edge: i for i, edge in enumerate(edges)}
        sizes = [stop - start for start, stop in pairwise(edges)]
        # pieces (heads, tokens, dim) of the row
        q, k, v = (torch.split(x[row], sizes, dim=1) for x in (query, key, value))
        # 2. One call a block; zeros where there is none.
        parts = list[Tensor]()  # (tokens, heads, dim), in the order of the row
        end = 0  # tokens of the row that have a part
        for block in blocks:
            start, stop = block.queries
            # (tokens of the block, heads, dim)
            out = F.scaled_dot_product_attention(
                _joined(q, at, [block.queries]),
                _joined(k, at, block.keys),
                _joined(v, at, block.keys),
                attn_mask=block.mask,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
            # what lies between two blocks is padding
            parts += (
                [query.new_zeros(start - end, heads, dim), out] if start > end else [out]
            )
            end = stop
        # and so is what is left of the row
        if end < length:
            parts.append(query.new_zeros(length - end, heads, dim))
        rows.append(torch.cat(parts))
    return torch.stack(rows), None


def one_per_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, key-value heads, T, dim) repeated to as many heads as queries have."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _joined(
    pieces: tuple[Tensor, ...], at: dict[int, int], ranges: list[tuple[int, int]]
) -> Tensor:
    """The tokens of the ranges, (1, heads, tokens, dim); every range ends on edges, `at` says which."""
    found = [piece for start, stop in ranges for piece in pieces[at[start] : at[stop]]]
    # a single piece is a view; several are copied together
    return (found[0] if len(found) == 1 else torch.cat(found, dim=1))[None]


AttentionInterface.register(SEGMENTS, segments_attention)
