"""The command `compare`: paired differences of two runs' heads in AUC and log loss, from score tables alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch

from project.arrays import F64, I64
from project.errors import DataError
from project.evaluation.bootstrap import UserBootstrap
from project.exits.calibration import fit_calibration
from project.metrics import head_metrics
from project.report.tables import render
from project.results import Compared, CompareResult, Estimate, HeadScores
from project.run import exit_layers_of, read_result, result_head, table_about, write_json

Part = Literal["tune", "test"]
DRAWS = 1000  # resamples of users behind every interval


@dataclass(frozen=True)
class Heads:
    """A run's n rows by row id, and by layer the logits (n,), as they are and calibrated with exit 0.

    `calibrated` is empty where tune has one class, or a head gives all rows the same logit.
    """

    row_id: I64
    labels: I64
    users: I64
    raw: dict[int, F64]
    calibrated: dict[int, F64]

    def metrics(self, layer: int) -> HeadScores:
        """AUC and log loss of a head as it is, and under `calibrated` where that is possible."""

        def scores(logits: F64, calibrated: HeadScores | None) -> HeadScores:
            found = head_metrics(logits, self.labels, self.users)
            return {
                "auc": found["auc"],
                "log_loss": found["log_loss"],
                "calibrated": calibrated,
            }

        own = self.calibrated.get(layer)
        return scores(self.raw[layer], None if own is None else scores(own, None))


def read_heads(run: Path, part: Part = "tune") -> Heads:
    """Heads of a finished run on validation's tune fold or on test, calibrated on tune."""
    paths = {split: run / "scores" / f"{split}.parquet" for split in ("valid", "test")}
    for split, command in (("valid", "fit"), ("test", "test")):
        if split in ("valid", part) and not paths[split].is_file():
            raise DataError(
                f"{paths[split]} does not exist; expected the folder of a run that `{command}` has scored."
            )
    if part == "test":
        about = [table_about(path) for path in paths.values()]
        for key, differ in (("heads", "checkpoints"), ("protocol", "protocols")):
            if len({found[key] for found in about if key in found}) > 1:
                raise DataError(
                    f"{paths['valid']} and {paths['test']} are of different {differ}; test's scores are calibrated on "
                    "validation's. Run `validate` and `test` with the same --config and --ckpt_path."
                )
    tune = pl.read_parquet(paths["valid"], glob=False).filter(pl.col("fold") == "tune")
    scores = tune if part == "tune" else pl.read_parquet(paths["test"], glob=False)
    scores = scores.sort("row_id")
    layers = exit_layers_of(scores)
    logits = _logits(scores, layers)
    calibrated: dict[int, F64] = {}
    try:
        labels = tune["label"].to_numpy()
        calibration = fit_calibration(
            _logits(tune, layers), labels, [0, *layers], exit_0=True
        )
        values = calibration.apply(logits).numpy()
        calibrated = dict(zip(layers, values.T[1:], strict=True))
    except DataError:
        pass
    row_id, labels, users = (
        scores[key].to_numpy().astype(np.int64) for key in ("row_id", "label", "user")
    )
    raw = dict(zip(layers, logits.numpy().T[1:], strict=True))
    return Heads(row_id, labels, users, raw, calibrated)


def _logits(scores: pl.DataFrame, layers: list[int]) -> torch.Tensor:
    """(n, 1 + layers) float64, exit 0 first."""
    values = scores.select(f"logit_{k}" for k in (0, *layers)).cast(pl.Float64).to_numpy()
    return torch.from_numpy(values.copy())


def compare(run: Path, base: Path, part: Part) -> CompareResult:
    """Every head of a run beside the base's of the same layer, the deepest beside the deepest."""
    # 1. what is compared: one protocol, the same rows, the same labels
    mine, theirs = (read_result(folder / "results" / "fit.json") for folder in (run, base))
    hashes = [result["protocol"]["hash"] for result in (mine, theirs)]
    if hashes[0] != hashes[1]:
        raise DataError(
            f"{run} has the protocol hash {hashes[0]}, {base} has {hashes[1]}: expected two runs of one protocol; "
            "give both the same data.protocol and train one of them again."
        )
    heads, other = read_heads(run, part), read_heads(base, part)
    if not np.array_equal(heads.row_id, other.row_id):
        raise DataError(
            f"{run} and {base} have not scored the same rows of {part}: score all with both."
        )
    if not np.array_equal(heads.labels, other.labels):
        raise DataError(
            f"{run} and {base} have scored the same rows of {part} under other labels: expected one "
            "data.protocol.label. Score both again with their config.yaml."
        )
    # 2. head by head, paired differences over resampled users
    labels, bootstrap = heads.labels, UserBootstrap(heads.users, DRAWS)
    exits = list[Compared]()
    pairs = {
        "": (heads.raw, other.raw),
        "calibrated_": (heads.calibrated, other.calibrated),
    }
    for layer in sorted(heads.raw):
        against = max(other.raw) if layer == max(heads.raw) else layer
        difference = dict[str, Estimate]()
        for prefix, (own, base_logits) in pairs.items():
            if layer in own and against in base_logits:
                both = own[layer], base_logits[against], labels
                difference[f"{prefix}auc"] = bootstrap.difference_interval(*both)
                losses = bootstrap.log_loss_difference_interval(*both)
                difference[f"{prefix}log_loss"] = losses
        exits.append(
            {
                "layer": layer,
                "n": len(labels),
                **heads.metrics(layer),
                "difference": difference,
            }
        )
    head = result_head("compare", mine["protocol"], mine["config"], mine["seed"])
    users = int(np.unique(heads.users).size)
    return {
        **head,
        "base": theirs["config"],
        "part": part,
        "users": users,
        "exits": exits,
    }


def run_compare(arguments: Sequence[str]) -> None:
    """The command `compare`: writes RUN/results/compare-PART.json and prints it as Markdown."""
    parser = argparse.ArgumentParser(
        "python -m project compare", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("base", type=Path, help="folder of the run it is compared with")
    parser.add_argument(
        "--part", choices=("tune", "test"), default="tune", help="rows that are compared"
    )
    given = parser.parse_args(arguments)
    result = compare(given.run, given.base, given.part)
    path = write_json(given.run / "results" / f"compare-{given.part}.json", result)
    print(f"{render(result)}\nwritten: {path}")
