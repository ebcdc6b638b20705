"""Builds small logs, splits, retrieved features and streams in memory, for tests that need no CLI."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pytest
import torch

from project.data.logs import TableLogs
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import (
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
)
from project.data.stream import Streams, build_streams
from project.layout import Layout, visible
from research.packing import prompts_of

# text, and numbers in a token of their own
SEGMENT = "{title} all{item_percent} near{vote_number+item_count_number}:"


class Letters:
    """A tokenizer whose tokens are characters, so that tests can read token ids as text."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
    ) -> list[int]:
        """Code points."""
        assert not add_special_tokens
        return [ord(c) for c in text]


def text_of(tokens: np.ndarray) -> str:
    """What `Letters` encoded."""
    return "".join(map(chr, tokens.tolist()))


def dense_mask(layout: Layout) -> torch.Tensor:
    """The rule of attention written out: bool (B, queries T, keys T)."""
    tokens = layout.tokens()
    return visible(tokens.at(slice(None), slice(None), None), tokens.at(slice(None), None))


def read_split(folder: Path, protocol: Protocol) -> SplitInteractions:
    """The logs in `folder` under a protocol, with its labels from ratings."""
    logs = TableLogs(str(folder / "interactions.csv"), str(folder / "items.csv"))
    protocol = replace(protocol, label="rating > 3")
    return apply_protocol(build_interactions(logs.read(), protocol), protocol)


def whole_prompts(streams: Streams) -> dict[int, str]:
    """By row id, what every target's head may read, of a stream of `Letters`."""
    found: dict[int, str] = {}
    for s, w in streams.evaluation(400):
        rows = streams.offsets[s] + np.arange(w.first, w.last)
        ids = streams.row_id[rows[streams.target[rows]]].tolist()
        # a number or a rating is its id
        texts = [
            "".join(chr(c) if c >= 0 else f"<{c}>" for c in prompt.tolist())
            for prompt in prompts_of(streams, s, w)
        ]
        found |= dict(zip(ids, texts, strict=True))
    return found


def no_retrieved(rows: pl.DataFrame) -> pl.DataFrame:
    """A retrieved features table without any earlier row."""
    n = len(rows)
    counts = {
        c: pl.Series(c, [0] * n, dtype=pl.Int32)
        for c in ("neighbour_count", "item_count", "user_count")
    }
    rates = {
        c: pl.Series(c, [None] * n, dtype=pl.Float32)
        for c in ("vote", "item_rate", "user_rate")
    }
    return pl.DataFrame({"row_id": rows["row_id"], **counts, **rates})


def streams_without_retrieved(
    split: SplitInteractions, name: str, segment: str = "{title}:"
) -> Streams:
    """Streams of one split whose prompts are titles and answers."""
    encoder = PromptEncoder(
        Letters(), Prompt(instruction="I\n", segment=segment), split.interactions.items
    )
    order = ("train", "valid", "test").index(name)
    rows = split.rows.filter(pl.col("split").to_physical() <= order)
    return build_streams(rows, no_retrieved(rows), name, encoder)


def tiny_settings(
    logs: Path, model: Path, runs: Path, name: str = "tiny"
) -> dict[str, Any]:
    """A configuration of the tiny world, as YAML would give it; tests change it.

    Args:
        logs: Folder with interactions.csv and items.csv.
        model: Folder of a model with three layers or more.
        runs: Where runs go.
        name: Folder of the runs below that.
    """
    files = {kind: str(logs / f"{kind}.csv") for kind in ("interactions", "items")}
    csv = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(runs), "name": name},
    }
    return {
        "seed_everything": 0,
        "data": {
            "logs": {"class_path": "project.data.logs.TableLogs", "init_args": files},
            "retriever": "project.retrieval.ItemKNN",
            "protocol": {
                "minimum_history": 1,
                "shares": [0.6, 0.2, 0.2],
                "label": "rating > 3",
            },
            "prompt": {"segment": SEGMENT},
            "context_tokens": 128,
            "batch_tokens": 512,
            "refits": 5,
            "mf": None,
        },
        # the rate is said, so that numbers of this world do not depend on a default
        "model": {
            "backbone": str(model),
            "exit_layers": [1, 3],
            "optim": {"learning_rate": 2e-4},
        },
        "exits": {"lists": 20},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": [csv],
        },
    }


def sharpened(model: Path, folder: Path) -> Path:
    """A copy with layers ten times as large: attention is far from uniform."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    made: Any = AutoModelForCausalLM.from_pretrained(model)
    for name, weights in made.named_parameters():
        if "proj" in name:
            weights.data.mul_(10)
    made.save_pretrained(folder)
    return folder


def spread_exits(run: Path) -> None:
    """Thresholds at which some test rows leave at every exit: calibration on tiny logs uses no depth.

    Heads are similar here, so thresholds fall with depth: who stays at one head would hardly leave at the next.
    """
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    plan = content["exit_plans"]["plan"]
    scores = pl.read_parquet(run / "scores" / "test.parquet")
    for head, layer in enumerate(plan["layers"][:-1]):
        slope, exit_0, offset = plan["calibration"][head].tolist()
        logit = (
            scores[f"logit_{layer}"].to_numpy() * slope
            + scores["logit_0"].to_numpy() * exit_0
            + offset
        )
        plan["thresholds"][head] = float(np.quantile(np.abs(logit), 0.7 - 0.3 * head))
    # lists of up to 5, whose candidates leave at every exit
    start = 0.5 * float(np.std(logit))
    margins = [start / 2**head for head in range(len(plan["layers"]))]
    lists = content["exit_plans"]["lists"]
    lists["margins"] = {5: torch.tensor(margins, dtype=torch.float64)}
    torch.save(content, path)


def call(cache: Path, *arguments: object) -> None:
    """Run `python -m project ...` in this process, with a cache folder."""
    from project.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROJECT_CACHE", str(cache))
        patch.setattr("sys.argv", ["project", *map(str, arguments)])
        main()


def given(run: Path) -> tuple[object, ...]:
    """Options that a command after `fit` needs: the run's own configuration and checkpoint."""
    return (
        "--config",
        run / "config.yaml",
        "--ckpt_path",
        run / "checkpoints" / "last.ckpt",
    )


def result(run: Path, command: str) -> dict[str, Any]:
    """A result file of a run."""
    content: dict[str, Any] = json.loads((run / "results" / f"{command}.json").read_text())
    return content
