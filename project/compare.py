"""Two runs on the same rows: paired differences of their heads' AUC and log loss, from score tables alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from project.errors import DataError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import part_of
from project.exits.calibration import fit_calibration
from project.metrics import head_metrics
from project.report.tables import render
from project.run import exit_layers_of, read_result, result_head, table_about, write_json

Floats = NDArray[np.float64]
Part = Literal["tune", "test"]
DRAWS = 1000  # resamples of users behind every interval
SHOWN = ("auc", "log_loss")


@dataclass(frozen=True)
class Heads:
    """Logits of a run on n rows, ordered by row id.

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

    def metrics(self, layer: int) -> dict[str, Any]:
        """AUC and log loss of a head as it is, and under `calibrated` with exit 0 where that is possible."""
        found: dict[str, Any] = _shown(self.raw[layer], self)
        if layer in self.calibrated:
            found["calibrated"] = _shown(self.calibrated[layer], self)
        return found


def read_heads(run: Path, part: Part = "tune") -> Heads:
    """Heads of a run from its score tables.

    Args:
        run: Folder of a finished run.
        part: Rows: validation's tune fold, or test.

    Raises:
        DataError: The run has no such score table, or different checkpoints or protocols scored validation and test.
    """
    if part == "test":
        _check_tables(run)
    tune = _scores(run, "valid", "fit").filter(pl.col("fold") == "tune")
    scores = tune if part == "tune" else part_of(_scores(run, "test", "test"), "test", None)
    scores = scores.sort("row_id")
    layers = exit_layers_of(scores)
    logits = _logits(scores, layers)
    calibrated: dict[int, Floats] = {}
    try:
        labels = tune["label"].to_numpy().astype(np.int64)
        calibration = fit_calibration(_logits(tune, layers), labels, [0, *layers], exit_0=True)
        better = calibration.apply(logits).numpy()
        calibrated = {k: better[:, column] for column, k in enumerate(layers, start=1)}
    except DataError:  # one class, or a head that says the same of everybody: shown as undefined
        pass
    return Heads(
        scores["row_id"].to_numpy().astype(np.int64),
        scores["label"].to_numpy().astype(np.int64),
        scores["user"].to_numpy().astype(np.int64),
        {k: logits[:, column].numpy() for column, k in enumerate(layers, start=1)},
        calibrated,
    )


def head_difference(heads: Heads, layer: int, base: Heads) -> dict[str, Any]:
    """A head minus the base's: the deepest minus the deepest, others minus the base's head of the same layer.

    Args:
        heads: The run's.
        layer: One of its exits.
        base: Those of the run it is compared with; rows that only one of them has are left out.

    Returns:
        `against` (the base's layer) and `difference` {`auc`, `log_loss`, `calibrated_auc`, `calibrated_log_loss`:
        {`value`, `interval`}}; empty where the base has no such head.
    """
    static_exit = base.deepest if layer == heads.deepest else layer
    if static_exit not in base.raw:
        return {}
    _, mine, theirs = np.intersect1d(heads.row_id, base.row_id, assume_unique=True, return_indices=True)
    labels, bootstrap = heads.labels[mine], UserBootstrap(heads.users[mine], DRAWS)
    difference = {}
    for prefix, own, other in (("", heads.raw, base.raw), ("calibrated_", heads.calibrated, base.calibrated)):
        if layer in own and static_exit in other:
            a, b = own[layer][mine], other[static_exit][theirs]
            difference[f"{prefix}auc"] = bootstrap.difference_interval(a, b, labels)
            difference[f"{prefix}log_loss"] = bootstrap.log_loss_difference_interval(a, b, labels)
    return {"against": static_exit, "difference": difference}


def _scores(run: Path, split: str, command: str) -> pl.DataFrame:
    path = run / "scores" / f"{split}.parquet"
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the folder of a run that `{command}` has scored.")
    return pl.read_parquet(path, glob=False)


def _check_tables(run: Path) -> None:
    paths = [run / "scores" / f"{split}.parquet" for split in ("valid", "test")]
    about = [table_about(path) for path in paths if path.is_file()]
    for key, differ in (("heads", "checkpoints"), ("protocol", "protocols")):
        if len({found[key] for found in about if key in found}) > 1:
            raise DataError(
                f"{paths[0]} and {paths[1]} are of different {differ}; test's scores are calibrated on validation's. "
                "Run `validate` and `test` with the same --config and --ckpt_path."
            )


def _logits(scores: pl.DataFrame, layers: list[int]) -> torch.Tensor:
    values = scores.select(f"logit_{k}" for k in (0, *layers)).cast(pl.Float64).to_numpy()
    return torch.from_numpy(values.copy())


def _shown(logits: Floats, heads: Heads) -> dict[str, Any]:
    metrics = head_metrics(logits, heads.labels, heads.users)
    return {name: metrics[name] for name in SHOWN}


def run_compare(arguments: Sequence[str]) -> None:
    """The command: writes RUN/results/compare-PART.json and prints it as Markdown.

    Args:
        arguments: RUN, BASE, and maybe --part test.

    Raises:
        DataError: Score tables are missing, or the runs have two protocols.
    """
    parser = argparse.ArgumentParser("python -m project compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("base", type=Path, help="folder of the run it is compared with")
    parser.add_argument("--part", choices=("tune", "test"), default="tune", help="rows that are compared")
    given = parser.parse_args(arguments)
    result = compare(given.run, given.base, given.part)
    path = write_json(given.run / "results" / f"compare-{given.part}.json", result)
    print(f"{render(result)}\nwritten: {path}")


def compare(run: Path, base: Path, part: Part) -> dict[str, Any]:
    """Every head of a run beside the base's.

    Args:
        run: Folder of a run.
        base: Folder of the run it is compared with, of the same protocol.
        part: Rows: validation's tune fold, or test.

    Returns:
        A result: `base` (its configuration), `part`, and `exits` [{`layer`, `n`, `auc`, `log_loss`, `calibrated`}],
        each with `against`, `base` (the same metrics of the base's head) and `difference` where the base has one.
    """
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
            f"{run} and {base} have not scored the same rows of {part}: score all of them with both."
        )
    if not np.array_equal(heads.labels, other.labels):
        raise DataError(
            f"{run} and {base} have scored the same rows of {part} under other labels: expected one "
            "data.protocol.label. Score both again with the config.yaml of their runs."
        )
    exits = []
    for layer in sorted(heads.raw):
        found = {"layer": layer, "n": len(heads.labels)} | heads.metrics(layer)
        against = head_difference(heads, layer, other)
        exits.append(found | against | ({"base": other.metrics(against["against"])} if against else {}))
    said = {"base": theirs["config"], "part": part, "exits": exits}
    return result_head("compare", mine["protocol"], mine["config"], mine["seed"]) | said
