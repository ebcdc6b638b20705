"""Makes tiny random models of every supported family, and layouts for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from project.layout import Layout


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """Makes a configuration of 3 layers, hidden size 32, 4 heads over 2 key-value heads, 64 tokens."""
    from transformers import AutoConfig

    def make(family: str = "llama", **changes: Any) -> Any:
        values = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "sliding_window": None,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
            "no_rope_layer_interval": 3,  # of SmolLM3
            # ten times the usual: attention is far from uniform and errors show
            "initializer_range": 0.2,
        }
        if family == "qwen3":
            values["head_dim"] = 16
        return AutoConfig.for_model(family, **(values | changes))

    return make


@pytest.fixture
def random_layout() -> Callable[..., Layout]:
    """Makes two rows of packed sequences: ties, target-only segments anywhere, candidates, padding."""

    def make(seed: int, length: int = 60, block_tokens: int = 16) -> Layout:
        rng = np.random.default_rng(seed)
        rows = []
        for row in range(2):
            tokens: list[tuple[int, int, int, bool, int]] = []
            segment = 0
            for sequence in range(2):
                group, start, size = 0, 0, 0
                for kind in ["instruction", *["stream"] * 5, *["candidate"] * 2]:
                    if kind != "instruction" and (
                        group == 0 or (kind == "stream" and rng.random() < 0.6)
                    ):
                        group, start, size = group + 1, start + size, 0
                    n = int(rng.integers(2, 6))
                    context = kind == "instruction" or (
                        kind == "stream" and rng.random() < 0.8
                    )
                    tokens += [
                        (sequence, segment, group, context, start + i) for i in range(n)
                    ]
                    size, segment = size + n, segment + 1
            tokens = tokens[: length - 5 * row]
            rows.append(tokens + [(-1, 0, 0, False, 0)] * (length - len(tokens)))
        columns = torch.tensor(rows).permute(2, 0, 1)
        return Layout.build(
            columns[0],
            columns[1],
            columns[2],
            columns[3].bool(),
            columns[4],
            block_tokens=block_tokens,
        )

    return make


@pytest.fixture
def causal_layout() -> Callable[[int, int], Layout]:
    """Makes rows that are one plain prompt each: five-token context segments, each a group of its own."""

    def make(rows: int, length: int) -> Layout:
        index = torch.arange(length).expand(rows, length)
        segment = index // 5
        return Layout.build(
            torch.zeros_like(index), segment, segment, index >= 0, index, block_tokens=16
        )

    return make
