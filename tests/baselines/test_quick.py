import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression

from project.data.protocol import Protocol, apply_protocol
from project.errors import DataError
from project.evaluation.baselines import (
    FEATURES,
    Baseline,
    baseline_rows,
    best_baseline,
    fit_baselines,
)
from project.features import PRIOR_ROWS, feature_matrix
from project.metrics import auc, head_metrics

NAMES = [
    "item_rate",
    "user_rate",
    "neighbour_vote",
    "lr_rates",
    "lr_features",
    "gbdt_features",
    "lr_text",
    "gbdt_text",
]
SIZES = {"train": 600, "valid": 200, "test": 200}
NO_LISTS = {"similarities": pl.List(pl.Float32), "answers": pl.List(pl.Int8)}


def world(seed=0, neighbours=True):
    """1,000 rows of 40 users: labels follow the rates and, where there are any, the neighbours' votes."""
    rng = np.random.default_rng(seed)
    n = sum(SIZES.values())
    rates, counts = rng.random((2, n)), rng.integers(0, 30, (2, n))
    answers = [rng.integers(0, 2, rng.integers(0, 6)) if neighbours else [] for _ in range(n)]
    vote = np.array([np.mean(a) if len(a) else np.nan for a in answers])
    logit = 4 * (rates - 0.5) * (counts > 0)
    labels = rng.random(n) < 1 / (1 + np.exp(-logit.sum(axis=0) - 4 * np.nan_to_num(vote - 0.5)))
    split = np.repeat(list(SIZES), list(SIZES.values()))
    fold = np.where(split == "valid", np.array(["select", "tune", "certify"])[np.arange(n) % 40 % 3], "")
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
    table = pl.DataFrame(
        {
            "row_id": np.arange(n),
            "similarities": [rng.random(len(a)).tolist() for a in answers],
            "answers": [list(map(int, a)) for a in answers],
            "vote": vote,
            "neighbour_count": [len(a) for a in answers],
            **{
                f"{kind}_rate": np.where(counts[k] > 0, rates[k], np.nan)
                for k, kind in enumerate(("item", "user"))
            },
            **{f"{kind}_count": counts[k] for k, kind in enumerate(("item", "user"))},
        },
        schema_overrides=NO_LISTS,
    ).with_columns(pl.col("vote", "item_rate", "user_rate").fill_nan(None).cast(pl.Float32))
    ends = dict(zip(SIZES, np.cumsum(list(SIZES.values())), strict=True))
    return rows, {name: table.head(int(end)) for name, end in ends.items()}


@pytest.fixture(scope="module")
def fitted():
    """(rows, retrieved features, baselines) of one world, fitted once."""
    rows, retrieved = world()
    return rows, retrieved, fit_baselines(rows, retrieved)


def by_name(baselines):
    return {baseline.name: baseline for baseline in baselines}


def split_auc(baseline, rows, split="test"):
    part = rows.filter((pl.col("split") == split) & (pl.col("role") == "target"))
    return auc(baseline.logits(part["row_id"]), part["label"])


