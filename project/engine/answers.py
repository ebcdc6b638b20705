"""A decoder layer for those who read it only: what it makes of the answer positions.

Unusual here: transformers' layer computes every token whole, so its modules are called one by one. Everyone gives keys
and values, but only answer positions ask, and only they go through the MLP; a head can read no more than that. Who
leaves at this exit never runs the layer whole, who stays runs it again: keys and values twice, a tenth of its work.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from project.engine.attention import Structure
from project.model.trunk import State


def answers_of_layer(layer: nn.Module, state: State, structure: Structure) -> Tensor:
    """Hidden states of the answer positions behind a layer, (m, H): what the whole layer gives there, to rounding.

    Args:
        layer: A decoder layer of a family that the trunk supports.
        state: T tokens in front of it.
        structure: Of these tokens; streams that are cached get the layer's keys and values.
    """
    block: Any = layer
    attention = block.self_attn
    hidden, slots = state.hidden[0], structure.slots
    normed = block.input_layernorm(hidden)
    query = _heads(attention.q_proj(normed.index_select(0, slots)), attention.head_dim)
    key, value = (
        _heads(project(normed), attention.head_dim) for project in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (x[0] for x in state.position_embeddings)
    query = _rotated(query, cos.index_select(0, slots), sin.index_select(0, slots))
    key = _rotated(key, cos, sin)
    key, value = (x.transpose(0, 1)[None] for x in (key, value))
    found = structure.attend_answers(attention.layer_idx, query, key, value, attention.scaling)
    answers = hidden.index_select(0, slots) + attention.o_proj(found.flatten(1))
    out: Tensor = answers + block.mlp(block.post_attention_layernorm(answers))
    return out


def _heads(projected: Tensor, dim: int) -> Tensor:
    return projected.view(len(projected), -1, dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, heads, dim), turned by (T, dim)."""
    found: Tensor = x * cos[:, None] + rotate_half(x) * sin[:, None]  # type: ignore[no-untyped-call]
    return found
