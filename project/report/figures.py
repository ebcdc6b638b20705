"""Which pictures a run's report shows: figures of project.report.plots, or the line that says why one is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from project.artefacts import exit_layers_of
from project.errors import DataError
from project.evaluation.metrics import probabilities
from project.report.plots import Floats, depth_figure, exit_share_figure, pareto_figure, reliability_figure
from project.report.run import Run
from project.report.tables import chosen_policy, rows_of


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: File name without .png.
        alt: What it shows, for those who cannot see it.
        caption: Its caption; where there is no figure, why not.
        figure: The figure, None where it cannot be drawn.
    """

    name: str
    alt: str
    caption: str
    figure: Figure | None


def pictures(run: Run) -> dict[str, Picture]:
    """All four pictures of a report by name: pareto, exit_share, reliability, depth."""
    found = [_pareto(run), _exit_share(run), _reliability(run), _depth(run)]
    return {picture.name: picture for picture in found}


def _pareto(run: Run) -> Picture:
    alt = "AUC against token-layers for every criterion, fixed depth, random and oracle"
    if not run.calibrate.get("policies"):
        return Picture("pareto", alt, "", None)  # the section says what is missing
    caption = (
        "AUC on the tune fold against token-layers relative to full depth. Squares: the same depth for every row, "
        "joined by what a budget buys. The oracle knows the full model's score: an upper bound, not a policy."
    )
    return Picture("pareto", alt, caption, pareto_figure(run.calibrate, run.floor("valid", "tune")))


def _exit_share(run: Run) -> Picture:
    alt = "share of rows that leave at each exit"
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    if not any(row.get("exit_share") is not None for row in exits):
        return Picture("exit_share", alt, "", None)  # the first section says what is missing
    depth = (run.reported.get("adaptive") or {}).get("mean_depth")
    return Picture("exit_share", alt, f"Who leaves where, {run.rows}.", exit_share_figure(exits, depth))


def _depth(run: Run) -> Picture:
    alt = "AUC by depth with intervals, and the best floor"
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    if not exits:
        return Picture("depth", alt, run.missing("No exits were scored.", "fit"), None)
    adaptive = run.reported.get("adaptive")
    figure = depth_figure(exits, run.floor(run.split, run.fold), adaptive, run.rows)
    return Picture(
        "depth", alt, f"AUC by depth, {run.rows}; bars are 95 % intervals, users resampled.", figure
    )


def _reliability(run: Run) -> Picture:
    alt = "observed share of positives against emitted probability, per exit"
    path = run.folder / "scores" / f"{run.split}.parquet"
    verb = "test" if run.split == "test" else "validate"
    if not path.is_file():
        text = run.missing(f"No reliability diagrams: scores/{path.name} is missing.", verb)
        return Picture("reliability", alt, text, None)
    table = pl.read_parquet(path, glob=False)
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    reason = _unusable(table, run, exits)
    if reason:
        text = run.missing(f"No reliability diagrams: scores/{path.name} {reason}.", verb)
        return Picture("reliability", alt, text, None)
    policy = chosen_policy(run.calibrate)
    layers = [row["layer"] for row in exits] or exit_layers_of(table)
    part = _rows(table, run.split, run.fold)
    scores = reliability_scores(part, layers, policy.get("calibration") or {}, f"scores/{path.name}")
    kind = "calibrated" if policy else "uncalibrated"
    caption = f"Reliability of {kind} probabilities on {run.rows}, ten bins of equal mass."
    if run.fold == "tune" and policy:
        caption += " The calibration was fitted on these rows."
    if policy and "adaptive" not in scores:
        caption += " The score table holds no adaptive scores."
    return Picture("reliability", alt, caption, reliability_figure(scores))


def reliability_scores(
    rows: pl.DataFrame,
    layers: list[int],
    calibration: dict[str, dict[str, float]],
    name: str = "the score table",
) -> dict[str, tuple[Floats, Floats]]:
    """Panels of `plots.reliability_figure` from rows of a score table: "exit k" and maybe "adaptive".

    Args:
        rows: Of a score table; `adaptive_logit` (calibrated) is there once a policy ran.
        layers: Exits to show, 0 for counting.
        calibration: By layer {`logit`, `prior`, `offset`}: score_k = logit * logit_k + prior * logit_0 + offset. A
            layer that is not in it keeps its own logit.
        name: The table's name in messages.

    Raises:
        DataError: NaN or infinite logits.
    """
    labels = rows["label"].to_numpy().astype(np.float64)
    found = {}
    for layer in layers:
        logits = _logits(rows, f"logit_{layer}", name)
        if terms := calibration.get(str(layer)):
            prior = terms.get("prior", 0.0)
            zero = prior * _logits(rows, "logit_0", name) if prior and layer else 0.0
            logits = terms["logit"] * logits + zero + terms["offset"]
        found[f"exit {layer}"] = (probabilities(logits), labels)
    if "adaptive_logit" in rows.columns and rows["adaptive_logit"].null_count() == 0:
        found["adaptive"] = (probabilities(_logits(rows, "adaptive_logit", name)), labels)
    return found


def _rows(table: pl.DataFrame, split: str, fold: str | None) -> pl.DataFrame:
    part = table.filter(pl.col("split") == split)
    return part if fold is None else part.filter(pl.col("fold") == fold)


def _unusable(table: pl.DataFrame, run: Run, exits: list[Any]) -> str:
    """Why a score table does not belong to the reported rows; empty where it does."""
    wanted = ["split", "fold", "label", *(f"logit_{row['layer']}" for row in exits)]
    lacking = [c for c in wanted if c not in table.columns]
    if lacking:
        return f"has no column {', '.join(lacking)}"
    rows = len(_rows(table, run.split, run.fold))
    if not rows:
        return f"holds no rows of {run.rows}"
    counts = {row["n"] for row in exits}
    return f"holds {rows:,} rows, the result {max(counts):,}" if counts and counts != {rows} else ""


def _logits(part: pl.DataFrame, column: str, name: str) -> Floats:
    values = part[column].to_numpy().astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(
            f"{name}: {column} is empty, NaN or infinite in places: the model diverged or the file is broken."
        )
    return values
