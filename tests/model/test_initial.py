"""Warm start: what is copied from another run, what starts new, and where a fit may not start from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from world import read_split, result, tiny_settings

from project.data.protocol import Protocol, SplitInteractions
from project.errors import CheckpointError, ConfigError
from project.model.initial import copy_weights, read_initial, read_until
from project.model.module import ExitRecommender
from project.run import read_checkpoint

PROTOCOL = Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2])


@pytest.fixture
def split(tiny_logs: Path) -> SplitInteractions:
    """As the fitted run has it."""
    return read_split(tiny_logs, PROTOCOL)


def later(split: SplitInteractions, by: float) -> SplitInteractions:
    rows = split.rows.with_columns(pl.col("timestamp") + by)
    return replace(split, rows=rows)


def test_rows_that_were_trained_on_are_not_scored(
    fitted: Path, tiny_model: Path, split: SplitInteractions
) -> None:
    """Validation must begin after the last train row; in a log without times, or of a run that does not say, never."""
    until = read_until(split, "train")
    file = fitted / "checkpoints" / "last.ckpt"
    content = read_checkpoint(file)
    assert content["trained_until"] == until

    def start(run: str, split: SplitInteractions, layers: tuple[int, ...] = (1, 3)) -> Any:
        return read_initial(run, [*layers], str(tiny_model), split)

    run = str(fitted)
    begins = split.rows.filter(split="valid")["timestamp"].min()
    gap = begins - until  # type: ignore[operator]  # how much earlier validation may begin
    undated = replace(split, manifest=split.manifest | {"times": []})
    for seen in (later(split, -gap), later(undated, 1e6)):
        with pytest.raises(ConfigError, match="trained on rows that this run scores"):
            start(run, seen)
        start(f"trusted:{run}", seen)
    # validation begins a second after the last train row, and just then
    start(run, later(split, 1 - gap))
    with pytest.raises(CheckpointError, match=r"exit_layers = \[1, 3\]"):
        start(run, split, (1, 2))
    with pytest.raises(ConfigError, match="does not exist"):
        start("absent", split)
    del content["trained_until"]
    torch.save(content, file)
    with pytest.raises(ConfigError, match="row is of inf"):
        start(run, later(split, 1e6))


def test_what_is_copied() -> None:
    """Kinds of numbers in order; what only one of both has starts new or is lost."""
    at = "backbone.embed_tokens."
    saved = {"layer": torch.ones(2), "exit_0": torch.ones(3)}
    saved |= {f"{at}numbers": torch.full((2, 1), 7.0), f"{at}projection": torch.ones(1)}
    state = {name: torch.zeros_like(value) for name, value in saved.items()}
    del state[f"{at}projection"]
    state |= {f"{at}numbers": torch.zeros(3, 1), f"{at}weight": torch.zeros(1)}
    content = {"state_dict": saved}
    copy_weights(content, state, set())
    assert state[f"{at}numbers"][:, 0].tolist() == [7.0, 7.0, 0.0]
    found = {name: state[name].sum().item() for name in ("layer", "exit_0", f"{at}weight")}
    assert found == {"layer": 2, "exit_0": 0, f"{at}weight": 0}
    # frozen here, trained there
    with pytest.raises(CheckpointError, match=r"trained other weights.*layer"):
        copy_weights(content, state, {"layer"})


def test_until_when_a_chain_has_seen_rows(
    fitted: Path, tiny_model: Path, split: SplitInteractions, monkeypatch: Any
) -> None:
    """A run has seen what its initial run has; one that training goes on from says so itself."""
    monkeypatch.setattr("project.model.module.copy_weights", lambda *_: None)
    model = ExitRecommender(str(tiny_model), [1, 3], initial=f"trusted:{fitted}")
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"), ckpt_path=None)
    trainer.datamodule = SimpleNamespace(split=later(split, -100))
    monkeypatch.setattr(ExitRecommender, "trainer", trainer)
    model.start()
    assert model.trained_until == read_until(split, "train")
    trainer.ckpt_path = "last.ckpt"
    model.start()
    assert model.trained_until == read_until(split, "train") - 100


@pytest.mark.slow
def test_a_warm_start_begins_where_the_run_ended(
    fitted: Path,
    run: Callable[..., None],
    tiny_logs: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Without learning every logit is that of the initial run; where there is none nothing is made."""
    config = tmp_path / "warm.yaml"
    config.write_text(
        yaml.safe_dump(tiny_settings(tiny_logs, tiny_model, tmp_path / "warm"))
    )
    still = ("--model.optim.learning_rate", 0)
    run("fit", "--config", config, "--model.initial", f"trusted:{fitted}", *still)
    (folder,) = (tmp_path / "warm" / "tiny").glob("version_*")
    cold = pl.read_parquet(fitted / "scores" / "valid.parquet")
    warm = pl.read_parquet(folder / "scores" / "valid.parquet")
    for layer in (1, 3):
        gap = (warm[f"logit_{layer}"] - cold[f"logit_{layer}"]).abs().max()
        assert gap < 1e-6  # type: ignore[operator]
    assert result(folder, "fit")["exits"]
    with pytest.raises(SystemExit):
        run("fit", "--config", config, "--model.initial", tmp_path / "absent")
    assert len([*(tmp_path / "warm" / "tiny").glob("version_*")]) == 1
