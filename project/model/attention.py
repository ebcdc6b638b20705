"""Structured attention: the plan of a layout's blocks, run with scaled_dot_product_attention.

Unusual: registered with transformers' attention interface as "segments", so the library's own decoder layers
call it; the layout reaches it as a keyword argument of the layer. Rows are cut once at all edges of the plan
and glued together per block: the backward pass of a cut is one concatenation, whereas every slice of a tensor
costs a zero tensor of the full length.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from project.layout import Block, Layout

SEGMENTS = "segments"


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

    Args:
        module: The attention module that calls (its `layer_idx` names the layer).
        query: (B, heads, T, dim), rotary embedding applied.
        key: (B, key-value heads, T, dim), rotary embedding applied.
        value: (B, key-value heads, T, dim).
        attention_mask: Ignored; the layout says what is visible.
        layout: Structure of the (B, T) tokens, with its blocks planned.
        scaling: Factor on the dot products.
        dropout: Share of attention weights dropped in training.

    Returns:
        (B, T, heads, dim), zero at padding; and no attention weights.
    """
    attend = getattr(layout, "attend", None)
    if attend is not None:  # the engine's structure of a batch, which may hold cached keys and values
        return attend(module.layer_idx, query, key, value, scaling), None
    groups = query.shape[1] // key.shape[1]
    # With a mask, CUDA has no fused kernel for grouped queries; the CPU's takes them as they are.
    grouped = groups > 1 and query.device.type == "cpu"
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    blocks: list[list[Block]] = [[] for _ in range(query.shape[0])]
    for block in layout.blocks:
        blocks[block.row].append(block)
    rows = []
    for row, plan in enumerate(blocks):
        edges = _edges(plan, query.shape[2])
        q, k, v = (_Pieces(tensor[row], edges) for tensor in (query, key, value))
        outputs = [
            F.scaled_dot_product_attention(
                q.join([block.queries])[None],
                k.join(block.keys)[None],
                v.join(block.keys)[None],
                attn_mask=block.mask,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )[0].transpose(0, 1)
            for block in plan
        ]
        rows.append(_in_place(outputs, plan, query[row]))
    return torch.stack(rows), None


class _Pieces:
    """A row (heads, T, dim) cut at `edges`."""

    def __init__(self, row: Tensor, edges: list[int]) -> None:
        self._pieces = torch.split(row, [stop - start for start, stop in pairwise(edges)], dim=1)
        self._at = {edge: i for i, edge in enumerate(edges)}

    def join(self, ranges: list[tuple[int, int]]) -> Tensor:
        """The tokens of the ranges, (heads, tokens, dim); every range ends on edges."""
        pieces = [piece for start, stop in ranges for piece in self._pieces[self._at[start] : self._at[stop]]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _edges(plan: list[Block], length: int) -> list[int]:
    ends = {edge for block in plan for span in [block.queries, *block.keys] for edge in span}
    return sorted(ends | {0, length})


def _in_place(outputs: list[Tensor], plan: list[Block], query: Tensor) -> Tensor:
    """Outputs of the blocks in the order of the row, (T, heads, dim), with zeros where there is no block."""
    heads, length, dim = query.shape
    parts, end = [], 0
    for output, block in zip(outputs, plan, strict=True):
        start, stop = block.queries
        parts += [query.new_zeros(start - end, heads, dim), output] if start > end else [output]
        end = stop
    if end < length:
        parts.append(query.new_zeros(length - end, heads, dim))
    return torch.cat(parts)


AttentionInterface.register(SEGMENTS, segments_attention)
