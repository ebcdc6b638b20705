"""From how many tokens on it pays to read a layer at its answer positions before running it whole.

Unusual here: it is measured, because it depends on what a layer costs however few tokens run (its weights come from
memory, its kernels are launched, its modules called), and that is the machine's. Who leaves saves the rest of the
layer; who stays pays the fixed part twice.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from project.engine.attention import Structure
from project.engine.rotary import RotaryTable
from project.engine.survivors import Row
from project.model.trunk import State, Trunk

LEAVES = 0.5  # share of candidates taken to leave at an exit: about what saves half of the token-layers
ANSWERS = 0.05  # share of tokens that are answer positions: candidates of twenty tokens
LAYERS, PASSES = 4, 3  # what is timed: different weights in turn, as in a trunk


@torch.inference_mode()
def tokens_worth_reading(trunk: Trunk) -> float:
    """Tokens of a row from which reading first is cheaper, if half of the candidates leave; inf: it never is.

    A layer of n tokens is taken to cost f + c n, both timed on one candidate without a stream. Reading costs
    f + c n (kv + answers), kv being the share of keys and values in a layer's weights; it saves c n / 2.

    Args:
        trunk: On its device; some of its layers are timed, which takes as long as a small request.
    """
    few, many = (8, 128) if trunk.embed_tokens.weight.device.type == "cpu" else (64, 4096)
    _seconds(trunk, few)  # warm up
    short, long = (min(_seconds(trunk, n) for _ in range(PASSES)) for n in (few, many))
    each = (long - short) / (many - few)
    gain = LEAVES - ANSWERS - _key_value_share(trunk)
    return max(short - each * few, 0.0) / (each * gain) if each > 0 and gain > 0 else math.inf


def _seconds(trunk: Trunk, tokens: int) -> float:
    weight = trunk.embed_tokens.weight
    one = np.zeros(1, dtype=np.int64)
    row = Row.of(requests=one, stream=one, candidates=one, own=np.array([tokens]))
    hidden = torch.ones(1, tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    places = RotaryTable(trunk).at(np.arange(tokens))
    state = State(hidden, Structure(row, weight.device, [[]], [None]), places)  # type: ignore[arg-type]
    start = time.perf_counter()
    float(trunk.run(state, 0, min(LAYERS, len(trunk.layers))).hidden[0, 0, 0])  # waits for the device
    return time.perf_counter() - start


def _key_value_share(trunk: Trunk) -> float:
    layer: Any = trunk.layers[0]
    width: int = layer.self_attn.head_dim
    config = trunk.config
    hidden, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    keys = 2 * hidden * width * shared
    share: float = keys / (keys + 2 * hidden * width * heads + 3 * hidden * config.intermediate_size)
    return share
