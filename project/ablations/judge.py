"""What a variant is worth on the tune fold of validation, and how far that is from the base, on the same rows.

Unusual here: test is never read; `compare` does that, for two runs that are frozen (project.evaluation.compare).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from project.artefacts import read_result
from project.evaluation.paired import Heads, head_difference, read_heads


def judge(run: Path, base: Heads | None) -> dict[str, Any]:
    """A row of the ablation table.

    Args:
        run: Folder of a finished run.
        base: Heads of the base; None where there is none or this is the base.

    Returns:
        `protocol_hash`, `config` and `result` (paths), `seconds` {`train`, `all`}; `exits` [{`layer`, `n`, `auc`,
        `log_loss`, `calibrated` {`auc`, `log_loss`}}], each with `against` and `difference` where there is one (see
        `project.evaluation.paired.head_difference`); and `early_exit`, what the run's own exit plan does, where it is
        calibrated.
    """
    fit = read_result(run / "results" / "fit.json")
    heads, seconds = read_heads(run), fit["stage_seconds"]
    exits = []
    for row in fit["exits"]:
        if row["layer"] == 0 or row.get("fold") != "tune":
            continue
        layer = row["layer"]
        found = {"layer": layer, "n": row["n"]} | heads.metrics(layer)
        exits.append(found | (head_difference(heads, layer, base) if base else {}))
    return {
        "protocol_hash": fit["protocol"]["hash"],
        "config": str(run / "config.yaml"),
        "result": str(run / "results" / "fit.json"),
        "seconds": {"train": seconds.get("train"), "all": round(sum(seconds.values()), 1)},
        "exits": exits,
        **_early_exit(run),
    }


def _early_exit(run: Path) -> dict[str, Any]:
    """What the run's exit plan does on tune; nothing for a run whose exits could not be calibrated."""
    path = run / "results" / "calibrate.json"
    if not path.is_file():
        return {}
    adaptive = read_result(path)["adaptive"]
    names = ("criterion", "auc", "auc_drop", "mean_depth", "token_layer_speedup")
    return {"early_exit": {name: adaptive[name] for name in names}}
