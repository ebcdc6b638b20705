"""The peers as floors: each network is trained at every point of a small grid, chosen on `tune`, scored once.

Unusual here: torch-rechub comes with an extra and is imported where it is used, so the rest of the project runs
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from rich.progress import Progress
from torch import nn

from project.errors import DataError
from project.evaluation.metrics import auc
from project.floors.peers import features as reading
from project.floors.peers import networks, training
from project.floors.peers.features import PeerFeatures, Table
from project.floors.peers.networks import dcn_v2, deepfm, din
from project.floors.peers.training import Labelled, score, train
from project.floors.quick import Floor, floor_scores, targets_of

if TYPE_CHECKING:
    from project.data.splits import SplitInteractions

PEERS: dict[str, Callable[[PeerFeatures, int], nn.Module]] = {
    "deepfm": deepfm,
    "dcn_v2": dcn_v2,
    "din": din,
}
LIBRARY = "torch-rechub"
LEFT_OUT = (
    "DeepFM, DCN-v2 and DIN are left out: torch-rechub is not installed (pip install 'exitrec[peers]' or, "
    "from a checkout, pip install -e '.[peers]')."
)


@dataclass(frozen=True)
class GridPoint:
    """What is chosen on `tune`; everything else is fixed in networks.py and training.py.

    Attributes:
        embedding: Size of a vector.
        weight_decay: Adam's.
    """

    embedding: int
    weight_decay: float


GRID = tuple(GridPoint(*point) for point in product((8, 16), (1e-4, 1e-3)))


def peers_installed() -> bool:
    """Whether the extra `peers` is here."""
    return find_spec("torch_rechub") is not None


def peer_settings(library: str | None = None) -> dict[str, Any]:
    """Everything about the networks that their scores depend on, JSON-able.

    Args:
        library: Version of torch-rechub; None: the installed one.
    """
    constants = {
        reading: ("BINS", "HISTORY_ROWS", "ATTRIBUTE_WORDS"),
        networks: ("LAYERS", "CROSSES", "ATTENTION_LAYERS"),
        training: ("BATCH_ROWS", "LEARNING_RATE", "EPOCHS", "PATIENCE", "HIDDEN_SHARE"),
    }
    return {
        LIBRARY: library or version(LIBRARY),
        "networks": list(PEERS),
        "grid": [asdict(point) for point in GRID],
        **{name.lower(): getattr(module, name) for module, names in constants.items() for name in names},
    }


def peer_floors(
    split: SplitInteractions,
    evidence: Mapping[str, pl.DataFrame],
    splits: Sequence[str] = ("valid", "test"),
    seed: int = 0,
    grid: Sequence[GridPoint] = GRID,
) -> list[Floor]:
    """Train on train targets, choose on valid's fold `tune`, score the targets of `splits`: deepfm, dcn_v2, din.

    Args:
        split: The log under its protocol.
        evidence: Evidence table of each split.
        splits: Splits to score. Leave test out while exploring.
        seed: Seed of first weights, order and dropout.
        grid: Points to choose among, the first of equals.

    Returns:
        A floor each, with the point and the number of epochs in `chosen`.

    Raises:
        DataError: Train targets, or valid's fold select or tune, lack a class; or evidence lacks a target's row.
    """
    rows = split.rows
    features = PeerFeatures.fit(rows, split.interactions.items, evidence)
    tables = {s: features.table(rows, evidence, s) for s in dict.fromkeys(("train", "valid", *splits))}
    parts = {
        "train": Labelled(tables["train"], _labels(targets_of(rows, "train"))),
        **{fold: _fold(rows, tables["valid"], fold) for fold in ("select", "tune")},
    }
    found = []
    with Progress(transient=True) as progress:
        for name, build in PEERS.items():
            points = progress.track(grid, description=name)
            best = max((_trained(build, features, parts, point, seed) for point in points), key=_tune_auc)
            logits = {s: score(best.network, tables[s]) for s in splits}
            found.append(
                Floor(name, floor_scores(rows, logits), asdict(best.point) | {"epochs": best.epochs})
            )
    return found


@dataclass(frozen=True)
class _Trained:
    network: nn.Module
    point: GridPoint
    epochs: int
    tune_auc: float


def _tune_auc(trained: _Trained) -> float:
    return trained.tune_auc


def _trained(
    build: Callable[[PeerFeatures, int], nn.Module],
    features: PeerFeatures,
    parts: Mapping[str, Labelled],
    point: GridPoint,
    seed: int,
) -> _Trained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(features, point.embedding)
        epochs = train(network, parts["train"], parts["select"], point.weight_decay, seed)
    value = auc(score(network, parts["tune"].table), parts["tune"].labels.numpy())
    assert value is not None  # _fold has looked
    return _Trained(network, point, epochs, value)


def _fold(rows: pl.DataFrame, valid: Table, fold: str) -> Labelled:
    """Targets of one fold of valid; DataError where a class is missing."""
    inside = torch.from_numpy((targets_of(rows, "valid")["fold"] == fold).to_numpy().copy())
    labels = _labels(targets_of(rows, "valid", fold))
    if not 0 < labels.sum() < len(labels):
        raise DataError(
            f"peers stop training on valid's fold select and are chosen on its fold tune: {fold} has {len(labels)} "
            f"targets, {int(labels.sum())} of them liked, expected both classes. Give validation a larger share "
            "(data.protocol.shares), or run floors without --peers true."
        )
    return Labelled({name: values[inside] for name, values in valid.items()}, labels)


def _labels(targets: pl.DataFrame) -> torch.Tensor:
    return torch.from_numpy(targets["label"].to_numpy().astype("float32"))
