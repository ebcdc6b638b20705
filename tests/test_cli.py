"""The commands, end to end on a tiny world: what they write, what they refuse, and how calibration comes out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from world import given, result

from project.__main__ import run as run_command
from project.callbacks import ExitCalibration, will_be_saved
from project.data.logs import TableLogs
from project.data.protocol import Protocol, apply_protocol, build_interactions
from project.errors import DataError
from project.exits.plan import ExitPlan, ExitSettings
from project.features import FeatureBaseline, feature_matrix
from project.model.module import ExitRecommender
from project.run import SCORE_COLUMNS

Run = Callable[..., None]
Config = Callable[..., Path]


def latest(tmp_path: Path) -> Path:
    return (tmp_path / "runs" / "tiny" / "latest").resolve()


def state_of(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found: dict[str, Any] = content["exit_plans"]
    return found


@pytest.mark.slow
def test_the_main_job(run: Run, fitted: Path, tmp_path: Path) -> None:
    fit = result(fitted, "fit")
    shown = [(row["layer"], row["split"], row["fold"]) for row in fit["exits"]]
    assert shown == [(layer, "valid", "tune") for layer in (0, 1, 3)]
    names = {
        "item_rate",
        "user_rate",
        "neighbour_vote",
        "lr_rates",
        "lr_features",
        "gbdt_features",
    }
    # and those that another test kept
    assert names <= {row["name"] for row in fit["baselines"]}
    assert {"read logs", "retrieve", "train", "validate"} <= set(fit["stage_seconds"])

    run("test", *given(fitted))
    test = result(fitted, "test")
    assert test["chosen_exit"] == fit["chosen_exit"] in (1, 3)
    assert test["protocol"]["hash"] == fit["protocol"]["hash"]
    count = test["protocol"]["counts"]["test"]
    assert {(row["n"], row["split"]) for row in test["exits"] + test["baselines"]} == {
        (count, "test")
    }
    assert test["baseline_difference"]["baseline"] == test["best_baseline"]
    sizes = {part["name"]: part["n"] for part in test["slices"]}
    assert sum(n for name, n in sizes.items() if name.startswith("item_")) == count
    scores = pl.read_parquet(fitted / "scores" / "test.parquet")
    assert scores.columns == [
        *SCORE_COLUMNS,
        "logit_1",
        "logit_3",
        "exit_layer",
        "adaptive_logit",
    ]
    assert len(scores) == count == scores["row_id"].n_unique()

    run("validate", *given(fitted))
    assert result(fitted, "validate")["exits"] == fit["exits"]
    run("baselines", *given(fitted))
    baselines = [
        f for f in result(fitted, "baselines")["baselines"] if f["split"] == "test"
    ]
    # the command appends slower ones
    assert baselines[: len(test["baselines"])] == test["baselines"]
    page = fitted / "report" / "report.html"
    page.unlink()
    run("report", fitted)
    assert "data:image/png;base64" in page.read_text()
    assert not (tmp_path / "runs" / "tiny" / "version_1").exists()

    bundle = json.loads((fitted / "bundle" / "bundle.json").read_text())
    assert bundle["protocol"]["hash"] == test["protocol"]["hash"]
    assert (fitted / "bundle" / bundle["retrieved"] / "test.parquet").is_file()


@pytest.mark.slow
# rightly: these few rows cannot
@pytest.mark.filterwarnings("ignore:exits are not calibrated")
def test_limited_batches(run: Run, tiny_config: Config, tmp_path: Path) -> None:
    """A trial with a few batches runs to its end, results included, although not every row was scored."""
    run("fit", "--config", tiny_config(**{"trainer.limit_val_batches": 2}))
    rows = result(latest(tmp_path), "fit")
    assert rows["slices"]
    assert rows["exits"][0]["n"] < rows["baselines"][0]["n"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:exits are not calibrated")
def test_fast_dev_run_leaves_nothing(
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its files are not where it is started, but where it says; `run` takes the command as its argument."""
    config = tiny_config()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run_command(["fit", "--config", str(config), "--trainer.fast_dev_run", "true"])
    written = re.search(r"written: (\S+fit\.json)", capsys.readouterr().out)
    assert written
    assert Path(written[1]).is_file()
    shutil.rmtree(Path(written[1]).parents[1])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_predict_equals_test(run: Run, fitted: Path, tmp_path: Path) -> None:
    run("test", *given(fitted))
    scores = pl.read_parquet(fitted / "scores" / "test.parquet").sort("row_id")
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    protocol = Protocol(**config["data"]["protocol"])
    logs = TableLogs(**config["data"]["logs"]["init_args"]).read()
    split = apply_protocol(build_interactions(logs, protocol), protocol)
    users, items = (
        dict(table.select(c, f"{c}_id").iter_rows())
        for table, c in (
            (split.interactions.users, "user"),
            (split.interactions.items, "item"),
        )
    )
    requests = [
        {"request_id": f"r{row['row_id']}", "user_id": users[row["user"]], "time": row["timestamp"],
         "candidates": [items[row["item"]], "i0"]}
        for row in split.rows[scores["row_id"]].iter_rows(named=True)
    ]  # fmt: skip
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, requests)))
    run("predict", *given(fitted), "--data.requests", path)
    predicted = pl.read_parquet(fitted / "scores" / "predict.parquet")
    assert len(predicted) == 2 * len(requests)
    first = predicted.filter(pl.col("candidate_index") == 0)
    for column in ("logit_0", "logit_1", "logit_3"):
        assert np.abs(first[column].to_numpy() - scores[column].to_numpy()).max() < 1e-4


