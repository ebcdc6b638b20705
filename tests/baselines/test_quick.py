"""Baselines without networks: what each is, which labels it reads, its calibration, and heads compared with one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from project.data.logs import OWN_SCORE
from project.data.protocol import Protocol, apply_protocol
from project.errors import DataError
from project.evaluation.baselines import (
    FEATURES,
    Baseline,
    baseline_rows,
    best_baseline,
    fit_baselines,
    platt,
    targets_of,
)
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.result import add_comparisons
from project.features import PRIOR_ROWS, feature_matrix
from project.metrics import auc, head_metrics

RATES = ["item_rate", "user_rate", "neighbour_vote"]
NAMES = [*RATES, "lr_rates", "lr_features", "gbdt_features", "lr_text", "gbdt_text"]
SIZES = {"train": 600, "valid": 200, "test": 200}
World = tuple[pl.DataFrame, dict[str, pl.DataFrame]]


def world(neighbours: bool = True) -> World:
    """1,000 rows of 40 users: labels follow the rates and, where there are any, the neighbours' votes."""
    rng = np.random.default_rng(0)
    n = sum(SIZES.values())
    rates, counts = rng.random((2, n)), rng.integers(0, 30, (2, n))
    answers = [
        rng.integers(0, 2, rng.integers(0, 6)) if neighbours else [] for _ in range(n)
    ]
    vote = np.array([np.mean(a) if len(a) else np.nan for a in answers])
    logit = 4 * (rates - 0.5) * (counts > 0)
    labels = rng.random(n) < 1 / (
        1 + np.exp(-logit.sum(axis=0) - 4 * np.nan_to_num(vote - 0.5))
    )
    split = np.repeat(list(SIZES), list(SIZES.values()))
    fold = np.where(
        split == "valid", np.array(["select", "tune", "certify"])[np.arange(n) % 40 % 3], ""
    )
    rows = pl.DataFrame(
        {
            "row_id": np.arange(n),
            "user": np.arange(n) % 40,
            "label": labels.astype(np.int8),
            "split": split,
            "fold": [f or None for f in fold],
            "role": np.where(np.arange(n) % 10 == 9, "context", "target"),
        }
    )
    known = np.where(counts > 0, rates, np.nan)
    table = pl.DataFrame(
        {
            "row_id": np.arange(n),
            "vote": vote,
            "weighted_vote": vote,
            "vote_weight": [0.5 * len(a) for a in answers],
            "neighbour_count": [len(a) for a in answers],
            "item_rate": known[0],
            "item_count": counts[0],
            "user_rate": known[1],
            "user_count": counts[1],
        },
    ).with_columns(
        pl.col("vote", "weighted_vote", "item_rate", "user_rate")
        .fill_nan(None)
        .cast(pl.Float32)
    )
    ends = dict(zip(SIZES, np.cumsum(list(SIZES.values())), strict=True))
    return rows, {name: table.head(int(end)) for name, end in ends.items()}


@pytest.fixture(scope="module")
def fitted() -> tuple[pl.DataFrame, dict[str, pl.DataFrame], list[Baseline]]:
    """(rows, retrieved features, baselines) of one world, fitted once."""
    rows, retrieved = world()
    return rows, retrieved, fit_baselines(rows, retrieved)


def targets(rows: pl.DataFrame, **values: str) -> pl.DataFrame:
    return rows.filter(
        pl.col("role") == "target",
        *(pl.col(name) == value for name, value in values.items()),
    )


def by_name(baselines: list[Baseline]) -> dict[str, Baseline]:
    return {baseline.name: baseline for baseline in baselines}


def test_every_target_is_scored_once(fitted: Any) -> None:
    """One finite logit per target of valid and test, none for context rows, and only of the splits that are named."""
    rows, retrieved, baselines = fitted
    assert [baseline.name for baseline in baselines] == NAMES
    wanted = targets(rows).filter(pl.col("split") != "train").select("row_id", "split")
    for baseline in baselines:
        assert baseline.scores.select("row_id", "split").equals(wanted)
        assert baseline.scores["logit"].is_finite().all()
    exploring = fit_baselines(
        rows, {key: retrieved[key] for key in ("train", "valid")}, splits=("valid",)
    )
    assert set(exploring[0].scores["split"]) == {"valid"}


