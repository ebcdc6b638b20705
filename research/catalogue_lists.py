"""Whether two runs find a liked item among unrated ones equally well.

`python -m research.catalogue_lists RUN SCORES.parquet` scores requests of test with the code of the run's own version;
`python -m research.catalogue_lists BASE.parquet OTHER.parquet OUT.json RUN` compares two such files.

A request is a liked test row among 63 items that its user has not rated before, at the time of the row. NDCG@10 and the
share of liked items in the best 10, of every exit; differences are paired, users resampled, 95 %.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.config import open_run
from project.data.requests import catalogue_requests
from project.engine.engine import score_every_head
from project.engine.predict import load_weights
from project.engine.requests import prepare_requests
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import labelled_scores
from project.run import result_head, write_json

COUNT, CANDIDATES, FIRST = 600, 64, 10


def score(run: Path, out: Path) -> None:
    """Write the scores of every exit for `COUNT` targets, drawn by lot, among items of the catalogue."""
    model, data = open_run(run)
    data.prepare_data()
    data.setup("test")
    checkpoint = run / "checkpoints" / "last.ckpt"
    load_weights(model, data.tokenizer, checkpoint, data, compared=False)
    drawn = catalogue_requests(data.split, "test", COUNT, CANDIDATES, seed=0)
    scores = score_every_head(model.eval(), prepare_requests(model, data, drawn.requests))
    labelled_scores(scores, drawn.table).write_parquet(out)


def found(scores: pl.DataFrame, exit_layer: str) -> pl.DataFrame:
    """NDCG and whether the liked item is in the list, by request and user; a tie counts half a place."""
    logit = pl.col(exit_layer)
    liked = scores.filter(pl.col("label") == 1).select(
        "request_id", "user", target=exit_layer
    )
    ranks = (
        scores.join(liked.drop("user"), on="request_id")
        .group_by("request_id")
        .agg(
            rank=1
            + (logit > pl.col("target")).sum()
            + ((logit == pl.col("target")).sum() - 1) / 2
        )
    )
    inside = pl.col("rank") <= FIRST
    return liked.join(ranks, on="request_id", maintain_order="left").select(
        "user",
        ndcg=pl.when(inside).then(1 / (pl.col("rank") + 1).log(2)).otherwise(0.0),
        hits=inside.cast(pl.Float64),
    )


def compare(base: Path, other: Path, out: Path, run: Path) -> None:
    """Write a row an exit; both files are of the same requests."""
    tables = [pl.read_parquet(path) for path in (base, other)]
    rows = list[dict[str, Any]]()
    for name in [column for column in tables[0].columns if column.startswith("logit_")]:
        before, after = (found(table, name) for table in tables)
        assert before["user"].equals(after["user"])
        gap = after["ndcg"] - before["ndcg"]
        bootstrap = UserBootstrap(after["user"])
        rows.append(
            {
                "exit": name.removeprefix("logit_"),
                "requests": after.height,
                "users": after["user"].n_unique(),
                "base_ndcg": before["ndcg"].mean(),
                "ndcg": after["ndcg"].mean(),
                "minus_base": bootstrap.ratio_interval(gap, np.ones(gap.len())),
                "base_hits": before["hits"].mean(),
                "hits": after["hits"].mean(),
            }
        )
    _, data = open_run(run)
    head = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    about = (
        "A liked row of test among 63 items that its user has not rated before: NDCG@10, and the share in the best 10. "
        "Differences are paired, users resampled, 95 %."
    )
    write_json(out, head | {"rows": rows, "about": about})


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    score(*paths) if len(paths) == 2 else compare(*paths)
