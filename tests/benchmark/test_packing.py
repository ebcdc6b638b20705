"""The packing benchmark: both contenders read the same tokens for the same targets; what it writes.

Training windows are what it measures; tests/data/test_packing.py has the same for evaluation windows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from project.benchmark import packing as benchmark
from project.benchmark.packing import prompts_of, run_packing
from project.data.batch import Batch, TrainSampler, pack
from project.data.stream import Streams
from project.datamodule import InteractionData
from project.model.backbone import Backbone
from project.model.module import ExitRecommender
from project.run import read_result


def training(data: InteractionData) -> tuple[Streams, TrainSampler]:
    streams = data.streams("train")
    return streams, TrainSampler(streams, data.context_tokens, data.batch_tokens, data.seed, 0, 1)


def test_prompts_are_what_packed_targets_see(data: InteractionData) -> None:
    """Over an epoch of training windows: one prompt a target, the token ids its slot reads, tied rows left out."""
    streams, sampler = training(data)
    targets = left_out = 0
    for windows in sampler:
        batch = pack(streams, windows)
        prompts = [p.tolist() for s, w in windows for p in prompts_of(streams, s, w)]
        mask = batch.layout.dense_mask()[0]  # the written-out rule
        assert prompts == [batch.tokens[0, mask[slot]].tolist() for slot in batch.slots]
        targets += len(prompts)
        times = [streams.timestamp[streams.offsets[s] + w.positions] for s, w in windows]
        left_out += sum(len(time) - len(np.unique(time)) for time in times)
    assert targets == streams.target.sum() == data.split.manifest["counts"]["train"]
    assert left_out > 0  # rows that tie with another row of their window


def test_pointwise_batches_are_those_prompts(data: InteractionData) -> None:
    """Pointwise batches hold prompts of training targets, each padded batch within the token budget."""
    streams, sampler = training(data)
    prompts = {
        tuple(p.tolist()) for windows in sampler for s, w in windows for p in prompts_of(streams, s, w)
    }
    batches = list(islice(benchmark._pointwise_batches(streams, sampler, data.batch_tokens), 20))
    for batch in batches:
        assert max(map(len, batch)) * len(batch) <= data.batch_tokens
        assert {tuple(p.tolist()) for p in batch} <= prompts
    assert sum(map(len, batches)) / 20 > 2  # several prompts share a batch


def test_pointwise_reads_the_last_token(tiny_model: Path) -> None:
    """A padded batch's gradient is the mean of its prompts' gradients: padding is neither read nor scored."""
    base = AutoModel.from_pretrained(tiny_model)
    prompts = [np.arange(5, 5 + n, dtype=np.int64) for n in (3, 8, 5)]
    found = []
    base.zero_grad = lambda: None  # keep what the step computed
    for batches in ([prompts], [[p] for p in prompts]):
        base.layers[0].mlp.up_proj.weight.grad = None
        assert sum(benchmark._pointwise_step(base, batch) for batch in batches) == 3
        found.append(base.layers[0].mlp.up_proj.weight.grad / len(batches))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-7)


def test_run_packing(data: InteractionData, tiny_model: Path, tmp_path: Path) -> None:
    """The result file holds both rates, the median of the rounds' ratios and their spread."""
    model = ExitRecommender(str(tiny_model), [1, 3], numbers=True)
    result = run_packing(model, data, tmp_path, seconds=0.0, device=torch.device("cpu"))
    assert read_result(tmp_path / "results" / "benchmark-packing.json") == result
    assert (result["command"], result["protocol"]["hash"]) == ("benchmark", data.split.hash)
    packing = result["packing"]
    assert packing["rounds"] >= benchmark.ROUNDS
    low, high = packing["spread"]
    assert 0 < low <= packing["ratio"] <= high
    assert min(packing["packed_targets_per_s"], packing["pointwise_targets_per_s"]) > 0
    assert (packing["layers"], packing["context_tokens"]) == (3, 128)


def test_both_contenders_run_on_the_device(
    data: InteractionData, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models and the windows are on the benchmark's device; "meta" stands in for a GPU."""
    seen = set[str]()

    def packed_step(backbone: Backbone, batch: Batch) -> int:
        seen.update(t.device.type for t in [*backbone.parameters(), batch.tokens, batch.slots])
        return len(batch.label)

    def pointwise_step(base: Any, prompts: list[Any]) -> int:
        seen.update(p.device.type for p in base.parameters())
        return len(prompts)

    monkeypatch.setattr(benchmark, "_packed_step", packed_step)
    monkeypatch.setattr(benchmark, "_pointwise_step", pointwise_step)
    model = ExitRecommender(str(tiny_model), [1, 3])
    run_packing(model, data, tmp_path, seconds=0.0, device=torch.device("meta"))
    assert seen == {"meta"}


def test_command(run: Callable[..., None], tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    run("benchmark", "--config", tiny_config(), "--only", "packing", "--seconds", 0.1)
    (file,) = (tmp_path / "runs").rglob("results/benchmark-packing.json")
    assert read_result(file)["packing"]["ratio"] > 0
