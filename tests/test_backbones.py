"""Backbones of today, tiny and random, from `fit` to the exported folder: the logits are transformers' own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from conftest import write_model
from example_engine import raw_outputs
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from world import given

from project.api import open_run
from project.data.ragged import Ragged
from project.engine import Engine, PreparedRequest, StreamCache, StreamTokens
from project.engine.decisions import EveryHead
from project.exits.calibration import Calibration
from project.export import load_exported
from project.model.heads import START

Run = Callable[..., None]
Config = Callable[..., Path]
OVERLAY = Path(__file__).parents[1] / "configs" / "overlays" / "qwen3_reranker.yaml"
# Llama 3.2 stretches slow turns as its numbers are for 8,192 positions; here 16
LLAMA3 = """{rope_type: llama3, rope_theta: 500000.0, factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0,
original_max_position_embeddings: 16}"""
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": yaml.safe_load(LLAMA3)},
    "qwen3": {"head_dim": 16, "rope_theta": 1e6},
    # the fourth of five layers, which an exit reads, has no rotary positions
    "smollm3": {"pad_token_id": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_parity(family: str, run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """Training's forward, the engine, and the engine from its cache: to 1e-5, at both exits, behind 20 segments."""
    base = write_model(tmp_path / "base", 5, family, **SHAPES[family])
    changes = {"model.backbone": str(base), "model.exit_layers": [2, 4]}
    run("fit", "--config", tiny_config(**changes))
    folder, target = tmp_path / "runs" / "tiny" / "latest", tmp_path / "exported"
    run("export", folder, target)
    rng = np.random.default_rng(0)
    history, own = (
        Ragged.of([rng.integers(0, 400, n).tolist() for n in rng.integers(2, 6, count)])
        for count in (20, 3)
    )
    stream = StreamTokens.of(history, np.arange(20))
    request = PreparedRequest("r", stream, own, np.zeros(3), np.zeros((3, 1)), "user")
    # 1. transformers' forward of each candidate behind the history, by what was exported
    library = AutoModel.from_pretrained(target, attn_implementation="eager")
    library.norm = nn.Identity()
    heads = load_exported(target).heads
    expected = []
    for candidate in own:
        tokens = torch.from_numpy(np.concatenate([stream.tokens, candidate]))[None]
        states = library(tokens, output_hidden_states=True).hidden_states
        expected.append(torch.cat([heads[str(k)](states[k][0, -1:]) for k in (2, 4)]))
    # 2. ours, by the run
    model = open_run(folder, "cpu").model.eval()
    raw = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    decision = EveryHead(Calibration((2, 4), raw))
    engine = Engine(model, decision, StreamCache(), read_tokens=0)
    for _ in range(2):
        engine.score([request])
    trained = raw_outputs(model, request).logits[:, 1:]
    for logits in (trained, *(outputs.logits for outputs in decision.outputs)):
        torch.testing.assert_close(
            logits, torch.stack(expected).double(), atol=1e-5, rtol=1e-5
        )


SYSTEM = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. \
Note that the answer can only be "yes" or "no".<|im_end|>
"""
TURN = """<|im_start|>user
<Instruct>: {}
<Query>: {}
<Document>: {}<|im_end|>
<|im_start|>assistant
<think>

</think>

"""


@pytest.mark.slow
def test_reranker(run: Run, tiny_config: Config, tiny_logs: Path, tmp_path: Path) -> None:
    """Qwen3-Reranker's prompt as its authors write it: untrained logits are logit(yes) - logit(no), times START.

    A history is more turns of the same chat.
    """
    # 1. a tiny Qwen3 with Qwen's control tokens, and a run of it that trains nothing
    base = write_model(tmp_path / "base", family="qwen3", vocab_size=416)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>", "yes", "no"])
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    prompt = yaml.safe_load(OVERLAY.read_text())["data"]["prompt"]
    changes = {"data.prompt": prompt, "model.backbone": str(base)}
    changes |= {"data.context_tokens": 2048, "data.batch_tokens": 2048}
    untrained = ("--model.optim.learning_rate", 0, "--trainer.limit_train_batches", 2)
    run("fit", "--config", tiny_config(**changes), *untrained)
    # 2. a new user, and one with a history
    rows = [{"item_id": f"i{k}", "label": k, "time": k} for k in (0, 1)]
    lines = [
        {"request_id": str(len(part)), "history": part, "candidates": ["i3", "i4"]}
        for part in ([], rows)
    ]
    asked = tmp_path / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "runs" / "tiny" / "latest"
    run("predict", *given(folder), "--data.requests", asked)
    found = pl.read_parquet(folder / "scores" / "predict.parquet")["logit_3"]
    # 3. transformers beside it
    about = re.search(r"<Instruct>: (.*)\n<Query>: (.*)\n", prompt["segment"])
    assert about
    items = pl.read_csv(tiny_logs / "items.csv")
    turns = [TURN.format(*about.groups(), title) for title in items["title"]]
    before = f"{turns[0]}no<|im_end|>\n{turns[1]}yes<|im_end|>\n"
    library = AutoModelForCausalLM.from_pretrained(base)
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    for score, text in zip(
        found, [text + turns[k] for text in ("", before) for k in (3, 4)], strict=True
    ):
        logits = library(**tokenizer(SYSTEM + text, return_tensors="pt")).logits[0, -1]
        assert score / START == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-4)