def test_ckpt_path_is_a_checkpoint(
    fails: Callable[..., str],
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config()
    monkeypatch.chdir(tmp_path)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").touch()
    Path("own.yaml").write_text("model: {}\n")
    for wrong in (
        "run, which is a folder",
        "own.yaml, which is not a checkpoint",
        "absent.ckpt, which does not",
    ):
        name = wrong.split(",")[0]
        assert f"ckpt_path is {wrong}" in fails(
            "test", "--config", config, "--ckpt_path", name
        )


@pytest.mark.parametrize(("save_top_k", "expected"), [(0, True), (1, False), (-1, False)])
def test_what_is_saved_without_a_best(
    tmp_path: Path, save_top_k: int, expected: bool
) -> None:
    """With save_top_k 0 no checkpoint is chosen by its metric: the latest weights are what results are about."""
    saver = ModelCheckpoint(
        tmp_path, monitor="select/auc/deepest", mode="max", save_top_k=save_top_k
    )
    trainer = Trainer(
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert will_be_saved(trainer) is expected  # the metric is not there yet
    trainer.callback_metrics["select/auc/deepest"] = torch.tensor(0.6)
    assert will_be_saved(trainer)


@pytest.mark.slow
def test_calibrate_again_is_the_same(run: Run, fitted: Path) -> None:
    """From the run's own config and checkpoint the command gives what the callback gave, from the score table or
    anew.
    """
    before, policies = state_of(fitted), result(fitted, "calibrate")["policies"]
    run("calibrate", *given(fitted))
    assert result(fitted, "calibrate")["policies"] == policies
    torch.testing.assert_close(
        state_of(fitted)["plan"]["thresholds"], before["plan"]["thresholds"]
    )
    (fitted / "scores" / "valid.parquet").unlink()  # score anew
    run("calibrate", *given(fitted))
    assert result(fitted, "calibrate")["policies"] == policies


@pytest.mark.slow
def test_simulated_equals_heads(run: Run, fitted: Path) -> None:
    """On test, every row's reported exit is what its heads say one by one, and the result file adds them up right."""
    run("test", *given(fitted))
    scores, adaptive = (
        pl.read_parquet(fitted / "scores" / "test.parquet"),
        result(fitted, "test")["adaptive"],
    )
    plan = ExitPlan.from_state(state_of(fitted)["plan"])
    exit_0 = torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)[
        "state_dict"
    ]["exit_0"]
    base = FeatureBaseline.from_array(exit_0.numpy()).base
    (file,) = (fitted / "bundle" / "retrieved").glob("*/test.parquet")
    retrieved = pl.read_parquet(file)
    rows = scores.select("row_id").join(
        retrieved, on="row_id", how="left", maintain_order="left"
    )
    outputs = plan.outputs(scores, feature_matrix(rows, base))
    for row in range(len(scores)):
        alone = outputs.rows(torch.tensor([row]))
        head = next(k for k in range(len(plan.layers)) if plan.leaves(alone.until(k)))
        assert scores["exit_layer"][row] == plan.layers[head]
        assert scores["adaptive_logit"][row] == pytest.approx(
            float(alone.logits[0, head]), abs=1e-5
        )
    assert adaptive["mean_depth"] == pytest.approx(scores["exit_layer"].mean())
    tokens = (scores["target_tokens"] + scores["stream_tokens"]).to_numpy()
    spent = float((scores["exit_layer"].to_numpy() * tokens).sum())
    # None: no layer runs
    expected = pytest.approx(3 * tokens.sum() / spent) if spent else None
    assert adaptive["token_layer_speedup"] == expected
    shares = adaptive["exit_shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert np.isclose(shares["3"], (scores["exit_layer"] == 3).mean())


@pytest.mark.slow
def test_second_certificate_is_refused(
    run: Run, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another epsilon on a fold that was tested: the plan is made, without a certificate, and the ledger stays."""
    run(
        "fit",
        "--config",
        tiny_config(),
        "--exits.alpha",
        "0.5",
        "--exits.certificate.epsilon",
        "0.9",
    )
    folder = latest(tmp_path)
    issued = result(folder, "calibrate")
    assert issued["certificate"]["passed"] is not None
    run("calibrate", *given(folder), "--exits.certificate.epsilon", "0.8")
    assert "voids delta" in " ".join(capsys.readouterr().out.split())
    again = result(folder, "calibrate")
    assert again["certificate"] is None
    assert (again["ledger"], again["policies"]) == (issued["ledger"], issued["policies"])
    run("calibrate", *given(folder), "--exits.certificate", "null")
    assert result(folder, "calibrate")["certificate"] is None


@pytest.mark.slow
def test_failed_calibration_leaves_no_stale_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a later validation cannot be calibrated, the plan of an earlier one does not go into its checkpoint."""
    module = ExitRecommender("unused", [1, 3])
    module.scores = pl.DataFrame()
    callback = ExitCalibration(ExitSettings())
    callback.plans = cast(Any, "the plan of epoch 0")

    def fails(*_: object, **__: object) -> None:
        raise DataError("one class")

    monkeypatch.setattr(callback, "calibrate", fails)
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), checkpoint_callback=None, datamodule=None,
        loggers=[], default_root_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="not calibrated: one class"):
        callback.on_validation_end(cast(Any, trainer), module)
    checkpoint: dict[str, Any] = {}
    callback.on_save_checkpoint(cast(Any, trainer), module, checkpoint)
    assert checkpoint == {}
