"""Whether a tuned boosted tree makes a better baseline: `python -m research.tuned_boosting CONFIG...`.

Needs `pip install lightgbm`. LightGBM on the features of gbdt_text: the number of trees by early stopping and the other
settings by AUC on tune; writes results/tuned_boosting.json. Settings and trees are chosen on the fold that the best
baseline is chosen on, so its tune AUC is an upper one.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from project.evaluation.baselines import boosting, targets_of, targets_table, train_labels
from project.evaluation.bootstrap import UserBootstrap
from project.features import feature_matrix
from project.metrics import auc
from research.text_baselines import SPLITS, data_of, study_all

OUT = Path(__file__).parents[1] / "results" / "tuned_boosting.json"
GRID = {
    "num_leaves": (7, 15, 31, 63),
    "min_child_samples": (20, 100, 500),
    "reg_lambda": (0.0, 10.0),
}
FIXED = {
    "learning_rate": 0.03,
    "n_estimators": 2000,
    "subsample": 0.8,
    "subsample_freq": 1,
    "colsample_bytree": 0.8,
    "random_state": 0,
    "n_jobs": 1,
    "verbose": -1,
}
PATIENCE = 50  # trees without a better AUC on tune
ABOUT = (
    "LightGBM on the features of gbdt_text, the best of 24 settings with as many trees, both by AUC on tune. Minus "
    "gbdt_text: scikit-learn's boosting with one setting for all logs; paired, users resampled, 95 %."
)


def study(config: Path) -> list[dict[str, Any]]:
    """Rows of the table for one data configuration."""
    import lightgbm

    # 1. features and labels of the splits
    data = data_of(config)
    rows = data.split.rows
    labels = train_labels(rows)
    base = float(labels.mean())
    features = {
        split: feature_matrix(targets_table(rows, data.retrieved, split), base)
        for split in SPLITS
    }
    tune = (targets_of(rows, "valid")["fold"] == "tune").to_numpy()
    tune_labels = targets_of(rows, "valid", "tune")["label"].to_numpy()
    tuned = (features["valid"][tune], tune_labels)
    # 2. every setting, stopped on tune
    best: tuple[float, Any, dict[str, Any]] | None = None
    for values in product(*GRID.values()):
        setting = dict(zip(GRID, values, strict=True))
        model = lightgbm.LGBMClassifier(**FIXED, **setting)
        model.fit(
            features["train"],
            labels,
            eval_set=[tuned],
            eval_metric="auc",
            callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
        )
        reached = auc(model.predict(tuned[0], raw_score=True), tune_labels)
        if reached is not None and (best is None or reached > best[0]):
            best = (reached, model, setting | {"trees": model.best_iteration_})
    assert best is not None
    # 3. beside the baseline, on tune and on test
    plain = boosting().fit(features["train"], labels)
    row: dict[str, Any] = {"log": config.stem, "protocol": data.split.hash}
    row["chosen"] = ", ".join(f"{name} {value:g}" for name, value in best[2].items())
    for part, split, fold in (("tune", "valid", "tune"), ("test", "test", None)):
        x = features[split][tune] if fold else features[split]
        targets = targets_of(rows, split, fold)
        truth = targets["label"].to_numpy()
        scores = best[1].predict(x, raw_score=True)
        bootstrap = UserBootstrap(targets["user"].to_numpy())
        gap = bootstrap.difference_interval(scores, plain.decision_function(x), truth)
        row |= {part: auc(scores, truth), f"{part}_minus_gbdt_text": gap}
    print(row, flush=True)
    return [row]


if __name__ == "__main__":
    study_all(sys.argv[1:], study, OUT, ABOUT)
