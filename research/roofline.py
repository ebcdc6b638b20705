"""How near the engine's backbone comes to what the machine allows: `roofline.py RUN OUT [CANDIDATES]`.

A layer takes at least as long as its arithmetic, and at least as long as reading its weights once; both ceilings are
measured between the requests, on the same machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from project.arrays import F64
from project.data.requests import catalogue_requests
from project.engine.decisions import RowExits, static_exits
from project.engine.engine import Engine
from project.engine.requests import PreparedRequest, Scored, prepare_requests
from project.loading import open_run
from project.model.module import ExitRecommender
from project.report.tables import render
from project.run import result_head, write_json

REQUESTS = 16
ABOUT = (
    "Requests of test one by one, histories not cached. GFLOP/s that exits need; share of limit: least seconds the "
    "machine's ceilings allow over the engine's seconds."
)


@dataclass(frozen=True)
class Limits:
    """Ceilings of the machine, measured."""

    gflops: float  # GFLOP/s of a matrix product of many rows
    gbytes: float  # GB/s at which the linear layers' weights are read for a single row
    layer_bytes: float  # bytes of the linear layers' weights of one decoder layer

    @classmethod
    def measure(cls, model: ExitRecommender, tokens: int = 1024) -> Limits:
        """Of this moment. One row is bound by reading the weights, a product of many `tokens` by arithmetic."""
        assert model.backbone is not None
        layers: Any = model.backbone.layers
        own = [part for part in layers.modules() if isinstance(part, nn.Linear)]
        widest: Any = next(
            part for name, part in layers.named_modules() if name.endswith("up_proj")
        )
        widest = getattr(widest, "base_layer", widest)  # without adapters
        like = model.backbone.embed_tokens.weight
        size = sum(w.nbytes for part in own for w in part.parameters(recurse=False))
        flops = 2 * tokens * widest.in_features * widest.out_features
        reading = _seconds(own, 1, like)
        return cls(
            flops / _seconds([widest], tokens, like) / 1e9,
            size / reading / 1e9,
            size / len(layers),
        )

    @classmethod
    def median(cls, measured: Sequence[Limits]) -> Limits:
        """Of each ceiling."""
        return cls(*np.median([astuple(limits) for limits in measured], axis=0).tolist())

    def least_seconds(self, flops: Sequence[F64]) -> float:
        """Seconds below which the backbone cannot do this; a layer's weights are read once for all.

        `flops`: per request that runs together with the others, `useful_flops` by layer.
        """
        every = np.zeros(max((len(own) for own in flops), default=0))
        for own in flops:
            every[: len(own)] += own
        return (
            float(np.maximum(every / self.gflops, self.layer_bytes / self.gbytes).sum())
            / 1e9
        )


@torch.inference_mode()
def _seconds(layers: Sequence[Any], rows: int, like: torch.Tensor) -> float:
    """Of these linear layers one after the other, each on rows of its own width."""
    given = {n: like.new_ones(rows, n) for n in {layer.in_features for layer in layers}}
    start = time.perf_counter()
    for layer in layers:
        out = layer(given[layer.in_features])
    float(out[0, 0])  # waits for the device
    return time.perf_counter() - start


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> F64:
    """FLOPs that a request's exits need by layer, (deepest exit,): linear layers, and the scores that queries may see.

    At the layer where a candidate leaves, its tokens owe keys and values alone and its answer slot the rest; the same
    holds for the history at the request's deepest exit.
    """
    assert model.backbone is not None
    config, layer = model.backbone.config, model.backbone.layers[0]
    sizes = {name: p.numel() for name, p in layer.named_parameters() if p.ndim == 2}
    whole = sum(sizes.values())
    owed = sum(n for name, n in sizes.items() if "k_proj" in name or "v_proj" in name)
    width = (
        getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    deepest = max(int(depth.max(initial=0)), 0)
    at = np.arange(1, deepest + 1)[:, None]
    passes, leaves = depth > at, depth == at  # (deepest, candidates)
    tokens, read, slots = passes @ own, leaves @ own, leaves.sum(axis=1)
    seen = passes @ (own * s + own * (own + 1) / 2) + leaves @ (s + own)
    if scored.token_layers > (np.maximum(depth, 0) * own).sum():  # the history ran
        goes_on = at[:, 0] < deepest
        tokens, read = tokens + s * goes_on, read + s * ~goes_on
        seen = seen + goes_on * s * (s + 1) / 2
    linear = whole * tokens + owed * read + (whole - owed) * slots
    flops: F64 = 2.0 * linear + 4.0 * config.num_attention_heads * width * seen
    return flops


def measure(run: Path, candidates: int) -> dict[str, Any]:
    """The result of a calibrated run: full depth, and its plan."""
    # 1. requests, which both score
    opened = open_run(run, "cpu")
    model = opened.model
    data = opened.data
    drawn = catalogue_requests(data.split, "test", REQUESTS, candidates, data.seed)
    requests = prepare_requests(model, data, drawn.requests)
    decisions = {
        "full depth": static_exits(opened.plan, model.depth),
        "plan": RowExits(opened.plan),
    }
    # 2. seconds and useful FLOPs of each, and the ceilings beside every request
    rows = []
    for name, decision in decisions.items():
        engine = Engine(model, decision)
        engine.score(requests[:1])  # warm up
        spent = 0.0
        flops = list[F64]()
        limits = list[Limits]()
        for request in requests:
            start = time.perf_counter()
            (scored,) = engine.score([request])
            spent += time.perf_counter() - start
            flops.append(useful_flops(scored, request, model))
            limits.append(Limits.measure(model))
        limit = Limits.median(limits)
        rows.append(
            {
                "decision": name,
                "gflops": sum(float(own.sum()) for own in flops) / spent / 1e9,
                "gflops_ceiling": limit.gflops,
                "gbytes_ceiling": limit.gbytes,
                "share_of_limit": sum(limit.least_seconds([own]) for own in flops) / spent,
            }
        )
    head = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    return head | {"rows": rows, "about": ABOUT}


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else 64)
    print(render(found), write_json(Path(sys.argv[2]), found), sep="\n")
