"""Several processes, interruptions and tracking, through the command line as a user would."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from world import result

OVERLAYS = Path(__file__).parents[1] / "configs" / "overlays"
Config = Callable[..., Path]
pytestmark = pytest.mark.slow


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "project", *map(str, arguments)]


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


@pytest.fixture
def project(environment: dict[str, str]) -> Callable[..., str]:
    """Runs a command in a process of its own; it must succeed."""

    def call(*arguments: object) -> str:
        done = subprocess.run(
            command(*arguments),
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def exits(folder: Path, command: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result(folder, command)["exits"]
    return rows


def plan(folder: Path) -> list[float]:
    """Thresholds and calibration of every criterion, as numbers."""
    words = {"never": 1e9, "everyone": -1e9}
    found: list[float] = []
    for policy in result(folder, "calibrate")["policies"]:
        found += [words.get(t, t) for t in policy["thresholds"].values()]
        found += [v for row in policy["calibration"].values() for v in row.values()]
    return found


def test_two_processes(
    project: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """Two processes train; validate, calibrate and predict of their checkpoint give the same with two as with one."""
    ddp = ("--config", OVERLAYS / "ddp.yaml")
    project("fit", "--config", tiny_config(), *ddp)
    folder = tmp_path / "runs" / "tiny" / "latest"
    given = ("--ckpt_path", folder / "checkpoints" / "last.ckpt")
    trained = exits(folder, "fit")
    project("validate", "--config", tiny_config(), *given)
    alone = exits(folder, "validate")
    alone_scores = pl.read_parquet(folder / "scores" / "valid.parquet")
    project("validate", "--config", tiny_config(), *ddp, *given)
    together = exits(folder, "validate")
    together_scores = pl.read_parquet(folder / "scores" / "valid.parquet")
    assert (
        [r["auc"] for r in together]
        == [r["auc"] for r in alone]
        == [r["auc"] for r in trained]
    )
    assert [r["n"] for r in together] == [r["n"] for r in alone]
    assert together_scores["row_id"].to_list() == alone_scores["row_id"].to_list()
    assert (together_scores["logit_3"] - alone_scores["logit_3"]).abs().max() < 1e-5
    fitted = plan(folder)
    for processes in ((), ddp):
        # without its score table validation is scored anew
        (folder / "scores" / "valid.parquet").unlink()
        project("calibrate", "--config", tiny_config(), *processes, *given)
        assert plan(folder) == pytest.approx(fitted, abs=1e-4)
    asked, scored = tmp_path / "requests.jsonl", list[pl.DataFrame]()
    users = [
        {"request_id": f"r{k}", "user_id": f"u{k}", "candidates": ["i1", "i2", "i3"]}
        for k in range(9)
    ]
    asked.write_text("\n".join(map(json.dumps, users)))
    for processes in ((), ddp):
        project(
            "predict",
            "--config",
            tiny_config(),
            *processes,
            *given,
            "--data.requests",
            asked,
        )
        scored.append(pl.read_parquet(folder / "scores" / "predict.parquet"))
    logits = ["logit_0", "logit_1", "logit_3", "adaptive_logit"]
    assert scored[0].drop(logits).equals(scored[1].drop(logits))
    np.testing.assert_allclose(*(table.select(logits) for table in scored), atol=1e-5)


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        folder / "checkpoints" / "last.ckpt", weights_only=True
    )
    return content


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimizer's state and its groups of two checkpoints are the same, under the same names and numbers."""
    assert one["global_step"] == other["global_step"]
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weights in one["state_dict"].items():
        torch.testing.assert_close(
            other["state_dict"][name], weights, atol=1e-5, rtol=0, equal_nan=True
        )
    ((mine, yours),) = zip(one["optimizer_states"], other["optimizer_states"], strict=True)
    assert yours["param_groups"] == mine["param_groups"]
    assert yours["state"].keys() == mine["state"].keys()
    for number, state in mine["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(
                yours["state"][number][key], value, atol=1e-5, rtol=1e-4
            )


two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="two GPUs are not here: sharded training is untested on them",
)


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=two_gpus)])
@pytest.mark.parametrize(
    "model", [{"freeze_embeddings": True}, {"lora": {"rank": 2}}], ids=" ".join
)
def test_sharded_training(
    project: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    model: dict[str, Any],
    accelerator: str,
) -> None:
    """A model cut over two processes ends as two whole copies do; one process scores it as the two did.

    Weights, the optimizer's state and its numbering are those of data-parallel training, so going on from the
    checkpoint does not depend on who wrote it.
    """
    changes = {f"model.{key}": value for key, value in model.items()}
    config = tiny_config(**changes, **{"trainer.gradient_clip_val": 0.5})
    runs = tmp_path / "runs" / "tiny"
    device = ("--trainer.accelerator", accelerator)
    backend = (
        ()
        if accelerator == "cpu"
        else ("--trainer.strategy.init_args.process_group_backend", "nccl")
    )
    project("fit", "--config", config, "--config", OVERLAYS / "ddp.yaml", *device, *backend)
    project("fit", "--config", config, "--config", OVERLAYS / "fsdp.yaml", *device)
    copies, sharded = (checkpoint(runs / f"version_{k}") for k in (0, 1))
    assert_same_training(copies, sharded)
    project(
        "validate",
        "--config",
        config,
        "--ckpt_path",
        runs / "version_1" / "checkpoints" / "last.ckpt",
    )
    assert exits(runs / "version_1", "validate") == exits(runs / "version_1", "fit")