def test_rate_baselines_golden(fitted: Any) -> None:
    """Logit of (rate * count + 5 base) / (count + 5), base = train mean; logit of base without rows."""
    rows, retrieved, baselines = fitted
    base = targets(rows, split="train")["label"].mean()
    columns = [
        ("item_rate", "item_count"),
        ("user_rate", "user_count"),
        ("vote", "neighbour_count"),
    ]
    for name, (rate, count) in zip(RATES, columns, strict=True):
        table = by_name(baselines)[name].scores.join(retrieved["test"], on="row_id")
        assert table[count].min() == 0
        p = (table[rate].fill_null(0) * table[count] + PRIOR_ROWS * base) / (
            table[count] + PRIOR_ROWS
        )
        np.testing.assert_allclose(table["logit"], np.log(p / (1 - p)), atol=1e-6)


def test_auc(fitted: Any) -> None:
    """More knowledge ranks better on planted data; without neighbours the vote is .5 and lr_features is lr_rates.

    But for the ridge: without factorisation its feature is the two rates' sum, which adds room under the penalty, .04
    at most.
    """
    rows, _, baselines = fitted
    test = targets(rows, split="test")
    found = {
        baseline.name: auc(baseline.logits(test["row_id"]), test["label"])
        for baseline in baselines
    }
    assert found["lr_rates"] > max(found["item_rate"], found["user_rate"]) + 0.02
    assert found["lr_features"] > max(found["lr_rates"], found["neighbour_vote"]) + 0.02
    assert found["gbdt_features"] > found["lr_rates"]
    rows, retrieved = world(neighbours=False)
    test, alone = targets(rows, split="test"), by_name(fit_baselines(rows, retrieved))
    assert auc(alone["neighbour_vote"].logits(test["row_id"]), test["label"]) == 0.5
    logits = (alone[name].scores["logit"] for name in ("lr_features", "lr_rates"))
    np.testing.assert_allclose(*logits, atol=0.05)


def test_reads_no_later_label(fitted: Any) -> None:
    """Flipping every label of valid and test changes no baseline."""
    rows, retrieved, baselines = fitted
    later = pl.col("split") != "train"
    flipped = rows.with_columns(
        label=pl.when(later).then(1 - pl.col("label")).otherwise(pl.col("label"))
    )
    for baseline, other in zip(baselines, fit_baselines(flipped, retrieved), strict=True):
        assert baseline.scores.equals(other.scores)


def test_each_split_reads_its_own_features(fitted: Any) -> None:
    """Train rows of valid's table are not read; another test table changes test logits only."""
    rows, retrieved, before = fitted
    spoilt = retrieved["test"].with_columns(item_rate=1 - pl.col("item_rate"))
    train_only = pl.col("row_id") < SIZES["train"]
    item_rate = pl.when(train_only).then(0.0).otherwise(pl.col("item_rate"))
    mixed = retrieved["valid"].with_columns(item_rate=item_rate)
    after = fit_baselines(
        rows, {"train": retrieved["train"], "valid": mixed, "test": spoilt}
    )
    valid = pl.col("split") == "valid"
    for old, new in zip(before, after, strict=True):
        assert old.scores.filter(valid).equals(new.scores.filter(valid))
        reads_items = old.name not in ("user_rate", "neighbour_vote")
        assert old.scores.filter(~valid).equals(new.scores.filter(~valid)) != reads_items


def test_similarity_weighs_votes() -> None:
    """A liker of similarity 1 against a disliker of 0, and the reverse."""
    table = world()[1]["train"].head(2)
    table = table.with_columns(weighted_vote=pl.Series([1.0, 0.0]), vote_weight=1.0)
    found = feature_matrix(table, 0.5)[:, FEATURES.index("weighted_vote_log_odds")]
    high = np.log(3.5 / 2.5)  # (1 + 5 * .5) / (0 + 5 * .5)
    np.testing.assert_allclose(found, [high, -high])


