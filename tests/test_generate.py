"""Generated logs: what can be reached is known, and nothing reaches more."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.__main__ import run
from project.data.logs import TableLogs
from project.generate import generate, reachable_auc
from project.metrics import auc
from project.retrieval.own_text import item_vectors

ROWS = 30_000


@pytest.fixture(scope="module")
def log() -> tuple[pl.DataFrame, pl.DataFrame]:
    return generate(ROWS)


def test_reachable_auc() -> None:
    """Chances .2 and .8: of the pairs with a like and a dislike .64 are in order, .04 in the wrong one."""
    assert reachable_auc(np.array([0.8, 0.2])) == pytest.approx(0.64 / 0.68)
    assert reachable_auc(np.full(4, 0.3)) == pytest.approx(0.5)


def test_no_score_beats_the_truth(log: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """The chances' AUC on the drawn labels is the reachable one, within four standard errors of at most .003."""
    rows = log[0]
    assert rows.height == ROWS
    assert rows["timestamp"].is_sorted()
    assert not rows.select("user_id", "item_id").is_duplicated().any()
    reachable, label = reachable_auc(rows["chance"].to_numpy()), rows["label"].to_numpy()
    assert reachable == pytest.approx(0.87, abs=0.02)
    assert auc(rows["chance"].to_numpy(), label) == pytest.approx(reachable, abs=0.012)
    # rates of the whole log, the future included, know items and users, but not who likes what
    rates = rows.select(pl.col("label").mean().over("user_id") + pl.col("label").mean().over("item_id"))
    assert 0.6 < (auc(rates.to_series().to_numpy(), label) or 0) < reachable


def test_text_tells_taste(log: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """Answers of a user agree more often on items whose titles are alike: by chance half of the time."""
    rows, items = log
    vectors = item_vectors(items.with_columns(item=pl.col("item_id")), items)
    user, item, label = (rows[name].to_numpy() for name in ("user_id", "item_id", "label"))
    order = np.argsort(user, kind="stable")
    a = np.concatenate([order[:-gap] for gap in (1, 2, 3)])
    b = np.concatenate([order[gap:] for gap in (1, 2, 3)])
    a, b = a[user[a] == user[b]], b[user[a] == user[b]]
    alike = np.asarray(vectors[item[a]].multiply(vectors[item[b]]).sum(1)).ravel() > 0.1
    agree = label[a] == label[b]
    assert alike.sum() > 2000
    assert agree[alike].mean() > agree[~alike].mean() + 0.03


def test_command_writes_a_log_that_can_be_read(tmp_path: Path) -> None:
    run(["generate", "--rows", "2e3", str(tmp_path / "log")])
    raw = TableLogs(
        str(tmp_path / "log" / "interactions.parquet"), str(tmp_path / "log" / "items.parquet")
    ).read()
    assert raw.interactions.height == pl.read_parquet(tmp_path / "log" / "truth.parquet").height > 1000
    assert "interactions.parquet" in (tmp_path / "log" / "config.yaml").read_text()
