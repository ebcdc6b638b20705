"""Ranking requests: golden numbers on hand-made score tables, and the command on a tiny world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from world import given
from world import result as result_of

from project.errors import ConfigError
from project.evaluation.result import labelled_scores
from project.exits.calibration import Calibration
from project.exits.criteria import Consistency
from project.exits.ranking import (
    ScoredRequests,
    by_row,
    costs,
    fastest,
    fixed_depth,
    overlaps,
    policies,
)
from project.rank import RankSettings, policy_row, rank_rows
from project.report.tables import render
from project.run import score_table


def table(
    requests: list[str],
    logits: dict[int, list[float]],
    labels: list[int | None] | None = None,
) -> pl.DataFrame:
    """Score table of candidates; two tokens each after a stream of ten; user u<number of the request>."""
    n = len(requests)
    names = list(dict.fromkeys(requests))
    columns = {
        "request_id": requests,
        "candidate_index": [requests[:i].count(r) for i, r in enumerate(requests)],
        "user": [names.index(r) for r in requests],
        "label": labels or [None] * n,
        "target_tokens": [2] * n,
        "stream_tokens": [10] * n,
        "logit_0": np.array(logits[0], dtype=np.float64),
    }
    layers = [k for k in logits if k]
    return score_table(columns, np.array([logits[k] for k in layers]).T, layers)


GOLDEN = table(
    ["a"] * 4 + ["b"] * 3,
    {0: [4, 3, 2, 1, 0, 0, 9], 2: [4, 1, 2, 3, 5, 6, 8], 6: [1, 2, 4, 3, 7, 6, 5]},
    [0, 1, 1, 0, 1, 0, 0],
)
"""Best 2 at layer 0: a {0, 1}, b {2, 0}; at layer 2: a {0, 3}, b {2, 1}; at layer 6: a {2, 3}, b {0, 1}."""


def test_golden_static_models() -> None:
    """Overlap@2 at layer 0: a 0/2, b 1/2, mean .25; at layer 2: a 1/2, b 1/2, mean .5. Precision@2 by labels.

    Layer 0: a holds labels 0, 1 and b 0, 1, mean .5; layer 2: a 0, 0, b 0, 0, mean 0; layer 6: a 1, 0, b 1, 0: .5.
    GAUC at layer 6: a beats 2 of 4 pairs with 4 > 1, 3 and 2 > 1 (3 of 4), b both: (4 * .75 + 3 * 1) / 7 = 6 / 7.
    Cost at layer 2 of 6: every token runs a third of the layers, cached or not.
    """
    scored = ScoredRequests.of(GOLDEN)
    assert scored.outputs.layers == (0, 2, 6)
    full = fixed_depth(scored.outputs.layers, 2)
    at = [
        policy_row(fixed_depth(scored.outputs.layers, j), full, scored, scored, 2)
        for j in range(3)
    ]
    assert [row["policy"] for row in at] == ["fixed_depth_0", "fixed_depth_2", "full_depth"]
    assert [row["overlap"] for row in at] == [0.25, 0.5, 1.0]
    assert [row["precision"] for row in at] == [0.5, 0.0, 0.5]
    assert at[2]["gauc"] == pytest.approx(6 / 7)
    assert [row["mean_depth"] for row in at] == [0, 2, 6]
    for key in ("depth_share", "cost", "cost_cached"):
        assert [row[key] for row in at] == pytest.approx([0, 1 / 3, 1])
    assert at[0]["overlap_interval"] == [0.0, 0.5]
    assert (at[0]["n_requests"], at[0]["n_labelled"]) == (2, 2)


def test_golden_row_policy() -> None:
    """`consistency` leaves at layer 2 where the probability moved less than .05, else goes to layer 6.

    |sigmoid change|: a0 4 -> 4: 0, leaves; a1 .95 -> .73: stays; a2 2 -> 2: 0, leaves; a3 .73 -> .95: stays;
    b0, b1 .5 -> .99: stay; b2 .9999 -> .9997: leaves. Emitted: a 4, 2, 2, 3 -> best 2 {0, 3}: 1 of full depth's {2, 3};
    b 7, 6, 8 -> {0, 2}: 1 of {0, 1}.
    Cost cached: a 2 * (2 + 6 + 2 + 6) = 32, b 2 * (6 + 6 + 2) = 28; not cached: both streams run to layer 6: + 60 each.
    """
    scored = ScoredRequests.of(GOLDEN)
    full = fixed_depth(scored.outputs.layers, 2).decide(scored)
    ranking = by_row(Consistency(), -0.05).decide(scored)
    assert ranking.exits.tolist() == [1, 2, 1, 2, 2, 2, 1]
    assert ranking.keys.tolist() == [4, 2, 2, 3, 7, 6, 8]
    assert overlaps(scored, ranking, full, 2).tolist() == [0.5, 0.5]
    assert costs(scored, ranking, True).tolist() == [32, 28]
    assert costs(scored, ranking, False).tolist() == [92, 88]


def test_calibration_enters() -> None:
    """Slopes leave a head's list alone; exit 0's logit does not: -logit + 2 logit_0 reverses layer 6's list of a."""
    values = torch.tensor(
        [[1.0, 0, 0], [2.0, 0, 5.0], [0.001, 2.0, 0]], dtype=torch.float64
    )
    plain, made = (
        ScoredRequests.of(GOLDEN, c) for c in (None, Calibration((0, 2, 6), values))
    )
    whole = fixed_depth((0, 2, 6), 2)
    shallow = fixed_depth((0, 2, 6), 1)
    assert (
        made.outputs.logits[:, 1].tolist() == (2 * plain.outputs.logits[:, 1] + 5).tolist()
    )
    # both read exit 0's order now, so layer 6's list is layer 0's
    assert overlaps(
        made, whole.decide(made), fixed_depth((0, 2, 6), 0).decide(made), 2
    ).tolist() == [1, 1]
    assert overlaps(made, shallow.decide(made), shallow.decide(plain), 2).tolist() == [1, 1]
    without = ScoredRequests.of(
        GOLDEN, Calibration((2, 6), values[1:] * torch.tensor([1.0, 0, 1]))
    )
    assert without.outputs.layers == (2, 6)


