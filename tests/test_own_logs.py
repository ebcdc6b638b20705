"""The user's own log, in the user's own columns, through the main job from YAML alone.

A music shop's log: other column names, ISO dates, 0/1 answers, a split column with history rows, items with attributes
of their own. The same log with a split column and as one CSV per split must train the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import yaml
from fake_ranker import serving
from jsonargparse import ArgumentParser
from world import given, result, tiny_settings

from project.data.logs import GIVEN_SPLITS, TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.retrieval import ItemKNN, LightGCN, MatrixFactorisation, NoRetriever
from project.serve.ranker import Ranker

Run = Callable[..., None]
ROWS, USERS, ITEMS = 400, 25, 15
START = datetime(2024, 5, 17, 9, 30, tzinfo=UTC)
COLUMNS = {
    "user_id": "customer",
    "item_id": "song",
    "timestamp": "heard_at",
    "label": "liked",
}
ITEM_COLUMNS = {"item_id": "song", "title": "name"}
PROMPT: dict[str, Any] = {
    "instruction": "Songs and answers.\n",
    "segment": "{title} by {artist} all {item_percent} near {vote_percent}:",
}


def listened() -> pl.DataFrame:
    """Rows in time order under the shop's names; `row` is the position. Factorisation decides, so both answers are
    common.
    """
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, USERS, ROWS), rng.integers(0, ITEMS, ROWS)
    liked = (
        rng.normal(size=USERS)[user] * rng.normal(size=ITEMS)[item]
        + 0.5 * rng.normal(size=ROWS)
        > 0
    )
    minutes = np.sort(rng.integers(0, ROWS // 2, ROWS))  # ties
    part = np.searchsorted([100, 280, 340], np.arange(ROWS), side="right")
    split = np.array(GIVEN_SPLITS)[part]
    late = rng.choice(np.arange(100, 280), 15, replace=False)
    split[late] = "history"  # past that lies among training rows
    table = pl.DataFrame(
        {
            "heard_at": [START + timedelta(minutes=int(m)) for m in minutes],
            "customer": [f"c-{u}" for u in user],
            "song": [f"s-{i}" for i in item],
            "liked": liked.astype(int),
            "part": split,
            "device": "phone",  # a column nobody asked for
        }
    )
    return table.unique(["heard_at", "customer", "song"], keep="first", maintain_order=True)


def songs() -> pl.DataFrame:
    words = ["Sea", "Road", "Night", "River", "Dog"]
    return pl.DataFrame(
        {
            "song": [f"s-{i}" for i in range(ITEMS)],
            "name": [f"{words[i % 5]} {i}" for i in range(ITEMS)],
            "artist": [f"Band {i % 4}" for i in range(ITEMS)],
        }
    )


def as_text(table: pl.DataFrame) -> pl.DataFrame:
    return table.with_columns(pl.col("heard_at").dt.strftime("%Y-%m-%dT%H:%M:%S"))


def write_logs(folder: Path, form: str = "csv") -> dict[str, Any]:
    """The shop's files; returns data.logs.init_args."""
    table, columns = listened(), dict(COLUMNS)
    songs().write_csv(folder / "songs.csv")
    arguments: dict[str, Any] = {
        "items": str(folder / "songs.csv"),
        "item_columns": ITEM_COLUMNS,
    }
    if form == "files":
        names = {split: str(folder / f"{split}.csv") for split in GIVEN_SPLITS}
        for split, name in names.items():
            as_text(table.filter(pl.col("part") == split).drop("part")).write_csv(name)
        return arguments | {"interactions": names, "columns": columns}
    columns["split"] = "part"
    path = folder / "log.csv"
    as_text(table).write_csv(path)
    return arguments | {"interactions": str(path), "columns": columns}


