"""The research scripts: what other tests rely on, and that each runs."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from example_engine import LAYERS, make_module, random_request
from world import dense_mask

from project.data.batch import TrainSampler, pack
from project.data.logs import TableLogs
from project.data.prompt import Prompt
from project.data.protocol import Protocol
from project.data.ragged import Ragged
from project.datamodule import InteractionData
from project.engine import Engine, PreparedRequest, RowExits, StreamTokens
from project.exits.calibration import Calibration
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.metrics import auc
from project.report.tables import render
from project.retrieval import LightGCN
from research import library, llama, llmrank, packing, retrieval_times, roofline
from research.generate import generate, reachable_auc, run_generate

SCRIPTS = [path.stem for path in Path(library.__file__).parent.glob("*.py")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_finds_what_it_imports(name: str) -> None:
    import_module(f"research.{name}")


def test_prompts_are_what_packed_targets_see(tiny_logs: Path, tiny_model: Path) -> None:
    """Over an epoch of training windows: one prompt a target, the token ids its slot reads, tied rows left out."""
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
    assert [row["speed"] > 0 for row in library.measure(fitted, candidates=4)["rows"]] == [
        True
    ] * 3
    pytest.importorskip("llama_cpp_py_sync")
    assert llama.measure(fitted, candidates=4)["rows"][0]["speed"] > 0


def untied(seed: int, name: str, segments: int, candidates: int) -> PreparedRequest:
    """A request whose history has one segment a second: there our visibility rule is plain causality."""
    request = random_request(np.random.default_rng(seed), name, segments, candidates)
    lists = Ragged(
        request.stream.tokens,
        np.searchsorted(request.stream.segment, np.arange(segments + 2)),
    )
    return replace(request, stream=StreamTokens.of(lists, np.arange(segments + 1)))


@pytest.mark.parametrize("cached", [None, False, True])
def test_the_library_has_the_engines_logits(
    cached: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ties its causal forward and full depth agree to 1e-4, for one and many candidates, twice.

    S prefix and O own tokens of n candidates run n S + O tokens alone, S + O shared, then O. Batches do not matter:
    padding is neither read nor scored.
    """
    module = make_module()
    requests = [
        untied(n, f"r{n}", segments, n) for n, segments in ((1, 5), (70, 4), (7, 3))
    ]
    calibration = Calibration(
        (LAYERS,), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    )
    nobody = torch.tensor([-torch.inf], dtype=torch.float64)
    plan = ExitPlan(calibration, Ratio(), nobody)
    ours = Engine(module, RowExits(plan)).score(requests)
    theirs = (
        library.Pointwise(module)
        if cached is None
        else library.SharedPrefix(module, cached)
    )
    for again in (False, True):
        monkeypatch.setattr(library, "BATCH_TOKENS", 1 if again else 16_384)
        scores = theirs.score(requests)
        for own, found, request in zip(ours, scores, requests, strict=True):
            np.testing.assert_allclose(found.logits, own.logits, atol=1e-4)
            prefixes = len(request) if cached is None else int(not (cached and again))
            tokens = prefixes * len(request.stream) + len(request.candidates.values)
            assert found.token_layers == tokens * LAYERS


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


def test_fashion_drifts() -> None:
    """The same rows; what a title's first word says of a like turns round in half of the log, and stays without."""
    found = []
    for drift in (0.0, 1.5):
        rows, items = generate(30_000, drift=drift)
        word = pl.col("title").str.slice(0, 4)
        half = (pl.col("timestamp") > rows["timestamp"].max() / 2).alias("late")  # type: ignore[operator]
        of = rows.join(items, on="item_id").group_by(word, half)
        rates = of.agg(pl.col("chance").mean(), pl.len()).filter(pl.col("len") > 30)
        table = rates.pivot("late", index="title", values="chance").drop_nulls()
        found.append(
            (rows.drop("label", "chance"), table.select(pl.corr("true", "false")).item())
        )
    assert found[0][0].equals(found[1][0])
    assert found[0][1] > 0.2 > -0.2 > found[1][1]


def test_generated_log_can_be_read(tmp_path: Path) -> None:
    run_generate(["--rows", "2e3", str(tmp_path)])
    raw = TableLogs(
        str(tmp_path / "interactions.parquet"), str(tmp_path / "items.parquet")
    ).read()
    assert (
        raw.interactions.height == pl.read_parquet(tmp_path / "truth.parquet").height > 1000
    )


def test_counts_and_ndcg_of_fixed_candidates() -> None:
    """Users have {0, 1}, {0, 1}, {1}: items' cosine is 2 / sqrt(2 * 3). A truth that ties stands last."""
    counts = llmrank.Counts(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 1]), 3, 2)
    popularity, cosine = counts.features(np.array([2]), np.array([[0, 1]]))
    assert popularity.tolist() == [[2, 3]]
    assert cosine[0] == pytest.approx([2 / 6**0.5, 0])
    scores = np.array([[0.5, 0.1, 0.5], [0.0, 0.0, 1.0]])
    assert llmrank.ndcg(scores, 10) == pytest.approx([1 / np.log2(3), 1])
    assert llmrank.ndcg(scores, 1).tolist() == [0, 1]
