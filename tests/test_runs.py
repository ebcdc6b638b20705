"""A run's folder: who makes it, what `latest` names, checkpoints that are whole or absent, requests in parts."""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

import project.engine.predict as engine_command
from project.callbacks import RunLogger, WholeCheckpoints
from project.data.requests import Refused, Request, Requests
from project.engine.predict import parts_of, run_early_exit
from project.errors import CheckpointError, ConfigError
from project.run import read_checkpoint
from project.trainer import ProjectTrainer

Run = Callable[..., None]
Config = Callable[..., Path]


def test_two_fits_at_once_have_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find number 0 free; the second to make it takes the next."""
    monkeypatch.setattr(CSVLogger, "_get_next_version", lambda self: 0)
    found = [RunLogger(tmp_path, "a").version for _ in range(3)]
    assert found == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["version_0", "version_1", "version_2"]


def test_a_failed_command_leaves_no_empty_folder(tmp_path: Path) -> None:
    """A folder with a configuration alone goes, one with numbers stays, one that was there before stays."""
    empty, used, old = (RunLogger(tmp_path, "a") for _ in range(3))
    _ = empty.experiment
    (Path(empty.log_dir) / "config.yaml").touch()
    used.log_metrics({"loss": 1.0}, 0)
    old._version = "old"
    (tmp_path / "a" / "old").mkdir()
    for logger in (empty, used, old):
        logger.finalize("failed")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["old", "version_1"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that ends in the middle changes nothing under the checkpoint's name, and leaves nothing beside it."""
    file, saver = tmp_path / "last.ckpt", WholeCheckpoints()
    saver.save_checkpoint({"step": 1}, file)

    def half(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"PK half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        saver.save_checkpoint({"step": 2}, file)
    assert saver.load_checkpoint(file) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


class Mischief:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_checkpoint_is_never_unpickled(tmp_path: Path) -> None:
    """More than weights is one line and does not run, also where weights_only is false."""
    file, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    torch.save({"callbacks": Mischief(trace)}, file)
    for read in (read_checkpoint, functools.partial(WholeCheckpoints().load_checkpoint, weights_only=False)):
        with pytest.raises(CheckpointError, match=r"a\.ckpt holds a Python object \(\S*open\)") as error:
            read(file)
        assert "\n" not in str(error.value)
    assert not trace.exists()


def test_half_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    """Whatever torch says about a file that was cut."""
    file = tmp_path / "a.ckpt"
    torch.save({"weights": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="is not a whole checkpoint") as error:
        read_checkpoint(file)
    assert "\n" not in str(error.value)


def test_parts_of_requests() -> None:
    """Parts put together are the whole, refused requests at their places; a part ends where it has enough."""
    sizes = [2, 1, 0, 3, 1, 1]  # the third and the last are refused
    everything = [Request(f"r{k}", "u", (), None, ("i",) * n) for k, n in enumerate(sizes)]
    refused = tuple(Refused(k, f"r{k}", ("i",) * sizes[k], "no") for k in (2, 5))
    asked = Requests([r for k, r in enumerate(everything) if k not in (2, 5)], pl.DataFrame(), {}, refused)
    parts = list(parts_of(asked, 3))
    assert [r for part in parts for r in part.requests] == asked.requests
    assert [[r.request_id for r in part.requests] for part in parts] == [["r0", "r1"], ["r3"], ["r4"]]
    assert [[(r.place, r.request_id) for r in part.refused] for part in parts] == [
        [],
        [(0, "r2")],
        [(1, "r5")],
    ]


def test_early_exit_is_one_process() -> None:
    """Two are refused in one line, before anything is loaded."""
    trainer, none = cast(Any, SimpleNamespace(world_size=2)), cast(Any, None)
    with pytest.raises(ConfigError, match=r"one process, found 2; expected trainer\.devices 1"):
        run_early_exit(trainer, none, none, "last.ckpt")


@pytest.fixture
def made(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """The trainer that a command's command line makes; the command itself is not run."""

    def make(command: str, *arguments: object) -> Trainer:
        found = list[Trainer]()

        @functools.wraps(getattr(ProjectTrainer, command))
        def instead(self: Trainer, *args: Any, **others: Any) -> None:
            found.append(self)

        monkeypatch.setattr(ProjectTrainer, command, instead)
        run(command, *arguments)
        return found[0]

    return make


@pytest.mark.parametrize(
    ("logger", "kinds"),
    [
        (None, ["RunLogger"]),
        (
            {"class_path": "project.tracking.Tracking", "init_args": {"project": "p"}},
            ["RunLogger", "Tracking"],
        ),
        (False, []),
    ],
)
def test_own_yaml_needs_no_trainer(
    made: Callable[..., Trainer], tiny_config: Config, tmp_path: Path, logger: Any, kinds: list[str]
) -> None:
    """Runs go to runs/NAME of the first file, also beside W&B alone; one epoch, clipped, logged every five steps."""
    config = tiny_config(trainer={"accelerator": "cpu"} | ({} if logger is None else {"logger": logger}))
    own = config.rename(tmp_path / "own.yaml")
    trainer = made("fit", "--config", own)
    assert [type(x).__name__ for x in trainer.loggers] == kinds
    if kinds:
        first = cast(RunLogger, trainer.loggers[0])
        assert first.root_dir == "runs/own"
    settings = trainer.max_epochs, trainer.gradient_clip_val, trainer.num_sanity_val_steps
    assert settings == (1, 1.0, 0)
    assert trainer.log_every_n_steps == 5  # type: ignore[attr-defined]
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints)


def test_an_overlay_adds_a_logger_to_none(
    made: Callable[..., Trainer], tiny_config: Config, tmp_path: Path
) -> None:
    """`logger+` of the shipped overlay over a YAML without loggers."""
    overlay = Path(__file__).parents[1] / "configs" / "overlays" / "wandb.yaml"
    trainer = made("fit", "--config", tiny_config(trainer={"accelerator": "cpu"}), "--config", overlay)
    assert [type(x).__name__ for x in trainer.loggers] == ["RunLogger", "Tracking"]


def test_a_single_logger_is_a_list_of_one(
    made: Callable[..., Trainer], tiny_config: Config, tmp_path: Path
) -> None:
    """A command that reads a checkpoint makes no run of its own, however the YAML says its logger."""
    csv = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "own")},
    }
    checkpoint = tmp_path / "version_3" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({}, checkpoint)
    (tmp_path / "latest").symlink_to("version_3")
    given = "--ckpt_path", tmp_path / "latest" / "checkpoints" / "last.ckpt"
    trainer = made("test", "--config", tiny_config(**{"trainer.logger": csv}), *given)
    assert trainer.loggers == []
    assert not (tmp_path / "own").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:request 'none' is not scored")
