"""Two runs on the same rows: what stands in the table comes from their score tables, and other rows are refused."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from example_variant import tune_rows, write_variant

from project.compare import compare, read_heads, run_compare
from project.errors import DataError
from project.metrics import auc
from project.report.tables import render
from project.run import read_result, write_table


def with_test(run: Path) -> Path:
    """The run, with a test table of the same 90 rows as its validation."""
    scores = pl.read_parquet(run / "scores" / "valid.parquet")
    test = scores.with_columns(split=pl.lit("test"), fold=pl.lit(None, pl.String))
    test.write_parquet(run / "scores" / "test.parquet")
    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return with_test(write_variant(tmp_path / "base", noise=3.0))


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return with_test(write_variant(tmp_path / "better", noise=0.5, seed=1))


def test_differences_are_of_the_score_tables(base: Path, better: Path) -> None:
    """On tune: AUC minus AUC of the 30 rows, head by head, and both numbers beside it."""
    result = compare(better, base, "tune")
    mine, theirs = tune_rows(better), tune_rows(base)
    for row in result["exits"]:
        name = f"logit_{row['layer']}"
        own, other = (auc(rows[name], rows["label"]) for rows in (mine, theirs))
        assert own is not None
        assert other is not None
        assert (row["auc"], row["base"]["auc"]) == (pytest.approx(own), pytest.approx(other))
        assert row["difference"]["auc"]["value"] == pytest.approx(own - other)
        assert row["n"] == 30


def test_test_rows_are_calibrated_on_tune(base: Path, better: Path) -> None:
    """All 90 rows of test; flipping their labels changes no calibrated logit, flipping tune's labels does."""
    before = read_heads(better, "test")
    assert len(before.labels) == 90
    for split, changes in (("test", False), ("valid", True)):
        path = better / "scores" / f"{split}.parquet"
        kept = pl.read_parquet(path)
        kept.with_columns(label=(1 - pl.col("label")).cast(kept["label"].dtype)).write_parquet(path)
        after = read_heads(better, "test")
        assert (after.calibrated[4] != before.calibrated[4]).any() == changes
        kept.write_parquet(path)


@pytest.mark.parametrize(("key", "words"), [("heads", "checkpoints"), ("protocol", "protocols")])
def test_test_and_validation_are_of_one_run(base: Path, key: str, words: str) -> None:
    """Tables that name different heads or protocols are refused for test; tune needs validation's alone."""
    for split in ("valid", "test"):
        path = base / "scores" / f"{split}.parquet"
        write_table(path, pl.read_parquet(path), {"heads": "same", "protocol": "same"} | {key: split})
    with pytest.raises(DataError, match=rf"are of different {words}.*same --config and --ckpt_path"):
        read_heads(base, "test")
    assert len(read_heads(base, "tune").labels) == 30


def test_labels_are_the_same(base: Path, better: Path) -> None:
    """A run whose rows were labelled by another rule is not compared, whatever hash its fit had."""
    for split in ("valid", "test"):
        path = better / "scores" / f"{split}.parquet"
        scores = pl.read_parquet(path)
        flipped = pl.when(pl.col("row_id") == 40).then(1 - pl.col("label")).otherwise(pl.col("label"))
        scores.with_columns(label=flipped.cast(scores["label"].dtype)).write_parquet(path)
    with pytest.raises(DataError, match=r"under other labels.*data\.protocol\.label"):
        compare(better, base, "test")


def test_command_line(base: Path, better: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints what it writes; a run against itself differs by nothing."""
    run_compare([str(better), str(better), "--part", "test"])
    result = read_result(better / "results" / "compare-test.json")
    assert render(result) in capsys.readouterr().out
    assert all(row["difference"]["auc"]["value"] == 0 for row in result["exits"])
    assert "on test (90 rows)" in render(result)


def test_what_does_not_compare(base: Path, tmp_path: Path) -> None:
    """Another protocol, other rows and a run that was never tested: each says what was found and what to do."""
    other = write_variant(tmp_path / "other", protocol="0000000000000000")
    with pytest.raises(DataError, match=r"hash 0000000000000000.*expected two runs of one protocol"):
        compare(other, base, "tune")
    untested = write_variant(tmp_path / "untested")
    with pytest.raises(
        DataError, match=r"test\.parquet does not exist; expected the folder of a run that `test`"
    ):
        compare(untested, base, "test")
    less = with_test(untested)
    path = less / "scores" / "test.parquet"
    pl.read_parquet(path).head(50).write_parquet(path)
    with pytest.raises(DataError, match="have not scored the same rows of test"):
        compare(less, base, "test")


def test_deepest_against_deepest(base: Path, tmp_path: Path) -> None:
    """Exits 2, 3, 6 against 2, 4: 6 stands against 4, 3 against nothing and has no cells of a base."""
    rows = compare(write_variant(tmp_path / "deep", layers=(2, 3, 6)), base, "tune")
    assert [row.get("against") for row in rows["exits"]] == [2, None, 4]
    line = render(rows).splitlines()[3]
    assert line.startswith("| 3 | ")
    assert "| – | – |" in line
