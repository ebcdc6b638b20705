"""Tests items' texts in one token: ids, vectors, requests, export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn
from world import Letters, given

from project.api import open_run
from project.data.prompt import (
    FIRST_ITEM_ID,
    LOWEST_ID,
    Prompt,
    PromptEncoder,
    read_number_ids,
)
from project.data.requests import read_requests
from project.engine.engine import score_every_head
from project.engine.requests import prepare_requests
from project.export import export, load_exported
from project.model.backbone import ItemEmbedding, NumberEmbedding

ITEMS = pl.DataFrame({"item": [0, 1], "item_id": ["a", "b"], "title": ["Alien", "Brazil"]})
NEW = {"item_id": "new", "title": "a dog at sea", "year": "2020"}


def test_ids() -> None:
    """An item's id is below all numbers' and reads as its code; like a word's it shows no number."""
    encoder = PromptEncoder(Letters(), Prompt(segment="{title}{item_text}:"), ITEMS)
    found = encoder.encode(
        np.array([1, 0]), pl.DataFrame({"likes": [0, 0]}), np.array([1, -1], dtype=np.int8)
    )
    assert found.tokens[0].tolist() == [
        *map(ord, "Brazil"),
        FIRST_ITEM_ID - 1,
        *map(ord, ": yes"),
    ]
    assert found.tokens[1].tolist() == [*map(ord, "Alien"), FIRST_ITEM_ID, ord(":")]
    assert found.slots.tolist() == [7, 6]
    ids = torch.tensor([FIRST_ITEM_ID, FIRST_ITEM_ID - 255, 0, 1, 255, 49151])
    assert not read_number_ids(ids)[0].any()


@pytest.fixture
def embedding() -> ItemEmbedding:
    """Of 20 words and 30 items, in 8 dimensions."""
    torch.manual_seed(0)
    found = ItemEmbedding(nn.Embedding(20, 8))
    found.know(torch.randn(30, 8) * 3 + 1)
    found.standardise()
    return found


def test_vectors(embedding: ItemEmbedding) -> None:
    """By the definition; at first spread like words about one point; words and numbers are as without items."""
    codes = torch.arange(30).reshape(5, 6)
    found = embedding(FIRST_ITEM_ID - codes)
    frozen = embedding.items
    unit = (frozen - frozen.mean(0)) / frozen.std(0, correction=0) / 8**0.5
    expected = unit @ embedding.projection[:-1] + embedding.projection[-1]
    torch.testing.assert_close(found, expected[codes])
    spread = found.flatten(0, 1).std(0, correction=0)
    torch.testing.assert_close(spread, embedding.weight.std().expand(8))
    other = torch.tensor([0, 19, -1, LOWEST_ID])
    torch.testing.assert_close(embedding(other), NumberEmbedding.forward(embedding, other))
    assert embedding.lowest_id == FIRST_ITEM_ID - 29
    found.sum().backward()
    assert embedding.projection.grad is not None
    # more items change none of the old ones' vectors, and are not in the checkpoint
    embedding.know(torch.cat([frozen, torch.ones(1, 8)]))
    torch.testing.assert_close(embedding(FIRST_ITEM_ID - codes), found)
    assert set(embedding.state_dict()) == {"weight", "numbers", "projection", "moments"}


@pytest.mark.slow
def test_from_fit_to_requests(
    run: Callable[..., None],
    tiny_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The engine scores as `predict` does, new items included, whose text decides; an exported folder embeds alike."""
    config = tiny_config(**{"data.prompt": {"segment": "{item_text}{vote_number}:"}})
    run("fit", "--config", config)
    folder = (tmp_path / "runs" / "tiny" / "latest").resolve()
    past = [NEW | {"label": 1, "time": 5.0}, {"item_id": "i2", "label": 0, "time": 6.0}]
    twin = NEW | {"item_id": "twin"}
    other = NEW | {"item_id": "other", "title": "two friends in winter city"}
    records: list[dict[str, Any]] = [
        {
            "request_id": "known",
            "user_id": "u1",
            "time": 200.0,
            "candidates": ["i3", NEW, twin, other],
        },
        {"request_id": "own", "history": past, "candidates": ["i3", NEW, twin, other]},
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, records)))
    run("predict", *given(folder), "--data.requests", tmp_path / "requests.jsonl")
    packed = pl.read_parquet(folder / "scores" / "predict.parquet")
    heads = ["logit_1", "logit_3"]
    scores = packed.select(heads).to_numpy().reshape(2, 4, 2)
    np.testing.assert_allclose(scores[:, 1], scores[:, 2], atol=1e-5)
    assert np.abs(scores[:, 1] - scores[:, 3]).min() > 1e-3

    opened = open_run(folder, "cpu")
    model = opened.model
    data = opened.data
    asked = read_requests(str(tmp_path / "requests.jsonl"), data.split.interactions)
    every = score_every_head(model, prepare_requests(model, data, asked))
    np.testing.assert_allclose(every.select(heads), packed.select(heads), atol=1e-4)
    exported = load_exported(export(folder, tmp_path / "exported")).backbone
    assert model.backbone is not None
    model.know(data)
    ids = torch.tensor([FIRST_ITEM_ID, FIRST_ITEM_ID - 19, -1, 7])
    torch.testing.assert_close(exported.embed_tokens(ids), model.backbone.embed_tokens(ids))
