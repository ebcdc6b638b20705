"""A run's files: JSON, score tables and the head of every result, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml  # type: ignore[import-untyped]  # the package types-PyYAML would bring them

from project.data.protocol import FOLDS, SPLITS
from project.data.tables import sha256_of as sha256_of
from project.errors import CheckpointError, ConfigError, DataError
from project.results import Head

Checkpoint = dict[str, Any]  # tensors and plain values by name
PolarsType = pl.DataType | type[pl.DataType]
SCHEMA_VERSION = 2
# in a refitted run's folder: up to which `seq` of a store its log has the events
SEEN = "events.json"
LIBRARIES = (
    "torch",
    "lightning",
    "transformers",
    "torch-geometric",
    "peft",
    "polars",
    "scikit-learn",
)

SCORE_COLUMNS: dict[str, PolarsType] = {
    "row_id": pl.Int64,
    "request_id": pl.String,
    "candidate_index": pl.Int64,
    "user": pl.Int32,
    "split": pl.Enum(SPLITS),
    "fold": pl.Enum(FOLDS),
    "label": pl.Int8,
    "logit_0": pl.Float32,
    "target_tokens": pl.Int64,
    "stream_tokens": pl.Int64,
}
"""Columns of a score table before its heads: `logit_<layer>` Float32, one per exit layer. Rows of the logs have a
row_id, candidates of requests a request_id and candidate_index; `logit_0` is exit 0's. Scored under an exit plan, a
table ends in `exit_layer` Int64 and `adaptive_logit` Float32, where a row leaves and the logit it leaves with."""


def score_table(
    columns: Mapping[str, Any], logits: np.ndarray[Any, Any], exit_layers: list[int]
) -> pl.DataFrame:
    """A score table of `columns` (name -> (n,) values) and `logits` (n, exit layers); absent columns are empty."""
    absent = [None] * len(logits)
    head = [
        pl.Series(name, columns.get(name, absent)).cast(kind)
        for name, kind in SCORE_COLUMNS.items()
    ]
    heads = [
        pl.Series(f"logit_{k}", logits[:, j]).cast(pl.Float32)
        for j, k in enumerate(exit_layers)
    ]
    return pl.DataFrame([*head, *heads])


def exit_layers_of(scores: pl.DataFrame) -> list[int]:
    """Layers that a score table holds logits of, exit 0 left out."""
    return [
        int(c.removeprefix("logit_"))
        for c in scores.columns
        if c.startswith("logit_") and c != "logit_0"
    ]


def replace_file(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON; NaN and infinity are errors, they are not JSON."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_table(
    path: Path, table: pl.DataFrame, about: dict[str, str] | None = None
) -> Path:
    """Write Parquet; `about` is kept in the file's metadata, see `table_about`."""
    return replace_file(path, lambda part: table.write_parquet(part, metadata=about))


def table_about(path: Path) -> dict[str, str]:
    """What `write_table` noted about a table."""
    return pl.read_parquet_metadata(path)


def read_result(path: Path) -> Any:
    """A result file, of the type in project.results that its command writes; DataError where it is something else."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"{path} {found}; expected a result file, such as results/test.json of a run."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version_found = content.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is not a result file: {error}. Run the command that wrote it again."
        ) from error
    if version_found != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema_version {version_found}, this version reads {SCHEMA_VERSION}: run the command that "
            "wrote it again, or read it with the version of this package that its `version` names."
        )
    return content


class _EachKeyOnce(yaml.SafeLoader):  # type: ignore[misc]
    """A key that stands twice in a mapping is an error, as in YAML; PyYAML takes the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} stands twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """A configuration; ConfigError with file, line and column where it is no YAML, no mapping, or has a key twice."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {file} does not exist; expected a YAML file."
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{file}{where}: {error.problem}; expected YAML.") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{file} holds {type(content).__name__}; expected keys and values."
        )
    return content


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml of a run's folder."""
    return read_yaml(run / "config.yaml")


def read_seen(run: Path) -> dict[str, Any]:
    """What `refit` says of a run it made: `seq` up to which its log has the events, and more; empty of another run."""
    # JSON is YAML
    return read_yaml(run / SEEN) if (run / SEEN).exists() else {}


def label_rule(run: Path) -> str | None:
    """The rule that makes ratings labels; of a refitted run, whose log has labels, that of the run it came from."""
    found = read_seen(run) or read_config(run)["data"]["protocol"]
    rule: str | None = found.get("label")
    return rule


def result_head(
    command: str, manifest: Mapping[str, Any], config: str | None, seed: int
) -> Head:
    """What every result file starts with: command, versions, seed, configuration, machine, the protocol's manifest."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "version": own_version(),
        "seed": seed,
        # as seen from here, if it lies below: result files travel, home folders do not
        "config": config
        and (config if (near := os.path.relpath(config)).startswith("..") else near),
        "machine": machine(),
        "protocol": dict(manifest),
    }


def own_version() -> str:
    """This package's version."""
    try:
        return version("exitrec")
    except PackageNotFoundError:  # run from a source folder
        return "0+source"


def machine() -> dict[str, object]:
    """Cores, device and library versions."""
    cuda = torch.cuda.is_available()
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "devices": torch.cuda.device_count() if cuda else 0,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def read_checkpoint(path: str | Path, mmap: bool = False) -> Checkpoint:
    """Tensors and plain values of a checkpoint, on the CPU; never objects that run code when they are read."""
    try:
        content: Checkpoint = torch.load(
            path, map_location="cpu", mmap=mmap, weights_only=True
        )
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds a Python object ({found[1] if found else 'of an unknown kind'}), which could run code when "
            "it is read; expected tensors, numbers, text, lists and dictionaries, as `fit` writes them."
        ) from None
    except (RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a whole checkpoint ({reason}); expected one that `fit` wrote."
        ) from None
    return content


def run_of_checkpoint(checkpoint: str | Path) -> Path:
    """The run that a checkpoint belongs to: the folder above `checkpoints/`, else the checkpoint's own."""
    path = Path(checkpoint).resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
