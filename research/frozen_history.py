"""Whether the LLM ranks worse inside a user, or user-AUC says so: `frozen_history.py RUN OUT [USERS]` writes OUT.

A test row reads the labels before it, those of seconds ago included. Of two rows of a user, one liked and one not, the
later has read the earlier one's label and leans towards it, so who learns from the last label loses such pairs: the
best forecaster of a user whose level is unknown says 1/2, then 2/3 after a like and 1/3 after a dislike, and has
user-AUC 0. Here the same rows of a run are scored twice: as tested, and as candidates of one moment, the user's first
test row, with the history frozen before it. AUCs are inside users, weighted by rows; differences to exit 0 are paired,
users resampled, 95 %.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.arrays import F64
from project.config import open_run
from project.engine.engine import score_every_head
from project.engine.predict import load_weights
from project.engine.requests import prepare_requests
from project.evaluation.moment import moment_requests
from project.run import result_head, write_json

# up to so many seconds
APART = {
    "same second": 0,
    "a minute": 60,
    "an hour": 3600,
    "a day": 86400,
    "longer": np.inf,
}
DRAWS = 1000
ABOUT = (
    "The same test rows as tested, and with the history frozen before the user's first test row. AUC inside users, "
    "weighted by rows; pairs of a liked and a disliked row: all, or at most so far apart and further than the line "
    "before. Differences are paired, users resampled, 95 %."
)


def wins(rows: pl.DataFrame, column: str) -> tuple[F64, F64]:
    """Of a user's pairs of a liked and a disliked row: whether the liked one is ahead (1, 1/2, 0), seconds apart."""
    liked, not_liked = rows.filter(pl.col("label") == 1), rows.filter(pl.col("label") == 0)

    def gaps(name: str) -> F64:
        found: F64 = np.subtract.outer(
            *(t[name].to_numpy().astype(np.float64) for t in (liked, not_liked))
        )
        return found

    return np.heaviside(gaps(column), 0.5), abs(gaps("timestamp"))


def inside_users(
    users: list[pl.DataFrame],
    column: str,
    exit_0: str,
    longest: float,
    shortest: float = -1,
) -> dict[str, Any]:
    """AUC over pairs more than `shortest` and at most `longest` seconds apart, and minus that of exit 0.

    A user weighs as many rows as the share of their pairs that are meant.
    """
    auc, base, weight = list[float](), list[float](), list[float]()
    for rows in users:
        won, apart = wins(rows, column)
        meant = (apart > shortest) & (apart <= longest)
        if meant.any():
            auc.append(won[meant].mean())
            base.append(wins(rows, exit_0)[0][meant].mean())
            weight.append(rows.height * meant.mean())
    gap, rng = np.subtract(auc, base), np.random.default_rng(0)
    drawn = [
        np.average(gap[k], weights=np.array(weight)[k])
        for k in rng.integers(len(gap), size=(DRAWS, len(gap)))
    ]
    return {
        "users": len(auc),
        "rows": round(sum(weight)),
        "auc": float(np.average(auc, weights=weight)),
        "minus_exit_0": {
            "value": float(np.average(gap, weights=weight)),
            "interval": np.quantile(drawn, [0.025, 0.975]).tolist(),
        },
    }


def main(run: Path, out: Path, count: int = 800) -> None:
    """Score the test rows of so many users, drawn by lot, at one moment each; compare with the run's own scores."""
    model, data = open_run(run)
    data.prepare_data()
    data.setup("test")
    load_weights(
        model, data.tokenizer, run / "checkpoints" / "last.ckpt", data, compared=False
    )
    # 1. one request a user, at the time of their first test row
    workload = moment_requests(data.split, "test", count)
    if workload is None:
        sys.exit("too few test rows in every user")
    table = workload.table
    # 2. scores of every exit, frozen and as tested
    with torch.inference_mode():
        scored = score_every_head(
            model.eval(), prepare_requests(model, data, workload.requests)
        )
    exits = [name for name in scored.columns if name.startswith("logit_")]
    frozen = table.select("row_id", "user", "label").hstack(
        scored.select(pl.col(exits).name.prefix("frozen_"))
    )
    tested = pl.read_parquet(run / "scores" / "test.parquet").select("row_id", *exits)
    times = data.split.rows.select("row_id", "timestamp")
    rows = frozen.join(tested, on="row_id", maintain_order="left").join(
        times, on="row_id", maintain_order="left"
    )
    users = [
        own
        for own in rows.partition_by("user", maintain_order=True)
        if own["label"].n_unique() == 2
    ]
    # 3. rows of the result
    found, shortest = list[dict[str, Any]](), -1.0
    for name in exits:
        for history, prefix in (("as tested", ""), ("frozen", "frozen_")):
            row = inside_users(users, prefix + name, prefix + exits[0], np.inf)
            found.append(
                {"exit": name.removeprefix("logit_"), "history": history, "pairs": "all"}
                | row
            )
    for pairs, longest in APART.items():
        row = inside_users(users, exits[-1], exits[0], longest, shortest)
        found.append(
            {
                "exit": exits[-1].removeprefix("logit_"),
                "history": "as tested",
                "pairs": pairs,
            }
            | row
        )
        shortest = longest
    result = result_head("study", data.split.manifest, str(run / "config.yaml"), data.seed)
    write_json(out, result | {"rows": found, "about": ABOUT})
    for row in found:
        print(row)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
