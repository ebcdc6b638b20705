"""Sweeps and job scripts say what the command line understands.

Unusual here: W&B's agent needs its server, so the command is put together as its documentation describes:
`${args}` is `--key=value` for every parameter.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
SCRIPT = ROOT / "configs" / "slurm" / "fit.sbatch"
Run = Callable[..., None]
Config = Callable[..., Path]


def points(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a sweep's values."""
    axes = {key: axis["values"] for key, axis in sweep["parameters"].items()}
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def command(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
    """What an agent starts for a point, after `python -m project`."""
    args = [f"--{key}={value}" for key, value in point.items()]
    words = [word for part in sweep["command"] for word in (args if part == "${args}" else [part])]
    assert words[:4] == ["${env}", "${interpreter}", "-m", "project"]
    return words[4:]


def printed(run: Run, capsys: pytest.CaptureFixture[str], words: list[Any]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        run(*words, "--print_config")
    assert stopped.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_values_arrive(
    path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of every parameter is accepted by `fit` and stands in its configuration, as what it means."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(path.read_text())
    every = points(sweep)
    longest = max(len(axis["values"]) for axis in sweep["parameters"].values())
    axes = {key: axis["values"] for key, axis in sweep["parameters"].items()}
    few = [{key: values[i % len(values)] for key, values in axes.items()} for i in range(longest)]
    assert all(point in every for point in few)
    for point in few:
        config = printed(run, capsys, command(sweep, point))
        for key, value in point.items():
            assert at(config, key) == (yaml.safe_load(value) if isinstance(value, str) else value)
        assert max(config["model"]["exit_layers"]) == 6
        assert config["trainer"]["logger"][-1]["class_path"] == "project.tracking.Tracking"


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_metric_is_logged(path: Path, run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """A fit at the parameters of a sweep (but the tiny model's layers) logs the metric that the sweep maximises."""
    sweep = yaml.safe_load(path.read_text())
    point = points(sweep)[-1]
    del point["model.exit_layers"]
    run("fit", "--config", tiny_config(), *(f"--{key}={value}" for key, value in point.items()))
    header = (tmp_path / "runs" / "tiny" / "latest" / "metrics.csv").read_text().splitlines()[0]
    assert sweep["metric"]["name"] in header.split(",")


@pytest.mark.slow
def test_accumulation_steps_less(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """With four batches a step, ceil(batches / 4) steps are made, and the schedule ends with the last of them."""
    small = {"data.batch_tokens": 160, "data.context_tokens": 100}
    steps = []
    for option in ([], ["--trainer.accumulate_grad_batches", 4]):
        run("fit", "--config", tiny_config(**small), *option)
        folder = tmp_path / "runs" / "tiny" / "latest"
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        steps.append(content["global_step"])
        (schedule,) = content["lr_schedulers"]
        assert schedule["last_epoch"] == steps[-1]
    assert steps[0] > 4
    assert steps[1] == -(-steps[0] // 4)


def test_job_script(run: Run, capsys: pytest.CaptureFixture[str], tiny_config: Config) -> None:
    """The shell parses it; its command parses; tasks are the trainer's devices, nodes its nodes; untested is said."""
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    text = SCRIPT.read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    line = text[text.index("srun") :].replace("\\\n", " ").replace("$config", str(tiny_config()))
    words = shlex.split(line)
    assert words[:4] == ["srun", ".venv/bin/python", "-m", "project"]
    trainer = printed(run, capsys, words[4:])["trainer"]
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == int(trainer["devices"])
    assert int(asked["nodes"]) == trainer["num_nodes"]
    assert "UNTESTED" in text
