"""Files, logs and a random backbone for tests of the data's way."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import LlamaConfig

from project.data.batch import Batch
from project.data.logs import RAW_SCHEMA, RawLogs
from project.model.backbone import Backbone

Row = tuple[str, str, float, float]
MakeLogs = Callable[..., RawLogs]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    """Write a text file into the test's folder; returns its path."""

    def write_file(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def make_logs() -> MakeLogs:
    """RawLogs from (user_id, item_id, timestamp, rating) rows; labels and splits may be given as columns."""

    def make(
        rows: list[Row], labels: list[int] | None = None, splits: list[str] | None = None
    ) -> RawLogs:
        users, items, times, ratings = (list(column) for column in zip(*rows, strict=True))
        number = len(rows)
        interactions = pl.DataFrame(
            {
                "user_id": users,
                "item_id": items,
                "timestamp": times,
                "rating": ratings if labels is None else [None] * number,
                "label": labels or [None] * number,
                "split": splits or [None] * number,
                "source_file": ["log.csv"] * number,
                "source_row": range(1, number + 1),
            },
            schema=RAW_SCHEMA,
        )
        catalogue = sorted(set(items))
        table = pl.DataFrame(
            {"item_id": catalogue, "title": [f"Title {item}" for item in catalogue]}
        )
        return RawLogs(interactions, table, {"log.csv": "aa", "items.csv": "bb"})

    return make


@pytest.fixture
def hidden() -> Callable[[Batch], dict[int, torch.Tensor]]:
    """Last hidden state of each target, of a random backbone whose attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    backbone = Backbone.from_config(config).eval()

    def states(batch: Batch) -> dict[int, torch.Tensor]:
        with torch.no_grad():
            state = backbone.run(backbone.embed(batch.tokens, batch.layout), 0, 2).hidden[
                0, batch.slots
            ]
        return dict(zip(batch.row_id.tolist(), state, strict=True))

    return states
