"""Whether ratings make better features than shares of likes: `python -m research.stars CONFIG...`.

Retrieved features count likes. Beside them: mean ratings of item and user so far and the item's mean residual (its
ratings minus what their users gave on average before), and the factorisation fitted on ratings instead of labels. Each
part alone and together, by the models of exit 0 (lr_text) and of gbdt_text; writes results/stars.json, paired with the
same model without them on tune and on test. Ratings are places in train's order of all ratings, from 0 to 1.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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
from project.features import feature_matrix, logistic_regression
from project.retrieval import MatrixFactorisation
from project.retrieval.base import Edges
from project.retrieval.past import WalkRows
from project.retrieval.walk import block_cuts, fit_blocks
from research.text_baselines import SPLITS, data_of, study_all

OUT = Path(__file__).parents[1] / "results" / "stars.json"
SHRINK = 5.0  # rows that a mean counts as beside its own, at the mean of train
ABOUT = (
    "Beside all retrieved features: means (mean rating of item and user so far, the item's mean residual), mf (the "
    "factorisation fitted on ratings), both. Differences to the same model without them are paired, users resampled, "
    "95 %."
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


def rated(rows: pl.DataFrame, items: int, refits: int) -> dict[str, F64]:
    """Features (rows, d) by part, of strictly earlier rows alone."""
    # 1. means, and the residual of each row against what its user gave before
    table = rows.with_columns(place=places(rows))
    user = mean_so_far(table, "user", "place")
    table = table.with_columns(residual=pl.col("place") - pl.Series(user))
    means = [mean_so_far(table, "item", "place"), user]
    means.append(mean_so_far(table, "item", "residual"))
    # 2. the factorisation: soft labels, handed over as codes of the distinct ratings
    values, code = np.unique(table["place"].to_numpy(), return_inverse=True)
    mf = MatrixFactorisation()
    cuts = block_cuts(rows["timestamp"].to_numpy(), refits)
    snapshots = fit_blocks(
        table.with_columns(label=code),
        cuts,
        lambda edges, _: mf._fit(Edges(edges.user, edges.item, values[edges.label]), items),
        "factorisation",
    )
    walked = replace(WalkRows.from_log(rows), label=values[code])
    chance = np.nan_to_num(mf.chances(walked, snapshots), nan=float(values[code].mean()))
    logits = np.log(chance) - np.log1p(-chance)
    return {"means": np.stack(means, axis=1), "mf": logits[:, None]}


def study(config: Path) -> list[dict[str, Any]]:
    """Rows of the table for one data configuration."""
    # 1. features that every log gets, and those of ratings
    data = data_of(config)
    split = data.split
    rows = split.rows
    labels = train_labels(rows)
    base = float(labels.mean())
    targets = {name: targets_of(rows, name) for name in SPLITS}
    known = {
        name: feature_matrix(targets_table(rows, data.retrieved, name), base)
        for name in SPLITS
    }
    parts = rated(rows, split.interactions.items.height, data.refits)
    # 2. both models with every part
    scores: dict[str, dict[str, F64]] = {}
    for name, chosen in {"": (), "means": ("means",), "mf": ("mf",), "both": parts}.items():
        x = {
            s: np.hstack(
                [known[s], *(parts[p][targets[s]["row_id"].to_numpy()] for p in chosen)]
            )
            for s in SPLITS
        }
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
