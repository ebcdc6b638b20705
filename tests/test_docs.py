"""The site builds without a warning, has a page for every module, and its concept pages name only what exists."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from project.exits.certificate import RISKS
from project.exits.criteria import name
from project.exits.plan import ExitSettings, all_criteria

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
MODULES = [p for p in sorted((ROOT / "project").rglob("*.py")) if p.stat().st_size]


def page(path: Path) -> str:
    return path.stem


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    """No warning; README is the first page; a page for every module; angle brackets of docstrings are readable."""
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
    first = text(tmp_path / "index.html")
    assert "Your own logs" in first
    assert "results/12_layers/depth.png" in first
    assert (tmp_path / "results/12_layers/depth.png").is_file()
    assert "exit 12" in text(tmp_path / "measured/index.html")
    assert (tmp_path / "measured/12_layers/depth.png").is_file()
    for module in MODULES:
        parts = module.relative_to(ROOT).with_suffix("").parts
        folder = tmp_path.joinpath("reference", *(part for part in parts if part != "__init__"))
        assert "doc-heading" in text(folder / "index.html"), module
    assert "results/&lt;command&gt;.json" in text(tmp_path / "reference/project/callbacks/results/index.html")


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_names_exist(path: Path) -> None:
    """Every `project.x.y` is a module or in one, every notebook and configuration a file, every command a command."""
    from project.cli import ProjectCLI

    words = text(path)
    for dotted in set(re.findall(r"\bproject(?:\.\w+)+", words)):
        module, _, member = dotted.rpartition(".")
        try:
            importlib.import_module(dotted)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), member), dotted
    for file in re.findall(r"(?:notebooks|configs)/(?:\w+/)?\w+\.\w+", words):
        assert (ROOT / file).is_file(), file
    known = {*ProjectCLI.subcommands(), "table", "report", "export"}
    assert set(re.findall(r"python -m project (\w+)", words)) <= known


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_prose_quotes_no_measured_number(path: Path) -> None:
    """A decimal number stands in code (a setting) or in an arXiv id: results are quoted from result files alone."""
    prose = re.sub(
        r"```.*?```|`[^`]*`|^    .*?$|arXiv \d+\.\d+", "", text(path), flags=re.DOTALL | re.MULTILINE
    )
    assert re.findall(r"\d*\.\d+|\d+ ?%", prose) == []


def test_exits_page_is_complete() -> None:
    """It tells of every criterion, every risk and every setting of `exits`."""
    words = text(ROOT / "docs" / "exits.md")
    named = {name(criterion) for criterion in all_criteria()} | set(RISKS)
    assert {word for word in named if f"`{word}`" not in words} == set()
    settings = {field.name for field in fields(ExitSettings)} - {"compare"}
    assert {key for key in settings if not re.search(rf"\b{key}\b", words)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in PAGES if "```yaml" in text(p)], ids=page)
def test_examples_are_settings(
    path: Path, run: Callable[..., None], tmp_path: Path, tiny_config: Callable[..., Path]
) -> None:
    """Every block of YAML is accepted as a second --config."""
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text(path), re.DOTALL)):
        overlay = tmp_path / f"{number}.yaml"
        overlay.write_text(block)
        assert isinstance(yaml.safe_load(block), dict)
        with pytest.raises(SystemExit) as stopped:
            run("fit", "--config", tiny_config(), "--config", overlay, "--print_config")
        assert stopped.value.code == 0