class TestFitBaselines:
    def test_scores_every_target_once(self, fitted):
        """Eight baselines, each with one finite logit per target of valid and test, none for context rows."""
        rows, _, baselines = fitted
        assert [baseline.name for baseline in baselines] == NAMES
        targets = rows.filter(pl.col("role") == "target")
        wanted = targets.filter(pl.col("split") != "train").select("row_id", "split")
        for baseline in baselines:
            assert baseline.scores.select("row_id", "split").equals(wanted)
            assert baseline.scores["logit"].is_finite().all()

    def test_rate_baselines_golden(self, fitted):
        """Logit of (rate * count + 5 base) / (count + 5), base = train mean; logit of base without rows."""
        rows, retrieved, baselines = fitted
        base = rows.filter((pl.col("split") == "train") & (pl.col("role") == "target"))["label"].mean()
        columns = {"item_rate": "item_count", "user_rate": "user_count", "vote": "neighbour_count"}
        baselines = by_name(baselines)
        for rate, count in columns.items():
            baseline = baselines["neighbour_vote" if rate == "vote" else rate]
            table = baseline.scores.join(retrieved["test"], on="row_id")
            assert table[count].min() == 0
            p = (table[rate].fill_null(0) * table[count] + PRIOR_ROWS * base) / (table[count] + PRIOR_ROWS)
            np.testing.assert_allclose(table["logit"], np.log(p / (1 - p)), atol=1e-6)

    def test_logistic_equals_scikit_learn_by_hand(self, fitted):
        """The weights of lr_rates come from train targets, shrunk to the same base as the scored rows."""
        rows, retrieved, baselines = fitted
        train = rows.filter((pl.col("split") == "train") & (pl.col("role") == "target"))
        base = train["label"].mean()

        def columns(ids, table):
            table = ids.join(table, on="row_id")
            for kind in ("item", "user"):
                n = table[f"{kind}_count"].to_numpy().astype(float)
                likes = table[f"{kind}_rate"].fill_null(0).to_numpy() * n
                yield from (np.log((likes + 5 * base) / (n - likes + 5 * (1 - base))), np.log1p(n))

        x = np.stack(list(columns(train.select("row_id"), retrieved["train"])), axis=1)
        baseline = by_name(baselines)["lr_rates"].scores.filter(pl.col("split") == "test")
        scored = np.stack(list(columns(baseline.select("row_id"), retrieved["test"])), axis=1)
        model = LogisticRegression().fit((x - x.mean(0)) / x.std(0), train["label"])
        expected = model.decision_function((scored - x.mean(0)) / x.std(0))
        np.testing.assert_allclose(baseline["logit"], expected, atol=1e-3)

    def test_more_knowledge_ranks_better(self, fitted):
        """On planted data lr_rates beats both rates and lr_features beats lr_rates and the vote on test."""
        rows, _, baselines = fitted
        found = {baseline.name: split_auc(baseline, rows) for baseline in baselines}
        assert found["lr_rates"] > max(found["item_rate"], found["user_rate"]) + 0.02
        assert found["lr_features"] > max(found["lr_rates"], found["neighbour_vote"]) + 0.02
        assert found["gbdt_features"] > found["lr_rates"]

    def test_without_neighbours(self):
        """Retrieved features without neighbours: the vote is constant (AUC .5), lr_features is lr_rates but for the
        ridge.

        Without factorisation its feature is the two rates' sum: it adds nothing but room under the penalty, .04 at
        most.
        """
        rows, retrieved = world(neighbours=False)
        baselines = by_name(fit_baselines(rows, retrieved))
        assert split_auc(baselines["neighbour_vote"], rows) == 0.5
        np.testing.assert_allclose(
            baselines["lr_features"].scores["logit"], baselines["lr_rates"].scores["logit"], atol=0.05
        )

    def test_reads_no_later_label(self, fitted):
        """Flipping every label of valid and test changes no baseline."""
        rows, retrieved, baselines = fitted
        later = pl.col("split") != "train"
        flipped = rows.with_columns(label=pl.when(later).then(1 - pl.col("label")).otherwise(pl.col("label")))
        for baseline, other in zip(baselines, fit_baselines(flipped, retrieved), strict=True):
            assert baseline.scores.equals(other.scores)

    def test_each_split_reads_its_own_retrieved(self, fitted):
        """Train rows of valid's table are not read; another test table changes test logits only."""
        rows, retrieved, before = fitted
        spoilt = retrieved["test"].with_columns(item_rate=1 - pl.col("item_rate"))
        train_only = pl.col("row_id") < SIZES["train"]
        mixed = retrieved["valid"].with_columns(
            item_rate=pl.when(train_only).then(0.0).otherwise(pl.col("item_rate"))
        )
        after = fit_baselines(rows, {"train": retrieved["train"], "valid": mixed, "test": spoilt})
        for old, new in zip(before, after, strict=True):
            valid = pl.col("split") == "valid"
            assert old.scores.filter(valid).equals(new.scores.filter(valid))
            reads_items = old.name not in ("user_rate", "neighbour_vote")
            assert old.scores.filter(~valid).equals(new.scores.filter(~valid)) != reads_items

    def test_similarity_weighs_votes(self):
        """A liker of similarity 1 against a disliker of 0 beats the reverse; below 0 counts as 0."""
        _, retrieved = world()
        pairs = {"similarities": [[1.0, 0.0], [0.0, 1.0], [1.0, -0.5]], "answers": [[1, 0]] * 3}
        table = retrieved["train"].head(3).drop(*pairs).hstack(pl.DataFrame(pairs, schema=NO_LISTS))
        features = feature_matrix(table, 0.5)
        high = np.log(3.5 / 2.5)  # (1 + 5 * .5) / (0 + 5 * .5)
        np.testing.assert_allclose(features[:, FEATURES.index("weighted_vote_log_odds")], [high, -high, high])

    def test_only_the_splits_asked_for(self):
        """Exploring needs no test retrieved features and scores no test row."""
        rows, retrieved = world()
        baselines = fit_baselines(
            rows, {key: retrieved[key] for key in ("train", "valid")}, splits=("valid",)
        )
        assert set(baselines[0].scores["split"]) == {"valid"}

    def test_errors_name_what_is_missing(self, fitted):
        """One-class train targets, a split without retrieved features and a target without retrieved features are
        DataErrors.
        """
        rows, retrieved, baselines = fitted
        with pytest.raises(DataError, match="both classes, found 540 targets, 0 positive"):
            fit_baselines(rows.with_columns(label=pl.lit(0)), retrieved)
        with pytest.raises(DataError, match="retrieved features table of test, found"):
            fit_baselines(rows, {key: retrieved[key] for key in ("train", "valid")})
        with pytest.raises(
            DataError, match="retrieved features table of valid has 179 rows for its 180 targets"
        ):
            fit_baselines(rows, retrieved | {"valid": retrieved["valid"].filter(pl.col("row_id") != 600)})
        with pytest.raises(DataError, match="item_rate has no score for 1 of 2 rows"):
            baselines[0].logits([600, 0])


