"""Calibration of a whole run, through the command line as a user would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import polars as pl
import pytest
import torch

from project.callbacks import ExitCalibration
from project.errors import DataError
from project.exits.plan import ExitPlan
from project.features import FeatureBaseline, feature_matrix
from project.model.module import ExitRecommender

Run = Callable[..., None]
Config = Callable[..., Path]

pytestmark = pytest.mark.slow


def result(folder: Path, command: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results" / f"{command}.json").read_text())
    return content


@pytest.fixture
def fitted(run: Run, tiny_config: Config, tmp_path: Path) -> Path:
    """Folder of a tiny trained run."""
    run("fit", "--config", tiny_config())
    return (tmp_path / "runs" / "tiny" / "latest").resolve()


def given(folder: Path) -> tuple[object, ...]:
    return ("--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints" / "last.ckpt")


def state_of(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    found: dict[str, Any] = content["callbacks"]["ExitCalibration"]
    return found


def test_calibrate_again_is_the_same(run: Run, fitted: Path) -> None:
    """From the run's own config and checkpoint the command gives what the callback gave, from the score table or
    anew.
    """
    before, policies = state_of(fitted), result(fitted, "calibrate")["policies"]
    run("calibrate", *given(fitted))
    assert result(fitted, "calibrate")["policies"] == policies
    torch.testing.assert_close(state_of(fitted)["plan"]["thresholds"], before["plan"]["thresholds"])
    run("calibrate", *given(fitted), "--rescore", "true")
    assert result(fitted, "calibrate")["policies"] == policies


def test_simulated_equals_heads(run: Run, fitted: Path) -> None:
    """On test, every row's reported exit is what its heads say one by one, and the result file adds them up right."""
    run("test", *given(fitted))
    scores, adaptive = pl.read_parquet(fitted / "scores" / "test.parquet"), result(fitted, "test")["adaptive"]
    plan = ExitPlan.from_state(state_of(fitted)["plan"])
    exit_0 = torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["exit_0"]
    base = FeatureBaseline.from_array(exit_0.numpy()).base
    (retrieved,) = (fitted / "bundle" / "retrieved").glob("*/test.parquet")
    rows = scores.select("row_id").join(
        pl.read_parquet(retrieved), on="row_id", how="left", maintain_order="left"
    )
    outputs = plan.outputs(scores, feature_matrix(rows, base))
    for row in range(len(scores)):
        alone = outputs.rows(torch.tensor([row]))
        head = next(k for k in range(len(plan.layers)) if plan.policy.leaves(alone.until(k)))
        assert scores["exit_layer"][row] == plan.layers[head]
        assert scores["adaptive_logit"][row] == pytest.approx(float(alone.logits[0, head]), abs=1e-5)
    assert adaptive["mean_depth"] == pytest.approx(scores["exit_layer"].mean())
    tokens = (scores["target_tokens"] + scores["stream_tokens"]).to_numpy()
    spent = float((scores["exit_layer"].to_numpy() * tokens).sum())
    expected = pytest.approx(3 * tokens.sum() / spent) if spent else None  # None: no layer runs
    assert adaptive["token_layer_speedup"] == expected
    shares = {row["layer"]: row["exit_share"] for row in result(fitted, "test")["exits"]}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert np.isclose(shares[3], (scores["exit_layer"] == 3).mean())


def test_report_is_written(run: Run, fitted: Path) -> None:
    """Fit leaves a report with its pictures; the command writes it again."""
    page = fitted / "report" / "report.html"
    assert {"pareto.png", "report.md", "report.html"} <= {p.name for p in page.parent.iterdir()}
    page.unlink()
    run("report", fitted)
    assert "data:image/png;base64" in page.read_text()


def test_second_certificate_is_refused(
    run: Run, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another epsilon on a fold that was tested: the plan is made, without a certificate, and the ledger stays."""
    run("fit", "--config", tiny_config(), "--exits.certificate.epsilon", "0.9")
    folder = (tmp_path / "runs" / "tiny" / "latest").resolve()
    issued = result(folder, "calibrate")
    assert issued["certificate"]["passed"] is not None
    run("calibrate", *given(folder), "--exits.certificate.epsilon", "0.8")
    assert "voids delta" in " ".join(capsys.readouterr().out.split())
    again = result(folder, "calibrate")
    assert again["certificate"] is None
    assert (again["ledger"], again["policies"]) == (issued["ledger"], issued["policies"])
    run("calibrate", *given(folder), "--exits.certificate", "null")
    assert result(folder, "calibrate")["certificate"] is None
    run("test", *given(folder))
    assert "The plan runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--exits.certificate.epsilon", "7"), ("epsilon", "expected")),
        (("--exits.certificate.delta", "0"), ("delta", "expected")),
        (("--exits.max_auc_drop", "null"), ("max_auc_drop", "max_cost")),
        (("--exits.max_cost", "3"), ("max_cost", "3")),
    ],
)
def test_bad_settings(
    run: Run,
    tiny_config: Config,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    """A promise that cannot be kept is refused before anything runs."""
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny_config(), *arguments)
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_failed_calibration_leaves_no_stale_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a later validation cannot be calibrated, the plan of an earlier one does not go into its checkpoint."""
    module = ExitRecommender("unused", [1, 3])
    module.scores = pl.DataFrame()
    callback = ExitCalibration()
    callback.found = cast(Any, "the plan of epoch 0")

    def fails(*_: object) -> None:
        raise DataError("one class")

    monkeypatch.setattr(callback, "calibrate", fails)
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), checkpoint_callback=None, datamodule=None,
        loggers=[], default_root_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="not calibrated: one class"):
        callback.on_validation_end(cast(Any, trainer), module)
    assert callback.state_dict() == {}
