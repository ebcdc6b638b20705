"""Weights & Biases without an account: where a key is looked for, and which checkpoints get which alias."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from project.tracking import Tracking, aliased, key_is_known


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No key anywhere; returns where the netrc file would be."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_API_KEY is a key; an empty one is none."""
    assert not key_is_known()
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert not key_is_known()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert key_is_known()


def test_key_in_netrc(no_account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in netrc is one of its host alone; a file that is no netrc has none."""
    no_account.write_text("machine api.wandb.ai login user password 0000\n")
    assert key_is_known()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not key_is_known()
    no_account.write_text("machine wandb.example.org login user password 0000\n")
    assert key_is_known()
    no_account.write_text("not a netrc file")
    assert not key_is_known()


@pytest.mark.parametrize(
    ("key", "mode", "given", "offline"),
    [
        (False, None, None, True),  # nobody said anything
        (True, None, None, False),
        (False, "online", None, False),  # WANDB_MODE was said: W&B itself asks for the key
        (True, None, True, True),  # what YAML says comes first
        (False, None, False, False),
    ],
)
def test_offline_by_default_without_a_key(
    key: bool,
    mode: str | None,
    given: bool | None,
    offline: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Offline if YAML says so, or if it says nothing, WANDB_MODE says nothing and there is no key."""
    if key:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    assert Tracking("p", save_dir=str(tmp_path), offline=given)._offline == offline


@pytest.mark.parametrize(
    ("best", "last", "expected"),
    [
        (3, 7, [("best.ckpt", ["best"]), ("last.ckpt", ["latest"])]),
        (7, 7, [("last.ckpt", ["best", "latest"])]),
        (7, None, [("best.ckpt", ["best", "latest"])]),  # save_last is off
        (None, 7, [("last.ckpt", ["best", "latest"])]),  # nothing is monitored
        (None, None, []),
    ],
)
def test_aliases(best: int | None, last: int | None, expected: list[Any], tmp_path: Path) -> None:
    """The newest checkpoint is `latest`, the monitored one `best`; of the same step they are one."""
    saver = ModelCheckpoint(dirpath=tmp_path)
    for name, step in (("best", best), ("last", last)):
        if step is not None:
            torch.save({"global_step": step}, tmp_path / f"{name}.ckpt")
            setattr(saver, f"{name}_model_path", str(tmp_path / f"{name}.ckpt"))
    trainer = cast(pl.Trainer, SimpleNamespace(checkpoint_callback=saver))
    assert [(path.name, aliases) for path, aliases in aliased(trainer)] == expected


def test_no_aliases_without_checkpoints() -> None:
    """A trainer that saves nothing has nothing to log."""
    assert aliased(cast(pl.Trainer, SimpleNamespace(checkpoint_callback=None))) == []
