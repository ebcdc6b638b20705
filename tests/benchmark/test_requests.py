"""What the engine's benchmark is asked, before anything is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from torch import nn

from project.benchmark import engine as requests
from project.errors import ConfigError, NotFittedError


class Reached(Exception):
    """Everything that comes before measuring went well."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `run_engine` for a catalogue of 20 items; it ends where measuring would begin."""
    model, items = nn.Module(), pl.DataFrame({"item": range(20)})
    rows = pl.DataFrame({"split": ["test"], "role": ["target"], "hist": [3]})
    split = SimpleNamespace(interactions=SimpleNamespace(items=items), rows=rows)

    def load(model: nn.Module, *_: object) -> object:
        model.backbone = nn.Linear(2, 2)
        return SimpleNamespace(plan=SimpleNamespace(calibration=None))

    def bench(model: nn.Module, *arguments: Any) -> None:
        assert {p.device for p in model.parameters()} == {arguments[-1]}
        raise Reached

    monkeypatch.setattr(requests, "load_run", load)
    monkeypatch.setattr(requests, "Bench", bench)
    return {
        "model": model,
        "data": SimpleNamespace(prepare_data=lambda: None, tokenizer=None, split=split),
        "checkpoint": "last.ckpt",
        "folder": Path(),
        "settings": None,
        "device": torch.device("cpu"),
        "seconds": 1.0,
        "sizes": [1, 8],
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_is_on_the_device_asked_for(asked: dict[str, Any], device: str) -> None:
    """Also the backbone, which there is only once the run is loaded."""
    with pytest.raises(Reached):
        requests.run_engine(**asked | {"device": torch.device(device)})


@pytest.mark.parametrize("sizes", [[], [0], [21, 64]], ids=str)
def test_sizes_that_no_request_can_have(asked: dict[str, Any], sizes: list[int]) -> None:
    """None at all, none of one candidate or more, none that twenty items can fill."""
    with pytest.raises(ConfigError, match=r"--sizes is .*from 1 to 20"):
        requests.run_engine(**asked | {"sizes": sizes})


def test_sizes_beyond_the_catalogue_are_left_out(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are measured, and it is said which are not."""
    with pytest.raises(Reached):
        requests.run_engine(**asked | {"sizes": [1, 64, 8, 256]})
    assert "no requests of 64, 256 candidates: the catalogue has 20 items." in capsys.readouterr().out


def test_a_checkpoint_is_needed(asked: dict[str, Any]) -> None:
    """Speed of an untrained model's exits is nobody's."""
    with pytest.raises(NotFittedError, match="needs --ckpt_path"):
        requests.run_engine(**asked | {"checkpoint": None})
