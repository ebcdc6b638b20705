from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from project.ablations.settings import read_list
from project.errors import ConfigError


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a list over a base and an overlay, with some keys changed."""
    (tmp_path / "base.yaml").write_text("model: {exit_layers: [2, 4]}\n")
    (tmp_path / "lora.yaml").write_text("model: {lora: {rank: 4}}\n")

    def make(**changes: Any) -> Path:
        rows = [
            {"name": "base"},
            {"name": "lora", "overlays": [str(tmp_path / "lora.yaml")]},
            {
                "name": "late",
                "overrides": {"model.loss.weights": "linear", "trainer.precision": "bf16-mixed"},
            },
        ]
        content = {"base": str(tmp_path / "base.yaml"), "steps": 7, "rows": rows} | changes
        path = tmp_path / "losses.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


def test_variants(write: Any, tmp_path: Path) -> None:
    """Overlays follow the base, dotted keys become YAML, and the steps are those of the list or of the argument."""
    base, lora, late = read_list(write()).variants
    assert base.overrides == {"trainer": {"max_epochs": 1, "limit_train_batches": 7}}
    assert lora.configs == (tmp_path / "base.yaml", tmp_path / "lora.yaml")
    assert late.overrides["model"] == {"loss": {"weights": "linear"}}
    assert late.overrides["trainer"] == {"max_epochs": 1, "limit_train_batches": 7, "precision": "bf16-mixed"}
    assert read_list(write(), steps=3).variants[0].overrides["trainer"]["limit_train_batches"] == 3
    assert read_list(write(steps=None)).variants[0].overrides == {}
    assert read_list(write()).name == "losses"


def test_definition_is_content(write: Any, tmp_path: Path) -> None:
    """Equal for another name of the same settings; another for another step, override or file content."""
    path = write()
    base, lora, _ = (v.definition() for v in read_list(path).variants)
    again = read_list(
        write(rows=[{"name": "other"}, {"name": "x", "overlays": [str(tmp_path / "lora.yaml")]}])
    )
    assert [v.definition() for v in again.variants] == [base, lora]
    assert read_list(path, steps=8).variants[0].definition() != base
    (tmp_path / "lora.yaml").write_text("model: {lora: {rank: 8}}\n")
    assert read_list(write()).variants[1].definition() != lora


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row": []}, ["losses.yaml", "base, steps, row"]),
        ({"rows": [{"name": "base"}]}, ["rows", "at least one more"]),
        ({"steps": 0}, ["steps is 0"]),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, ["'a' stands twice"]),
        ({"rows": [{"name": "a"}, {"name": "b", "overlay": []}]}, ["rows[1]", "overlay"]),
        ({"rows": [{"name": "a"}, {"name": "../b"}]}, ["rows[1]", "without slashes"]),
        (
            {"rows": [{"name": "a"}, {"name": "b", "overlays": ["no.yaml"]}]},
            ["rows[1]", "no.yaml does not exist"],
        ),
        ({"base": "no.yaml"}, ["no.yaml does not exist"]),
        ({"rows": [{"name": "a"}, {"name": "b", "overrides": {"m.a": 1, "m": 2}}]}, ["says m and also"]),
        ({"rows": [{"name": "a"}, {"name": "b", "overrides": {"m": 2, "m.a": 1}}]}, ["says m.a and also"]),
    ],
)
def test_bad_lists(write: Any, changes: dict[str, Any], words: list[str]) -> None:
    """What cannot work is one error that names the file, the row and what was found."""
    with pytest.raises(ConfigError) as error:
        read_list(write(**changes))
    assert all(word in str(error.value) for word in words), error.value


def test_missing_list(tmp_path: Path) -> None:
    """A list that is not there, or is not YAML, names the file."""
    with pytest.raises(ConfigError, match=r"no\.yaml does not exist"):
        read_list(tmp_path / "no.yaml")
    (tmp_path / "broken.yaml").write_text("rows: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not YAML"):
        read_list(tmp_path / "broken.yaml")
