"""Training speed by packed windows over that by a padded prompt per candidate.

`python -m research.packing RUN OUT [SECONDS]`. Both, in turns, run the backbone forward and backward,
transformers' own model on prompts with the same visible history. Windows and prompts are made on the host inside
the clock, as a loader would make them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel

from project.arrays import I64
from project.config import open_run
from project.data.batch import Batch, TrainSampler, pack
from project.data.download import resolve_model
from project.data.stream import Streams, Window
from project.datamodule import InteractionData
from project.model.backbone import Backbone
from project.model.module import ExitRecommender
from project.report.tables import render
from project.run import result_head, write_json
from research.library import padded

ROUNDS = 3  # fewer do not show the spread


def prompts_of(streams: Streams, stream: int, window: Window) -> list[I64]:
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
        prompts.append(
            np.concatenate([streams.tokens[streams.instructions[stream]], seen, own])
        )
    return prompts


def _pointwise_batches(
    streams: Streams, sampler: TrainSampler, batch_tokens: int
) -> Iterator[list[Any]]:
    """Prompts of random targets, as many as fit into `batch_tokens` when padded to the longest."""
    rng = np.random.default_rng(0)
    batch: list[Any] = []  # goes on over windows: those of a small log do not fill one
    for windows in cycle(sampler):
        prompts = [p for s, w in windows for p in prompts_of(streams, s, w)]
        rng.shuffle(prompts)
        for prompt in prompts:
            if (
                batch
                and max(len(prompt), *(len(p) for p in batch)) * (len(batch) + 1)
                > batch_tokens
            ):
                yield batch
                batch = []
            batch.append(prompt)


def measure(run: Path, seconds: float) -> dict[str, Any]:
    """The result of a run's model and training windows, measured for about so many seconds."""
    # 1. both ways on the same training windows
    model, data = open_run(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.prepare_data()
    streams = data.streams("train")
    backbone, base = _both(model, data, device)
    sampler = TrainSampler(streams, data.context_tokens, data.batch_tokens, data.seed, 0, 1)
    windows = cycle(sampler)
    prompts = _pointwise_batches(streams, sampler, data.batch_tokens)
    steps: dict[str, Callable[[], int]] = {
        "packed": lambda: _packed_step(backbone, pack(streams, next(windows)).to(device)),
        "pointwise": lambda: _pointwise_step(base, next(prompts)),
    }
    for step in steps.values():
        step()  # warm up
    # 2. steps in turns: targets a second, one a round
    rates: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(rates["packed"]) < ROUNDS:
        for name, step in steps.items():
            began = time.perf_counter()
            targets = step()
            # a step is done when the device has done it, not when the host has sent it
            if device.type in ("cuda", "mps", "xpu"):
                getattr(torch, device.type).synchronize()
            rates[name].append(targets / (time.perf_counter() - began))
    # 3. medians of the rounds, and of their ratios
    ratios = np.array(rates["packed"]) / np.array(rates["pointwise"])
    head = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    about = (
        f"Targets a second in training, medians of {len(ratios)} rounds, {model.depth} layers, windows of "
        f"{data.context_tokens} tokens; packed over pointwise in a round: {ratios.min():.1f} to {ratios.max():.1f}."
    )
    row = {
        "packed targets/s": float(np.median(rates["packed"])),
        "pointwise targets/s": float(np.median(rates["pointwise"])),
        "ratio": float(np.median(ratios)),
    }
    return head | {"rows": [row], "about": about}


def _both(
    model: ExitRecommender, data: InteractionData, device: torch.device
) -> tuple[Backbone, Any]:
    """The backbone, and transformers' own model with the same weights, numbers and frozen parts."""
    name = resolve_model(model.backbone_name)
    backbone = Backbone.from_pretrained(name, num_layers=model.depth)
    backbone.embed_tokens.requires_grad_(not model.freeze_embeddings)
    base = AutoModel.from_pretrained(
        name, num_hidden_layers=model.depth, dtype=torch.float32
    )
    base.embed_tokens.requires_grad_(not model.freeze_embeddings)
    if model.items or model.numbers:
        backbone.learn(model.items, (0, 0) if data.rating_scale else None)
        if model.items:
            backbone.embed_tokens.know(torch.from_numpy(data.item_vectors()))
        base.embed_tokens = deepcopy(backbone.embed_tokens)
    return backbone.to(device), base.to(device)


def _packed_step(backbone: Backbone, batch: Batch) -> int:
    state = backbone.run(
        backbone.embed(batch.tokens, batch.layout), 0, len(backbone.layers)
    )
    state.hidden.flatten(0, 1)[batch.slots].square().mean().backward()  # type: ignore[no-untyped-call]
    backbone.zero_grad()
    return len(batch.label)


def _pointwise_step(base: Any, prompts: list[Any]) -> int:
    tokens, mask, last = padded([torch.from_numpy(p) for p in prompts], base.device)
    hidden = base(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    hidden[torch.arange(len(prompts)), last].square().mean().backward()
    base.zero_grad()
    return len(prompts)


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), float(sys.argv[3]) if len(sys.argv) > 3 else 60.0)
    print(render(found), write_json(Path(sys.argv[2]), found), sep="\n")
