"""CONTRIBUTING's worked examples work: its Python becomes a package of one's own, its YAML is given to `fit`.

Nothing of the examples is repeated: the tests read the document, block by block, and write its Python into
my_package.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml

from project.callbacks import ResultFiles
from project.config import open_run
from project.data.logs import TableLogs
from project.data.protocol import Protocol, build_interactions
from project.datamodule import InteractionData
from project.errors import ConfigError, DataError
from project.evaluation.result import own_metric
from project.exits.criteria import HeadOutputs, Ratio
from project.exits.plan import ExitPlan, plans_of
from project.model.heads import ExitHead
from project.retrieval import NoRetriever
from project.retrieval.base import Raters

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
PROTOCOL = Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2], label="rating > 3")
Run = Callable[..., None]
Config = Callable[..., Path]


def settings(word: str) -> dict[str, Any]:
    """The block of YAML with this word."""
    (found,) = (body for language, body in BLOCKS if language == "yaml" and word in body)
    content: dict[str, Any] = yaml.safe_load(found)
    return content


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """my_package.py: every block of Python, one after the other."""
    (tmp_path / "my_package.py").write_text(
        "\n".join(b for language, b in BLOCKS if language == "python")
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_package")
    del sys.modules["my_package"]


@pytest.fixture
def json_logs(tiny_logs: Path, tmp_path: Path) -> dict[str, str]:
    """The tiny log as the example's JSON lines; returns data.logs.init_args."""
    events = pl.read_csv(tiny_logs / "interactions.csv")
    renamed = events.rename(
        {"user_id": "who", "item_id": "what", "timestamp": "at", "rating": "stars"}
    )
    renamed.write_ndjson(tmp_path / "events.jsonl")
    items = pl.read_csv(tiny_logs / "items.csv").select(what="item_id", name="title")
    items.write_ndjson(tmp_path / "items.jsonl")
    return {
        "events": str(tmp_path / "events.jsonl"),
        "items": str(tmp_path / "items.jsonl"),
    }


def test_every_class_is_configured() -> None:
    python, yaml_ = (
        "\n".join(body for kind, body in BLOCKS if kind == word)
        for word in ("python", "yaml")
    )
    defined, named = (
        re.findall(r"^(?:class|def) (\w+)", python, re.M),
        re.findall(r"my_package\.(\w+)", yaml_),
    )
    assert (
        set(defined)
        == set(named)
        == {"Margin", "DeepHead", "LatestRaters", "first_hit", "JsonLogs"}
    )


