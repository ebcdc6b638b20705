"""A checkpoint scores what it was trained to read: other prompts, retrieved features or rows are refused before any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.datamodule import InteractionData, check_reads, reads_of
from project.errors import CheckpointError
from project.retrieval import ItemKNN, LightGCN, MatrixFactorisation


def data(protocol: str = "aaaa", prompt: Prompt | None = None, **changes: Any) -> Any:
    """What `reads_of` asks of a DataModule."""
    return SimpleNamespace(
        split=SimpleNamespace(hash=protocol),
        prompt=prompt or Prompt(),
        retriever=changes.get("retriever", ItemKNN(neighbours=7)),
        mf=changes.get("mf", MatrixFactorisation(dim=4)),
        refits=changes.get("refits", 10),
    )


def test_what_is_kept() -> None:
    """Hash of the protocol, and by key what the model reads beside the logs."""
    kept = reads_of(data())
    assert kept["protocol"] == "aaaa"
    assert kept["data.prompt"] == asdict(Prompt())
    assert kept["data.retriever"]["init_args"]["neighbours"] == 7
    assert kept["data.mf"]["dim"] == 4
    check_reads(kept, data())  # itself
    edited = ItemKNN(neighbours=7)  # a source that was edited is no difference
    edited.settings = lambda: ItemKNN(neighbours=7).settings() | {"source": "abc"}  # type: ignore[method-assign]
    check_reads(kept, data(retriever=edited))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (data(prompt=Prompt(segment="{title}:")), r"data\.prompt\.segment is '\{title\}:'"),
        (
            data(prompt=Prompt(answers=[" yes", " no"])),
            r"data\.prompt\.answers is \[' yes', ' no'\]",
        ),
        (
            data(retriever=ItemKNN(neighbours=8)),
            r"data\.retriever\.init_args\.neighbours is 8, .* with 7",
        ),
        (data(refits=5), r"data\.refits is 5, but the checkpoint was trained with 10"),
        (data(mf=None), r"data\.mf is None, but .* trained with \{'dim': 4"),
    ],
    ids=["segment", "answers", "retriever", "blocks", "mf"],
)
@pytest.mark.parametrize("command", ["test", "predict"])
def test_what_the_model_reads(other: Any, words: str, command: str) -> None:
    """The key that differs is named, with both values, whoever scores."""
    with pytest.raises(CheckpointError, match=words):
        check_reads(reads_of(data()), other, command)


def test_rows() -> None:
    """Another protocol may score rows that were trained on; requests may come from a log that has grown."""
    kept, grown = reads_of(data()), data(protocol="bbbb")
    with pytest.raises(
        CheckpointError, match=r"hash aaaa, this configuration gives bbbb: data\.protocol"
    ):
        check_reads(kept, grown)
    check_reads(kept, grown, "predict")
    # test rows of 7 and later; the checkpoint was chosen on rows until 6, or until 7, or does not say
    rows = pl.DataFrame({"split": ["valid", "test"], "timestamp": [6.0, 7.0]})
    grown.split.rows, grown.split.manifest = rows, {"times": ["", ""]}
    check_reads(kept | {"until": 6.0}, grown, "test")
    for seen, command in (
        ({"until": 7.0}, "test"),
        ({}, "test"),
        ({"until": 5}, "validate"),
    ):
        with pytest.raises(CheckpointError, match="hash aaaa"):
            check_reads(kept | seen, grown, command)
    grown.split.manifest = {"times": []}
    with pytest.raises(CheckpointError, match="hash aaaa"):
        check_reads(kept | {"until": 6.0}, grown, "test")


@pytest.mark.slow
def test_commands(
    run: Callable[..., None], fails: Callable[..., str], tiny_config: Any, tmp_path: Path
) -> None:
    """test, calibrate and both kinds of predict refuse, and leave the run's files as they were."""
    run("fit", "--config", tiny_config())
    # a fit that is refused takes the name
    folder = (tmp_path / "runs" / "tiny" / "latest").resolve()
    given = (
        "--config",
        folder / "config.yaml",
        "--ckpt_path",
        folder / "checkpoints" / "last.ckpt",
    )
    run("test", *given)

    def files() -> dict[Path, bytes]:
        return {
            p: p.read_bytes()
            for p in folder.rglob("*")
            if p.suffix in (".json", ".ckpt", ".parquet")
        }

    before = files()
    shares = ("--data.protocol.shares", "[0.2,0.2,0.6]")
    answers = ("--data.prompt.answers", '[" yes"," no"]')
    asked = tmp_path / "requests.jsonl"
    asked.write_text('{"request_id": "a", "user_id": "u1", "candidates": ["i1"]}\n')
    for command, change in (
        (("fit",), shares),
        (("test",), answers),
        (("calibrate",), shares),
        (("predict", "--data.requests", asked), answers),
        (("predict", "--engine", "early_exit", "--data.requests", asked), answers),
    ):
        assert "the checkpoint was trained" in fails(
            command[0], *given, *command[1:], *change
        ), command
        assert files() == before, command


def read(folder: Path, kind: str, cache: Path, refits: int = 2) -> InteractionData:
    """The log in a folder's interactions and items of a kind."""
    logs = TableLogs(str(folder / f"interactions.{kind}"), str(folder / f"items.{kind}"))
    retriever = LightGCN(dim=4, epochs=1)
    data = InteractionData(logs, retriever, Protocol(label="rating > 3"), refits=refits)
    data.cache_dir = cache
    return data


def test_parquet_reads_as_csv(tiny_logs: Path, tmp_path: Path) -> None:
    """Rows and retrieved features of the same log are the same, whatever the file."""
    for name in ("interactions", "items"):
        table = pl.read_csv(tiny_logs / f"{name}.csv")
        table.write_parquet(tmp_path / f"{name}.parquet")
    csv, parquet = read(tiny_logs, "csv", tmp_path), read(tmp_path, "parquet", tmp_path)
    assert csv.split.rows.equals(parquet.split.rows)
    for split, features in csv.retrieved.items():
        assert features.equals(parquet.retrieved[split], null_equal=True)


def test_what_features_warn_of_reaches_the_user(tiny_logs: Path, tmp_path: Path) -> None:
    """As a warning on reading, and for results: one block alone has no graph before its targets."""
    data = read(tiny_logs, "csv", tmp_path, refits=1)
    with pytest.warns(UserWarning, match="LightGCN was never fitted before"):
        _ = data.retrieved
    assert any("LightGCN was never fitted" in line for line in data.warnings)
