"""The plan of the house: no import circles, a bounded number of settings."""

from __future__ import annotations

import ast
import inspect
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "project").rglob("*.py")
}


def imports() -> dict[str, set[str]]:
    """Module -> modules of this project that it imports anywhere, for types alone included."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "project":
                full = {f"{node.module}.{name.name}" for name in node.names}
                found[module] |= {name if name in MODULES else node.module for name in full}
    return found


def folder(module: str) -> str:
    """Its folder; a file on top is a folder of its own."""
    return module.split(".")[1] if "." in module else module


def test_no_circle_between_files() -> None:
    list(TopologicalSorter(imports()).static_order())


def test_no_circle_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for module, others in imports().items():
        graph.setdefault(folder(module), set()).update(
            folder(other) for other in others if folder(other) != folder(module)
        )
    list(TopologicalSorter(graph).static_order())


def test_a_circle_would_be_seen() -> None:
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert "project.layout" in imports()["project.model.attention"]


def settings() -> set[str]:
    """Everything a user can set in YAML or on the command line: a base class's arguments once, linked keys once.

    A key that only holds others (`data.protocol`) is none.
    """
    from project import callbacks, rank, retrieval, tracking
    from project.data import logs, negatives, prompt, protocol, readers
    from project.datamodule import InteractionData
    from project.exits import certificate, criteria, plan
    from project.model import module, optim
    from project.retrieval.base import Retriever
    from project.trainer import ProjectTrainer

    linked = {"tokenizer", "answers", "numbers", "items", "seed", "bundle"}
    sections = {"logs", "retriever", "protocol", "prompt", "mf", "optim", "lora", "certificate", "ranking"}
    sections |= {"negatives"}
    plain = {"self", "model", "datamodule", "ckpt_path", "weights_only", "dataloaders", "return_predictions"}
    classes = [
        *(InteractionData, protocol.Protocol, prompt.Prompt, retrieval.MatrixFactorisation),
        *(module.ExitRecommender, optim.OptimSettings, module.LoraSettings),
        *(plan.ExitSettings, callbacks.ResultFiles, tracking.WandbArtifacts),
        *(certificate.CertificateSettings, rank.RankSettings, logs.TableLogs, logs.RecBoleLogs),
        *(readers.BookCrossing, readers.AmazonReviews, negatives.Negatives),
        *(retrieval.VectorRetriever, retrieval.LightGCN, retrieval.TextEncoder, retrieval.ItemKNN),
        *(criteria.Consistency, criteria.RatioConsistency, criteria.Learned),
    ]
    shared = set(inspect.signature(Retriever).parameters)
    found = {f"Retriever.{name}" for name in shared}
    for kind in classes:
        names = set(inspect.signature(kind).parameters) - ({"args", "kwargs"})
        names -= shared if issubclass(kind, Retriever) else linked if kind is not prompt.Prompt else set()
        found |= {f"{kind.__name__}.{name}" for name in names - sections}
    for command in ("calibrate", "baselines", "benchmark", "predict", "rank"):
        names = set(inspect.signature(getattr(ProjectTrainer, command)).parameters) - plain
        found |= {f"{command} --{name}" for name in names - sections}
    return found - {"RecBoleLogs.columns", "RecBoleLogs.item_columns"}  # TableLogs has the same mappings


def test_settings_are_few() -> None:
    assert len(settings()) <= 80, sorted(settings())
