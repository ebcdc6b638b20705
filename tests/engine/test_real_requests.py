"""Requests of logs, end to end: they score as in the packed evaluation, and the commands work.

Unusual here: one tiny fit with sharp attention serves all tests (as in tests/test_predict.py), so a wrong position,
group or window moves scores far more than rounding does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from world import tiny_settings

from project.run import read_result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted(
    tiny_model: Path, tiny_logs: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Run folder of one tiny fit with a test, its exits calibrated."""
    from transformers import AutoModelForCausalLM

    from project.__main__ import main

    folder = tmp_path_factory.mktemp("engine")
    sharp = folder / "model"
    shutil.copytree(tiny_model, sharp)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    for name, weights in model.named_parameters():
        if "proj" in name:
            weights.data.mul_(10)
    model.save_pretrained(sharp)
    config = tiny_settings(tiny_logs, sharp, folder, name="")
    config["data"] |= {"context_tokens": 256, "batch_tokens": 1024}
    config["model"]["exit_layers"] = [1, 2, 3]
    config["exits"] = {"criterion": "project.exits.criteria.Ratio"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROJECT_CACHE", str(session_cache))
        run = folder / "version_0"
        given = ["--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
        for arguments in (["fit", "--config", str(folder / "tiny.yaml")], ["test", *given]):
            patch.setattr("sys.argv", ["project", *arguments])
            main()
    spread_exits(run)
    return run


def spread_exits(run: Path) -> None:
    """Thresholds at which some test rows leave at every exit: tiny logs see no use in depth.

    Heads are alike here, so thresholds fall with depth: who stays at one would hardly leave at the next.
    """
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    plan = content["callbacks"]["ExitCalibration"]["plan"]
    scores = pl.read_parquet(run / "scores" / "test.parquet")
    for head, layer in enumerate(plan["layers"][:-1]):
        slope, exit_0, offset = plan["calibration"][head].tolist()
        logit = scores[f"logit_{layer}"].to_numpy() * slope + scores["logit_0"].to_numpy() * exit_0 + offset
        plan["thresholds"][head] = float(np.quantile(np.abs(logit), 0.7 - 0.3 * head))
    torch.save(content, path)


def given(run: Path) -> tuple[object, ...]:
    """Arguments that name the run."""
    return "--config", run / "config.yaml", "--ckpt_path", run / "checkpoints" / "last.ckpt"


def write_requests(path: Path) -> Path:
    """Known, unseen and anonymous users, a history beyond the window, one candidate twice, more than fit a window."""
    long = [{"item_id": f"i{k % 20}", "label": k % 2, "time": 10.0 * k} for k in range(60)]
    tied = [{"item_id": f"i{k}", "label": 1, "time": 5.0} for k in range(6)]
    items = [f"i{k}" for k in range(20)]
    records = [
        {"request_id": "known", "user_id": "u1", "time": 200.0, "candidates": ["i3", "i0", "i3"]},
        {"request_id": "again", "user_id": "u1", "time": 240.0, "candidates": ["i3", "i5"]},
        {"request_id": "unseen", "user_id": "nobody", "candidates": ["i1"]},
        {"request_id": "empty", "history": [], "candidates": ["i1", "i2"]},
        {"request_id": "long", "history": long, "candidates": items[:7]},
        {"request_id": "tied", "history": tied, "candidates": [*items, *items]},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_predict_leaves_where_the_packed_scores_say(
    fitted: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """`predict --engine early_exit` and `predict` with its simulated exits: the same candidates, exits and logits."""
    requests = write_requests(tmp_path / "requests.jsonl")
    for extra in ((), ("--engine", "early_exit")):
        run("predict", *given(fitted), "--data.requests", requests, *extra)
    packed = pl.read_parquet(fitted / "scores" / "predict.parquet")
    early = pl.read_parquet(fitted / "scores" / "predict-early_exit.parquet")
    keys = ["request_id", "candidate_index", "item_id"]
    assert early.select(keys).equals(packed.select(keys))
    assert early["error"].null_count() == len(early) == 55
    same = (early["exit_layer"] == packed["exit_layer"]).to_numpy()
    assert same.mean() > 0.95  # but for rows near a threshold
    np.testing.assert_allclose(
        early["adaptive_logit"].filter(same), packed["adaptive_logit"].filter(same), atol=1e-4
    )
    assert packed["exit_layer"].n_unique() >= 3
    assert packed["logit_3"].std() > 0.05  # what is read moves the score  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:request .* is not scored")
def test_bad_requests_have_rows_of_their_own(fitted: Path, run: Callable[..., None], tmp_path: Path) -> None:
    """Unknown items, in candidates or history, and no candidate: an error each; others score as without them."""
    good = write_requests(tmp_path / "good.jsonl").read_text().splitlines()
    bad = [
        {"request_id": "unknown", "user_id": "u1", "candidates": ["i3", "zzz"]},
        {"request_id": "nothing", "user_id": "u1", "candidates": []},
        {"request_id": "past", "history": [{"item_id": "zzz", "label": 1, "time": 5}], "candidates": ["i3"]},
    ]
    lines = [json.dumps(bad[0]), *good[:2], *map(json.dumps, bad[1:]), *good[2:]]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    found = []
    for name in ("good", "mixed"):
        run(
            "predict", *given(fitted), "--data.requests", tmp_path / f"{name}.jsonl", "--engine", "early_exit"
        )
        found.append(pl.read_parquet(fitted / "scores" / "predict-early_exit.parquet"))
    plain, mixed = found
    scored = mixed.filter(pl.col("error").is_null())
    assert scored.drop("adaptive_logit", "probability").equals(plain.drop("adaptive_logit", "probability"))
    np.testing.assert_allclose(scored["adaptive_logit"], plain["adaptive_logit"], atol=1e-5)
    failed = mixed.filter(pl.col("error").is_not_null())
    assert failed.select("request_id", "candidate_index", "item_id").rows() == [
        ("unknown", 0, "i3"),
        ("unknown", 1, "zzz"),
        ("nothing", None, None),
        ("past", 0, "i3"),
    ]
    assert failed["exit_layer"].to_list() == [-1] * 4
    assert failed["adaptive_logit"].is_nan().all()
    assert mixed["request_id"].unique(maintain_order=True).to_list()[:5] == [
        "unknown",
        "known",
        "again",
        "nothing",
        "past",
    ]
    run("predict", *given(fitted), "--data.requests", tmp_path / "mixed.jsonl")
    assert len(pl.read_parquet(fitted / "scores" / "predict.parquet")) == len(plain)


def test_benchmark_writes_rows_of_every_engine(fitted: Path, run: Callable[..., None]) -> None:
    """Packed, each static depth and early exit, prefix cached or not; ratios are against packed, which is 1."""
    run("benchmark", *given(fitted), "--only", "engine", "--seconds", "0.1")
    rows = read_result(fitted / "results" / "benchmark.json")["rows"]
    assert {(r["candidates"], r["prefix_cached"]) for r in rows} == {
        (n, cached) for n in (1, 8) for cached in (False, True)
    }  # there are 20 items
    for row in rows:
        if row["engine"] == "packed":
            assert (row["measured_speedup"], row["token_layer_speedup"], row["efficiency"]) == (1, 1, 1)
            assert row["auc_drop"] == 0
        if row["engine"] == "fixed_depth_1":
            assert row["token_layer_speedup"] == pytest.approx(3)
        assert row["gflops"] is None or row["gflops"] < 2 * row["gflops_ceiling"]
        assert row["gbytes_ceiling"] > 0
        assert 0 <= row["of_limit"] < 2
    assert sum(r["engine"] == "early_exit" for r in rows) >= 2 * 8


def test_benchmark_times_lists(
    fitted: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one of eight, prefix cached or not: a list is as good as its overlap, and costs at most full depth."""
    monkeypatch.setattr("project.benchmark.contenders.LISTS", (1,))
    monkeypatch.setattr("project.benchmark.contenders.OVERLAP", 0.0)
    run("benchmark", *given(fitted), "--only", "engine", "--seconds", "0.1", "--sizes", "[8]")
    rows = read_result(fitted / "results" / "benchmark.json")["rows"]
    lists = [row for row in rows if row["engine"] == "top_k"]
    assert [(row["policy"], row["prefix_cached"]) for row in lists] == [("best 1", False), ("best 1", True)]
    for row in lists:
        assert 0 <= row["overlap"] <= 1
        assert row["auc"] is None
        assert row["token_layer_speedup"] >= 1
