"""docs/python.md is run as it stands, on the tiny world."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from project.api import Run, open_run
from project.errors import DataError
from project.request import Item, RankRequest

ROOT = Path(__file__).parents[2]
COLUMNS = [
    "request_id",
    "candidate_index",
    "item_id",
    "exit_layer",
    "adaptive_logit",
    "probability",
    "error",
]
pytestmark = pytest.mark.slow


@pytest.fixture
def opened(served_run: Path) -> Run:
    """The served run, opened from Python."""
    return open_run(served_run)


@pytest.mark.filterwarnings("ignore")
def test_the_document(
    served_run: Path,
    tiny_logs: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every block of Python, one after the other; the names of its world are those of the tiny one."""
    monkeypatch.chdir(tmp_path)
    names = {
        "runs/quickstart/latest": str(served_run),
        '"196"': '"u1"',
        '"22"': '"u2"',
        '"242"': '"i1"',
        '"302"': '"i3"',
        "881250949": "200",
        "logs.csv": str(tiny_logs / "interactions.csv"),
        "products.csv": str(tiny_logs / "items.csv"),
        "smollm2-135m-instruct": str(tiny_model),
        "[2, 4, 6]": "[1, 2, 3]",
    }
    text = (ROOT / "docs" / "python.md").read_text()
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for name, tiny in names.items():
            block = block.replace(name, tiny)
        exec(block, found)
    for scores in (found["scores"], found["run"].score(found["requests"])):
        assert scores.columns == COLUMNS
        assert scores.select("request_id", "item_id").rows() == [
            ("0", "i1"),
            ("0", "i3"),
            ("1", "i1"),
        ]
        assert scores["probability"].is_between(0, 1).all()
    whole = found["run"].score_after_log(
        RankRequest(None, found["request"].history, found["request"].candidates)
    )
    (best,) = found["best"].rows(named=True)
    assert best["exit_layer"] == 3
    plain = found["run"].score_after_log(replace(found["request"], exhaustive=True))
    assert plain["probability"].to_list() == [whole["probability"].max()]
    assert (tmp_path / "runs/mine/version_0/results/fit.json").is_file()
    assert found["mine"].folder.name == "version_0"
    assert found["listed"]["rank"].to_list() == [1, 2, 3] * 2


def test_a_backtest_reads_strictly_earlier_rows(opened: Run, tiny_logs: Path) -> None:
    """A request without a time is an error of `score`; with the time of a row of the log it does not read that row."""
    with pytest.raises(DataError, match=r"request '0' has no time.*score_after_log"):
        opened.score(pl.DataFrame({"user_id": ["u1"], "candidates": [["i1"]]}))
    log = pl.read_csv(tiny_logs / "interactions.csv").filter(user_id="u1").sort("timestamp")
    last = float(log["timestamp"][-1])
    before, after = (
        opened.score(RankRequest("u1", None, [log["item_id"][-1]], time=time))[
            "adaptive_logit"
        ][0]
        for time in (last, last + 1)
    )
    assert before != after
    with pytest.raises(DataError, match=r"request 'r': .*'yaer'"):
        opened.score_after_log(
            RankRequest("u1", None, [Item("n", "x", (("yaer", "1"),))], request_id="r")
        )
