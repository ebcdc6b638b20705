"""The research scripts: what other tests rely on, and that each runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from world import dense_mask

from project.data.batch import TrainSampler, pack
from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.metrics import auc
from project.report.tables import render
from project.retrieval import LightGCN
from research import llama, packing, retrieval_times, roofline
from research.generate import generate, reachable_auc, run_generate


def test_prompts_are_what_packed_targets_see(
    tiny_logs: Path, tiny_model: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over an epoch of training windows: one prompt a target, the token ids its slot reads, tied rows left out."""
    monkeypatch.setenv("PROJECT_CACHE", str(session_cache))
    data = InteractionData(
        TableLogs(str(tiny_logs / "interactions.csv"), str(tiny_logs / "items.csv")),
        LightGCN(neighbours=3, dim=4, epochs=1),
        Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2], label="rating > 3"),
        Prompt(segment="{title} all{item_percent} near{vote_percent}:"),
        tokenizer=str(tiny_model),
        context_tokens=128,
        batch_tokens=512,
        refits=5,
        mf=None,
    )
    streams = data.streams("train")
    targets = left_out = 0
    for windows in TrainSampler(
        streams, data.context_tokens, data.batch_tokens, data.seed, 0, 1
    ):
        batch = pack(streams, windows)
        prompts = [
            p.tolist() for s, w in windows for p in packing.prompts_of(streams, s, w)
        ]
        mask = dense_mask(batch.layout)[0]  # the written-out rule
        assert prompts == [batch.tokens[0, mask[slot]].tolist() for slot in batch.slots]
        targets += len(prompts)
        times = [streams.timestamp[streams.offsets[s] + w.positions] for s, w in windows]
        left_out += sum(len(time) - len(np.unique(time)) for time in times)
    assert targets == streams.target.sum() == data.split.manifest["counts"]["train"]
    assert left_out > 0  # rows that tie with another row of their window


@pytest.mark.slow
def test_scripts_measure_a_run(fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios are above 0, shares of the machine's limit in 0 to 2: its ceilings are measured, too."""
    monkeypatch.setattr(roofline, "REQUESTS", 2)
    monkeypatch.setattr(llama, "REQUESTS", 2)
    assert packing.measure(fitted, seconds=0.0)["rows"][0]["ratio"] > 0
    assert retrieval_times.measure(fitted, seconds=0.0)["rows"][0]["over LightGCN"] == 1
    near = roofline.measure(fitted, candidates=4)
    assert "full depth" in render(near)
    assert 0 < near["rows"][0]["share_of_limit"] < 2
    pytest.importorskip("llama_cpp_py_sync")
    assert llama.measure(fitted, candidates=4)["rows"][0]["speed"] > 0


def test_reachable_auc() -> None:
    """Chances .2 and .8: of the pairs with a like and a dislike .64 are in order, .04 in the wrong one."""
    assert reachable_auc(np.array([0.8, 0.2])) == pytest.approx(0.64 / 0.68)


def test_no_score_beats_the_truth() -> None:
    """The chances' AUC on the drawn labels is the reachable one, within four standard errors of at most .003."""
    rows = generate(30_000)[0]
    assert rows["timestamp"].is_sorted()
    assert not rows.select("user_id", "item_id").is_duplicated().any()
    reachable = reachable_auc(rows["chance"].to_numpy())
    label = rows["label"].to_numpy()
    assert auc(rows["chance"].to_numpy(), label) == pytest.approx(reachable, abs=0.012)
    # rates of the whole log, the future included, know items and users, but not who likes
    # what
    rates = rows.select(
        pl.col("label").mean().over("user_id") + pl.col("label").mean().over("item_id")
    )
    assert 0.6 < (auc(rates.to_series().to_numpy(), label) or 0) < reachable


def test_generated_log_can_be_read(tmp_path: Path) -> None:
    run_generate(["--rows", "2e3", str(tmp_path)])
    raw = TableLogs(
        str(tmp_path / "interactions.parquet"), str(tmp_path / "items.parquet")
    ).read()
    assert (
        raw.interactions.height == pl.read_parquet(tmp_path / "truth.parquet").height > 1000
    )