def drifting(requests: int, candidates: int, seed: int, noise: float = 0.3) -> pl.DataFrame:
    """Scores of layers 0, 2, 4, 6 whose distance from the last head shrinks with depth; labels follow the last."""
    rng = np.random.default_rng(seed)
    n = requests * candidates
    last = rng.normal(size=n)
    logits = {
        k: (last + noise * (6 - k) * rng.normal(size=n)).tolist() for k in (0, 2, 4)
    } | {6: last.tolist()}
    labels = (rng.random(n) < 1 / (1 + np.exp(-2 * last))).astype(int).tolist()
    return table([f"r{i // candidates}" for i in range(n)], logits, labels)


def test_top_k_keeps_its_overlap() -> None:
    """On noise that shrinks with depth `top_k` keeps its overlap on tune, nearly so on other requests, at less cost."""
    tune, test = (ScoredRequests.of(drifting(60, 40, seed)) for seed in (0, 1))
    for k in (3, 8):
        full, top_k, *others = policies(tune, k, 0.97)
        assert (full.name, top_k.name) == ("full_depth", "top_k")
        assert {p.name for p in others} >= {
            "consistency",
            "ratio",
            "fixed_depth_0",
            "fixed_depth_4",
        }
        kept = overlaps(tune, top_k.decide(tune), full.decide(tune), k).mean()
        assert 0.97 <= kept < 1
        row = policy_row(top_k, full, test, test, k)
        assert row["overlap"] > 0.93
        assert row["depth_share"] < 0.9
        assert row["cost"] > row["cost_cached"]
        ranking = top_k.decide(test)
        keys, stayed = ranking.keys.numpy(), (ranking.exits == 3).numpy()
        for request in range(60):
            mine = test.request.numpy() == request
            assert stayed[mine].sum() >= k  # the list is whole
            assert keys[mine & stayed].min() > keys[mine & ~stayed].max(initial=-np.inf)


def test_the_fastest_that_is_enough() -> None:
    """Of static depths whose overlaps@2 are .25, .5 and 1: 0 takes layer 0, .3 layer 2, .6 full depth."""
    scored = ScoredRequests.of(GOLDEN)
    path = [fixed_depth((0, 2, 6), index) for index in (1, 0)]
    full = fixed_depth((0, 2, 6), 2)
    found = [fastest(path, full, scored, 2, overlap) for overlap in (0.1, 0.3, 0.6)]
    assert [costs(scored, p.decide(scored), True).sum().item() for p in found] == [
        0,
        28,
        84,
    ]


def parts_of(**others: ScoredRequests) -> dict[str, ScoredRequests]:
    """Requests of every kind and part, with some replaced."""
    names = ("catalogue/tune", "labelled/tune", "catalogue/test", "labelled/test")
    return {
        name: ScoredRequests.of(drifting(50, 30, seed)) for seed, name in enumerate(names)
    } | others


def test_rows_and_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("project.rank.LISTS", (3, 5))
    scored = ScoredRequests.of(drifting(400, 30, 9))
    made = parts_of(**{"catalogue/certify": scored})
    # nobody rated enough for precision on test
    del made["labelled/test"]
    settings = RankSettings(candidates=30, epsilon=0.1)
    result = rank_rows(made, settings)
    assert {(r["split"], r["precision"] is None) for r in result["requests"]} == {
        ("valid", False),
        ("test", True),
    }
    shown = [(r["split"], r["k"]) for r in result["requests"] if r["policy"] == "top_k"]
    assert shown == [("valid", 3), ("test", 3), ("valid", 5), ("test", 5)]
    for k, certificate in zip((3, 5), result["certificate"], strict=True):
        full, top_k, *_ = policies(made["catalogue/tune"], k, settings.overlap)
        loss = 1 - overlaps(scored, top_k.decide(scored), full.decide(scored), k).mean()
        assert certificate["estimate"] == pytest.approx(loss)
        assert certificate["passed"]
        assert (certificate["k"], certificate["n"]) == (k, 400)
        assert certificate["delta"] == 0.05  # .1 shared out among two lists
        assert loss < certificate["bound"] <= 0.1


