"""Shipped YAML and saved YAML: every file parses and makes its objects, and config.yaml of a run can be given back."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from world import given as of_run
from world import result

from project.callbacks import ResultFiles
from project.model.module import ExitRecommender
from project.model.sharding import FullyShardedStrategy
from project.retrieval import NoRetriever
from project.trainer import ProjectTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "overlays").glob("*.yaml"))
Run = Callable[..., None]
Config = Callable[..., Path]


def by_name(path: Path | None) -> str:
    return path.stem if path else "alone"


def given(*paths: Path | None) -> list[object]:
    return [word for path in paths if path for word in ("--config", path)]


@pytest.fixture
def made(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Trainer, Any, Any]]:
    """Makes the objects of a configuration as `fit` would, and returns trainer, model and data instead of training."""

    def make(*arguments: object) -> tuple[Trainer, Any, Any]:
        found = []

        @functools.wraps(ProjectTrainer.fit)
        def fit(self: Trainer, model: Any, **others: Any) -> None:
            found.append((self, model, others["datamodule"]))

        # what `fit` checks first reads the log, which a preset may have to fetch
        monkeypatch.setattr(ExitRecommender, "check", lambda *_, **__: None)
        monkeypatch.setattr(ProjectTrainer, "fit", fit)
        run("fit", *arguments)
        return found[0]

    return make


def printed(
    run: Run, capsys: pytest.CaptureFixture[str], command: str, *arguments: object
) -> dict[str, Any]:
    """What --print_config says."""
    with pytest.raises(SystemExit) as stopped:
        run(command, *arguments, "--print_config")
    assert stopped.value.code == 0
    config: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return config


def leaves(config: Any, at: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything a YAML file says."""
    if not isinstance(config, dict):
        return {at: config}
    return {
        k: v
        for key, value in config.items()
        for k, v in leaves(value, f"{at}.{key}").items()
    }


