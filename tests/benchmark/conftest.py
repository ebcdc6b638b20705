"""The data of the tiny world."""

from __future__ import annotations

from pathlib import Path

import pytest

from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.retrieval import LightGCN


@pytest.fixture
def data(
    tiny_logs: Path, tiny_model: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> InteractionData:
    """Real retrieved features and the tiny model's tokenizer."""
    monkeypatch.setenv("PROJECT_CACHE", str(session_cache))
    return InteractionData(
        TableLogs(str(tiny_logs / "interactions.csv"), str(tiny_logs / "items.csv")),
        LightGCN(neighbours=3, dim=4, epochs=1),
        Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2], label="rating > 3"),
        Prompt(segment="{title} all{item_percent} near{vote_percent}:"),
        tokenizer=str(tiny_model),
        context_tokens=128,
        batch_tokens=512,
        refits=5,
        mf=None,
    )
