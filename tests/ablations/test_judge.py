from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from example_variant import tune_rows, write_variant

from project.ablations.judge import judge
from project.evaluation.metrics import auc
from project.evaluation.paired import read_heads


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_variant(tmp_path / "base", noise=3.0)


def test_difference_is_of_the_same_rows(base: Path, tmp_path: Path) -> None:
    """Variant minus base, paired by row id whatever the order of the tables; 30 rows of tune and no others."""
    better = write_variant(tmp_path / "better", noise=0.5, seed=1)
    path = better / "scores" / "valid.parquet"
    table = pl.read_parquet(path)
    spoilt = (
        pl.when(pl.col("fold") == "tune").then("logit_4").otherwise(0.0)
    )  # nobody may look at other folds
    table.with_columns(logit_4=spoilt).reverse().write_parquet(path)
    row = judge(better, read_heads(base))
    mine, theirs = tune_rows(better), tune_rows(base)
    expected = auc(mine["logit_4"], mine["label"]) - auc(theirs["logit_4"], theirs["label"])  # type: ignore[operator]
    last = row["exits"][-1]
    assert (last["layer"], last["against"], last["n"]) == (4, 4, 30)
    assert last["difference"]["auc"]["value"] == pytest.approx(expected)
    low, high = last["difference"]["auc"]["interval"]
    assert low <= expected <= high
    assert expected > 0 > last["difference"]["log_loss"]["value"]


def test_like_with_like(base: Path, tmp_path: Path) -> None:
    """Exits 2 and 6 against 2 and 4: 2 with 2, the deepest with the deepest; 3 has nothing to be compared with."""
    row = judge(write_variant(tmp_path / "a", layers=(2, 3, 6)), read_heads(base))
    assert [head.get("against") for head in row["exits"]] == [2, None, 4]
    shallow = judge(write_variant(tmp_path / "b", layers=(2,)), read_heads(base))
    assert [head["against"] for head in shallow["exits"]] == [4]


def test_the_same_run_is_no_difference(base: Path) -> None:
    """Base minus base is 0 in every respect, with an interval of no width."""
    for head in judge(base, read_heads(base))["exits"]:
        for found in head["difference"].values():
            assert found["value"] == 0
            assert found["interval"] == [0, 0]


def test_calibrated_with_exit_0(base: Path) -> None:
    """On the rows it is fitted on, calibration with exit 0 lowers the log loss of an overconfident head."""
    heads = judge(base, None)["exits"]
    assert all(head["calibrated"]["log_loss"] < head["log_loss"] for head in heads)
    assert all("difference" not in head for head in heads)  # the base is compared with nothing


def test_what_is_not_there(base: Path) -> None:
    """Without a plan there is no early exit; with one class nothing is calibrated and AUC is undefined."""
    assert judge(base, None)["early_exit"]["token_layer_speedup"] == 1.5
    (base / "results" / "calibrate.json").unlink()
    path = base / "scores" / "valid.parquet"
    pl.read_parquet(path).with_columns(label=pl.lit(1, pl.Int8)).write_parquet(path)
    fit = json.loads((base / "results" / "fit.json").read_text())
    for head in fit["exits"]:
        head["auc"] = None
    (base / "results" / "fit.json").write_text(json.dumps(fit))
    row = judge(base, read_heads(base))
    assert "early_exit" not in row
    assert all("calibrated" not in head for head in row["exits"])
    assert row["exits"][0]["difference"]["auc"] == {"value": None, "interval": None}
