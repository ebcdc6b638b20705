"""A run folder as a trained, calibrated, tested and benchmarked run would leave it, generated in memory.

Unusual here: scores are simulated (deeper heads see the truth with less noise), every number of the result files is
computed from them by project.metrics, so tables and pictures look like a real run's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from example_scores import Example, terms

from project.evaluation.bootstrap import UserBootstrap
from project.run import result_head, write_json, write_table

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
CERTIFICATE = {
    "risk": "score_drift",
    "epsilon": 0.05,
    "delta": 0.1,
    "n": 78,
    "unit": "user",
    "kind": "finite-sample",
    "bound": 0.0712,
    "estimate": 0.0311,
    "path_step": None,
    "passed": False,
    "users_needed": 210,
    "words": "Not passed: it is not shown that the mean score_drift over users is at most 0.05 (78 users).",
}


def results(
    rows: int = 900, layers: tuple[int, ...] = (0, 2, 4, 6), chosen: str = "consistency", seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, pl.DataFrame]]:
    """Result files by name, and score tables by split, of one run.

    Args:
        rows: Rows of test; the tune fold has half of them.
        layers: Heads, exit 0 first.
        chosen: The criterion of the policy.
        seed: Seed of the scores.
    """
    tune, test = Example("valid", rows // 2, layers, seed), Example("test", rows, layers, seed + 1)
    names = ("ratio", "consistency", "ratio_consistency", "learned")
    policies, thresholds = [], {}
    for name in names:
        path, levels = tune.pareto(name)
        allowed = [i for i, step in enumerate(path) if step["auc_drop"] <= 0.002]
        step = max(allowed, key=lambda i: -path[i]["cost"])
        thresholds[name] = levels[step]
        limits = {str(k): None if np.isinf(levels[step]) else float(levels[step]) for k in layers}
        calibration = {str(k): terms(k) for k in layers}
        policies.append(
            {
                "criterion": name,
                "mode": "budget",
                "thresholds": limits | {str(layers[-1]): "everyone"},
                "calibration": calibration,
                "pareto": path,
                "chosen_step": step,
            }
        )
    fixed = [tune.step(np.full(len(tune.label), k)) | {"layer": layer} for k, layer in enumerate(layers)]
    controls = [{"name": "fixed_depth", "pareto": fixed}]
    controls += [{"name": name, "pareto": tune.pareto(name)[0]} for name in ("random", "oracle")]
    left = {x.split: x.leave(chosen, thresholds[chosen]) for x in (tune, test)}
    best = max(step["auc"] for step in fixed)
    static_exit = next(step for step in fixed if step["auc"] >= best - 0.002)
    baselines = {"valid": tune.baselines("tune"), "test": test.baselines(None)}
    head = {
        command: result_head(command, MANIFEST, "runs/quickstart/version_0/config.yaml", 0)
        for command in ("fit", "test", "calibrate", "benchmark")
    }
    difference = UserBootstrap(test.user, 200).difference_interval(
        test.logits[:, -1], test.baseline, test.label
    )

    def adaptive(example: Example) -> dict[str, Any]:
        found = example.adaptive(left[example.split], static_exit["layer"])
        return found | {"without_exit_0": dict(found)}

    point = tune.step(left["valid"])
    exit_0 = {
        "exits": fixed,
        "criterion": chosen,
        "chosen": point,
        "never_enter_backbone": 0.173,
        "static_exit": static_exit["layer"],
    }
    files: dict[str, dict[str, Any]] = {
        "fit": head["fit"]
        | {"exits": tune.exits(None, "tune"), "chosen_exit": layers[-1], "baselines": baselines["valid"]}
        | {
            "best_baseline": "gbdt_features",
            "stage_seconds": {"retrieved": 25.0, "train": 1150.2, "validate": 75.1},
        },
        "calibrate": head["calibrate"]
        | {"layers": list(layers), "exit_0": True, "policies": policies, "controls": controls}
        | {
            "chosen": chosen,
            "mode": "budget",
            "budget": {"max_auc_drop": 0.002, "max_cost": None},
            "certificate": dict(CERTIFICATE),
        }
        | {
            "static_exit": {
                "layer": static_exit["layer"],
                "auc": static_exit["auc"],
                "cost": static_exit["cost"],
            }
        }
        | {"adaptive": adaptive(tune) | {"fold": "tune"}, "prefix_cached": False}
        | {
            "exit_0_rows": {
                "with_exit_0": exit_0,
                "without_exit_0": exit_0 | {"exits": fixed[1:], "never_enter_backbone": 0.0},
            }
        },
        "test": head["test"]
        | {"exits": test.exits(left["test"], None), "chosen_exit": layers[-1], "baselines": baselines["test"]}
        | {"best_baseline": "gbdt_features", "stage_seconds": {"test": 80.3, "baselines": 6.0}}
        | {"baseline_difference": {"layer": layers[-1], "baseline": "gbdt_features"} | difference}
        | {"adaptive": adaptive(test)},
        "benchmark": head["benchmark"] | {"rows": benchmark_rows(layers[-1])},
    }
    return files, {"valid": tune.table(left["valid"]), "test": test.table(left["test"])}


def benchmark_rows(depth: int) -> list[dict[str, Any]]:
    """The `rows` of a benchmark result."""
    common = {
        "candidates": 64, "prefix_cached": False, "history": None, "workload": "logged", "dtype": "float32", "requests": 8,
        "at_once": 1, "auc": 0.77, "gflops": 150.0, "gflops_ceiling": 200.0, "static_exit": False,
    }  # fmt: skip
    full = {
        "engine": "packed", "policy": "full", "requests_per_s": 2.1, "p50_ms": 470.0, "p95_ms": 610.0, "p99_ms": 622.0,
        "mean_depth": float(depth), "measured_speedup": 1.0, "measured_speedup_interval": [1.0, 1.0],
        "token_layer_speedup": 1.0, "speedup_over_static": {"value": 0.66}, "efficiency": 1.0,
    }  # fmt: skip
    early = {
        "engine": "early_exit", "policy": "budget: consistency", "requests_per_s": 3.9, "p50_ms": 251.0,
        "p95_ms": 402.0, "p99_ms": 410.0, "mean_depth": 3.1, "measured_speedup": 1.86,
        "measured_speedup_interval": [1.71, 2.02], "token_layer_speedup": 1.92, "speedup_over_static": {"value": 1.23},
        "efficiency": 0.97,
    }  # fmt: skip
    return [common | full, common | early]


def write_run(folder: Path, files: dict[str, dict[str, Any]], scores: dict[str, pl.DataFrame]) -> Path:
    """Write results and score tables into a run folder."""
    for name, content in files.items():
        write_json(folder / "results" / f"{name}.json", content)
    for name, table in scores.items():
        write_table(folder / "scores" / f"{name}.parquet", table)
    return folder
