"""A run folder with the result files of a published run: fitted, calibrated, tested and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from project.run import read_result, write_json

RUN = Path(__file__).parents[1] / "results" / "quickstart"


def results() -> dict[str, dict[str, Any]]:
    """Its result files by name."""
    names = ("fit", "calibrate", "test", "benchmark")
    return {name: read_result(RUN / f"{name}.json") for name in names}


def write_run(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write results into a run folder."""
    for name, content in files.items():
        write_json(folder / "results" / f"{name}.json", content)
    return folder
