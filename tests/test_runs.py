"""What a run leaves: its folder, whole files or none, checkpoints, score tables and results."""

from __future__ import annotations

import errno
import functools
import json
import math
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
from project.engine.actors import run_actors
from project.engine.predict import run_early_exit
from project.errors import CheckpointError, ConfigError, DataError
from project.run import (
    SCHEMA_VERSION,
    SCORE_COLUMNS,
    exit_layers_of,
    read_checkpoint,
    read_result,
    replace_file,
    run_of_checkpoint,
    score_table,
    write_json,
    write_table,
)
from project.run_folder import RunLogger, WholeCheckpoints
from project.trainer import ProjectTrainer

WANDB = Path(__file__).parents[1] / "configs" / "overlays" / "wandb.yaml"
Run = Callable[..., None]
Config = Callable[..., Path]


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


def test_two_fits_at_once_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find number 0 free; the second to make it takes the next."""
    monkeypatch.setattr(CSVLogger, "_get_next_version", lambda self: 0)
    found = [RunLogger(tmp_path, "a").version for _ in range(3)]
    assert found == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "version_0",
        "version_1",
        "version_2",
    ]


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


def test_a_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """More than weights is refused and does not run, also where weights_only is false; so is half a file."""
    file, trace = tmp_path / "a.ckpt", tmp_path / "trace"
    torch.save({"callbacks": Mischief(trace)}, file)
    for read in (
        read_checkpoint,
        functools.partial(WholeCheckpoints().load_checkpoint, weights_only=False),
    ):
        with pytest.raises(
            CheckpointError, match=r"a\.ckpt holds a Python object \(\S*open\)"
        ):
            read(file)
    assert not trace.exists()
    torch.save({"weights": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        read_checkpoint(file)


def test_early_exit_is_one_process_or_ray() -> None:
    trainer, none = cast(Any, SimpleNamespace(world_size=2)), cast(Any, None)
    with pytest.raises(
        ConfigError, match=r"one process, found 2; expected trainer\.devices 1"
    ):
        run_early_exit(trainer, none, none, "last.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("project.engine.actors.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"needs Ray Data.*'\.\[ray\]'"):
            run_actors(trainer, none, none, "last.ckpt")


@pytest.mark.parametrize("extra", ["nothing", "W&B", "overlay", "no logger"])
def test_own_yaml_needs_no_trainer(
    made: Callable[..., Trainer], tiny_config: Config, tmp_path: Path, extra: str
) -> None:
    """Runs go to runs/NAME of the first file, also beside W&B alone; one epoch, clipped, logged every five steps."""
    tracking = {"class_path": "WandbLogger", "init_args": {"project": "p"}}
    said = {"W&B": {"logger": tracking}, "no logger": {"logger": False}}.get(extra, {})
    config = tiny_config(trainer={"accelerator": "cpu"} | said).rename(
        tmp_path / "own.yaml"
    )
    trainer = made(
        "fit", "--config", config, *(("--config", WANDB) if extra == "overlay" else ())
    )
    kinds = {"nothing": ["RunLogger"], "no logger": []}.get(
        extra, ["RunLogger", "WandbLogger"]
    )
    assert [type(x).__name__ for x in trainer.loggers] == kinds
    assert all(
        cast(RunLogger, logger).root_dir == "runs/own" for logger in trainer.loggers[:1]
    )
    assert (
        trainer.max_epochs,
        trainer.gradient_clip_val,
        trainer.num_sanity_val_steps,
    ) == (1, 1.0, 0)
    assert trainer.log_every_n_steps == 5  # type: ignore[attr-defined]
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpoints)


def test_a_command_that_reads_a_checkpoint_makes_no_run(
    made: Callable[..., Trainer], tiny_config: Config, tiny_model: Path, tmp_path: Path
) -> None:
    """However the YAML says its logger."""
    csv = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path / "own")},
    }
    checkpoint = tmp_path / "version_3" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save(
        {"hyper_parameters": {"exit_layers": [1, 3], "backbone": str(tiny_model)}},
        checkpoint,
    )
    trainer = made(
        "test",
        "--config",
        tiny_config(**{"trainer.logger": csv}),
        "--ckpt_path",
        checkpoint,
    )
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
    run(
        "fit",
        "--config",
        tiny_config(**few, **{"trainer.max_epochs": 2}),
        "--ckpt_path",
        last,
    )
    assert (runs / "latest").resolve().name == "version_1"
    assert read_checkpoint(last)["global_step"] == 4
    # the backbone knows 4096 positions
    beyond = {"data.context_tokens": 8192, "data.batch_tokens": 8192}
    assert "at most 4096" in fails("fit", "--config", tiny_config(**beyond))
    assert (runs / "latest").resolve().name == "version_1"
    assert sorted(path.name for path in runs.iterdir()) == [
        "latest",
        "version_0",
        "version_1",
    ]

    requests = [
        {"request_id": f"r{k}", "user_id": f"u{k}", "candidates": ["i1", "i2", "i3"]}
        for k in range(5)
    ]
    requests.insert(2, {"request_id": "none", "user_id": "u1", "candidates": []})
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    tables = []
    for part in (50_000, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_command, "PART", part)
            given = (
                "--ckpt_path",
                last,
                "--data.requests",
                tmp_path / "requests.jsonl",
                "--engine",
                "early_exit",
            )
            run("predict", "--config", tiny_config(), *given)
        (file,) = (last.resolve().parents[1] / "scores").glob("predict*")
        tables.append(pl.read_parquet(file))
    numbers = ["adaptive_logit", "probability"]
    assert tables[0].drop(numbers, "error").equals(tables[1].drop(numbers, "error"))
    # batches of other sizes: the same but for rounding
    np.testing.assert_allclose(*(t.select(numbers).to_numpy() for t in tables), atol=1e-5)
    assert tables[0]["request_id"].unique(maintain_order=True).to_list() == [
        a["request_id"] for a in requests
    ]


def test_score_table_schema(tmp_path: Path) -> None:
    """The contract's columns in order and type, through Parquet; a logit an exit; the rest is null."""
    columns = {
        "row_id": [3, 8],
        "split": ["valid", "test"],
        "fold": ["tune", None],
        "label": [1, 0],
    }
    made = score_table(columns, np.array([[0.5, 1.0], [-0.25, 2.0]]), [2, 12])
    scores = pl.read_parquet(write_table(tmp_path / "scores" / "valid.parquet", made))
    heads = dict.fromkeys(("logit_2", "logit_12"), pl.Float32)
    assert list(scores.schema.items()) == list({**SCORE_COLUMNS, **heads}.items())
    assert (scores["logit_12"].to_list(), scores["fold"].to_list()) == (
        [1.0, 2.0],
        ["tune", None],
    )
    assert all(
        scores[name].is_null().all() for name in ("request_id", "logit_0", "target_tokens")
    )
    assert exit_layers_of(scores) == [2, 12]  # exit 0 is not a layer's
    with pytest.raises(pl.exceptions.InvalidOperationError):
        score_table({"split": ["validation"]}, np.zeros((1, 1)), [1])