def test_criterion(package: ModuleType) -> None:
    """|p - 1/2| grows with |logit|, so Margin orders rows as Ratio does; at p = 1/2 and p = 3/4 it is 0 and 1/4."""
    logits = torch.randn(
        50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    logits[:2, 1] = torch.tensor([1.0, 3.0], dtype=torch.float64).log()
    outputs = HeadOutputs.of([1, 3], logits, torch.zeros(50, 1, dtype=torch.float64))
    confidence = package.Margin().confidence(outputs)
    assert confidence[:2].tolist() == pytest.approx([0, 0.25])
    assert torch.equal(confidence.argsort(), Ratio().confidence(outputs).argsort())


def test_head(package: ModuleType) -> None:
    """At first the head says what `ExitHead` says."""
    norm, direction, hidden = torch.nn.LayerNorm(8), torch.randn(8), torch.randn(5, 8)
    torch.testing.assert_close(
        package.DeepHead(norm, direction)(hidden), ExitHead(norm, direction)(hidden)
    )


def test_retriever(package: ModuleType) -> None:
    """Of raters 3, 8, 9 (oldest first) two neighbours are 9, 8; its arguments are its key."""
    retriever = package.LatestRaters(neighbours=2)
    raters = Raters(np.array([3, 8, 9]), np.array([0, 1, 2]))
    assert retriever.select(5, 0, 1.0, raters).row.tolist() == [9, 8]
    assert retriever.select(
        5, 0, 1.0, Raters(raters.row[:1], raters.user[:1])
    ).row.tolist() == [3]
    assert retriever.settings()["init_args"] == {"neighbours": 2, "max_raters": 2000}


def test_metric(package: ModuleType) -> None:
    """User 0's most probable row is a like, user 1's is not: 1 of 2; a failure names the function."""
    about = np.array([1, 0, 0, 1]), np.array([0, 0, 1, 1])
    scores = {"exit 2": np.array([2.0, 1, 3, -1])}
    found = own_metric(package.first_hit, scores, *about)
    assert found == {"name": "first_hit", "scores": {"exit 2": 0.5}}
    with pytest.raises(
        ConfigError, match=r"results\.metric: fails failed: ZeroDivisionError"
    ):
        ResultFiles(metric=fails)


def fails(*_: Any) -> float:
    return 1 / 0


def test_data_set(
    package: ModuleType,
    json_logs: dict[str, str],
    tiny_logs: Path,
    tiny_model: Path,
) -> None:
    table = TableLogs(
        *(str(tiny_logs / name) for name in ("interactions.csv", "items.csv"))
    )

    def data(logs: Any) -> InteractionData:
        return InteractionData(logs, NoRetriever(), PROTOCOL, tokenizer=str(tiny_model))

    found, expected = (data(logs).split for logs in (package.JsonLogs(**json_logs), table))
    assert found.rows.equals(expected.rows)
    assert found.manifest["counts"] == expected.manifest["counts"]
    assert set(found.interactions.files) == {"events.jsonl", "items.jsonl"}
    assert data(package.JsonLogs(**json_logs)).targets("test").height > 0


def test_data_set_explains_a_mistake(
    package: ModuleType, json_logs: dict[str, str]
) -> None:
    with open(json_logs["events"], "a") as file:
        file.write('{"who": "u1", "what": "i999", "at": 1, "stars": 4}\n')
    line = len(Path(json_logs["events"]).read_text().splitlines())
    with pytest.raises(
        DataError,
        match=rf"events\.jsonl, row {line}: item 'i999' is not in the reader's items",
    ):
        build_interactions(package.JsonLogs(**json_logs).read(), PROTOCOL)


@pytest.mark.slow
def test_fit_with_all_five(
    run: Run,
    package: ModuleType,
    json_logs: dict[str, str],
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The document's YAML trains: Margin decides and comes back from the checkpoint, the bundle names the retriever."""
    logs = settings("JsonLogs")
    logs["data"]["logs"]["init_args"] = json_logs
    # this log knows no year
    wording = {"segment": "{title} all {item_percent} near {vote_percent}:"}
    words = {
        "criterion": settings("Margin"),
        "retriever": settings("LatestRaters"),
        "logs": logs,
    }
    words |= {"head": settings("DeepHead"), "metric": settings("first_hit")}
    overlays = []
    for name, content in words.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        overlays += ["--config", tmp_path / f"{name}.yaml"]
    base = tiny_config(**{"data.prompt": wording})
    run("fit", "--config", base, *overlays)

    folder = tmp_path / "runs" / "tiny" / "latest"
    assert (
        json.loads((folder / "results" / "calibrate.json").read_text())["chosen"]
        == "margin"
    )
    own = json.loads((folder / "results" / "fit.json").read_text())["own_metric"]
    assert own["scores"].keys() >= {"exit 0", "exit 1", "exit 3"}
    assert "| first_hit |" in (folder / "report" / "report.md").read_text()
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert any(name.endswith("mix.weight") for name in checkpoint["state_dict"])
    plan = ExitPlan.from_state(checkpoint["exit_plans"]["plan"])
    assert isinstance(plan.criterion, package.Margin)
    # as in a new process: the run's own config.yaml brings it
    monkeypatch.delitem(sys.modules, "my_package")
    with pytest.raises(ConfigError, match=r"my_package\.Margin"):
        ExitPlan.from_state(checkpoint["exit_plans"]["plan"])
    open_run(folder)
    assert plans_of(checkpoint) is not None
    retriever = json.loads((folder / "bundle" / "bundle.json").read_text())["retriever"]
    assert retriever["class_path"] == "my_package.LatestRaters"
    assert retriever["init_args"]["neighbours"] == 5


def changed(tree: Path, diff: str) -> None:
    """Make a document's changes: lines with a minus become the lines with a plus; their place must be the only one."""
    for part in diff.split("--- ")[1:]:
        name, _, body = part.partition("\n")
        lines = body.splitlines()
        old, new = (
            "\n".join(line[1:] for line in lines if line[0] in kind)
            for kind in (" -", " +")
        )
        text = (tree / name).read_text()
        assert text.count(old) == 1, (name, old)
        (tree / name).write_text(text.replace(old, new))


@pytest.mark.slow
def test_model_family(tmp_path: Path) -> None:
    """A copy of this tree with the document's changes passes the document's command, which chooses the new family."""
    for folder in ("project", "research", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (diff,) = (body for kind, body in BLOCKS if kind == "diff")
    (command,) = (body.split() for kind, body in BLOCKS if not kind and "pytest" in body)
    changed(tmp_path, diff)
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= 3