def test_what_cannot_be_fitted_is_refused(fitted: Any) -> None:
    rows, retrieved, baselines = fitted
    one_class, hole = (
        rows.with_columns(label=pl.lit(0)),
        retrieved["valid"].filter(pl.col("row_id") != 600),
    )
    for given, tables, words in (
        (one_class, retrieved, "both classes, found 540 targets, 0 positive"),
        (
            rows,
            {key: retrieved[key] for key in ("train", "valid")},
            "retrieved features table of test",
        ),
        (rows, retrieved | {"valid": hole}, "valid has 179 rows for its 180 targets"),
    ):
        with pytest.raises(DataError, match=words):
            fit_baselines(given, tables)
    with pytest.raises(DataError, match="no score for 1 of 2 rows"):
        baselines[0].logits([600, 0])


def test_result_rows(fitted: Any) -> None:
    """One row a baseline for valid, test and the folds select and tune, none for certify; same metrics for a part
    alone.

    Every baseline has a calibrated log loss, but on select, which it was fitted on: baselines times ten plus one
    sound far too sure: raw they lose, calibrated they are what they were.
    """
    rows, _, baselines = fitted
    found = baseline_rows(baselines, rows, draws=20)
    parts = [("valid", None), ("test", None), ("valid", "select"), ("valid", "tune")]
    assert [(r["name"], r["split"], r.get("fold")) for r in found] == [
        (n, *part) for part in parts for n in NAMES
    ]
    tune = targets(rows, fold="tune")
    metrics = head_metrics(baselines[3].logits(tune["row_id"]), tune["label"], tune["user"])
    row = found[-5]
    assert row | metrics == row
    assert row["auc_interval"][0] < row["auc"] < row["auc_interval"][1]
    assert baseline_rows(baselines, rows, draws=20, parts=[("valid", "tune")]) == found[-8:]
    loud = [
        Baseline(f.name, f.scores.with_columns(logit=10 * pl.col("logit") + 1))
        for f in baselines
    ]
    assert all((row["calibrated"] is None) == (row["fold"] == "select") for row in found)
    for row, again in zip(found, baseline_rows(loud, rows, draws=2), strict=True):
        if row["calibrated"] is not None:
            assert again["log_loss"] > row["log_loss"]
            assert again["auc"] == pytest.approx(row["auc"], abs=1e-6)
            expected = pytest.approx(row["calibrated"]["log_loss"], abs=1e-6)
            assert again["calibrated"]["log_loss"] == expected


def test_only_tune_decides_which_baseline_is_best() -> None:
    """The one that is best on tune wins although it is wrong on every other row of valid; one class: none."""
    rows, _ = world()
    valid = targets(rows, split="valid")
    label, tune = (
        valid["label"].cast(pl.Float64),
        (valid["fold"] == "tune").cast(pl.Float64),
    )
    baselines = [
        Baseline(name, valid.select("row_id", "split").with_columns(logit=label * right))
        for name, right in (("elsewhere", 1 - 2 * tune), ("on_tune", 2 * tune - 1))
    ]
    best = best_baseline(baselines, rows)
    assert best is not None
    assert best.name == "on_tune"
    assert best_baseline(baselines, rows.with_columns(label=pl.lit(1))) is None


def test_golden_calibration() -> None:
    """At logit 1 three of four are liked, at -1 one of four: slope log 3, offset 0, so the chances are 3/4 and 1/4."""
    logits, labels = np.repeat([1.0, -1.0], 4), np.array([1, 1, 1, 0, 0, 0, 0, 1])
    assert platt(logits, labels) == pytest.approx((np.log(3), 0), abs=1e-6)


def test_calibration_at_its_borders() -> None:
    """A baseline that ranks backwards keeps its AUC: the slope is held above zero.

    Where select does not determine the slope it is 1, and the offset gives select's share of likes, here 1/4. Without
    both classes there is no calibration, rather than an infinite one.
    """
    found = platt(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1, 1, 0, 0]))
    assert found is not None
    assert found[0] == pytest.approx(1e-3)
    constant = platt(np.full(4, 2.0), np.array([1, 0, 0, 0]))
    assert constant == pytest.approx((1, np.log(1 / 3) - 2))
    for one in ([], [1, 1], [0, 0]):
        assert platt(np.arange(float(len(one))), np.array(one)) is None


