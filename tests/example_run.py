"""A run folder as a trained, calibrated, tested and benchmarked run would leave it; its scores are simulated.

Every number of the result files is computed from the scores as the commands compute it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.data.protocol import FOLDS, ROLES, SPLITS
from project.evaluation.baselines import AgainstBaseline, Baseline
from project.evaluation.result import PlannedRows, adaptive_summary, comparison, part_of
from project.exits.budget import calibrate
from project.exits.criteria import Consistency
from project.exits.plan import ExitSettings
from project.metrics import probabilities
from project.run import result_head, score_table, write_json

LAYERS = (0, 2, 4, 6)
MANIFEST = {
    "name": "global_time-80-10-10-h5",
    "hash": "f45a216bc7435a87",
    "counts": {"train": 75599, "valid": 9447, "test": 9453},
    "folds": {
        "select": {"targets": 1281, "users": 32, "positives": 684},
        "tune": {"targets": 3943, "users": 87, "positives": 2261},
        "certify": {"targets": 4223, "users": 78, "positives": 2422},
    },
    "cold_user_share": {"valid": 0.8384, "test": 0.8538},
    "cold_item_share": {"valid": 0.0055, "test": 0.0149},
}


def simulated(n: int) -> tuple[pl.DataFrame, pl.DataFrame, list[Baseline]]:
    """Targets, their score table and baselines: n rows of validation and n of test; deeper heads see the truth
    better.
    """
    rng = np.random.default_rng(0)
    truth, users = 2 * rng.normal(size=2 * n), n // 20
    split = np.repeat(["valid", "test"], n)
    user = rng.integers(0, users, 2 * n) + users * (split == "test")
    about = {
        "row_id": np.arange(2 * n),
        "user": user,
        "split": split,
        "fold": np.where(
            split == "test",
            None,
            np.array(["select", "tune", "tune", "tune", "certify"])[user % 5],
        ),
        "label": (rng.random(2 * n) < probabilities(truth)).astype(int),
    }
    hard = rng.random(2 * n) < 0.5
    noise = np.cumsum(
        (0.1 + 3 * hard) * rng.normal(size=(4, 2 * n)) * [[0.01], [0.2], [0.3], [0.5]],
        axis=0,
    )[::-1]
    tokens = {"target_tokens": np.full(2 * n, 25), "stream_tokens": np.full(2 * n, 700)}
    scores = score_table(
        {**about, **tokens, "logit_0": truth + noise[0]},
        (truth + noise[1:]).T,
        list(LAYERS[1:]),
    )
    kinds = {"split": pl.Enum(SPLITS), "fold": pl.Enum(FOLDS), "role": pl.Enum(ROLES)}
    rows = pl.DataFrame({**about, "role": ["target"] * 2 * n}, schema_overrides=kinds)
    baselines = [
        Baseline(
            name,
            pl.DataFrame(
                {
                    "row_id": about["row_id"],
                    "split": split,
                    "logit": 0.3 * truth + rng.normal(size=2 * n),
                }
            ),
        )
        for name in ("item_rate", "lr_rates", "gbdt_features")
    ]
    return rows, scores, baselines


def results(rows: int = 400) -> dict[str, dict[str, Any]]:
    """Result files by name, of one run.

    Args:
        rows: Rows of test; validation has as many in its three folds.
    """
    targets, scores, baselines = simulated(rows)
    features = np.random.default_rng(1).normal(size=(2 * rows, 3))
    settings = ExitSettings(criterion=Consistency(), max_auc_drop=0.01, alpha=0.5)
    valid = scores.filter(pl.col("split") == "valid")
    plans, document = calibrate(valid, features[:rows], settings, MANIFEST["hash"])
    files: dict[str, dict[str, Any]] = {
        "calibrate": dict(document),
        "benchmark": {"rows": benchmark_rows(6)},
    }
    for command, name, fold in (("fit", "valid", "tune"), ("test", "test", None)):
        part = part_of(scores, name, fold)
        planned = PlannedRows(plans.plan, part, features[part["row_id"]], False, draws=100)
        found = comparison(scores, targets, baselines, name, LAYERS[-1])
        for row in found["exits"] if command == "test" else []:  # as before calibration
            row["calibrated"] = planned.calibrated_metrics(row["layer"])
            row["auc_leaving"] = planned.auc_leaving(row["layer"])
        best = next(
            baseline for baseline in baselines if baseline.name == found["best_baseline"]
        )
        against = AgainstBaseline(best, part["row_id"].to_numpy(), targets)
        adaptive = adaptive_summary(plans, planned, name, against)
        files[command] = found | {
            "adaptive": None,
            "certificate": None,
            "with_exit_0": None,
            "slices": [],
            "own_metric": None,
            "warnings": [],
            "not_calibrated": None,
            "stage_seconds": {"retrieved": 25.0, command: 75.1},
        }
        files["calibrate" if command == "fit" else command]["adaptive"] = adaptive
    head = {
        command: result_head(command, MANIFEST, "runs/quickstart/version_0/config.yaml", 0)
        for command in files
    }
    return {command: head[command] | content for command, content in files.items()}


def benchmark_rows(depth: int) -> list[dict[str, Any]]:
    """The `rows` of a benchmark result."""
    common = {
        "candidates": 64, "prefix_cached": False, "history": None, "at_once": 1, "dtype": "float32", "requests": 8,
        "auc": 0.77, "overlap": None, "ndcg": None, "hits": None, "static_exit": False,
    }  # fmt: skip
    full = {
        "engine": "packed", "policy": "full", "p50_ms": 470.0, "mean_depth": float(depth),
        "measured_speedup": 1.0, "measured_speedup_interval": [1.0, 1.0], "token_layer_speedup": 1.0,
        "speedup_over_static": {"value": 0.66, "interval": None},
    }  # fmt: skip
    early = {
        "engine": "early_exit", "policy": "budget: consistency", "p50_ms": 251.0, "mean_depth": 3.1,
        "measured_speedup": 1.86, "measured_speedup_interval": [1.71, 2.02], "token_layer_speedup": 1.92,
        "speedup_over_static": {"value": 1.23, "interval": None},
    }  # fmt: skip
    return [common | full, common | early]


def write_run(folder: Path, files: dict[str, dict[str, Any]]) -> Path:
    """Write results into a run folder."""
    for name, content in files.items():
        write_json(folder / "results" / f"{name}.json", content)
    return folder