SHARED = {
    "model.optim.learning_rate": 3e-4,
    "model.exit_layers": [2, 4, 6],
    "data.retriever.class_path": "project.retrieval.LightGCN",
    "data.protocol.shares": [0.8, 0.1, 0.1],
    "data.refits": 10,
    "data.mf.dim": 8,
    "exits.max_auc_drop": 0.002,
    "exits.certificate.epsilon": 0.02,
}
"""What every preset has and none says: the defaults that results are of."""


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_shipped_recipes(
    recipe: Path,
    made: Callable[..., tuple[Any, ...]],
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A preset says what is its own, and has the defaults; only the paper's prompts compare no items."""
    config = leaves(printed(run, capsys, "fit", *given(recipe)))
    assert {key: config[f".{key}"] for key in SHARED} == SHARED
    neighbours = 0 if recipe.stem.startswith("paper") else 30
    assert config[".data.retriever.init_args.item_neighbours"] == neighbours
    said = leaves(yaml.safe_load(recipe.read_text()))
    assert {key for key in said if config.get(key) == SHARED.get(key[1:], "")} <= {
        ".data.retriever.class_path"
    }
    trainer, model, data = made(*given(recipe))
    assert isinstance(model, ExitRecommender)
    data.protocol.check()
    assert {ModelCheckpoint, ResultFiles} <= {type(c) for c in trainer.callbacks}
    assert trainer.checkpoint_callback.monitor == "select/auc/deepest"
    assert isinstance(trainer.loggers[0], CSVLogger)  # decides where a run's files go


@pytest.mark.parametrize("overlay", OVERLAYS, ids=by_name)
def test_overlays_change_what_they_say(
    overlay: Path, run: Run, capsys: pytest.CaptureFixture[str], tiny_config: Config
) -> None:
    """Over any base an overlay's values arrive; lists of loggers are merged by `test_overlays_make_...`."""
    both = leaves(printed(run, capsys, "fit", *given(tiny_config(), overlay)))
    for key, value in leaves(yaml.safe_load(overlay.read_text())).items():
        if key == ".data.retriever":
            assert both[".data.retriever.class_path"] == value
        elif ".logger" not in key:
            assert both[key] == value


@pytest.mark.slow
def test_overlays_make_what_they_promise(
    made: Callable[..., Any], tiny_config: Config
) -> None:
    """Adapters; no neighbours; a W&B logger after the CSV one; two processes, in two ways."""

    def over(name: str) -> tuple[Any, Any, Any]:
        found: tuple[Any, Any, Any] = made(
            *given(tiny_config(), CONFIGS / "overlays" / f"{name}.yaml")
        )
        return found

    assert over("lora")[1].lora.rank == 16
    assert isinstance(over("no_retrieval")[2].retriever, NoRetriever)
    csv, wandb = over("wandb")[0].loggers
    assert isinstance(csv, CSVLogger)
    assert isinstance(wandb, WandbLogger)
    for name, strategy in (("ddp", DDPStrategy), ("fsdp", FullyShardedStrategy)):
        trainer = over(name)[0]
        assert trainer.world_size == 2
        assert type(trainer.strategy) is strategy


def test_values_are_said_once(
    made: Callable[..., Any], tiny_config: Config, tiny_model: Path
) -> None:
    """The backbone is also the tokenizer, the prompt's answers are also the heads', the seed is also the data's."""
    changes = {"data.prompt": {"answers": [" sea", " dog"]}, "seed_everything": 7}
    _, model, data = made(*given(tiny_config(**changes)))
    assert model.answers == [" sea", " dog"]
    assert data.tokenizer_name == str(tiny_model)
    assert data.seed == 7


@pytest.mark.slow
def test_saved_config_can_be_given_back(
    run: Run, tiny_config: Config, tmp_path: Path
) -> None:
    """Saved config.yaml keeps nulls and all that overlays and the command line said.

    It alone gives fit, validate and test the same protocol hash, and saves as itself again.
    """
    overlay = tmp_path / "lora.yaml"
    overlay.write_text((CONFIGS / "overlays" / "lora.yaml").read_text())
    said = {
        "data.prompt": {
            "instruction": 'One: "two"\n',
            "segment": "{title} all {item_percent}:",
        }
    }
    run("fit", *given(tiny_config(**said), overlay), "--trainer.limit_train_batches", 2)
    overlay.unlink()
    first, second = (tmp_path / "runs" / "tiny" / f"version_{k}" for k in (0, 1))
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["data"]["mf"] is None
    assert saved["data"]["prompt"]["instruction"] == 'One: "two"\n'
    assert (saved["model"]["lora"]["rank"], saved["trainer"]["limit_train_batches"]) == (
        16,
        2,
    )

    expected = result(first, "fit")
    for command in ("validate", "test"):
        run(command, *of_run(first))
        assert result(first, command)["protocol"] == expected["protocol"]
    assert result(first, "validate")["exits"] == expected["exits"]
    assert not second.exists()  # commands that were given a checkpoint write into its run

    run("fit", *given(first / "config.yaml"))
    assert result(second, "fit")["protocol"] == expected["protocol"]
    assert result(second, "fit")["exits"] == expected["exits"]  # the same run once more
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()


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


def test_job_script(
    run: Run, capsys: pytest.CaptureFixture[str], tiny_config: Config
) -> None:
    script = CONFIGS / "slurm" / "fit.sbatch"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text()
    sbatch = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    line = (
        text[text.index("srun") :]
        .replace("\\\n", " ")
        .replace("$config", str(tiny_config()))
    )
    words = shlex.split(line)
    assert words[:4] == ["srun", ".venv/bin/python", "-m", "project"]
    trainer = printed(run, capsys, *words[4:])["trainer"]
    assert (
        int(sbatch["ntasks-per-node"])
        == int(sbatch["gpus-per-node"])
        == int(trainer["devices"])
    )
    assert int(sbatch["nodes"]) == trainer["num_nodes"]
