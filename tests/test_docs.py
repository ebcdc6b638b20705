"""What stands beside the code: the site, its examples, commands of documents and of workflows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from project.__main__ import OTHER_COMMANDS
from project.cli import ProjectCLI

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    """No warning, README first, pictures beside it, and a page for every module with a public class."""
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    assert (tmp_path / "results/quickstart/depth.png").is_file()
    for module in sorted((ROOT / "project").rglob("*.py")):
        if re.search(r"^class [A-Z]", module.read_text(), re.M):
            parts = module.relative_to(ROOT).with_suffix("").parts
            folder = tmp_path.joinpath(
                "reference", *(part for part in parts if part != "__init__")
            )
            assert "doc-heading" in (folder / "index.html").read_text(), module


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in PAGES if "```yaml" in p.read_text()], ids=lambda p: p.stem
)
def test_examples_are_settings(
    path: Path, run: Callable[..., None], tmp_path: Path, tiny_config: Callable[..., Path]
) -> None:
    """Every block of YAML is accepted as a second --config."""
    for number, block in enumerate(
        re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)
    ):
        overlay = tmp_path / f"{number}.yaml"
        overlay.write_text(block)
        with pytest.raises(SystemExit) as stopped:
            run("fit", "--config", tiny_config(), "--config", overlay, "--print_config")
        assert stopped.value.code == 0


def test_commands_are_commands() -> None:
    """Every `python -m project COMMAND` of the documents."""
    documents = [
        *PAGES,
        *(
            ROOT / name
            for name in (
                "README.md",
                "CONTRIBUTING.md",
                "results/README.md",
                "results/archive.md",
            )
        ),
    ]
    used = {
        command
        for p in documents
        for command in re.findall(r"python -m project (\w+)", p.read_text())
    }
    assert used - {*ProjectCLI.subcommands(), *OTHER_COMMANDS} == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_commands_of_workflows_exist(path: Path) -> None:
    """Make's targets are in the Makefile, named tests and extras are there; workflows read and hold no secret."""
    content = yaml.safe_load(path.read_text())
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    text = "\n".join(step["run"] for step in steps if "run" in step)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)", text)) <= set(targets)
    assert all((ROOT / name).exists() for name in re.findall(r"\btests/[\w/.]+", text))
    extras = {
        name
        for found in re.findall(r"-e '\.\[([\w,]+)\]'", text)
        for name in found.split(",")
    }
    assert extras <= set(PROJECT["optional-dependencies"])
    assert content["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text()


def test_every_dependency_has_a_lowest_version() -> None:
    """Without a lower bound the job of lowest versions would test whatever is oldest on the index."""
    wanted = [
        *PROJECT["dependencies"],
        *(d for e in PROJECT["optional-dependencies"].values() for d in e),
    ]
    assert [d for d in wanted if ">=" not in d] == []


def test_every_command_stands_in_a_document() -> None:
    """And an extra is installed from a checkout: no index has this package."""
    text = "".join(path.read_text() for path in [*PAGES, ROOT / "README.md"])
    commands = [*ProjectCLI.subcommands(), *OTHER_COMMANDS]
    assert [
        name for name in commands if not re.search(rf"(project |`){name}\b", text)
    ] == []
    sources = "".join(path.read_text() for path in (ROOT / "project").rglob("*.py"))
    assert not re.search(r"pip install ['\"]*exitrec", text + sources)
