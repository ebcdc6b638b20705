"""Benchmark: speed as ratios, both sides measured in turns in one run, so that a slow minute hits both.

Packing: training steps (forward and backward) of the backbone on packed windows, against transformers' own model on one
padded prompt per (user, candidate) with the same visible history.

Unusual here: windows and prompts are made on the host as a loader would, inside the clock on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoModel

from project.data.batch import Batch, TrainSampler, pack
from project.data.download import resolve_model
from project.data.stream import Streams, Window
from project.model.backbone import Backbone, NumberEmbedding
from project.run import result_head, write_json

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

ROUNDS = 3  # fewer pairs of measurements than this say nothing about spread


@dataclass
class _Side:
    """Rates of one side, one a round."""

    rates: list[float] = field(default_factory=list)

    def measure(self, step: Callable[[], int], device: torch.device) -> None:
        """Note the rate of one step on the device."""
        start = time.perf_counter()
        targets = step()
        # a step is done when the device is, not when the host has asked for it
        if device.type in ("cuda", "mps", "xpu"):
            getattr(torch, device.type).synchronize()
        self.rates.append(targets / (time.perf_counter() - start))

    @property
    def median(self) -> float:
        """Targets a second in a typical round."""
        return float(np.median(self.rates))


def prompts_of(streams: Streams, stream: int, window: Window) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """One prompt for each target of a window: instruction, the segments it may see, itself up to the answer slot."""
    positions = window.positions + streams.offsets[stream]
    time = streams.timestamp[positions]
    prompts = []
    for p in range(window.first, window.last):
        row = int(streams.offsets[stream]) + p
        if not streams.target[row]:
            continue
        earlier = positions[(time < streams.timestamp[row]) & streams.context[positions]]
        own = streams.tokens[row][: streams.slots[row] + 1]
        seen = streams.tokens.take(earlier).values
        prompts.append(np.concatenate([streams.tokens[streams.instruction], seen, own]))
    return prompts


def _pointwise_batches(streams: Streams, sampler: TrainSampler, batch_tokens: int) -> Iterator[list[Any]]:
    """Prompts of random targets, as many as fit into `batch_tokens` when padded to the longest."""
    rng = np.random.default_rng(0)
    batch: list[Any] = []  # goes on over windows: those of a small log do not fill one
    for windows in cycle(sampler):
        prompts = [p for s, w in windows for p in prompts_of(streams, s, w)]
        rng.shuffle(prompts)
        for prompt in prompts:
            if batch and max(len(prompt), *(len(p) for p in batch)) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(prompt)


def run_packing(
    model: ExitRecommender,
    data: InteractionData,
    folder: Path,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """Training targets a second, packed against one prompt per (user, candidate), base model only.

    Args:
        model: Names the backbone and its depth.
        data: Prompts and window size.
        folder: Run folder of the result file.
        seconds: About how long to measure.
        device: Where both sides run.
    """
    data.prepare_data()
    streams = data.streams("train")
    backbone, base = _both(model, device)
    sampler = TrainSampler(streams, data.context_tokens, data.batch_tokens, data.seed, 0, 1)
    packed_windows = cycle(sampler)
    pointwise = _pointwise_batches(streams, sampler, data.batch_tokens)

    sides = {"packed": _Side(), "pointwise": _Side()}
    steps: dict[str, Callable[[], int]] = {
        "packed": lambda: _packed_step(backbone, pack(streams, next(packed_windows)).to(device)),
        "pointwise": lambda: _pointwise_step(base, next(pointwise)),
    }
    for step in steps.values():
        step()  # warm up
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(sides["packed"].rates) < ROUNDS:
        for side, step in steps.items():
            sides[side].measure(step, device)
    result = result_head("benchmark", data.split.manifest, str(folder / "config.yaml"), data.seed)
    result["packing"] = _figures(sides["packed"], sides["pointwise"]) | {
        "layers": model.depth,
        "context_tokens": data.context_tokens,
        "batch_tokens": data.batch_tokens,
    }
    path = write_json(folder / "results" / "benchmark-packing.json", result)
    packing = result["packing"]
    Console().print(
        f"training targets per second: packed {packing['packed_targets_per_s']}, one prompt per candidate "
        f"{packing['pointwise_targets_per_s']}: x{packing['ratio']} (median of {packing['rounds']} rounds, "
        f"{packing['spread'][0]} to {packing['spread'][1]})\nwritten: {path}"
    )
    return result


def _both(model: ExitRecommender, device: torch.device) -> tuple[Backbone, Any]:
    """The backbone, and transformers' own model with the same weights, numbers and frozen parts."""
    name = resolve_model(model.backbone_name)
    backbone = Backbone.from_pretrained(name, num_layers=model.depth)
    backbone.embed_tokens.requires_grad_(not model.freeze_embeddings)
    base = AutoModel.from_pretrained(name, num_hidden_layers=model.depth, dtype=torch.float32)
    base.embed_tokens.requires_grad_(not model.freeze_embeddings)
    if model.numbers:
        backbone.learn_numbers()
        base.embed_tokens = NumberEmbedding(base.embed_tokens)
    return backbone.to(device), base.to(device)


def _figures(packed: _Side, pointwise: _Side) -> dict[str, Any]:
    ratios = np.array(packed.rates) / np.array(pointwise.rates)
    return {
        "packed_targets_per_s": round(packed.median, 2),
        "pointwise_targets_per_s": round(pointwise.median, 3),
        "ratio": round(float(np.median(ratios)), 2),
        "spread": [round(float(r), 2) for r in (ratios.min(), ratios.max())],
        "rounds": len(ratios),
    }


def _packed_step(backbone: Backbone, batch: Batch) -> int:
    state = backbone.run(backbone.embed(batch.tokens, batch.layout), 0, len(backbone.layers))
    state.hidden.flatten(0, 1)[batch.slots].square().mean().backward()  # type: ignore[no-untyped-call]
    backbone.zero_grad()
    return len(batch.label)


def _pointwise_step(base: Any, prompts: list[Any]) -> int:
    lengths = torch.tensor([len(p) for p in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(p) for p in prompts], batch_first=True)
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
    read = {"input_ids": tokens.to(base.device), "attention_mask": mask.to(base.device)}
    hidden = base(**read, use_cache=False).last_hidden_state
    hidden[torch.arange(len(prompts)), lengths - 1].square().mean().backward()
    base.zero_grad()
    return len(prompts)
