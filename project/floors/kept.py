"""CTR networks take long to train: `floors --peers true` keeps their scores; `fit`, `validate` and `test` find them.

A result has the networks that were trained under just its hash: of the log's files, the protocol, the features that
networks read, the seed and the settings of `networks.py`. Nothing is trained to complete a result, and networks of
another hash are never taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from project.artefacts import table_about, write_table
from project.counting import FEATURES
from project.data.splits import SPLITS
from project.floors.networks import network_floors, network_settings
from project.floors.quick import Floor, evidence_features, train_labels
from project.retrieval.walk import cached_folder, content_key

if TYPE_CHECKING:
    from project.datamodule import InteractionData

FORMAT = 2  # raise it when the same settings would give other scores
FILE = "scores.parquet"


def trained_networks(data: InteractionData) -> list[Floor]:
    """The networks of these data, scores of valid and test: kept ones, or trained now and kept whole or not at all."""

    def write(folder: Path) -> None:
        floors = network_floors(data.split, data.evidence, seed=data.seed)
        named = [floor.scores.select(pl.lit(floor.name).alias("floor"), pl.all()) for floor in floors]
        chosen = {floor.name: floor.chosen for floor in floors}
        write_table(folder / FILE, pl.concat(named), {"chosen": json.dumps(chosen)})

    return _read(cached_folder(data.cache_dir / "floor_scores", _content(data), write), SPLITS)


def kept_networks(data: InteractionData, splits: Sequence[str] = SPLITS) -> list[Floor]:
    """The networks that were trained before, scores of `splits` alone; none is trained.

    Args:
        data: Of the run.
        splits: Splits that may be read.
    """
    folder = data.cache_dir / "floor_scores" / content_key(_content(data))
    return _read(folder, splits) if folder.exists() else []


def _content(data: InteractionData) -> dict[str, Any]:
    """Everything the scores depend on; of the evidence the features, which are all that networks read of it."""
    rows = data.split.rows
    base = float(train_labels(rows).mean())
    features = hashlib.sha256(json.dumps(FEATURES).encode())
    for name in SPLITS:
        features.update(evidence_features(rows, data.evidence, name, base).tobytes())
    return {
        "made_by": FORMAT,
        "files": data.split.interactions.files,
        "protocol": data.split.hash,
        "evidence": features.hexdigest()[:16],
        "seed": data.seed,
        "settings": network_settings(),
    }


def _read(folder: Path, splits: Sequence[str]) -> list[Floor]:
    chosen = json.loads(table_about(folder / FILE)["chosen"])
    scores = pl.read_parquet(folder / FILE, glob=False).filter(pl.col("split").is_in(list(splits)))
    return [
        Floor(name, scores.filter(pl.col("floor") == name).drop("floor"), chosen[name]) for name in chosen
    ]