class TestBaselineRows:
    def test_result_rows(self, fitted):
        """One row a baseline for valid, test and the folds select and tune, none for certify; same metrics."""
        rows, _, baselines = fitted
        found = baseline_rows(baselines, rows, draws=50)
        parts = [("valid", None), ("test", None), ("valid", "select"), ("valid", "tune")]
        assert [(r["name"], r["split"], r.get("fold")) for r in found] == [
            (n, s, f) for s, f in parts for n in NAMES
        ]
        tune = rows.filter((pl.col("fold") == "tune") & (pl.col("role") == "target"))
        metrics = head_metrics(baselines[3].logits(tune["row_id"]), tune["label"], tune["user"])
        row = found[-5]
        assert row | metrics == row
        low, high = row["auc_interval"]
        assert low < row["auc"] < high

    def test_only_the_parts_asked_for(self, fitted):
        """A part's rows are the same whether all parts are asked for or it alone."""
        rows, _, baselines = fitted
        everything = baseline_rows(baselines, rows, draws=20)
        tune = [row for row in everything if row.get("fold") == "tune"]
        assert baseline_rows(baselines, rows, draws=20, parts=[("valid", "tune")]) == tune

    def test_calibrated_on_select(self, fitted):
        """Every baseline alike has a calibrated log loss, but on select, which it was fitted on.

        Baselines times ten plus one sound far too sure: raw they lose, calibrated they are what they were.
        """
        rows, _, baselines = fitted
        loud = [Baseline(f.name, f.scores.with_columns(logit=10 * pl.col("logit") + 1)) for f in baselines]
        found, other = (baseline_rows(some, rows, draws=2) for some in (baselines, loud))
        assert all(("calibrated" in row) == (row.get("fold") != "select") for row in found)
        for row, again in zip(found, other, strict=True):
            if "calibrated" in row:
                assert again["log_loss"] > row["log_loss"]
                assert again["calibrated"]["log_loss"] == pytest.approx(
                    row["calibrated"]["log_loss"], abs=1e-6
                )
                assert again["auc"] == pytest.approx(row["auc"], abs=1e-6)


class TestBestBaseline:
    def baselines(self, rows):
        """Right on tune only, and right everywhere but on tune."""
        valid = rows.filter((pl.col("split") == "valid") & (pl.col("role") == "target"))
        label, tune = valid["label"].cast(pl.Float64), (valid["fold"] == "tune").cast(pl.Float64)
        ids = valid.select("row_id", "split")
        return [
            Baseline("elsewhere", ids.with_columns(logit=label * (1 - 2 * tune))),
            Baseline("on_tune", ids.with_columns(logit=label * (2 * tune - 1))),
        ]

    def test_only_tune_decides(self):
        """The baseline that is best on tune wins although it is wrong on every other row of valid."""
        rows, _ = world()
        assert best_baseline(self.baselines(rows), rows).name == "on_tune"

    def test_undefined(self):
        """One class on tune: no best baseline."""
        rows, _ = world()
        assert best_baseline(self.baselines(rows), rows.with_columns(label=pl.lit(1))) is None


@pytest.mark.real
def test_movielens_anchors():
    """ML-100K, global_time, minimum history 5, as-of rates only: within .005 of an independent measurement.

    That one used its own code, other smoothing and LightGBM.
    """
    from project.data.logs import MovieLens100K
    from project.data.protocol import build_interactions
    from project.retrieval.controls import NoRetriever
    from project.retrieval.walk import WalkRows, walk

    protocol = Protocol(minimum_history=5, label="rating > 3")
    split = apply_protocol(build_interactions(MovieLens100K().read(), protocol), protocol)
    rows = split.rows
    log = walk(WalkRows.from_log(rows), NoRetriever(), split.interactions.items, np.empty(0), [])
    table = log.join(rows.select("row_id", "split"), on="row_id")
    retrieved = {s: table.filter(pl.col("split") <= s) for s in SIZES}
    baselines = fit_baselines(rows, retrieved)
    found = {(r["name"], r["split"]): r for r in baseline_rows(baselines, rows, draws=10) if "fold" not in r}
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