def test_remembered_draws_are_those_of_the_scores() -> None:
    """What a bootstrap remembers of other scores and other answers does not change an interval."""
    rng = np.random.default_rng(0)
    users, labels = np.arange(60) % 12, rng.integers(0, 2, (2, 60))
    scores = rng.normal(size=(2, 60))
    shared = UserBootstrap(users, 50)
    for answers in [*labels, *labels]:
        alone = UserBootstrap(users, 50).difference_interval(*scores, answers)
        assert shared.difference_interval(*scores, answers) == alone


@pytest.mark.real
def test_movielens_anchors() -> None:
    """ML-100K, global_time, minimum history 5, as-of rates only: within .005 of an independent measurement.

    That one used its own code, other smoothing and LightGBM.
    """
    from project.data.logs import MovieLens100K
    from project.data.protocol import build_interactions
    from project.retrieval.controls import NoRetriever
    from project.retrieval.past import WalkRows
    from project.retrieval.walk import walk

    protocol = Protocol(minimum_history=5, label="rating > 3")
    split = apply_protocol(build_interactions(MovieLens100K().read(), protocol), protocol)
    rows = split.rows
    log = walk(
        WalkRows.from_log(rows), NoRetriever(), split.interactions.items, np.empty(0), []
    )
    table = log.join(rows.select("row_id", "split"), on="row_id")
    retrieved = {s: table.filter(pl.col("split") <= s) for s in SIZES}
    baselines = fit_baselines(rows, retrieved)
    found = {
        (r["name"], r["split"]): r
        for r in baseline_rows(baselines, rows, draws=10)
        if r["fold"] is None
    }
    anchors = {
        ("item_rate", "test"): 0.7098,
        ("user_rate", "test"): 0.6413,
        ("lr_rates", "valid"): 0.7401,
        ("lr_rates", "test"): 0.7423,
        ("gbdt_features", "valid"): 0.7414,
        ("gbdt_features", "test"): 0.7437,
    }
    assert {key: found[key]["auc"] for key in anchors} == pytest.approx(anchors, abs=0.005)
    assert found["gbdt_features", "test"]["log_loss"] == pytest.approx(0.5901, abs=0.005)


def test_the_ranker_that_runs_today_is_a_baseline() -> None:
    """Its scores keep their order at any scale, stand first among the baselines, and the mean chance is train's."""
    rows, retrieved = world()
    rng = np.random.default_rng(1)
    score = 1e6 * (rows["label"].to_numpy() + rng.normal(size=rows.height)) - 3e7
    rows = rows.with_columns(pl.Series(OWN_SCORE, score))
    own, *others = fit_baselines(rows, retrieved, ("train", "test"), own_scores="my_ranker")
    assert [own.name, *(b.name for b in others)] == ["my_ranker", *NAMES]
    for split in ("train", "test"):
        part = targets_of(rows, split)
        logits = own.logits(part["row_id"])
        assert auc(logits, part["label"]) == auc(part[OWN_SCORE], part["label"])
    train = targets_of(rows, "train")
    chance = 1 / (1 + np.exp(-own.logits(train["row_id"])))
    assert chance.mean() == pytest.approx(train["label"].mean(), abs=1e-3)
    # everything else against it, paired
    test = targets_of(rows, "test")
    scores = {f"baseline {b.name}": b.logits(test["row_id"]) for b in (own, *others)}
    log = SimpleNamespace(interactions=SimpleNamespace(own_scores="my_ranker"), rows=rows)
    made: Any = {}
    add_comparisons(made, log, [own, *others], test, scores)  # type: ignore[arg-type]
    found = made["own_differences"]
    assert set(found) == {f"baseline {name}" for name in NAMES}
    gap = auc(scores["baseline lr_text"], test["label"]) - auc(
        own.logits(test["row_id"]), test["label"]
    )  # type: ignore[operator]
    assert found["baseline lr_text"]["value"] == pytest.approx(gap)
    assert found["baseline lr_text"]["baseline"] == "my_ranker"