def write_config(folder: Path, model: Path) -> Path:
    """All that a user writes."""
    config = tiny_settings(folder, model, folder, name="runs")
    config["data"] |= {
        "logs": {
            "class_path": "project.data.logs.TableLogs",
            "init_args": write_logs(folder),
        },
        "protocol": {"split": "given", "label": None},
        "prompt": PROMPT,
        "context_tokens": 160,
        "batch_tokens": 800,
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def read_data(folder: Path, form: str, model: Path) -> InteractionData:
    """The DataModule of the YAML, without a run."""
    return InteractionData(
        TableLogs(**write_logs(folder, form)),
        ItemKNN(),
        Protocol(split="given", label=None),
        Prompt(**PROMPT),
        tokenizer=str(model),
        refits=5,
        mf=None,
    )


@pytest.mark.slow
def test_fit_and_test(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    run("fit", "--config", write_config(tmp_path, tiny_model))
    folder, table = tmp_path / "runs" / "version_0", listened()
    run("test", *given(folder))
    parts = dict(table.group_by("part").len().iter_rows())
    for command, split in (("fit", "valid"), ("test", "test")):
        found = result(folder, command)
        assert found["protocol"]["name"] == "given"
        assert found["protocol"]["counts"] == {
            s: parts[s] for s in ("train", "valid", "test")
        }
        assert found["protocol"]["context"] == {
            "train": parts["history"],
            "valid": 0,
            "test": 0,
        }
        scores = pl.read_parquet(folder / "scores" / f"{split}.parquet")
        assert len(scores) == parts[split]
        assert scores["label"].sum() == table.filter(pl.col("part") == split)["liked"].sum()
        assert all(row["auc"] is not None for row in found["exits"])


@pytest.mark.slow
def test_clicks_without_dates_or_answers(
    run: Run, tmp_path: Path, tiny_model: Path
) -> None:
    """Who and what alone is a log: rows are shuffled, negatives sampled, and both are said in the table."""
    config = write_config(tmp_path, tiny_model)
    listened().select("customer", "song").unique(maintain_order=True).write_csv(
        tmp_path / "log.csv"
    )
    settings = yaml.safe_load(config.read_text())
    settings["data"]["logs"]["init_args"]["columns"] = {
        "user_id": "customer",
        "item_id": "song",
    }
    settings["data"]["protocol"] = {
        "split": "random",
        "label": "clicked",
        "negatives": {"per_positive": 1},
    }
    config.write_text(yaml.safe_dump(settings))
    run("fit", "--config", config)
    folder = tmp_path / "runs" / "version_0"
    run("test", *given(folder))
    found = result(folder, "test")["protocol"]
    assert (found["order"], found["fields"]["negatives"]["by"]) == ("shuffled", "uniform")
    assert found["counts"] == {
        split: 2 * count for split, count in found["positives"].items()
    }
    assert found["negatives"] == found["rows"] == sum(found["positives"].values())
    scores = pl.read_parquet(folder / "scores" / "test.parquet")
    assert scores["label"].mean() == 0.5


@pytest.fixture
def read_form(
    tmp_path: Path,
    tiny_model: Path,
) -> Callable[[str], InteractionData]:
    """Reads the log in a form of it."""
    return lambda form: read_data(tmp_path, form, tiny_model)


def test_a_file_each_split_trains_the_same(
    read_form: Callable[[str], InteractionData],
) -> None:
    """Rows, prompts and features are those of the CSV with a split column."""
    expected = read_form("csv")
    found = read_form("files")
    assert found.split.rows.equals(expected.split.rows)
    for name in ("train", "valid", "test"):
        assert found.retrieved[name].equals(expected.retrieved[name])
        one, other = (data.streams(name) for data in (expected, found))
        np.testing.assert_equal(other.tokens.values, one.tokens.values)


def test_history_is_context_and_never_a_target(
    read_form: Callable[[str], InteractionData],
) -> None:
    """No history row is scored in any split; later rows of its user read it, its answer included, and count it."""
    data = read_form("csv")
    rows, kinds = data.split.rows, data.split.interactions.rows["given_split"]
    history = rows.filter(kinds == "history")["row_id"].to_numpy()
    assert len(history) > 100
    assert set(rows.filter(kinds == "history")["role"]) == {"context"}
    for name in ("train", "valid", "test"):
        streams = data.streams(name)
        inside = np.isin(streams.row_id, history)
        assert inside.sum() == len(history)
        assert not streams.target[inside].any()
        assert streams.context[inside].all()
        # the answer is there
        assert (
            streams.tokens.lengths[: len(inside)][inside] == streams.slots[inside] + 2
        ).all()
    own = rows.filter(pl.col("user") == 0, kinds.is_in(["history", "train"]).to_list())
    last = own.filter(pl.col("role") == "target").tail(1)
    earlier = own.filter(pl.col("timestamp") < last["timestamp"].item())
    assert "context" in earlier["role"]
    counted = data.retrieved["train"].filter(pl.col("row_id") == last["row_id"].item())
    assert counted["user_count"].item() == len(earlier)
    assert counted["user_rate"].item() == pytest.approx(earlier["label"].mean())


def readme_yaml() -> str:
    """The YAML of README's own logs, as it stands there."""
    parts = (Path(__file__).parents[1] / "README.md").read_text().split("```")[1::2]
    return next(
        part.removeprefix("yaml\n")
        for part in parts
        if "class_path: project.data.logs.TableLogs" in part
    )


@pytest.mark.slow
def test_readme_yaml_makes_a_run_that_every_command_reads(
    run: Run, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitted as it stands, with a tiny backbone: tested, predicted, exported, loaded, served."""
    monkeypatch.chdir(tmp_path)
    shop = {"customer": "member", "song": "product", "heard_at": "when"}
    log = as_text(listened()).rename(shop).with_columns(stars=2 + 2 * pl.col("liked"))
    log.drop("liked", "device").write_csv("logs.csv")
    songs().rename({"song": "product"}).write_csv("products.csv")
    Path("own.yaml").write_text(readme_yaml())
    small = (
        "--model.backbone",
        tiny_model,
        "--model.exit_layers",
        "[1,3]",
        "--trainer.accelerator",
        "cpu",
    )
    run("fit", "--config", "own.yaml", *small, "--trainer.limit_train_batches", 2)
    folder = (tmp_path / "runs" / "own" / "latest").resolve()
    saved = (folder / "config.yaml").read_text()
    assert "Unable to serialize" not in saved
    assert "class_path: project.retrieval" in saved
    # every command that reads config.yaml
    run("test", *given(folder))
    assert result(folder, "test")["exits"]
    ids = {"user_id": "c-1", "candidates": ["s-1", "s-2"]}
    Path("requests.jsonl").write_text(json.dumps({"request_id": "r", **ids}))
    run("predict", *given(folder), "--data.requests", "requests.jsonl")
    assert len(pl.read_parquet(folder / "scores" / "predict.parquet")) == 2
    assert Ranker.load(folder).user("c-1")["known"]
    run("export", folder, tmp_path / "exported")
    with serving(tmp_path, run=folder) as (_, address):
        response = httpx.post(f"{address}/v1/rank", json=ids, timeout=30)
        assert (response.status_code, len(response.json()["items"])) == (200, 2)


def test_retriever_and_factorisation_may_be_left_out(
    tiny_config: Callable[..., Path],
) -> None:
    """Own YAML without them has LightGCN and the factorisation as they are; null leaves that out."""
    parser = ArgumentParser()
    parser.add_class_arguments(InteractionData, "data")
    settings = yaml.safe_load(tiny_config().read_text())["data"]
    del settings["retriever"], settings["mf"]
    for change, retriever, mf in (
        ({}, LightGCN(item_neighbours=30), MatrixFactorisation()),
        (
            {"retriever": {"class_path": "project.retrieval.NoRetriever"}, "mf": None},
            NoRetriever(),
            None,
        ),
    ):
        data = parser.instantiate_classes(
            parser.parse_object({"data": settings | change})
        ).data
        assert (data.retriever.settings(), data.mf) == (retriever.settings(), mf)
