"""Shipped YAML and saved YAML: every recipe parses and makes its objects, and config.yaml of a run can be given back.

Unusual here: `fit` of the Trainer is replaced where a recipe is only to be made, so nothing is fetched or trained.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy

from project.callbacks import ResultFiles, RunBundle
from project.datamodule import InteractionData
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
def made(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Trainer, Any, Any]]:
    """Makes the objects of a configuration as `fit` would, and returns trainer, model and data instead of training."""

    def make(*arguments: object) -> tuple[Trainer, Any, Any]:
        found = []

        @functools.wraps(ProjectTrainer.fit)
        def fit(self: Trainer, model: Any, **others: Any) -> None:
            found.append((self, model, others["datamodule"]))

        monkeypatch.setattr(ProjectTrainer, "fit", fit)
        run("fit", *arguments)
        return found[0]

    return make


def printed(run: Run, capsys: pytest.CaptureFixture[str], command: str, *arguments: object) -> dict[str, Any]:
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
    return {k: v for key, value in config.items() for k, v in leaves(value, f"{at}.{key}").items()}


def test_there_are_recipes() -> None:
    """The recipes and overlays that the README names are among those tested here."""
    assert "quickstart" in map(by_name, RECIPES)
    assert {"12_layers", "30_layers", "no_exit_0", "wandb", "ddp", "fsdp", "lora", "no_retrieval"} <= set(
        map(by_name, OVERLAYS)
    )


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=by_name)
@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_shipped_recipes(recipe: Path, overlay: Path | None, made: Callable[..., tuple[Any, ...]]) -> None:
    """Every recipe, alone and with each overlay, makes a trainer, a model and data that fit together."""
    trainer, model, data = made(*given(recipe, overlay))
    assert isinstance(model, ExitRecommender)
    assert isinstance(data, InteractionData)
    assert model.backbone_name == data.tokenizer_name
    assert model.answers == data.prompt.answers
    data.protocol.check()
    kinds = {type(c) for c in trainer.callbacks}
    assert {ModelCheckpoint, ResultFiles, RunBundle} <= kinds
    assert trainer.checkpoint_callback.monitor == "select/auc/deepest"
    assert isinstance(trainer.loggers[0], CSVLogger)  # decides where a run's files go


@pytest.mark.parametrize("overlay", OVERLAYS, ids=by_name)
def test_overlays_change_what_they_say(
    overlay: Path, run: Run, capsys: pytest.CaptureFixture[str], tiny_config: Config
) -> None:
    """Over any base an overlay's values arrive, and nothing that it does not name changes."""
    base = leaves(printed(run, capsys, "fit", *given(tiny_config())))
    both = leaves(printed(run, capsys, "fit", *given(tiny_config(), overlay)))
    said = leaves(yaml.safe_load(overlay.read_text()))
    for key, value in said.items():
        if key == ".data.retriever":
            assert both[".data.retriever.class_path"] == value
        elif key.endswith("logger+"):
            assert [entry["class_path"] for entry in both[".trainer.logger"]] == [
                entry["class_path"] for entry in base[".trainer.logger"] + value
            ]
        elif key == ".trainer.logger":
            for entry, logger in zip(both[key], value, strict=True):
                assert logger["init_args"].items() <= entry["init_args"].items()
        else:
            assert both[key] == value
    filled = [".trainer.strategy", ".model.lora"]  # null before, classes with defaults after
    touched = tuple(key.removesuffix("+") for key in [*said, *filled])
    rest, expected = ({k: v for k, v in x.items() if not k.startswith(touched)} for x in (both, base))
    assert rest == expected


