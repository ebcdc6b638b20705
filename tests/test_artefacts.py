"""Score tables, the writers that never leave half a file, result files and where runs lie."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.errors import DataError
from project.run import (
    SCHEMA_VERSION,
    SCORE_COLUMNS,
    exit_layers_of,
    machine,
    read_result,
    replace_file,
    result_head,
    run_of_checkpoint,
    score_table,
    sha256_of,
    write_json,
    write_table,
)


def table() -> pl.DataFrame:
    """Two rows of the logs, two exits."""
    columns = {
        "row_id": [3, 8],
        "user": [0, 1],
        "split": ["valid", "test"],
        "fold": ["tune", None],
        "label": [1, 0],
    }
    return score_table(columns, np.array([[0.5, 1.0], [-0.25, 2.0]]), [2, 12])


def test_score_table_schema() -> None:
    """The contract's columns in order and type, a logit an exit; the rest is null."""
    scores = table()
    heads = dict.fromkeys(("logit_2", "logit_12"), pl.Float32)
    assert list(scores.schema.items()) == list({**SCORE_COLUMNS, **heads}.items())
    assert scores["logit_12"].to_list() == [1.0, 2.0]
    assert scores["fold"].to_list() == ["tune", None]
    empty = ("request_id", "candidate_index", "logit_0", "target_tokens", "stream_tokens")
    assert all(scores[name].is_null().all() for name in empty)
    assert exit_layers_of(scores) == [2, 12]  # exit 0 is counting's, not a layer's
    assert score_table({}, np.zeros((1, 2)), [2, 12]).columns == [*SCORE_COLUMNS, "logit_2", "logit_12"]


def test_score_table_through_a_file(tmp_path: Path) -> None:
    """Parquet keeps the schema, enumerations included."""
    path = write_table(tmp_path / "scores" / "valid.parquet", table())
    read = pl.read_parquet(path)
    assert read.equals(table())
    assert read.schema == table().schema


def test_score_table_refuses_an_unknown_split() -> None:
    """A split outside the contract does not become null in silence."""
    with pytest.raises(pl.exceptions.InvalidOperationError):
        score_table({"split": ["validation"]}, np.zeros((1, 1)), [1])


class Stopped(BaseException):
    """Stands for Ctrl-C or SIGTERM."""


@pytest.mark.parametrize("error", [OSError, Stopped])
def test_half_a_file_is_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    """A writer that fails half way leaves nothing behind, keeps the old file, and the error goes on."""
    path = tmp_path / "results" / "test.json"

    def half(part: Path) -> None:
        part.write_text("half")
        raise error

    with pytest.raises(error):
        replace_file(path, half)
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    with pytest.raises(error):
        replace_file(path, half)
    assert [p.name for p in path.parent.iterdir()] == ["test.json"]
    assert path.read_text() == "old"
    replace_file(path, lambda part: part.write_text("new"))
    assert [p.name for p in path.parent.iterdir()] == ["test.json"]
    assert path.read_text() == "new"


def test_the_old_file_is_there_while_the_new_one_is_written(tmp_path: Path) -> None:
    """A reader that comes in the middle of a write sees the old file whole."""
    path = write_json(tmp_path / "a.json", {"a": 1})

    def slowly(part: Path) -> None:
        assert part.parent == path.parent  # a rename across file systems would be a copy
        part.write_text("new")
        assert json.loads(path.read_text()) == {"a": 1}

    assert replace_file(path, slowly).read_text() == "new"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_json_without_nan(tmp_path: Path, number: float) -> None:
    """NaN and infinity are not JSON: refused, and the old file is kept."""
    path = write_json(tmp_path / "a.json", {"auc": None})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"auc": number})
    assert json.loads(path.read_text()) == {"auc": None}


def test_result_through_a_file(tmp_path: Path) -> None:
    """A result file comes back as it was written, with the head that every command's file has."""
    head = result_head("test", {"name": "p", "hash": "abc"}, "runs/a/config.yaml", seed=7)
    path = write_json(tmp_path / "test.json", head | {"exits": []})
    result = read_result(path)
    assert result == head | {"exits": []}
    assert list(head) == ["schema_version", "command", "version", "seed", "config", "machine", "protocol"]
    assert result["schema_version"] == SCHEMA_VERSION
    assert {"cores", "device", "python", "torch", "transformers"} <= set(machine())


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None, str(SCHEMA_VERSION)])
def test_refuses_other_schema_versions(tmp_path: Path, version: object) -> None:
    """Another version, or none, is refused: the message names the file, what was found and what is read."""
    content = {"command": "test"} | ({} if version is None else {"schema_version": version})
    path = write_json(tmp_path / "old.json", content)
    with pytest.raises(DataError) as error:
        read_result(path)
    assert all(w in str(error.value) for w in ("old.json", str(version), f"reads {SCHEMA_VERSION}", "again"))


def test_refuses_a_missing_result(tmp_path: Path) -> None:
    """A file that is not there is named, with the commands that would write it."""
    with pytest.raises(DataError, match=r"absent\.json does not exist.*fit, test or baselines"):
        read_result(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), r"is a folder.*results/test\.json"),
        (lambda path: path.write_text("[1]"), "holds a list, expected an object"),
        (lambda path: path.write_text("{"), "is not a result file"),
    ],
)
def test_refuses_what_is_no_result(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    """A folder suggests a file in it; JSON that is something else says what it is."""
    make(tmp_path / "a.json")
    with pytest.raises(DataError, match=rf"a\.json.*{words}"):
        read_result(tmp_path / "a.json")


def test_run_of_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder above checkpoints/, also by a relative name or the link `latest`; else the checkpoint's folder."""
    run = tmp_path / "runs" / "version_3"
    (run / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("version_3", target_is_directory=True)
    assert run_of_checkpoint(str(run / "checkpoints" / "last.ckpt")) == run
    assert run_of_checkpoint(tmp_path / "runs" / "latest" / "checkpoints" / "last.ckpt") == run
    assert run_of_checkpoint(tmp_path / "elsewhere" / "a.ckpt") == tmp_path / "elsewhere"
    monkeypatch.chdir(run)
    assert run_of_checkpoint("checkpoints/last.ckpt") == run
    monkeypatch.chdir(run / "checkpoints")
    assert run_of_checkpoint("last.ckpt") == run


def test_sha256(tmp_path: Path) -> None:
    """FIPS 180-2's example: the digest of "abc"."""
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "a") == expected
