"""What context columns and users' attributes are worth: a generated log of clicks, whose truth is known.

The table has the AUC on test that the true chances reach, that of boosting on all raw columns (scikit-learn, none of
this project's features), of exit 0 and of the best baseline, with the columns and without.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from sklearn.ensemble import HistGradientBoostingClassifier

from project.data.logs import TableLogs
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.evaluation.baselines import best_baseline, fit_baselines, targets_of
from project.evaluation.networks import network_baselines, networks_installed
from project.metrics import auc
from project.run import SCHEMA_VERSION, write_json
from research.generate import generate_clicks, reachable_auc, run_generate

ABOUT = (
    "What context columns and users' attributes are worth on a generated log of clicks, whose chances are known. Raw "
    "columns: scikit-learn's boosting, without this project's features. The best baseline is chosen on tune."
)
CATEGORIES = ("device", "placement", "country", "category")
NUMBERS = ("hour", "price", "age", "user_id", "item_id")


def measure(folder: Path, rows: int = 15_000, seed: int = 0) -> dict[str, Any]:
    """Make the log in a folder, and score it with and without its columns."""
    run_generate(
        [str(folder), "--rows", str(rows), "--seed", str(seed), "--context", "--users"]
    )
    log, items, users = generate_clicks(rows, seed)
    raw = log.join(items, on="item_id", maintain_order="left")
    raw = raw.join(users, on="user_id", maintain_order="left")
    found = list[dict[str, Any]]()
    for with_columns in (True, False):
        data = InteractionData(
            _logs(folder, with_columns), protocol=Protocol(minimum_history=5)
        )
        split = data.split
        kinds = split.interactions.columns
        baselines = fit_baselines(split.rows, data.retrieved, kinds=kinds)
        if networks_installed():
            baselines += network_baselines(split, data.retrieved)
        test = targets_of(split.rows, "test")
        label = test["label"].to_numpy()
        if with_columns:
            # rows of both tables are in order of time, user and item
            ordered = raw.sort("timestamp", "user_id", "item_id")
            chance = ordered["chance"].to_numpy()[test["row_id"].to_numpy()]
            found.append(
                {"scores": "reachable: the true chances", "auc": reachable_auc(chance)}
            )
            train = targets_of(split.rows, "train")
            found.append(
                {"scores": "boosting on raw columns", "auc": _raw(ordered, train, test)}
            )
        columns = "with columns" if with_columns else "context: []"
        best = best_baseline(baselines, split.rows)
        named = {baseline.name: baseline for baseline in baselines}
        exit_0 = named["lr_context" if kinds else "lr_text"]
        assert best is not None
        found += [
            {"scores": f"{name}, {columns}", "auc": auc(of.logits(test["row_id"]), label)}
            for name, of in (("exit 0", exit_0), (f"best baseline {best.name}", best))
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "protocol": {"name": split.protocol.name, "hash": "generated"},
        "about": f"{ABOUT} {rows:,} rows, seed {seed}; AUC on {len(label):,} rows of test.",
        "rows": found,
    }


def _logs(folder: Path, with_columns: bool) -> TableLogs:
    further: dict[str, Any] = {
        "context": ["device", "placement", "hour", "price"],
        "users": str(folder / "users.parquet"),
    }
    return TableLogs(
        str(folder / "interactions.parquet"),
        str(folder / "items.parquet"),
        **(further if with_columns else {}),
    )


def _raw(rows: pl.DataFrame, train: pl.DataFrame, test: pl.DataFrame) -> float | None:
    """AUC on test of boosting that reads nothing but the columns as they stand."""
    codes = rows.select(
        *(
            pl.col(name).cast(pl.Categorical).to_physical().cast(pl.Float64)
            for name in CATEGORIES
        ),
        *(pl.col(name).cast(pl.Float64) for name in NUMBERS),
    ).to_numpy()
    at = [part["row_id"].to_numpy() for part in (train, test)]
    model = HistGradientBoostingClassifier(
        categorical_features=[*range(len(CATEGORIES))], random_state=0
    ).fit(codes[at[0]], train["label"].to_numpy())
    return auc(np.asarray(model.decision_function(codes[at[1]])), test["label"].to_numpy())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    for row in result["rows"]:
        print(row)
    write_json(Path(sys.argv[1] if len(sys.argv) > 1 else "results/context.json"), result)