class Stopped(BaseException):
    """Stands for Ctrl-C or SIGTERM."""


@pytest.mark.parametrize("error", [OSError, Stopped])
def test_half_a_file_is_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    """A writer that fails half way leaves nothing behind and keeps the old file, which is there all the while."""
    path = tmp_path / "results" / "test.json"

    def half(part: Path) -> None:
        assert part.parent == path.parent  # a rename across file systems would be a copy
        part.write_text("half")
        assert not path.exists() or path.read_text() == "old"
        raise error

    for old in ([], ["test.json"]):
        with pytest.raises(error):
            replace_file(path, half)
        assert [p.name for p in path.parent.iterdir()] == old
        path.write_text("old")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_without_nan(tmp_path: Path, number: float) -> None:
    path = write_json(tmp_path / "a.json", {"auc": None})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"auc": number})
    assert json.loads(path.read_text()) == {"auc": None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("folder", "is a folder"),
        ("{", "is not a result file"),
        ("{}", f"None.*reads {SCHEMA_VERSION}"),
        (
            f'{{"schema_version": {SCHEMA_VERSION + 1}}}',
            f"{SCHEMA_VERSION + 1}.*reads {SCHEMA_VERSION}",
        ),
    ],
)
def test_refuses_what_is_no_result(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "a.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.json.*{words}"):
        read_result(path)


def test_run_of_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder above checkpoints/, also by a relative name or the link `latest`; else the checkpoint's folder."""
    run = tmp_path / "runs" / "version_3"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("version_3", target_is_directory=True)
    assert run_of_checkpoint(str(run / "checkpoints" / "last.ckpt")) == run
    assert (
        run_of_checkpoint(tmp_path / "runs" / "latest" / "checkpoints" / "last.ckpt") == run
    )
    assert run_of_checkpoint(tmp_path / "elsewhere" / "a.ckpt") == tmp_path / "elsewhere"
    monkeypatch.chdir(run)
    assert run_of_checkpoint("checkpoints/last.ckpt") == run
    monkeypatch.chdir(run / "checkpoints")
    assert run_of_checkpoint("last.ckpt") == run
