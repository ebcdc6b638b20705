"""What columns are worth to a trained run: `python -m research.columns OUT.json (LOG WITH_RUN WITHOUT_RUN)...`.

Run at commit 3b95009, the last version whose prompts could show columns ({context}, {user}). Two runs on the same rows,
one of which reads context columns and users' attributes, in exit 0 and in prompts; both were fitted and tested. For
baselines and every exit: AUC on test without the columns, with them in exit 0 alone, and with them in prompts, too. In
exit 0 alone are the exits of the run without, calibrated with exit 0 of the run with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import polars as pl
import torch

from project.api import open_run
from project.arrays import F64
from project.evaluation.baselines import best_baseline, fit_baselines, targets_of
from project.evaluation.bootstrap import UserBootstrap
from project.exits.calibration import fit_calibration
from project.run import SCHEMA_VERSION, exit_layers_of, write_json

# a regression and a boosted tree read the columns under another name
READERS = {"lr_text": "lr_context", "gbdt_text": "gbdt_context"}
SPLITS = ("valid", "test")
ABOUT = (
    "AUC on test without columns of context and users' attributes, with them in exit 0 alone, and with them in prompts "
    "as well; minus: paired, users resampled, 95 %. Exits are calibrated with exit 0 on tune. lr_text and gbdt_text "
    "have no columns, lr_context (exit 0) and gbdt_context are the same models with them. The best baseline is chosen "
    "on tune."
)


def baselines_of(folder: Path) -> dict[str, F64]:
    """Logits (n,) on test of a run's baselines by name, and of the best of them."""
    data = open_run(folder).data
    rows = data.split.rows
    baselines = fit_baselines(rows, data.retrieved, kinds=data.split.interactions.columns)
    best = best_baseline(baselines, rows)
    assert best is not None
    row_id = targets_of(rows, "test")["row_id"]
    named = {of.name: of.logits(row_id) for of in baselines}
    return named | {"best baseline": named[best.name]}


def tables_of(folder: Path) -> dict[str, pl.DataFrame]:
    """A run's score tables by split."""
    return {
        split: pl.read_parquet(folder / "scores" / f"{split}.parquet", glob=False).sort(
            "row_id"
        )
        for split in SPLITS
    }


def exits_of(tables: dict[str, pl.DataFrame]) -> dict[str, F64]:
    """Logits (n,) on test of every exit, calibrated with exit 0 on tune."""
    layers = (0, *exit_layers_of(tables["test"]))
    logits = {
        split: torch.from_numpy(
            table.select(f"logit_{k}" for k in layers).cast(pl.Float64).to_numpy().copy()
        )
        for split, table in tables.items()
    }
    tune = tables["valid"]["fold"].to_numpy() == "tune"
    labels = tables["valid"]["label"].to_numpy()[tune]
    calibration = fit_calibration(logits["valid"][tune], labels, layers, exit_0=True)
    columns = calibration.apply(logits["test"]).numpy().T
    return {f"exit {layer}": of for layer, of in zip(layers, columns, strict=True)}


def study(log: str, with_columns: Path, without: Path) -> list[dict[str, Any]]:
    """Rows of the table for one log."""
    # 1. score tables of the same rows, and exits of one run beside exit 0 of the other
    rich, plain = tables_of(with_columns), tables_of(without)
    same = ["row_id", "user", "label"]
    if not rich["test"].select(same).equals(plain["test"].select(same)):
        raise SystemExit(f"{with_columns} and {without} have not scored the same rows")
    alone = {
        split: table.with_columns(rich[split]["logit_0"]) for split, table in plain.items()
    }
    neither, in_exit_0, in_prompts = map(exits_of, (plain, alone, rich))
    # 2. baselines, which have no prompts
    of_plain, of_rich = baselines_of(without), baselines_of(with_columns)
    for name in (*READERS, "best baseline"):
        neither[name] = of_plain[name]
        in_exit_0[name] = of_rich[READERS.get(name, name)]
    # 3. a row each
    labels = rich["test"]["label"].to_numpy()
    bootstrap = UserBootstrap(rich["test"]["user"].to_numpy())
    found = []
    for name, logits in neither.items():
        reader = READERS.get(name)
        row: dict[str, Any] = {
            "log": log,
            "scores": f"{name}, {reader}" if reader else name,
            "without": bootstrap.metrics(logits, labels)["auc"],
        }
        for place, of in (("in exit 0", in_exit_0), ("in prompts", in_prompts)):
            value, gap = None, None
            if name in of:
                value = bootstrap.metrics(of[name], labels)["auc"]
                gap = bootstrap.difference_interval(of[name], logits, labels)
            row |= {place: value, f"{place} minus without": gap}
        found.append(row)
        print(row, flush=True)
    return found


def main(out: Path, asked: list[str]) -> None:
    """Study every log and write the file."""
    rows = list[dict[str, Any]]()
    for log, rich, plain in zip(asked[::3], asked[1::3], asked[2::3], strict=True):
        rows += study(log, Path(rich).resolve(), Path(plain).resolve())
    head = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "protocol": {"name": "of each log", "hash": "several"},
        "about": ABOUT,
    }
    print(write_json(out, head | {"rows": rows}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
