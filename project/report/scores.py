"""The report's table of exits and floors: each exit and what the plan makes of them, minus the best floor.

Unusual here: the chosen exit stands there three times: as trained, and calibrated with counting and without, so that
what the LLM knows and what counting adds are not taken for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from project.report.tables import ABSENT, exit_label, percent, rows_of, value_cell
from project.tables import difference_cell, interval, markdown_table, number

Row = Mapping[str, Any]

PRIORS = {"counting": "calibrated, prior counting", "none": "calibrated, prior none"}


def scores_table(result: Row, split: str, fold: str | None) -> str:
    """A row for every exit, the chosen one by prior, the adaptive score and every floor.

    Columns that not every result has (differences, calibrated log loss, who leaves) are left out where no row has them.

    Args:
        result: `exits`, `floors` and maybe `adaptive`, `chosen_exit`, `chosen_exit_by_prior`, `best_floor`.
        split: Which rows.
        fold: Which rows.
    """
    rows = [(exit_label(row, result), row) for row in rows_of(result.get("exits", []), split, fold)]
    rows += [(name, _as_emitted(row)) for name, row in (*_by_prior(result), *_adaptive(result))]
    for row in rows_of(result.get("floors", []), split, fold):
        best = " (best floor)" if row["name"] == result.get("best_floor") else ""
        rows.append((f"floor {row['name']}{best}", row))
    columns = {header: [cell(row) for _, row in rows] for header, cell in COLUMNS.items()}
    shown = {h: c for h, c in columns.items() if h not in OPTIONAL or set(columns[OPTIONAL[h]]) - {ABSENT}}
    lines = [[name, *(cells[k] for cells in shown.values())] for k, (name, _) in enumerate(rows)]
    return markdown_table(["scores", *shown], lines)


def prior_line(result: Row) -> str:
    """What counting as exit 0 adds to the chosen exit; empty where that was not compared."""
    found = result.get("chosen_exit_by_prior") or {}
    if "difference" not in found:
        return ""
    auc, log_loss = difference_cell(found["difference"]), difference_cell(found["difference"]["log_loss"])
    return (
        f"Exit {found['layer']} with counting in its calibration minus without: AUC {auc}, log loss {log_loss} "
        f"(paired, users resampled)"
    )


def calibrated_line(result: Row) -> str:
    """What "calibrated log loss" is after; empty where there is none."""
    if not any("calibrated" in row for key in ("exits", "floors") for row in result.get(key, [])):
        return ""
    return (
        "Calibrated log loss: a floor's after an offset and a slope fitted on the fold select; an exit's after the "
        "plan's calibration, fitted on the fold tune. Differences in log loss are to the calibrated floor."
    )


def _by_prior(result: Row) -> list[tuple[str, Row]]:
    found = result.get("chosen_exit_by_prior") or {}
    return [(f"exit {found['layer']}, {words}", found[key]) for key, words in PRIORS.items() if key in found]


def _adaptive(result: Row) -> list[tuple[str, Row]]:
    adaptive = result.get("adaptive") or {}
    without = adaptive.get("without_exit_0")
    named = (("adaptive", adaptive), ("adaptive without exit 0", without))
    return [(name, row) for name, row in named if row]


def _as_emitted(row: Row) -> Row:
    """A row whose scores are calibrated ones: its log loss is after calibration."""
    return {**row, "calibrated": {key: row[key] for key in ("log_loss",) if key in row}}


def _difference(row: Row) -> str:
    return difference_cell(row["floor_difference"]) if "floor_difference" in row else ABSENT


def _log_loss_difference(row: Row) -> str:
    found = row.get("floor_difference", {})
    return difference_cell(found["log_loss"]) if "log_loss" in found else ABSENT


COLUMNS: dict[str, Callable[[Row], str]] = {
    "AUC": lambda row: value_cell(row, "auc"),
    "95 % interval": lambda row: interval(row["auc_interval"]) if "auc_interval" in row else ABSENT,
    "minus best floor": _difference,
    "log loss": lambda row: value_cell(row, "log_loss"),
    "calibrated log loss": lambda row: value_cell(row.get("calibrated", {}), "log_loss"),
    "minus best floor's": _log_loss_difference,
    "Brier": lambda row: value_cell(row, "brier"),
    "ECE": lambda row: value_cell(row, "ece"),
    "user-AUC": lambda row: number(row["uauc"]["value"]) if row.get("uauc") else ABSENT,
    "n": lambda row: f"{row['n']:,}" if "n" in row else ABSENT,
    "share leaving": lambda row: percent(row["exit_share"]) if "exit_share" in row else ABSENT,
    "AUC of those": lambda row: value_cell(row, "auc_leaving"),
}
OPTIONAL = {
    "minus best floor": "minus best floor",
    "calibrated log loss": "calibrated log loss",
    "minus best floor's": "minus best floor's",
    "share leaving": "share leaving",
    "AUC of those": "share leaving",
}
"""Column -> the one that a row must have something in for it to be shown."""
