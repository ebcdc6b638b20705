"""Golden values of the tiny world: code that only moves or leaves does not change them.

A change that moves one on purpose writes the new value, and its commit says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from example_engine import EXITS, make_module, random_request
from world import SEGMENT, Letters, given, read_split, result

from project.data.batch import Batch, pack
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Protocol, SplitInteractions
from project.data.stream import build_streams
from project.engine import Engine, RowExits
from project.exits.calibration import Calibration
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.model.module import ExitRecommender
from project.retrieval import ItemKNN, LightGCN, RetrievedFeatures
from project.retrieval.factorisation import MatrixFactorisation

REFITS = 5
EXACT = ("row_id", "neighbour_count", "item_count", "user_count")


@pytest.fixture(scope="module")
def split(tiny_logs: Path) -> SplitInteractions:
    return read_split(tiny_logs, Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2]))


@pytest.fixture(scope="module")
def retrieved(
    split: SplitInteractions, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pl.DataFrame]:
    """Item kNN's: counts and cosines, no training."""
    return RetrievedFeatures(
        split, ItemKNN(), REFITS, tmp_path_factory.mktemp("retrieved")
    ).tables()


@pytest.fixture(scope="module")
def batch(split: SplitInteractions, retrieved: dict[str, pl.DataFrame]) -> Batch:
    """The first six test windows; a token is a letter, and a number."""
    encoder = PromptEncoder(
        Letters(), Prompt(instruction="I\n", segment=SEGMENT), split.interactions.items
    )
    streams = build_streams(split.rows, retrieved["test"], "test", encoder)
    return pack(streams, streams.evaluation(300)[:6])


def digest(*arrays: np.ndarray) -> str:
    """16 hex digits of SHA-256."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array.astype(np.int64)).tobytes())
    return found.hexdigest()[:16]


def exact_part(table: pl.DataFrame) -> str:
    """Digest of what is counted, not computed."""
    return digest(*(table[name].to_numpy() for name in EXACT))


def means(table: pl.DataFrame, columns: list[str]) -> list[float]:
    return [float(table[c].cast(pl.Float64).mean()) for c in columns]  # type: ignore[arg-type]


def test_retrieved(retrieved: dict[str, pl.DataFrame]) -> None:
    assert {name: exact_part(table) for name, table in retrieved.items()} == {
        "train": "f8f58162e50e8811",
        "valid": "29b94b6c5f478ca7",
        "test": "b92b3e458b51db8f",
    }
    rates = ["similarity", "weighted_vote", "vote_weight", "vote", "item_rate", "user_rate"]
    assert means(retrieved["test"], rates) == pytest.approx(
        [0.381346, 0.469050, 2.001791, 0.488849, 0.508799, 0.495837], abs=1e-6
    )


def test_retrieved_of_learned_retrievers(split: SplitInteractions, tmp_path: Path) -> None:
    """LightGCN and the factorisation, by means: their last bits are the processor's."""
    found = RetrievedFeatures(
        split,
        LightGCN(dim=8, item_neighbours=5),
        REFITS,
        tmp_path,
        MatrixFactorisation(dim=4),
    ).tables()["test"]
    assert means(
        found,
        ["neighbour_count", "similarity", "vote", "mf", "item_similarity", "mf_rating"],
    ) == pytest.approx(
        [9.11022, 0.018070, 0.496088, 0.489440, 0.469233, 0.501743], abs=1e-5
    )


def test_packed_batch(batch: Batch) -> None:
    layout = batch.layout
    arrays = [
        batch.tokens,
        layout.sequence,
        layout.segment,
        layout.group,
        layout.context,
        layout.position,
    ]
    arrays += [
        batch.slots,
        batch.row_id,
        batch.label,
        batch.target_tokens,
        batch.stream_tokens,
    ]
    assert batch.tokens.shape == (1, 1634)
    assert [digest(a.numpy()) for a in arrays] == [
        "d4cccf477e7ee034",
        "8954ccd086544e49",
        "7c58689505b3011f",
        "e16150c7dbd05cbe",
        "54a4ff59fd5ffb1d",
        "cbbeb25779efc5b5",
        "71027f2a72ac9ab8",
        "de341cd5f667e776",
        "2e944b459e918bdc",
        "258d02480a7ac40c",
        "071adc8d9693728e",
    ]


def seeded(module: ExitRecommender) -> ExitRecommender:
    """Weights of heads and numbers that do not depend on what else a module is made of."""
    assert module.backbone is not None
    numbers = module.backbone.embed_tokens.numbers
    torch.nn.init.normal_(numbers, std=0.2, generator=torch.Generator().manual_seed(100))
    for layer, head in module.heads.items():
        torch.nn.init.normal_(
            head.linear.weight, std=0.2, generator=torch.Generator().manual_seed(int(layer))
        )
    return module


def test_logits(batch: Batch) -> None:
    module = seeded(make_module())
    known = torch.where(batch.tokens < 0, batch.tokens, batch.tokens % 64)
    batch = Batch(**{**vars(batch), "tokens": known})
    with torch.no_grad():
        logits = module(batch)[[0, -1], :3]
    assert logits.flatten().tolist() == pytest.approx(
        [-1.071504, 0.826964, -0.116370, -0.297843, 1.427304, -0.363361], abs=1e-5
    )


def test_engine() -> None:
    """Seven candidates behind twelve segments leave at four depths: before the LLM, at 2, 3 and 5."""
    request = random_request(np.random.default_rng(5), "golden", 12, 7)
    layers = (0, *EXITS)
    values = torch.tensor(
        [[1.0, 0.0, 0.0]] + [[1.0, 0.3, -0.1]] * len(EXITS), dtype=torch.float64
    )
    thresholds = torch.tensor([0.8, 0.8, 0.8, 0.8, -torch.inf], dtype=torch.float64)
    plan = ExitPlan(Calibration(layers, values), Ratio(), thresholds)
    (scored,) = Engine(seeded(make_module()), RowExits(plan)).score([request])
    assert scored.exit_layers.tolist() == [2, 0, 0, 3, 0, 5, 0]
    assert scored.logits.tolist() == pytest.approx(
        [-2.754398, -0.840473, 1.448731, 1.050684, 2.431732, -0.949895, 0.844993], abs=1e-5
    )


@pytest.mark.slow
def test_fit_and_test(
    run: Callable[..., None], tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    """AUC of every head and of the baselines that stay, from logs to test.json."""
    run("fit", "--config", tiny_config(**{"data.refits": REFITS}))
    folder = tmp_path / "runs" / "tiny" / "latest"
    run("test", *given(folder))
    found = result(folder, "test")
    assert {row["layer"]: row["auc"] for row in found["exits"]} == pytest.approx(
        {0: 0.78000, 1: 0.45045, 3: 0.46909}, abs=1e-4
    )
    baselines = {
        row["name"]: row["auc"] for row in found["baselines"] if row["split"] == "test"
    }
    expected = {
        "item_rate": 0.5648,
        "neighbour_vote": 0.6868,
        "lr_features": 0.7791,
        "gbdt_features": 0.6027,
    }
    assert {name: baselines[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    # candidates of one moment share their history: the user's own rate orders none of them
    inside = found["moment"]["scores"]
    assert inside["baseline user_rate"]["auc"] == 0.5
    assert inside["exit 0"]["auc"] == inside["baseline lr_text"]["auc"] != 0.5
