"""What this machine allows: arithmetic, or reading the weights, whichever takes longer in a layer (a roofline).

Unusual here: both ceilings are measured in the same minutes as the sides, by the trunk's own linear layers: one product
of many rows for arithmetic, every layer with a single row for reading. A layer of few rows costs its weights' way from
memory however few they are, so token-layers that were saved there save no time: the limit says how much of a shortfall
of efficiency is the machine's and how much is ours (Williams et al. 2009, "Roofline").
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Ceilings, measured.

    Attributes:
        gflops: GFLOP/s of a matrix product of many rows.
        gbytes: GB/s at which the linear layers' weights are read for a single row.
        layer_bytes: Bytes of the linear layers' weights of one decoder layer.
    """

    gflops: float
    gbytes: float
    layer_bytes: float

    @classmethod
    def measure(cls, model: ExitRecommender, tokens: int = 1024) -> Limits:
        """Of this moment, about as long as a small request.

        Args:
            model: The run.
            tokens: Rows of the product. Few rows are bound by reading the weights, many by arithmetic.
        """
        assert model.trunk is not None
        layers: Any = model.trunk.layers
        own = [part for part in layers.modules() if isinstance(part, nn.Linear)]
        widest: Any = next(part for name, part in layers.named_modules() if name.endswith("up_proj"))
        widest = getattr(widest, "base_layer", widest)  # without adapters
        like = model.trunk.embed_tokens.weight
        size = sum(w.nbytes for part in own for w in part.parameters(recurse=False))
        flops = 2 * tokens * widest.in_features * widest.out_features
        reading = _seconds(own, 1, like)
        return cls(flops / _seconds([widest], tokens, like) / 1e9, size / reading / 1e9, size / len(layers))

    @classmethod
    def median(cls, measured: Sequence[Limits]) -> Limits:
        """Of each ceiling.

        Args:
            measured: At least one.
        """
        names = [field.name for field in fields(cls)]
        return cls(*(float(np.median([getattr(limits, name) for limits in measured])) for name in names))

    def least_seconds(self, flops: Sequence[Floats]) -> float:
        """Seconds below which the trunk cannot do this; a layer's weights are read once for all.

        Args:
            flops: Per request that runs together with the others, `useful_flops` by layer.
        """
        every = np.zeros(max((len(own) for own in flops), default=0))
        for own in flops:
            every[: len(own)] += own
        return float(np.maximum(every / self.gflops, self.layer_bytes / self.gbytes).sum()) / 1e9


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> Floats:
    """FLOPs that a request's exits need by layer, (deepest exit,): linear layers, and the scores that queries may see.

    At the layer where a candidate leaves, its tokens owe keys and values alone and its answer slot the rest; the same
    holds for the stream at the request's deepest exit.

    Args:
        scored: Its exits and token-layers.
        request: Its tokens.
        model: Its trunk.
    """
    assert model.trunk is not None
    config, layer = model.trunk.config, model.trunk.layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.ndim == 2}
    whole, owed = (
        sum(sizes.values()),
        sum(n for name, n in sizes.items() if "k_proj" in name or "v_proj" in name),
    )
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    deepest = max(int(depth.max(initial=0)), 0)
    at = np.arange(1, deepest + 1)[:, None]
    passes, leaves = depth > at, depth == at  # (deepest, candidates)
    tokens, read, slots = passes @ own, leaves @ own, leaves.sum(axis=1)
    seen = passes @ (own * s + own * (own + 1) / 2) + leaves @ (s + own)
    if scored.token_layers > (np.maximum(depth, 0) * own).sum():  # the stream ran
        goes_on = at[:, 0] < deepest
        tokens, read = tokens + s * goes_on, read + s * ~goes_on
        seen = seen + goes_on * s * (s + 1) / 2
    linear = whole * tokens + owed * read + (whole - owed) * slots
    flops: Floats = 2.0 * linear + 4.0 * config.num_attention_heads * width * seen
    return flops


@torch.inference_mode()
def _seconds(layers: Sequence[Any], rows: int, like: torch.Tensor) -> float:
    """Of these linear layers one after the other, each on rows of its own width."""
    given = {n: like.new_ones(rows, n) for n in {layer.in_features for layer in layers}}
    start = time.perf_counter()
    for layer in layers:
        out = layer(given[layer.in_features])
    float(out[0, 0])  # waits for the device
    return time.perf_counter() - start
