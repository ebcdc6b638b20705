"""The notebooks run from top to bottom, print no warning, and are stored with the outputs of a run.

A notebook runs in a process of its own with its own Jupyter folders, so that Jupyter's own warnings are not pytest's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient
source, target, folder = sys.argv[1:]
book = nbformat.read(source, as_version=4)
NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
nbformat.write(book, target)
"""

Outputs = list[dict[str, Any]]


def execute(name: str, folder: Path, **environment: object) -> Outputs:
    """Outputs of all cells of a notebook that ran in a folder; fails with the cell's traceback where one raises."""
    places = {
        key: str(folder / key)
        for key in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    given = {key: str(value) for key, value in environment.items()}
    done = folder / name
    result = subprocess.run(
        [sys.executable, "-c", EXECUTE, ROOT / "notebooks" / name, done, folder],
        env={**os.environ, **places, "TMPDIR": str(folder), **given},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    cells = [
        cell
        for cell in json.loads(done.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    said = "".join(text for o in outputs if o.get("name") == "stderr" for text in o["text"])
    assert not [
        line
        for line in said.splitlines()
        if not line.startswith("Prompts show of each item:")
    ]
    return outputs


def printed(outputs: Outputs) -> str:
    """All that was printed or shown as Markdown."""
    return "\n".join(
        "".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/markdown", []))
        for o in outputs
    )


def pictures(outputs: Outputs) -> int:
    """How many pictures were drawn."""
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_outputs(path: Path) -> None:
    """All cells ran in order and none failed; outputs have no path of the machine and no widget, which GitHub drops."""
    book = json.loads(path.read_text())
    cells = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([c["outputs"] for c in cells])
    assert '"output_type": "error"' not in outputs
    assert not re.search(r"widget|[\s\"'](/|~/|[A-Z]:\\\\)\w+/", outputs)
    assert "widgets" not in book["metadata"]


@pytest.mark.slow
@pytest.mark.real
def test_logs_to_prompt(tmp_path: Path, tiny_model: Path) -> None:
    outputs = execute("01_logs_to_prompt.ipynb", tmp_path, EXITREC_MODEL=tiny_model)
    text = printed(outputs).rstrip()
    assert "global_time-80-10-10-h5" in text
    assert re.search(r"\[.*mf [+-]\d\.\d\d.*\]$", text)
    assert re.search(
        r"\[rating [+-]\d\.\d\d\]\n", text
    )  # what the candidate sees of the past


@pytest.mark.slow
def test_exits_of_a_run(tmp_path: Path, fitted: Path) -> None:
    """Given a calibrated run with exits 1 and 3 it trains nothing, and both pictures are drawn."""
    outputs = execute("02_exits.ipynb", tmp_path, EXITREC_RUN=fitted)
    assert "training" not in printed(outputs)
    assert "exit  3: leave where confidence >= -inf" in printed(outputs)
    assert pictures(outputs) == 2


@pytest.mark.slow
@pytest.mark.real
def test_exits_without_a_run(tmp_path: Path, tiny_model: Path) -> None:
    """It says that it trains a small run and shows that one, with exits 1 and 2."""
    outputs = execute(
        "02_exits.ipynb", tmp_path, EXITREC_RUN=tmp_path / "none", EXITREC_MODEL=tiny_model
    )
    text = printed(outputs)
    assert "training a small one" in text
    assert "exit  2: leave where confidence >= -inf" in text
    assert pictures(outputs) == 2


@pytest.mark.slow
def test_your_own_csv(tmp_path: Path, tiny_model: Path) -> None:
    """140 of the 600 rows are test and scored; the mistake is explained by its column; no terminal codes."""
    outputs = execute(
        "03_your_own_csv.ipynb",
        tmp_path,
        EXITREC_MODEL=tiny_model,
    )
    text = printed(outputs)
    assert "no column customer (our user_id)" in text
    assert "'test': 140" in text
    assert "| exit 2" in text
    assert "\x1b" not in text


@pytest.mark.slow
def test_serve(tmp_path: Path, fitted: Path) -> None:
    """It starts a server, which ends as asked, and an event changes scores."""
    outputs = execute("04_serve.ipynb", tmp_path, EXITREC_RUN=fitted)
    text = printed(outputs)
    assert "{'new': 1, 'conflict': []}" in text
    assert re.search(r"^[1-9]\d* of 12 scores changed$", text, re.M)
    assert "ended with 0" in text
