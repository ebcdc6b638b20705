"""Rows of the engine's benchmark: what each side needed, as numbers of a result file and as a table.

Unusual here: a request's time is the median of its rounds, and ratios are of sums of such medians; the spread beside
them is of whole rounds, so it is wider. Only FLOPs that the exits need count as achieved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from project.engine.engine import Engine
from project.engine.prepared import PreparedRequest
from project.engine.scored import Scored, Scores

if TYPE_CHECKING:
    from project.model.module import ExitRecommender

Floats = NDArray[np.float64]


@dataclass
class Side:
    """One engine, and what it needed: a row of seconds a round, a column a request."""

    engine: str
    policy: str
    runs: Engine
    auc: float | None = None
    wall: list[list[float]] = field(default_factory=list)
    trunk: list[list[float]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)

    def score(self, request: PreparedRequest) -> tuple[float, Scores]:
        """Seconds and scores of one request."""
        start = time.perf_counter()
        scores = self.runs.score([request])
        return time.perf_counter() - start, scores

    def typical(self, which: str) -> float:
        """Seconds of all requests, each the median of its rounds; `which` is wall or trunk."""
        return float(np.median(np.array(getattr(self, which)), axis=0).sum())

    def totals(self, which: str) -> Floats:
        """(rounds,) seconds of all requests."""
        found: Floats = np.array(getattr(self, which)).sum(axis=1)
        return found

    @property
    def token_layers(self) -> int:
        """Of all requests."""
        return sum(s.token_layers for s in self.scored)


def matmul_gflops(model: ExitRecommender, tokens: int = 1024) -> float:
    """GFLOP/s of one matrix product of the trunk's widest layer, the ceiling of this minute."""
    assert model.trunk is not None
    named = model.trunk.named_parameters()
    weight = next(p for n, p in named if n.endswith("up_proj.weight"))
    x = torch.ones(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    start = time.perf_counter()
    with torch.inference_mode():
        float((x @ weight.T)[0, 0])  # waits for the device
    return float(2e-9 * tokens * weight.numel()) / (time.perf_counter() - start)


def useful_flops(scored: Scored, request: PreparedRequest, model: ExitRecommender) -> float:
    """FLOPs that a request's exits need: linear layers of all token-layers, and the scores that queries may see.

    Args:
        scored: Its exits and token-layers.
        request: Its tokens.
        model: Its trunk.
    """
    assert model.trunk is not None
    config, layer = model.trunk.config, model.trunk.layers[0]
    linear = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    s, own, depth = len(request.stream), request.candidates.lengths, scored.exit_layers
    seen = float((depth * (own * s + own * (own + 1) / 2)).sum())
    if scored.token_layers > (depth * own).sum():  # the stream ran
        seen += float(depth.max()) * s * (s + 1) / 2
    flops: float = 2.0 * linear * scored.token_layers + 4.0 * config.num_attention_heads * width * seen
    return flops


def side_row(
    side: Side, full: Side, requests: list[PreparedRequest], model: ExitRecommender, ceiling: float
) -> dict[str, Any]:
    """One row of a result file.

    Args:
        side: What is described.
        full: Packed full depth of the same run.
        requests: The sample.
        model: The run.
        ceiling: GFLOP/s of a matrix product, measured in the same run.
    """
    wall, each = side.typical("wall"), np.array(side.wall).ravel() * 1e3
    saved = full.token_layers / side.token_layers if side.token_layers else None
    trunk = full.typical("trunk") / side.typical("trunk")
    ratios = full.totals("trunk") / side.totals("trunk")
    rates = len(requests) / side.totals("wall")
    flops = sum(useful_flops(s, r, model) for s, r in zip(_first(side, requests), requests, strict=True))
    depths = np.concatenate([s.exit_layers for s in side.scored])
    row: dict[str, Any] = {
        "engine": side.engine,
        "policy": side.policy,
        "workload": "catalogue, history as logged",
        "requests": len(requests),
        "rounds": len(side.wall),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "requests_per_s": len(requests) / wall,
        "candidates_per_s": len(depths) / wall,
        "spread": [float(rates.min()), float(rates.max())],
        **{f"p{p}_ms": float(np.percentile(each, p)) for p in (50, 95, 99)},
        "auc": side.auc,
        "auc_drop": None if side.auc is None or full.auc is None else full.auc - side.auc,
        "mean_depth": float(depths.mean()),
        "token_layers": side.token_layers,
        "measured_speedup": full.typical("wall") / wall,
        "trunk_speedup": trunk,
        "token_layer_speedup": saved,
        "efficiency": trunk / saved if saved else None,
        "efficiency_spread": [float(r) / saved for r in (ratios.min(), ratios.max())] if saved else None,
        "gflops": flops / side.typical("trunk") / 1e9,
        "gflops_ceiling": ceiling,
    }
    return row


def _first(side: Side, requests: list[PreparedRequest]) -> list[Scored]:
    found = {s.request_id: s for s in side.scored}
    return [found[r.request_id] for r in requests]


def benchmark_table(rows: list[dict[str, Any]]) -> Table:
    """What a person waits for.

    Args:
        rows: Of a result file.
    """
    table = Table(title="requests of the test split, one at a time")
    names = (
        "N",
        "stream",
        "engine",
        "requests/s",
        "p50 ms",
        "AUC",
        "depth",
        "token-layers",
        "measured",
        "efficiency",
    )
    for name in (*names, "GFLOP/s"):
        table.add_column(name, justify="left" if name in ("stream", "engine") else "right")
    for r in rows:
        table.add_row(
            str(r["candidates"]),
            r["stream"],
            r["engine"] if r["engine"] != "early_exit" else f"early_exit, {r['policy']}",
            f"{r['requests_per_s']:.2f}",
            f"{r['p50_ms']:.0f}",
            "" if r["auc"] is None else f"{r['auc']:.4f}",
            f"{r['mean_depth']:.2f}",
            "" if r["token_layer_speedup"] is None else f"x{r['token_layer_speedup']:.2f}",
            f"x{r['measured_speedup']:.2f}",
            "" if r["efficiency"] is None else f"{r['efficiency']:.2f}",
            f"{r['gflops']:.0f} of {r['gflops_ceiling']:.0f}",
        )
    return table
