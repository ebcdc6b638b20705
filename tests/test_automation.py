"""What runs on a server: every workflow parses, and every command in it is one that exists here.

Unusual here: nothing can run a workflow in a test, so commands are taken apart instead: make's targets, the files they
name, the versions they promise.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    found: dict[str, Any] = content["jobs"]
    return found


def commands(path: Path) -> list[str]:
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


def extras(text: str) -> set[str]:
    """Extras that commands install."""
    return {name for found in re.findall(r"-e '\.\[([\w,]+)\]'", text) for name in found.split(",")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_commands_exist(path: Path) -> None:
    """Make's targets are in the Makefile, named tests and extras are there, every job has an end in time."""
    text = "\n".join(commands(path))
    assert set(re.findall(r"\bmake (\w+)", text)) <= TARGETS
    assert all((ROOT / name).exists() for name in re.findall(r"\btests/[\w/.]+", text))
    assert extras(text) <= set(PROJECT["optional-dependencies"])
    assert all(job["timeout-minutes"] <= 60 for job in jobs(path).values())
    caches = [
        s["with"]["key"] for job in jobs(path).values() for s in job["steps"] if "cache@" in s.get("uses", "")
    ]
    assert all((ROOT / name).is_file() for key in caches for name in re.findall(r"hashFiles\('(.+?)'\)", key))


def test_pythons() -> None:
    """The matrix begins at the lowest Python that pyproject.toml allows; so does the job of lowest versions."""
    found = jobs(ROOT / ".github" / "workflows" / "ci.yml")
    pythons = found["check-and-test"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    (lowest,) = (
        s["with"]["python-version"] for s in found["lowest"]["steps"] if "python@" in s.get("uses", "")
    )
    assert lowest == pythons[0]
    assert {"lowest", "notebooks", "docs"} <= set(found)


def test_every_extra_is_tested() -> None:
    """Tests that need an extra skip without it: some job installs each, by itself or by `make install`."""
    text = "\n".join(commands(ROOT / ".github" / "workflows" / "ci.yml"))
    assert "make install" in text
    assert extras(text + (ROOT / "Makefile").read_text()) == set(PROJECT["optional-dependencies"])


def test_every_dependency_has_a_lowest_version() -> None:
    """Without a lower bound the job of lowest versions would test whatever is oldest on the index."""
    wanted = [*PROJECT["dependencies"], *(d for e in PROJECT["optional-dependencies"].values() for d in e)]
    assert [d for d in wanted if ">=" not in d] == []


def test_nothing_is_written_by_default() -> None:
    """Workflows read; the job that publishes may ask for an identity, and holds no secret."""
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
        assert "secrets." not in path.read_text()
    publish = jobs(ROOT / ".github" / "workflows" / "release.yml")["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"


def test_pre_commit_is_make_check() -> None:
    """The hooks run ruff's two commands and mypy, from the environment that make uses."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    tools = [" ".join(hook["entry"].split()[:2]).split(" --")[0] for hook in local["hooks"]]
    assert tools == [".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/mypy"]
    recipe = (ROOT / "Makefile").read_text().partition("check: install\n")[2].partition("\n\n")[0]
    assert all(tool.replace(".venv/bin", "$(BIN)") in recipe for tool in tools)


def test_forms_have_what_is_shown() -> None:
    """Issue forms have a name, a description and labelled fields, each with an id of its own."""
    forms = [p for p in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert {p.stem for p in forms} == {"bug", "idea"}
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"]
        assert form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in form["body"])
