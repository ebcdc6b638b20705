"""Two runs on the same rows: what stands in the table comes from their score tables, and other rows are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.compare import compare, read_heads, run_compare
from project.errors import DataError
from project.metrics import auc
from project.report.tables import render
from project.run import read_result, result_head, score_table, write_json, write_table


def write_variant(
    run: Path,
    noise: float = 1.0,
    layers: tuple[int, ...] = (2, 4),
    protocol: str = "f45a216bc7435a87",
    seed: int = 0,
) -> Path:
    """A run of 90 rows, three users in every fold, and the same rows as test; truth and labels are always the same.

    Args:
        run: The folder.
        noise: How far logits are from the truth; the deepest head has half of it.
        layers: Exit layers.
        protocol: Hash of the protocol.
        seed: Of the noise.
    """
    n, truth_rng, rng = 90, np.random.default_rng(9), np.random.default_rng(seed)
    truth = truth_rng.normal(size=n)
    columns = {
        "row_id": np.arange(n),
        "user": np.arange(n) // 10,
        "label": (truth + 0.5 * truth_rng.normal(size=n) > 0).astype(int),
        "logit_0": 0.3 * truth + 0.3 * truth_rng.normal(size=n),
    }
    sizes = [noise / (2 if layer == layers[-1] else 1) for layer in layers]
    logits = np.stack([2 * truth + size * rng.normal(size=n) for size in sizes], axis=1)
    folds = np.repeat(["select", "tune", "certify"], n // 3)
    for split, fold in (("valid", folds), ("test", [None] * n)):
        scores = score_table(
            {**columns, "split": [split] * n, "fold": fold}, logits, list(layers)
        )
        write_table(run / "scores" / f"{split}.parquet", scores)
    counts = {"train": n, "valid": n, "test": n}
    manifest = {"name": "global_time", "hash": protocol, "counts": counts}
    write_json(
        run / "results" / "fit.json",
        result_head("fit", manifest, str(run / "config.yaml"), 0),
    )
    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_variant(tmp_path / "base", noise=3.0)


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return write_variant(tmp_path / "better", noise=0.5, seed=1)


def test_differences_are_of_the_score_tables(base: Path, better: Path) -> None:
    """On tune: AUC minus AUC of the 30 rows, head by head."""
    tables = [pl.read_parquet(run / "scores" / "valid.parquet") for run in (better, base)]
    tune = [table.filter(pl.col("fold") == "tune") for table in tables]
    for row in compare(better, base, "tune")["exits"]:
        own, other = (
            auc(t[f"logit_{row['layer']}"].to_numpy(), t["label"].to_numpy()) for t in tune
        )
        assert own is not None
        assert other is not None
        assert (row["n"], row["auc"]) == (30, pytest.approx(own))
        assert row["difference"]["auc"]["value"] == pytest.approx(own - other)


def test_test_rows_are_calibrated_on_tune(base: Path, better: Path) -> None:
    """All 90 rows of test; flipping their labels changes no calibrated logit, flipping tune's labels does."""
    before = read_heads(better, "test")
    assert len(before.labels) == 90
    for split, changes in (("test", False), ("valid", True)):
        path = better / "scores" / f"{split}.parquet"
        kept = pl.read_parquet(path)
        kept.with_columns(
            label=(1 - pl.col("label")).cast(kept["label"].dtype)
        ).write_parquet(path)
        after = read_heads(better, "test")
        assert (after.calibrated[4] != before.calibrated[4]).any() == changes
        kept.write_parquet(path)


@pytest.mark.parametrize(
    ("key", "words"), [("heads", "checkpoints"), ("protocol", "protocols")]
)
def test_test_and_validation_are_of_one_run(base: Path, key: str, words: str) -> None:
    """Tables that name different heads or protocols are refused for test; tune needs validation's alone."""
    for split in ("valid", "test"):
        path = base / "scores" / f"{split}.parquet"
        write_table(
            path,
            pl.read_parquet(path),
            {"heads": "same", "protocol": "same"} | {key: split},
        )
    with pytest.raises(
        DataError, match=rf"are of different {words}.*same --config and --ckpt_path"
    ):
        read_heads(base, "test")
    assert len(read_heads(base, "tune").labels) == 30


def test_labels_are_the_same(base: Path, better: Path) -> None:
    """A run whose rows were labelled by another rule is not compared, whatever hash its fit had."""
    for split in ("valid", "test"):
        path = better / "scores" / f"{split}.parquet"
        flipped = (
            pl.when(pl.col("row_id") == 40)
            .then(1 - pl.col("label"))
            .otherwise(pl.col("label"))
        )
        pl.read_parquet(path).with_columns(label=flipped.cast(pl.Int8)).write_parquet(path)
    with pytest.raises(DataError, match=r"under other labels.*data\.protocol\.label"):
        compare(better, base, "test")


def test_what_does_not_compare(base: Path, tmp_path: Path) -> None:
    """Another protocol, a run that was never tested, and other rows."""
    other = write_variant(tmp_path / "other", protocol="0000000000000000")
    with pytest.raises(
        DataError, match=r"hash 0000000000000000.*expected two runs of one protocol"
    ):
        compare(other, base, "tune")
    less = write_variant(tmp_path / "less")
    path = less / "scores" / "test.parquet"
    scores = pl.read_parquet(path)
    path.unlink()
    with pytest.raises(DataError, match=r"test\.parquet does not exist"):
        compare(less, base, "test")
    scores.head(50).write_parquet(path)
    with pytest.raises(DataError, match="have not scored the same rows of test"):
        compare(less, base, "test")


def test_deepest_against_deepest(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exits 2, 3, 6 against 2, 4: 6 stands against 4, 3 against nothing; a run against itself differs by nothing."""
    rows = compare(write_variant(tmp_path / "deep", layers=(2, 3, 6)), base, "tune")
    assert ["auc" in row["difference"] for row in rows["exits"]] == [True, False, True]
    run_compare([str(base), str(base), "--part", "test"])
    result = read_result(base / "results" / "compare-test.json")
    assert all(row["difference"]["auc"]["value"] == 0 for row in result["exits"])
    assert render(result) in capsys.readouterr().out


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_overlays_beside_a_base(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """An overlay without effect differs by 0 from the base, and one with another seed does not."""
    config = tiny_config()
    for name, text in (
        ("same", "data: {refits: 5}"),
        ("seed", "seed_everything: 1"),
        ("none", "{}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    variants = [
        config,
        "same.yaml+none.yaml",
        "seed.yaml",
        "--",
        "--trainer.limit_train_batches",
        "2",
    ]
    subprocess.run(
        [sys.executable, ROOT / "research" / "compare_overlays.py", *variants],
        cwd=tmp_path,
        env=os.environ
        | {"PROJECT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    folder = tmp_path / "runs" / "compare_overlays"
    same, seed = (
        read_result(folder / name / "latest" / "results" / "compare-tune.json")
        for name in ("config-same-none", "config-seed")
    )
    differences = [
        [row["difference"]["log_loss"]["value"] for row in r["exits"]] for r in (same, seed)
    ]
    assert differences[0] == [0, 0]
    assert differences[1] != [0, 0]
    assert (
        "limit_train_batches: 2"
        in (folder / "config-seed" / "latest" / "config.yaml").read_text()
    )
