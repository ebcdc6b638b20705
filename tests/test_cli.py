"""The commands, end to end on a tiny world, and what they say when the input is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import will_be_saved
from project.run import SCORE_COLUMNS

Run = Callable[..., None]
Config = Callable[..., Path]


def latest(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny" / "latest"


def result(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results" / f"{name}.json").read_text())
    return content


@pytest.mark.slow
def test_the_main_job(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """fit, test, validate, baselines and predict, each from the saved config, leave the files the contract names."""
    run("fit", "--config", tiny_config())
    folder = latest(tmp_path)
    given = ("--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt")

    fit = result(folder, "fit")
    assert [(row["layer"], row["split"], row["fold"]) for row in fit["exits"]] == [
        (0, "valid", "tune"),
        (1, "valid", "tune"),
        (3, "valid", "tune"),
    ]
    names = {"item_rate", "user_rate", "neighbour_vote", "lr_rates", "lr_features", "gbdt_features"}
    assert names <= {row["name"] for row in fit["baselines"]}  # and those that another test kept
    assert {"read logs", "retrieve", "train", "validate"} <= set(fit["stage_seconds"])

    run("test", *given)
    test = result(folder, "test")
    assert test["chosen_exit"] == fit["chosen_exit"] in (1, 3)
    assert test["protocol"]["hash"] == fit["protocol"]["hash"]
    counts = test["protocol"]["counts"]
    assert all(
        row["n"] == counts["test"] and row["split"] == "test" for row in test["exits"] + test["baselines"]
    )
    assert {d["baseline"] for d in test["baseline_differences"]} == {test["best_baseline"], "lr_rates"}
    sizes = {part["name"]: part["n"] for part in test["slices"]}
    assert sum(n for name, n in sizes.items() if name.startswith("item_")) == counts["test"]
    assert all([row["mean_depth"] for row in part["rows"] if row.get("plan")] for part in test["slices"])
    scores = pl.read_parquet(folder / "scores" / "test.parquet")
    assert scores.columns == [*SCORE_COLUMNS, "logit_1", "logit_3", "exit_layer", "adaptive_logit"]
    assert len(scores) == counts["test"] == scores["row_id"].n_unique()

    run("validate", *given)
    assert result(folder, "validate")["exits"] == fit["exits"]
    run("baselines", *given)
    baselines = [f for f in result(folder, "baselines")["baselines"] if f["split"] == "test"]
    assert baselines[: len(test["baselines"])] == test["baselines"]  # the command appends slower ones
    assert not (tmp_path / "runs" / "tiny" / "version_1").exists()

    bundle = json.loads((folder / "bundle" / "bundle.json").read_text())
    assert bundle["protocol"]["hash"] == test["protocol"]["hash"]
    assert (folder / "bundle" / bundle["retrieved"] / "test.parquet").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:exits are not calibrated")  # rightly: these few rows cannot
@pytest.mark.parametrize("limits", [{"trainer.limit_val_batches": 2}, {"trainer.fast_dev_run": True}])
def test_limited_batches(
    run: Run, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any]
) -> None:
    """A trial with a few batches runs to its end, results included, although not every row was scored."""
    monkeypatch.chdir(tmp_path)  # fast_dev_run has no logger and writes where it is started
    run("fit", "--config", tiny_config(**limits))
    (file,) = tmp_path.rglob("results/fit.json")
    rows = json.loads(file.read_text())
    assert rows["slices"]
    assert rows["exits"][0]["n"] < rows["baselines"][0]["n"]


@pytest.mark.slow
def test_predict_equals_test(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """A request at a test row's own time scores its item as `test` did; unseen users and items have scores too."""
    run("fit", "--config", tiny_config())
    folder = latest(tmp_path)
    given = ("--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt")
    run("test", *given)
    scores = pl.read_parquet(folder / "scores" / "test.parquet").sort("row_id")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    files = config["data"]["logs"]["init_args"]
    log = pl.read_csv(files["interactions"]).sort("timestamp")

    from project.data.logs import TableLogs
    from project.data.protocol import Protocol, apply_protocol, build_interactions

    protocol = Protocol(**config["data"]["protocol"])
    split = apply_protocol(
        build_interactions(TableLogs(files["interactions"], files["items"]).read(), protocol), protocol
    )
    users, items = (
        dict(t.select(c, f"{c}_id").iter_rows())
        for t, c in ((split.interactions.users, "user"), (split.interactions.items, "item"))
    )
    rows = split.rows[scores["row_id"]]
    requests: list[dict[str, Any]] = []
    for row in rows.iter_rows(named=True):
        requests.append(
            {"request_id": f"r{row['row_id']}", "user_id": users[row["user"]], "time": row["timestamp"],
             "candidates": [items[row["item"]], "i0"]}
        )  # fmt: skip
    past = log.filter(
        (pl.col("user_id") == requests[-1]["user_id"]) & (pl.col("timestamp") < requests[-1]["time"])
    )
    history = [
        {"item_id": i, "label": int(r > 3), "time": t}
        for i, r, t in past.select("item_id", "rating", "timestamp").iter_rows()
    ]
    fresh = {"item_id": "new", "title": "a dog at sea", "year": "2020"}
    requests.append({"request_id": "new", "user_id": "nobody", "candidates": ["i1", fresh]})
    requests.append(
        {
            "request_id": "own",
            "history": history,
            "time": requests[-2]["time"],
            "candidates": requests[-2]["candidates"],
        }
    )
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, requests)))
    run("predict", *given, "--data.requests", path)
    predicted = pl.read_parquet(folder / "scores" / "predict.parquet")
    assert len(predicted) == 2 * len(requests)
    first = predicted.filter((pl.col("candidate_index") == 0) & pl.col("request_id").str.starts_with("r"))
    for column in ("logit_0", "logit_1", "logit_3"):
        assert np.abs(first[column].to_numpy() - scores[column].to_numpy()).max() < 1e-4
    new = predicted.filter(pl.col("request_id") == "new")
    assert new["item_id"].to_list() == ["i1", "new"]
    assert new.select("logit_1", "logit_3").null_count().sum_horizontal().item() == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run", r"run, which is a folder; .* run/checkpoints/last\.ckpt\."),
        ("own.yaml", r"own\.yaml, which is not a checkpoint, or not a whole one"),
        ("absent.ckpt", r"absent\.ckpt, which does not exist"),
    ],
)
def test_ckpt_path_is_a_checkpoint(
    run: Run,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    words: str,
) -> None:
    """A run's folder suggests its last checkpoint; another file and none are named, before anything is made."""
    config = tiny_config()
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").touch()
    Path("own.yaml").write_text("model: {}\n")
    with pytest.raises(SystemExit) as stopped:
        run("test", "--config", config, "--ckpt_path", name)
    assert stopped.value.code == 2
    assert re.search(rf"CheckpointError: ckpt_path is {words}", capsys.readouterr().err)


@pytest.mark.parametrize(("save_top_k", "expected"), [(0, True), (1, False), (-1, False)])
def test_what_is_saved_without_a_best(tmp_path: Path, save_top_k: int, expected: bool) -> None:
    """With save_top_k 0 no checkpoint is chosen by its metric: the latest weights are what results are about."""
    saver = ModelCheckpoint(tmp_path, monitor="select/auc/deepest", mode="max", save_top_k=save_top_k)
    trainer = Trainer(logger=False, callbacks=[saver], enable_progress_bar=False, enable_model_summary=False)
    assert will_be_saved(trainer) is expected  # the metric is not there yet
    trainer.callback_metrics["select/auc/deepest"] = torch.tensor(0.6)
    assert will_be_saved(trainer)
