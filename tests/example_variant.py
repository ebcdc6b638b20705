"""A run folder as `fit` of a variant leaves it, generated: three users in every fold, scores of a known worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.evaluation.result import exit_rows
from project.run import result_head, score_table, write_json, write_table

MANIFEST = {
    "name": "global_time",
    "hash": "f45a216bc7435a87",
    "counts": {"train": 90, "valid": 90, "test": 30},
}


def write_variant(
    run: Path,
    noise: float = 1.0,
    layers: tuple[int, ...] = (2, 4),
    protocol: str = MANIFEST["hash"],
    seed: int = 0,
) -> Path:
    """Write results/fit.json, results/calibrate.json and scores/valid.parquet.

    Args:
        run: The folder.
        noise: How far logits are from the truth; the deepest head has half of it.
        layers: Exit layers.
        protocol: Hash of the protocol.
        seed: Of the noise; truth and labels are always the same.
    """
    n, truth_rng, rng = 90, np.random.default_rng(9), np.random.default_rng(seed)
    truth = truth_rng.normal(size=n)
    label = (truth + 0.5 * truth_rng.normal(size=n) > 0).astype(int)
    fold = np.repeat(["select", "tune", "certify"], n // 3)
    columns = {
        "row_id": np.arange(n),
        "user": np.arange(n) // 10,
        "split": ["valid"] * n,
        "fold": fold,
        "label": label,
        "logit_0": 0.3 * truth + 0.3 * truth_rng.normal(size=n),
    }
    sizes = [noise / (2 if layer == layers[-1] else 1) for layer in layers]
    logits = np.stack([2 * truth + size * rng.normal(size=n) for size in sizes], axis=1)
    scores = score_table(columns, logits, list(layers))
    write_table(run / "scores" / "valid.parquet", scores)
    head = result_head("fit", MANIFEST | {"hash": protocol}, str(run / "config.yaml"), 0)
    exits = exit_rows(scores, "valid", "tune", draws=2)
    write_json(
        run / "results" / "fit.json",
        head | {"exits": exits, "stage_seconds": {"train": 61.4, "baselines": 2.0}},
    )
    adaptive = {
        "criterion": "ratio",
        "auc": 0.74,
        "auc_drop": 0.001,
        "mean_depth": 2.5,
        "token_layer_speedup": 1.5,
    }
    write_json(run / "results" / "calibrate.json", head | {"command": "calibrate", "adaptive": adaptive})
    return run


def tune_rows(run: Path) -> dict[str, Any]:
    """Columns of the tune fold by name."""
    return (
        pl.read_parquet(run / "scores" / "valid.parquet")
        .filter(pl.col("fold") == "tune")
        .to_dict(as_series=False)
    )
