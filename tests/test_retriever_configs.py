"""configs/retrievers: over every recipe each file puts its retriever in place, and changes nothing else.

Unusual here: `fit` of the Trainer is replaced, so nothing is fetched or trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from project.retrieval import ItemKNN, NoRetriever, Retriever, TextEncoder
from project.trainer import ProjectTrainer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
KINDS: dict[str, type[Retriever]] = {
    "text": TextEncoder,
    "item_knn": ItemKNN,
    "none": NoRetriever,
}
Run = Callable[..., None]


@pytest.fixture
def made(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The data that `fit` would get."""

    def make(*arguments: object) -> Any:
        found = []

        @functools.wraps(ProjectTrainer.fit)
        def fit(self: ProjectTrainer, model: Any, **others: Any) -> None:
            found.append(others["datamodule"])

        monkeypatch.setattr(ProjectTrainer, "fit", fit)
        run("fit", *arguments)
        return found[0]

    return make


def overlay(name: str) -> Path:
    return CONFIGS / "retrievers" / f"{name}.yaml"


def test_every_file_is_tested() -> None:
    """The folder holds these files and no other."""
    assert {path.stem for path in overlay("").parent.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_gets_the_retriever(recipe: Path, name: str, made: Callable[..., Any]) -> None:
    """The retriever is the named one; lists of similar users' likes stay where it can make them, as the recipe says."""
    data = made("--config", recipe, "--config", overlay(name))
    assert type(data.retriever) is KINDS[name]
    said = yaml.safe_load(recipe.read_text())["data"]
    given = said["retriever"].get("init_args", {}) if isinstance(said["retriever"], dict) else {}
    can_list = name in ("text", "llm")
    assert data.retriever.similar_every == (given.get("similar_every", 0) if can_list else 0)
    assert data.prompt.similar == (said["prompt"].get("similar") if can_list else None)
    assert data.prompt.segment == said["prompt"]["segment"]


def test_a_typo_is_caught(
    run: Run, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt argument is named, before anything is read."""
    with pytest.raises(SystemExit) as stopped:
        run(
            "fit",
            "--config",
            tiny_config(),
            "--config",
            overlay("text"),
            "--data.retriever.init_args.encodr",
            "x",
        )
    assert stopped.value.code != 0
    assert "encodr" in capsys.readouterr().err


def test_a_wrong_value_names_its_key(
    run: Run, tiny_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """max_tokens 0 is refused with the YAML key, what was found and what fixes it."""
    with pytest.raises(SystemExit):
        run(
            "fit",
            "--config",
            tiny_config(),
            "--config",
            overlay("text"),
            "--data.retriever.init_args.max_tokens",
            0,
        )
    said = " ".join(capsys.readouterr().err.split())
    assert "data.retriever.init_args.max_tokens is 0; expected 1 or more" in said
