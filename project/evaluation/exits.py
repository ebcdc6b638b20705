"""From a score table to the numbers of a result file: per exit, beside the best floor, with intervals.

The exit and the floor that are compared are both chosen on the `tune` fold of validation, never on the split that is
reported. Every exit is compared, not the chosen one alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.artefacts import exit_layers_of
from project.data.splits import SplitInteractions
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import auc, head_metrics
from project.floors.against import AgainstFloor
from project.floors.quick import Floor, best_floor, floor_rows

Floats = NDArray[np.float64]

DRAWS = 1000  # resamples of users behind every interval


def exit_rows(
    scores: pl.DataFrame, split: str, fold: str | None = None, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """The `exits` list of a result file for one split, or one fold of validation.

    Args:
        scores: A score table.
        split: valid or test.
        fold: select or tune; None: the whole split.
        draws: Resamples of users behind `auc_interval`; 0 leaves the interval out.
    """
    part = part_of(scores, split, fold)
    labels, users = part["label"].to_numpy(), part["user"].to_numpy()
    bootstrap = UserBootstrap(users, draws) if draws else None
    rows = []
    counting = [0] if len(part) and not part["logit_0"].null_count() else []
    for layer in [*counting, *exit_layers_of(scores)]:
        logits = part[f"logit_{layer}"].to_numpy().astype(np.float64)
        row = {"layer": layer, "split": split} | ({"fold": fold} if fold else {})
        row |= head_metrics(logits, labels, users)
        if bootstrap:
            row["auc_interval"] = bootstrap.auc_interval(logits, labels)
        rows.append(row)
    return rows


def choose_exit(scores: pl.DataFrame) -> int | None:
    """The exit layer of highest AUC on the `tune` fold (the shallowest of equals); None where that is undefined."""
    tune = part_of(scores, "valid", "tune")
    labels = tune["label"].to_numpy()
    layers = exit_layers_of(scores)
    values = {k: auc(tune[f"logit_{k}"].to_numpy().astype(np.float64), labels) for k in layers}
    defined = {k: v for k, v in values.items() if v is not None}
    return max(defined, key=lambda k: defined[k]) if defined else None


def comparison(
    scores: pl.DataFrame,
    split: SplitInteractions,
    floors: list[Floor],
    reported: str,
    chosen_exit: int | None,
) -> dict[str, Any]:
    """Everything a fit, validate or test result says about scores.

    Args:
        scores: A score table that holds the reported split.
        split: The interactions it is about.
        floors: Fitted floors, and kept ones.
        reported: valid or test. Of validation the tune fold is shown; the certify fold is for certificates alone.
        chosen_exit: The exit to compare with the best floor, see `choose_exit`.

    Returns:
        `exits`, each minus the best floor under `floor_difference` (see `AgainstFloor.difference`), `chosen_exit`,
        `floors`, `best_floor`, and `floor_difference`, that of the chosen exit; `floor_differences` has it and the
        one to `lr_rates`. All paired, users resampled.
    """
    fold = "tune" if reported == "valid" else None
    best = best_floor(floors, split.rows)
    exits = exit_rows(scores, reported, fold)
    result: dict[str, Any] = {
        "exits": exits,
        "chosen_exit": chosen_exit,
        "floors": floor_rows(floors, split.rows, parts=[(reported, fold)]),
        "best_floor": best.name if best else None,
    }
    if best is None:
        return result
    part = part_of(scores, reported, fold)
    logits = {row["layer"]: part[f"logit_{row['layer']}"].to_numpy().astype(np.float64) for row in exits}
    rivals = [best, *(f for f in floors if f.name == "lr_rates" and f is not best)]
    against = [AgainstFloor(rival, part["row_id"].to_numpy(), split.rows, DRAWS) for rival in rivals]
    for row in exits:
        row["floor_difference"] = against[0].difference(logits[row["layer"]])
    if chosen_exit is not None:
        differences = [{"layer": chosen_exit} | a.difference(logits[chosen_exit]) for a in against]
        result |= {"floor_difference": differences[0], "floor_differences": differences}
    return result


def prior_rows(heads: Mapping[str, Floats], against: AgainstFloor) -> dict[str, Any]:
    """One exit with counting in its calibration and without: what the exit itself adds, and what counting adds to it.

    Args:
        heads: Prior (counting, none) -> (n,) calibrated logits of the exit, on the rows of `against`.
        against: The best floor on these rows.

    Returns:
        By prior the metrics, `auc_interval` and `floor_difference`; where there are both, `difference`, counting minus
        none: {`value`, `interval`, `log_loss` {`value`, `interval`}}.
    """
    draws, labels = against.bootstrap, against.labels
    found: dict[str, Any] = {
        prior: head_metrics(logits, labels, against.users)
        | {"auc_interval": draws.auc_interval(logits, labels), "floor_difference": against.difference(logits)}
        for prior, logits in heads.items()
    }
    if {"counting", "none"} <= heads.keys():
        pair = heads["counting"], heads["none"]
        found["difference"] = draws.difference_interval(*pair, labels)
        found["difference"]["log_loss"] = draws.log_loss_difference_interval(*pair, labels)
    return found


def part_of(scores: pl.DataFrame, split: str, fold: str | None) -> pl.DataFrame:
    """Rows of one split, or of one fold of validation, of a score table."""
    part = scores.filter(pl.col("split") == split)
    return part if fold is None else part.filter(pl.col("fold") == fold)
