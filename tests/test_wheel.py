"""The package as it is installed: its wheel has every module and preset, and works outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PRESETS = ("*.yaml", "overlays/*.yaml")
PARTS = ("pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_wheel(tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    """The script `exitrec` shows a preset and fits with an overlay, both by name, from another folder."""
    # 1. a wheel of a copy, since building writes beside the sources
    source = tmp_path / "source"
    for folder in ("project", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in PARTS:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*built, "-w", tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("exitrec-*.whl")
    # 2. nothing is forgotten: new folders of code must be listed in pyproject.toml
    wanted = {path.relative_to(source).as_posix() for path in source.glob("project/**/*.*")}
    wanted |= {
        f"project/{path.relative_to(source).as_posix()}"
        for pattern in PRESETS
        for path in (source / "configs").glob(pattern)
    }
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()
    # 3. installed, and run where no checkout is
    installed = tmp_path / "installed"
    target = ["--no-deps", "--no-index", "--target", installed]
    subprocess.run([*pip, "install", *target, wheel], check=True, capture_output=True)
    here = tmp_path / "elsewhere"
    here.mkdir()

    def exitrec(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, installed / "bin" / "exitrec", *map(str, words)],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    shown = exitrec("fit", "--config", "exitrec:quickstart", "--print_config")
    preset = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    found = yaml.safe_load(shown.stdout)
    assert found["data"]["prompt"]["segment"] == preset["data"]["prompt"]["segment"]
    overlay = "--config=exitrec:overlays/no_retrieval"
    done = exitrec("fit", "--config", tiny_config(), overlay)
    assert done.returncode == 0, done.stderr
    saved = yaml.safe_load((tmp_path / "runs/tiny/latest/config.yaml").read_text())
    assert saved["data"]["retriever"]["class_path"] == "project.retrieval.NoRetriever"