def test_a_user_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 requests of 60 users are 60 users, and the estimate is the mean of their means; of 8 users too few."""
    monkeypatch.setattr("project.rank.LISTS", (3,))
    scored = ScoredRequests.of(drifting(400, 30, 9))
    uneven = np.random.default_rng(0).choice(60, 340, p=[0.3, 0.2, *[0.5 / 58] * 58])
    owners = np.concatenate([np.arange(60), uneven])
    settings = RankSettings(candidates=30, epsilon=0.1)
    made = parts_of(**{"catalogue/certify": replace(scored, user=owners)})
    (certificate,) = rank_rows(made, settings)["certificate"]
    full, top_k, *_ = policies(made["catalogue/tune"], 3, settings.overlap)
    loss = 1 - overlaps(scored, top_k.decide(scored), full.decide(scored), 3)
    assert certificate["n"] == 60
    by_user = [loss[owners == user].mean() for user in range(60)]
    assert certificate["estimate"] == pytest.approx(np.mean(by_user))
    made["catalogue/certify"] = replace(scored, user=owners % 8)
    (certificate,) = rank_rows(made, settings)["certificate"]
    assert (certificate["n"], certificate["passed"]) == (8, None)
    assert certificate["users_needed"] == 23  # ln 10 / ln(1 + .99 * .1 / .9) = 22.1


def test_scores_meet_their_labels() -> None:
    """Scores in any order are put in the workload's, each with its own label."""
    known = pl.DataFrame(
        {"request_id": ["a", "a", "b"], "candidate_index": [0, 1, 0], "user": [7, 7, 8], "label": [None, 1, 0],
         "row_id": [None, 30, 40]},
        schema_overrides={"label": pl.Int8},
    )  # fmt: skip
    scores = table(["b", "a", "a"], {0: [3.0, 1.0, 2.0], 2: [3.0, 1.0, 2.0]})
    joined = labelled_scores(scores, known)
    assert joined.columns == scores.columns
    assert joined.select("request_id", "user", "label", "row_id", "logit_2").rows() == [
        ("a", 7, None, None, 1.0),
        ("a", 7, 1, 30, 2.0),
        ("b", 8, 0, 40, 3.0),
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("candidates", 10),
        ("requests", 0),
        ("overlap", 1.5),
        ("epsilon", 2.0),
        ("delta", 0.0),
    ],
)
def test_bad_settings(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"ranking.{key}"):
        RankSettings(**{key: value}).check()


@pytest.mark.slow
def test_the_command(
    run: Callable[..., None],
    fitted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fit, test, rank: a target scores as `test` scored it; a second promise on the same fold is refused."""
    run("test", *given(fitted))
    monkeypatch.setattr("project.rank.LISTS", (2, 4))
    monkeypatch.setattr("project.rank.LEAST_LABELLED", 5)
    options = ["--ranking.requests", 12, "--ranking.certify", 8, "--ranking.candidates", 7]
    run("rank", *given(fitted), *options)
    result = result_of(fitted, "rank")
    assert (result["layers"], result["calibrated"]) == ([0, 1, 3], True)
    assert {(r["n_requests"], *r["candidates"]) for r in result["requests"]} == {(12, 7, 7)}
    for row in result["requests"]:
        if row["policy"] == "full_depth":
            assert (
                row["overlap"]
                == row["depth_share"]
                == row["cost"]
                == row["cost_cached"]
                == 1
            )
        assert 0 <= row["precision"] <= 1
    assert [c["k"] for c in result["certificate"]] == [2, 4]
    assert render(result).count("| top_k |") == 2

    scores, test = (
        pl.read_parquet(fitted / "scores" / f"{name}.parquet") for name in ("rank", "test")
    )
    scored = scores.filter(
        pl.col("request_id").str.starts_with("catalogue/test/")
    ).drop_nulls("row_id")
    assert len(scored) == 12
    both = scored.join(test, on="row_id", suffix="_test", validate="1:1")
    assert both["label"].to_list() == both["label_test"].to_list()
    for column in ("logit_0", "logit_1", "logit_3"):
        assert (
            np.abs(both[column].to_numpy() - both[f"{column}_test"].to_numpy()).max() < 1e-4
        )
    certified = scores.filter(pl.col("request_id").str.starts_with("catalogue/certify/"))
    assert certified["request_id"].n_unique() == 8
    assert {c["n"] for c in result["certificate"]} == {certified["user"].n_unique()}

    with pytest.raises(SystemExit):
        run("rank", *given(fitted), *options, "--ranking.epsilon", 0.2)
    assert "ranking.epsilon 0.05 -> 0.2" in capsys.readouterr().err
    run("rank", *given(fitted), *options, "--ranking.epsilon", 0.2, "--ranking.certify", 0)
    without = result_of(fitted, "rank")
    assert (without["certificate"], without["ledger"]) == ([], result["ledger"])