def test_latest_is_a_run_with_something(
    run: Run, fails: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """`fit` goes on from `latest`, which names the new run then; a refused fit leaves no folder and takes no name."""
    runs = tmp_path / "runs" / "tiny"
    last = runs / "latest" / "checkpoints" / "last.ckpt"
    few = {"trainer.limit_train_batches": 2}
    run("fit", "--config", tiny_config(**few))
    assert (runs / "latest").resolve().name == "version_0"
    run("fit", "--config", tiny_config(**few, **{"trainer.max_epochs": 2}), "--ckpt_path", last)
    assert (runs / "latest").resolve().name == "version_1"
    assert read_checkpoint(last)["global_step"] == 4
    beyond = {"data.context_tokens": 8192, "data.batch_tokens": 8192}  # the backbone knows 4096 positions
    assert "at most 4096" in fails("fit", "--config", tiny_config(**beyond))
    assert (runs / "latest").resolve().name == "version_1"
    assert sorted(path.name for path in runs.iterdir()) == ["latest", "version_0", "version_1"]

    asked = [{"request_id": f"r{k}", "user_id": f"u{k}", "candidates": ["i1", "i2", "i3"]} for k in range(5)]
    asked.insert(2, {"request_id": "none", "user_id": "u1", "candidates": []})
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    tables = []
    for part in (50_000, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_command, "PART", part)
            given = "--ckpt_path", last, "--data.requests", tmp_path / "asked.jsonl", "--engine", "early_exit"
            run("predict", "--config", tiny_config(), *given)
        (file,) = (last.resolve().parents[1] / "scores").glob("predict*")
        tables.append(pl.read_parquet(file))
    numbers = ["adaptive_logit", "probability"]
    assert tables[0].drop(numbers, "error").equals(tables[1].drop(numbers, "error"))
    # batches of other sizes: the same but for rounding
    np.testing.assert_allclose(*(t.select(numbers).to_numpy() for t in tables), atol=1e-5)
    assert tables[0]["request_id"].unique(maintain_order=True).to_list() == [a["request_id"] for a in asked]