def test_sharded_training_goes_on(
    project: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    """The second of two epochs, cut over two processes, from a checkpoint of two whole copies, ends as theirs does."""
    config = tiny_config(**{"trainer.max_epochs": 2, "checkpoint": {"save_top_k": -1}})
    runs = tmp_path / "runs" / "tiny"
    project("fit", "--config", config, "--config", OVERLAYS / "ddp.yaml")
    (first,) = (runs / "version_0" / "checkpoints").glob("epoch_0-*.ckpt")
    project(
        "fit", "--config", config, "--config", OVERLAYS / "fsdp.yaml", "--ckpt_path", first
    )
    assert_same_training(*(checkpoint(runs / f"version_{k}") for k in (0, 1)))


def test_goes_on_after_sigterm(
    project: Callable[..., str],
    environment: dict[str, str],
    tiny_config: Config,
    tmp_path: Path,
) -> None:
    """A fit stopped by SIGTERM in the middle of an epoch goes on with the next batch and ends at the same weights."""
    small = {"data.batch_tokens": 160, "data.context_tokens": 100, "trainer.max_epochs": 2}
    config = tiny_config(**small)
    project("fit", "--config", config)
    whole = tmp_path / "runs" / "tiny" / "version_0"
    expected = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)

    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_FIT, *command("fit", "--config", config)[3:]],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    stopped = tmp_path / "runs" / "tiny" / "version_1"
    wait_for(lambda: (tmp_path / "step_5").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    checkpoints = list((stopped / "checkpoints").glob("*.ckpt"))
    assert checkpoints, said
    state = torch.load(checkpoints[0], weights_only=True)
    assert 5 <= state["global_step"] < expected["global_step"]
    assert (
        state["global_step"]
        == state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"]
    )

    project("fit", "--config", config, "--ckpt_path", checkpoints[0])
    resumed = torch.load(
        tmp_path / "runs" / "tiny" / "version_2" / "checkpoints" / "last.ckpt",
        weights_only=True,
    )
    assert resumed["global_step"] == expected["global_step"]
    for name, weights in expected["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], weights, atol=1e-6, rtol=0)


# a fit that leaves a mark at its fifth step and is slow enough to be met in the middle of
# its first epoch
SLOW_FIT = """
import sys, time
from pathlib import Path
import yaml
from project.model.module import ExitRecommender

step = ExitRecommender.training_step

def slow(self, batch, batch_idx):
    if self.global_step == 5:
        config = Path(sys.argv[sys.argv.index("--config") + 1])
        (config.parent / "step_5").touch()
    if self.global_step >= 5:
        time.sleep(0.5)
    return step(self, batch, batch_idx)

ExitRecommender.training_step = slow
sys.argv[0] = "project"
from project.__main__ import main
main()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def records(file: Path) -> Iterator[Any]:
    """What a .wandb file holds: a LevelDB log (7 bytes of header, blocks of 32 KiB) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline(
    project: Callable[..., str], tiny_config: Config, tmp_path: Path
) -> None:
    overlay = yaml.safe_load((OVERLAYS / "wandb.yaml").read_text())
    overlay["trainer"]["logger+"][0]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    project("fit", "--config", tiny_config(), "--config", tmp_path / "overlay.yaml")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    settings, keys, artifacts = dict[str, Any](), set(), dict[str, Any]()
    aliases = defaultdict[str, set[str]](set)
    for record in records(next(folder.glob("*.wandb"))):
        settings |= {u.key: json.loads(u.value_json) for u in record.config.update}
        keys |= {
            i.key or "/".join(i.nested_key)
            for i in [*record.history.item, *record.summary.update]
        }
        if record.WhichOneof("record_type") == "artifact":
            artifacts[record.artifact.type] = record.artifact
            aliases[record.artifact.type] |= {*record.artifact.aliases}
    assert {"model", "data", "trainer", "checkpoint"} <= settings.keys()
    assert settings["data"]["context_tokens"] == 128
    logged = {
        "train/loss",
        "select/auc/exit_1",
        "select/auc/exit_3",
        "select/exit/mean_depth",
    }
    assert (
        logged | {"fit/minus_best_baseline", "fit/chosen_exit", "certificate/passed"}
        <= keys
    )
    (table,) = folder.glob("files/media/table/fit/tune/*.table.json")
    rows = {row[0] for row in json.loads(table.read_text())["data"]}
    assert {"exit 1", "exit 3", "lr_rates", "gbdt_features"} <= rows
    assert list(folder.glob("files/media/images/report/pareto_*.png"))
    assert aliases["model"] == {"best", "latest"}
    held = {
        kind: {e.path: Path(e.local_path) for e in a.manifest.contents}
        for kind, a in artifacts.items()
    }
    state = torch.load(held["model"]["model.ckpt"], weights_only=True)
    assert (
        state["global_step"]
        == checkpoint(tmp_path / "runs" / "tiny" / "latest")["global_step"]
    )
    assert {"report/report.html", "report/report.md", "results/fit.json"} <= held[
        "report"
    ].keys()
