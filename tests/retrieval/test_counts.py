"""docs/counts.sql counts as the walk does, on DuckDB and on Spark."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from example_logs import items_table, make_log

from project.features import FEATURES, feature_matrix
from project.retrieval import NoRetriever
from project.retrieval.past import WalkRows
from project.retrieval.walk import walk

SQL = (Path(__file__).parents[2] / "docs" / "counts.sql").read_text(encoding="utf-8")
RATES = ["item_rate", "item_count", "user_rate", "user_count"]
MADE = ["item_log_odds", "item_rows", "user_log_odds", "user_rows"]


def on_duckdb(file: Path) -> list[tuple[Any, ...]]:
    with duckdb.connect() as database:
        database.execute(f"create view interactions as from '{file}'")
        return database.execute(SQL).fetchall()


def on_spark(file: Path) -> list[tuple[Any, ...]]:
    sql = pytest.importorskip(
        "pyspark.sql", reason="Spark is not installed (pip install pyspark)"
    )
    session = (
        sql.SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", False)
        .getOrCreate()
    )
    try:
        session.read.parquet(str(file)).createOrReplaceTempView("interactions")
        return [tuple(row) for row in session.sql(SQL).collect()]
    finally:
        session.stop()


no_java = pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")


@pytest.mark.parametrize(
    "engine", [on_duckdb, pytest.param(on_spark, marks=[pytest.mark.slow, no_java])]
)
def test_counts_are_the_walks(
    engine: Callable[[Path], list[tuple[Any, ...]]], tmp_path: Path
) -> None:
    """Counts, rates (as the walk's float32) and their features, with ties, fractions of seconds and negatives."""
    random, rows = np.random.default_rng(0), make_log(0, rows=600)
    rows = rows.with_columns(
        timestamp=pl.col("timestamp") / 8,
        sampled=pl.Series(random.random(rows.height) < 0.1),
        split=pl.when(pl.col("timestamp") < 200)
        .then(pl.lit("train"))
        .otherwise(pl.lit("test")),
        role=pl.Series(random.choice(["target", "context"], rows.height)),
    )
    assert rows.select(pl.struct("item", "timestamp").is_duplicated().mean()).item() > 0.1
    table = tmp_path / "interactions.parquet"
    rows.rename({"user": "user_id", "item": "item_id"}).write_parquet(table)
    row_id, *found = np.array(engine(table), dtype=np.float64).T
    expected = walk(WalkRows.from_log(rows), NoRetriever(), items_table(), np.empty(0), [])
    assert row_id.tolist() == expected["row_id"].to_list()
    np.testing.assert_allclose(
        np.stack(found[:4], 1), expected.select(RATES).cast(pl.Float64), rtol=1e-6
    )
    base = rows.filter(pl.col("split") == "train", pl.col("role") == "target")[
        "label"
    ].mean()
    assert isinstance(base, float)
    made = feature_matrix(expected, base)[:, [FEATURES.index(name) for name in MADE]]
    np.testing.assert_allclose(np.stack(found[4:], 1), made, atol=1e-5)
