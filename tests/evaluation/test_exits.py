"""What a result file says of a score table, on a hand-made one: what is chosen where, and the differences' arithmetic.

Every user has the same four rows in each part (each fold of validation, and test): labels 1, 1, 0, 0 and the
same scores. So an AUC counts 4 pairs, and resampling users cannot move it: every interval has no width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from project.data.protocol import FOLDS, ROLES, SPLITS
from project.evaluation.baselines import Baseline
from project.evaluation.result import (
    choose_exit,
    comparison,
    exit_rows,
)
from project.run import score_table

PARTS = [("valid", "select"), ("valid", "tune"), ("valid", "certify"), ("test", None)]
USERS = 3  # of each part
LABELS = [1, 1, 0, 0]
# scores of the four rows and their AUC: pairs in the right order of 4, ties half
PERFECT = [4.0, 3.0, 2.0, 1.0]  # 1
GOOD = [4.0, 2.0, 3.0, 1.0]  # 3/4
FAIR = [2.0, 2.0, 2.0, 1.0]  # 1 + 1 + 1/2 + 1/2 = 3/4, by ties
COIN = [1.0, 1.0, 1.0, 1.0]  # 1/2
BAD = [1.0, 3.0, 2.0, 4.0]  # 1/4
# part (select, tune, certify or test) -> scores of a user's four rows
Scores = dict[str, list[float]]


def everywhere(scores: list[float], **but: list[float]) -> Scores:
    return {"select": scores, "tune": scores, "certify": scores, "test": scores} | but


def split_rows() -> pl.DataFrame:
    """Targets of all parts, and one context row first, so that a row id is not a position among the targets."""
    rows: list[dict[str, Any]] = [
        {
            "row_id": 0,
            "user": 0,
            "label": 1,
            "split": "train",
            "fold": None,
            "role": "context",
        }
    ]
    for k, (split, fold) in enumerate(PARTS):
        for user in range(USERS):
            for label in LABELS:
                about = {
                    "user": k * USERS + user,
                    "label": label,
                    "split": split,
                    "fold": fold,
                }
                rows.append({"row_id": len(rows)} | about | {"role": "target"})
    kinds = {"split": pl.Enum(SPLITS), "fold": pl.Enum(FOLDS), "role": pl.Enum(ROLES)}
    return pl.DataFrame(rows, schema_overrides=kinds)


ROWS = split_rows()
TARGETS = ROWS.filter(pl.col("role") == "target")


def spread(scores: Scores) -> np.ndarray:
    """A score for every target, in their order."""
    return np.concatenate([scores[fold or split] * USERS for split, fold in PARTS])


def table(exits: dict[int, Scores], rows: pl.DataFrame = TARGETS) -> pl.DataFrame:
    columns = {c: rows[c] for c in ("row_id", "user", "split", "fold", "label")}
    return score_table(
        columns, np.stack([spread(s) for s in exits.values()], axis=1), list(exits)
    )


def baseline(name: str, scores: Scores) -> Baseline:
    columns = TARGETS.select("row_id", pl.col("split").cast(pl.String))
    return Baseline(name, columns.with_columns(logit=pl.Series(spread(scores))))


def compared(
    exits: dict[int, Scores],
    baselines: list[Baseline],
    reported: str,
    chosen: int | None,
    rows: pl.DataFrame = ROWS,
) -> dict[str, Any]:
    scores = table(exits, rows.filter(pl.col("role") == "target"))
    return dict(comparison(scores, rows, baselines, reported, chosen))


def flipped(rows: pl.DataFrame, *parts: str) -> pl.DataFrame:
    """The rows with the answers of some parts turned round."""
    inside = (
        pl.col("fold")
        .cast(pl.String)
        .fill_null(pl.col("split").cast(pl.String))
        .is_in(parts)
    )
    return rows.with_columns(
        label=pl.when(inside).then(1 - pl.col("label")).otherwise("label").cast(pl.Int8)
    )


def test_exit_is_chosen_on_tune() -> None:
    """The exit that is best on tune is chosen though another is perfect everywhere else, and whatever happens there.

    Layers 2 and 9 are level at 3/4, by ranks and by ties: 2, the cheaper, is chosen. A tune fold without rows, or with
    one class, chooses nothing instead of the first exit.
    """
    exits = {1: everywhere(PERFECT, tune=BAD), 2: everywhere(BAD, tune=GOOD)}
    assert choose_exit(table(exits)) == 2
    assert choose_exit(table(exits, flipped(TARGETS, "select", "certify", "test"))) == 2
    assert choose_exit(table(exits, flipped(TARGETS, "tune"))) == 1
    assert (
        choose_exit(table({2: everywhere(GOOD), 9: everywhere(FAIR), 12: everywhere(COIN)}))
        == 2
    )
    elsewhere = (pl.col("fold") != "tune").fill_null(True)
    for keep in (elsewhere, elsewhere | (pl.col("label") == 1)):
        assert choose_exit(table(exits).filter(keep)) is None


def test_exit_rows() -> None:
    """One row an exit, in order of depth, of the named part only: 3 users of 4 rows, AUC 3/4 and 1/4."""
    scores = table({1: everywhere(COIN, tune=GOOD), 5: everywhere(COIN, tune=BAD)})
    rows = exit_rows(scores, "valid", "tune")
    assert [(r["layer"], r["split"], r["fold"], r["n"], r["auc"]) for r in rows] == [
        (1, "valid", "tune", 12, 0.75),
        (5, "valid", "tune", 12, 0.25),
    ]
    assert rows[0]["auc_interval"] == [0.75, 0.75]
    assert rows[0]["uauc"] == {"value": 0.75, "users": 3}
    (whole, _) = exit_rows(scores, "valid", draws=0)
    assert (whole["n"], whole["fold"], whole["auc_interval"]) == (36, None, None)


BASELINES = [
    # best on test, which must not matter
    baseline("item_rate", everywhere(COIN, test=PERFECT)),
    baseline("lr_rates", everywhere(COIN, test=BAD)),
    baseline("gbdt_features", everywhere(FAIR, test=COIN)),  # best on tune
]


def test_differences() -> None:
    """Test: exits of AUC 1/4, 3/4 and 1 minus the 1/2 of the baseline that is best by tune; no width."""
    result = compared(
        {1: everywhere(BAD), 4: everywhere(GOOD), 9: everywhere(PERFECT)},
        BASELINES,
        "test",
        4,
    )
    assert (result["best_baseline"], result["chosen_exit"]) == ("gbdt_features", 4)
    assert result["baseline_difference"] == {
        "baseline": "gbdt_features",
        "value": 0.25,
        "interval": [0.25, 0.25],
    }
    assert [(r["layer"], r["auc"]) for r in result["exits"]] == [
        (1, 0.25),
        (4, 0.75),
        (9, 1.0),
    ]
    found = [row["baseline_difference"] for row in result["exits"]]
    assert [(d["baseline"], d["value"]) for d in found] == [
        ("gbdt_features", v) for v in (-0.25, 0.25, 0.5)
    ]
    shown = [(f["name"], f["split"], f["n"], f["auc"]) for f in result["baselines"]]
    expected = {"item_rate": 1.0, "lr_rates": 0.25, "gbdt_features": 0.5}
    assert shown == [(name, "test", 12, value) for name, value in expected.items()]
    nothing = compared({4: everywhere(GOOD)}, BASELINES, "test", None)
    assert nothing["baseline_difference"] is None


def test_certify_and_select_are_not_read() -> None:
    """Answers of certify and test can be turned round: what is said of validation stays, word for word.

    Those of select decide the baselines' calibration, and so log losses after it, but nothing else.
    """
    exits = {1: everywhere(PERFECT, tune=FAIR), 4: everywhere(BAD, tune=GOOD)}
    expected = compared(exits, BASELINES, "valid", 4)
    assert (
        compared(exits, BASELINES, "valid", 4, flipped(ROWS, "certify", "test")) == expected
    )
    assert compared(exits, BASELINES, "valid", 4, flipped(ROWS, "tune")) != expected
    select = compared(exits, BASELINES, "valid", 4, flipped(ROWS, "select"))
    assert select != expected
    for found in (select, expected):
        for row in found["baselines"]:
            del row["calibrated"]
    assert select == expected


def test_rows_are_matched_by_row_id() -> None:
    exits = {4: everywhere(GOOD)}
    scores = table(exits).sample(fraction=1.0, shuffle=True, seed=0)
    shuffled = comparison(scores, ROWS, BASELINES, "test", 4)
    ordered = compared(exits, BASELINES, "test", 4)
    assert shuffled["baseline_difference"] == ordered["baseline_difference"]