@pytest.mark.slow
def test_overlays_make_what_they_promise(
    made: Callable[..., Any], tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters; no neighbours; a W&B logger after the CSV one, online with a key; two processes, in two ways."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    overlays = {p.stem: p for p in OVERLAYS}
    assert made(*given(tiny_config(), overlays["lora"]))[1].lora.rank == 16
    assert isinstance(made(*given(tiny_config(), overlays["no_retrieval"]))[2].retriever, NoRetriever)
    csv, wandb = made(*given(tiny_config(), overlays["wandb"]))[0].loggers
    assert isinstance(csv, CSVLogger)
    assert isinstance(wandb, WandbLogger)
    assert not wandb._offline
    for name, strategy in (("ddp", DDPStrategy), ("fsdp", FullyShardedStrategy)):
        trainer = made(*given(tiny_config(), overlays[name]))[0]
        assert trainer.world_size == 2
        assert type(trainer.strategy) is strategy


def test_values_are_said_once(made: Callable[..., Any], tiny_config: Config, tiny_model: Path) -> None:
    """The backbone is also the tokenizer, the prompt's answers are also the heads', the seed is also the data's."""
    changes = {"data.prompt": {"answers": [" sea", " dog"]}, "seed_everything": 7}
    _, model, data = made(*given(tiny_config(**changes)))
    assert model.answers == [" sea", " dog"]
    assert data.tokenizer_name == str(tiny_model)
    assert data.seed == 7


@pytest.mark.slow
def test_one_yaml_serves_every_command(
    run: Run, capsys: pytest.CaptureFixture[str], tiny_config: Config
) -> None:
    """The same YAML parses under every command, to the same data and model."""
    expected = printed(run, capsys, "fit", *given(tiny_config()))
    for command in ("validate", "test", "predict", "baselines", "benchmark"):
        config = printed(run, capsys, command, *given(tiny_config()))
        assert config["data"] == expected["data"]
        assert config["model"] == expected["model"]


LABELLED = {
    "data.protocol": {"minimum_history": 1, "shares": [0.6, 0.2, 0.2], "label": None, "name": "given labels"},
    "data.protocol.duplicates": "first",
    "data.prompt": {"instruction": 'One: "two"\n', "segment": "{title} all {item_percent}:"},
    "model.lora": None,
}


@pytest.fixture(scope="module")
def labelled_logs(tiny_logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny log with 0/1 labels instead of ratings."""
    path = tmp_path_factory.mktemp("labelled") / "labels.csv"
    table = pl.read_csv(tiny_logs / "interactions.csv")
    table.select(pl.exclude("rating"), liked=(pl.col("rating") > 3).cast(pl.Int8)).write_csv(path)
    return path


def results(folder: Path, command: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results" / f"{command}.json").read_text())
    return content


@pytest.mark.slow
def test_saved_config_can_be_given_back(
    run: Run, tiny_config: Config, labelled_logs: Path, tmp_path: Path
) -> None:
    """Saved config.yaml keeps nulls, gives fit, validate and test the same protocol hash, and saves as itself again."""
    logs = {"data.logs.init_args.interactions": str(labelled_logs)}
    columns = {"data.logs.init_args.columns": {"label": "liked"}}
    run("fit", *given(tiny_config(**LABELLED, **logs, **columns)), "--trainer.limit_train_batches", 2)
    first, second = (tmp_path / "runs" / "tiny" / f"version_{k}" for k in (0, 1))
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["data"]["protocol"]["label"] is None
    assert saved["data"]["protocol"]["duplicates"] == "first"
    assert saved["data"]["prompt"]["instruction"] == 'One: "two"\n'
    assert saved["model"]["lora"] is None
    assert saved["trainer"]["limit_train_batches"] == 2

    expected = results(first, "fit")
    checkpoint = ("--ckpt_path", first / "checkpoints" / "last.ckpt")
    for command in ("validate", "test"):
        run(command, *given(first / "config.yaml"), *checkpoint)
        assert results(first, command)["protocol"] == expected["protocol"]
    assert results(first, "validate")["exits"] == expected["exits"]
    assert not second.exists()  # commands that were given a checkpoint write into its run

    run("fit", *given(first / "config.yaml"))
    assert results(second, "fit")["protocol"] == expected["protocol"]
    assert results(second, "fit")["exits"] == expected["exits"]  # the same run once more
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()


@pytest.mark.slow
def test_saved_config_holds_overlays(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """What an overlay and the command line said is in config.yaml: it alone is enough for the other commands."""
    overlay = tmp_path / "lora.yaml"
    overlay.write_text((CONFIGS / "overlays" / "lora.yaml").read_text())
    run("fit", *given(tiny_config(), overlay), "--data.context_tokens", 100)
    overlay.unlink()
    folder = tmp_path / "runs" / "tiny" / "latest"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["lora"]["rank"] == 16
    assert saved["data"]["context_tokens"] == 100
    run("validate", *given(folder / "config.yaml"), "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    assert results(folder, "validate")["exits"] == results(folder, "fit")["exits"]
