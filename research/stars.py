"""Whether ratings make better features than shares of likes: `python -m research.stars CONFIG...`.

Base is what retrieved features make of labels: shares of likes and a factorisation of labels. Beside it: mf, the
factorisation of ratings (`mf_rating`, which is a feature now), means (mean rating of item and user so far and the
item's mean residual: its ratings minus what their users gave on average before), and both. Instead of the factorisation
of labels: that of ratings. By the models of exit 0 (lr_text) and of gbdt_text; writes results/stars.json, paired with
the same model on base, on tune and on test. In means ratings are places in train's order of all, from 0 to 1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.arrays import F64
from project.evaluation.baselines import (
    boosting,
    targets_of,
    targets_table,
    train_labels,
)
from project.evaluation.bootstrap import UserBootstrap
from project.features import FEATURES, feature_matrix, logistic_regression
from research.text_baselines import SPLITS, data_of, study_all

OUT = Path(__file__).parents[1] / "results" / "stars.json"
SHRINK = 5.0  # rows that a mean counts as beside its own, at the mean of train
ABOUT = (
    "Base: what retrieved features make of labels. Beside it means (mean rating of item and user so far, the item's "
    "mean residual), mf (the factorisation of ratings), both; instead of the factorisation of labels that of ratings. "
    "Differences to the same model on base are paired, users resampled, 95 %."
)


def places(rows: pl.DataFrame) -> F64:
    """(n,) of each row the share of train's ratings below its own, and half of the equal ones."""
    train = np.sort(rows.filter(pl.col("split") == "train")["rating"].to_numpy())
    ratings = rows["rating"].to_numpy()
    below = np.searchsorted(train, ratings, side="left")
    until = np.searchsorted(train, ratings, side="right")
    found: F64 = (below + until) / (2 * train.size)
    return found


def mean_so_far(rows: pl.DataFrame, by: str, value: str) -> F64:
    """(n,) shrunk mean minus the mean of train over rows of the same `by` that are strictly earlier."""
    base = float(rows.filter(pl.col("split") == "train")[value].mean())  # type: ignore[arg-type]
    moments = (
        rows.group_by(by, "timestamp")
        .agg(sum=(pl.col(value) - base).sum(), n=pl.len())
        .sort(by, "timestamp")
        .with_columns(pl.col("sum", "n").cum_sum().shift(1).over(by).fill_null(0))
    )
    found = rows.join(moments, on=[by, "timestamp"], how="left", maintain_order="left")
    return (found["sum"] / (found["n"] + SHRINK)).to_numpy()


def means(rows: pl.DataFrame) -> F64:
    """(rows, 3) of strictly earlier rows: mean ratings of item and user, and the item's mean residual."""
    table = rows.with_columns(place=places(rows))
    user = mean_so_far(table, "user", "place")
    table = table.with_columns(residual=pl.col("place") - pl.Series(user))
    item = mean_so_far(table, "item", "place")
    return np.stack([item, user, mean_so_far(table, "item", "residual")], axis=1)


def study(config: Path) -> list[dict[str, Any]]:
    """Rows of the table for one data configuration."""
    # 1. features that a log with ratings gets, and means
    data = data_of(config)
    rows = data.split.rows
    labels = train_labels(rows)
    base = float(labels.mean())
    targets = {name: targets_of(rows, name) for name in SPLITS}
    known = {
        name: feature_matrix(targets_table(rows, data.retrieved, name), base)
        for name in SPLITS
    }
    further = means(rows)
    # 2. both models with every part: columns of features that are left out, and further ones
    labels_mf, ratings_mf = map(FEATURES.index, ("mf_log_odds", "mf_rating_log_odds"))
    scores: dict[str, dict[str, F64]] = {}
    for name, out, more in (
        ("", ratings_mf, False),
        ("means", ratings_mf, True),
        ("mf", [], False),
        ("both", [], True),
        ("mf instead", labels_mf, False),
    ):
        x = {s: np.delete(known[s], out, axis=1) for s in SPLITS}
        if more:
            for s, of in targets.items():
                x[s] = np.hstack([x[s], further[of["row_id"].to_numpy()]])
        for model, made in (("lr_text", logistic_regression()), ("gbdt_text", boosting())):
            made.fit(x["train"], labels)
            scores[f"{model} {name}".strip()] = {
                s: made.decision_function(x[s]) for s in ("valid", "test")
            }
    # 3. paired with the same model without them
    found = []
    for name, logits in scores.items():
        row: dict[str, Any] = {"log": config.stem, "baseline": name}
        before = scores[name.split()[0]]
        for part, of, fold in (("tune", "valid", "tune"), ("test", "test", None)):
            here = targets[of]
            kept = np.ones(here.height, bool) if fold is None else here["fold"] == fold
            kept = np.asarray(kept)
            bootstrap = UserBootstrap(here["user"].to_numpy()[kept])
            truth = here["label"].to_numpy()[kept]
            gap = bootstrap.difference_interval(logits[of][kept], before[of][kept], truth)
            row[part] = bootstrap.metrics(logits[of][kept], truth)["auc"]
            row[f"{part} minus without"] = None if logits is before else gap
        found.append(row)
        print(row, flush=True)
    return found


if __name__ == "__main__":
    study_all(sys.argv[1:], study, OUT, ABOUT)
