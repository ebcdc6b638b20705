"""What a variant is worth on the tune fold of validation, and how far that is from the base, on the same rows.

Unusual here: test is never read. Every head is calibrated with counting as exit 0 (project.exits.calibration), also
where the run itself says `prior: none`, so that the columns of all variants mean the same. The interval of a difference
resamples users; it does not know that another seed would train another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from project.artefacts import exit_layers_of, read_result
from project.bootstrap import UserBootstrap
from project.errors import DataError
from project.evaluate import part_of
from project.exits.calibration import fit_calibration
from project.metrics import head_metrics

Floats = NDArray[np.float64]
DRAWS = 1000  # resamples of users behind every interval
SHOWN = ("auc", "log_loss")


@dataclass(frozen=True)
class Heads:
    """Logits of a run on the n rows of the tune fold, ordered by row id.

    Attributes:
        row_id: (n,).
        labels: (n,) 0 or 1.
        users: (n,).
        raw: Layer -> (n,) logits.
        calibrated: Layer -> (n,) logits calibrated with exit 0; empty where that is not possible.
    """

    row_id: NDArray[np.int64]
    labels: NDArray[np.int64]
    users: NDArray[np.int64]
    raw: dict[int, Floats]
    calibrated: dict[int, Floats]

    @property
    def deepest(self) -> int:
        """The last exit layer."""
        return max(self.raw)


def read_heads(run: Path) -> Heads:
    """Heads of a run from its scores/valid.parquet."""
    scores = part_of(pl.read_parquet(run / "scores" / "valid.parquet"), "valid", "tune").sort("row_id")
    layers = exit_layers_of(scores)
    labels = scores["label"].to_numpy().astype(np.int64)
    logits = scores.select(f"logit_{k}" for k in (0, *layers)).cast(pl.Float64).to_numpy()
    calibrated: dict[int, Floats] = {}
    try:
        values = torch.from_numpy(logits.copy())
        better = fit_calibration(values, labels, [0, *layers], prior=True).apply(values).numpy()
        calibrated = {k: better[:, column] for column, k in enumerate(layers, start=1)}
    except DataError:  # one class, or a head that says the same of everybody: shown as undefined
        pass
    return Heads(
        scores["row_id"].to_numpy().astype(np.int64),
        labels,
        scores["user"].to_numpy().astype(np.int64),
        {k: logits[:, column] for column, k in enumerate(layers, start=1)},
        calibrated,
    )


def judge(run: Path, base: Heads | None) -> dict[str, Any]:
    """A row of the ablation table.

    Args:
        run: Folder of a finished run.
        base: Heads of the base; None where there is none or this is the base.

    Returns:
        `protocol_hash`, `config` and `result` (paths), `seconds` {`train`, `all`}; `exits` [{`layer`, `n`, `auc`,
        `log_loss`, `calibrated` {`auc`, `log_loss`}}], each with `against` (the base's layer it is compared with) and
        `difference` {`auc`, `log_loss`, `calibrated_auc`, `calibrated_log_loss`: {`value`, `interval`}} where there
        is one; and `early_exit`, what the run's own exit plan does, where it is calibrated.
    """
    fit = read_result(run / "results" / "fit.json")
    heads, seconds = read_heads(run), fit["stage_seconds"]
    exits = []
    for row in fit["exits"]:
        if row["layer"] == 0 or row.get("fold") != "tune":
            continue
        layer, found = row["layer"], {key: row[key] for key in ("layer", "n", *SHOWN)}
        if layer in heads.calibrated:
            metrics = head_metrics(heads.calibrated[layer], heads.labels, heads.users)
            found["calibrated"] = {name: metrics[name] for name in SHOWN}
        exits.append(found | (_against(heads, layer, base) if base else {}))
    return {
        "protocol_hash": fit["protocol"]["hash"],
        "config": str(run / "config.yaml"),
        "result": str(run / "results" / "fit.json"),
        "seconds": {"train": seconds.get("train"), "all": round(sum(seconds.values()), 1)},
        "exits": exits,
        **_early_exit(run),
    }


def _against(heads: Heads, layer: int, base: Heads) -> dict[str, Any]:
    """A head minus the base's: the deepest minus the deepest, others minus the base's head of the same layer."""
    rival = base.deepest if layer == heads.deepest else layer
    if rival not in base.raw:
        return {}
    _, mine, theirs = np.intersect1d(heads.row_id, base.row_id, assume_unique=True, return_indices=True)
    labels, bootstrap = heads.labels[mine], UserBootstrap(heads.users[mine], DRAWS)
    difference = {}
    for prefix, own, other in (("", heads.raw, base.raw), ("calibrated_", heads.calibrated, base.calibrated)):
        if layer in own and rival in other:
            a, b = own[layer][mine], other[rival][theirs]
            difference[f"{prefix}auc"] = bootstrap.difference_interval(a, b, labels)
            difference[f"{prefix}log_loss"] = bootstrap.log_loss_difference_interval(a, b, labels)
    return {"against": rival, "difference": difference}


def _early_exit(run: Path) -> dict[str, Any]:
    """What the run's exit plan does on tune; nothing for a run whose exits could not be calibrated."""
    path = run / "results" / "calibrate.json"
    if not path.is_file():
        return {}
    adaptive = read_result(path)["adaptive"]
    names = ("criterion", "auc", "auc_drop", "mean_depth", "token_layer_speedup")
    return {"early_exit": {name: adaptive[name] for name in names}}
