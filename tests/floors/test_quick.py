import numpy as np
import polars as pl
import pytest
from sklearn.linear_model import LogisticRegression

from project.data.protocol import Protocol, apply_protocol
from project.errors import DataError
from project.evaluation.baselines import (
    FEATURES,
    Floor,
    best_floor,
    fit_floors,
    floor_rows,
)
from project.features import PRIOR_ROWS, counting_features
from project.metrics import auc, head_metrics

NAMES = [
    "item_rate",
    "user_rate",
    "neighbour_vote",
    "lr_rates",
    "lr_evidence",
    "gbdt_evidence",
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
    """(rows, evidence, floors) of one world, fitted once."""
    rows, evidence = world()
    return rows, evidence, fit_floors(rows, evidence)


def by_name(floors):
    return {floor.name: floor for floor in floors}


def split_auc(floor, rows, split="test"):
    part = rows.filter((pl.col("split") == split) & (pl.col("role") == "target"))
    return auc(floor.logits(part["row_id"]), part["label"])


class TestFitFloors:
    def test_scores_every_target_once(self, fitted):
        """Eight floors, each with one finite logit per target of valid and test, none for context rows."""
        rows, _, floors = fitted
        assert [floor.name for floor in floors] == NAMES
        targets = rows.filter(pl.col("role") == "target")
        wanted = targets.filter(pl.col("split") != "train").select("row_id", "split")
        for floor in floors:
            assert floor.scores.select("row_id", "split").equals(wanted)
            assert floor.scores["logit"].is_finite().all()

    def test_rate_floors_golden(self, fitted):
        """Logit of (rate * count + 5 base) / (count + 5), base = train mean; logit of base without rows."""
        rows, evidence, floors = fitted
        base = rows.filter((pl.col("split") == "train") & (pl.col("role") == "target"))["label"].mean()
        columns = {"item_rate": "item_count", "user_rate": "user_count", "vote": "neighbour_count"}
        floors = by_name(floors)
        for rate, count in columns.items():
            floor = floors["neighbour_vote" if rate == "vote" else rate]
            table = floor.scores.join(evidence["test"], on="row_id")
            assert table[count].min() == 0
            p = (table[rate].fill_null(0) * table[count] + PRIOR_ROWS * base) / (table[count] + PRIOR_ROWS)
            np.testing.assert_allclose(table["logit"], np.log(p / (1 - p)), atol=1e-6)

    def test_logistic_equals_scikit_learn_by_hand(self, fitted):
        """The weights of lr_rates come from train targets, shrunk to the same base as the scored rows."""
        rows, evidence, floors = fitted
        train = rows.filter((pl.col("split") == "train") & (pl.col("role") == "target"))
        base = train["label"].mean()

        def columns(ids, table):
            table = ids.join(table, on="row_id")
            for kind in ("item", "user"):
                n = table[f"{kind}_count"].to_numpy().astype(float)
                likes = table[f"{kind}_rate"].fill_null(0).to_numpy() * n
                yield from (np.log((likes + 5 * base) / (n - likes + 5 * (1 - base))), np.log1p(n))

        x = np.stack(list(columns(train.select("row_id"), evidence["train"])), axis=1)
        floor = by_name(floors)["lr_rates"].scores.filter(pl.col("split") == "test")
        scored = np.stack(list(columns(floor.select("row_id"), evidence["test"])), axis=1)
        model = LogisticRegression().fit((x - x.mean(0)) / x.std(0), train["label"])
        expected = model.decision_function((scored - x.mean(0)) / x.std(0))
        np.testing.assert_allclose(floor["logit"], expected, atol=1e-3)

    def test_more_knowledge_ranks_better(self, fitted):
        """On planted data lr_rates beats both rates and lr_evidence beats lr_rates and the vote on test."""
        rows, _, floors = fitted
        found = {floor.name: split_auc(floor, rows) for floor in floors}
        assert found["lr_rates"] > max(found["item_rate"], found["user_rate"]) + 0.02
        assert found["lr_evidence"] > max(found["lr_rates"], found["neighbour_vote"]) + 0.02
        assert found["gbdt_evidence"] > found["lr_rates"]

    def test_without_neighbours(self):
        """Evidence without neighbours: the vote is constant (AUC .5), lr_evidence is lr_rates but for the ridge.

        Without taste its feature is the two rates' sum: it adds nothing but room under the penalty, .04 at most.
        """
        rows, evidence = world(neighbours=False)
        floors = by_name(fit_floors(rows, evidence))
        assert split_auc(floors["neighbour_vote"], rows) == 0.5
        np.testing.assert_allclose(
            floors["lr_evidence"].scores["logit"], floors["lr_rates"].scores["logit"], atol=0.05
        )

    def test_reads_no_later_label(self, fitted):
        """Flipping every label of valid and test changes no floor."""
        rows, evidence, floors = fitted
        later = pl.col("split") != "train"
        flipped = rows.with_columns(label=pl.when(later).then(1 - pl.col("label")).otherwise(pl.col("label")))
        for floor, other in zip(floors, fit_floors(flipped, evidence), strict=True):
            assert floor.scores.equals(other.scores)

    def test_each_split_reads_its_own_evidence(self, fitted):
        """Train rows of valid's table are not read; another test table changes test logits only."""
        rows, evidence, before = fitted
        spoilt = evidence["test"].with_columns(item_rate=1 - pl.col("item_rate"))
        train_only = pl.col("row_id") < SIZES["train"]
        mixed = evidence["valid"].with_columns(
            item_rate=pl.when(train_only).then(0.0).otherwise(pl.col("item_rate"))
        )
        after = fit_floors(rows, {"train": evidence["train"], "valid": mixed, "test": spoilt})
        for old, new in zip(before, after, strict=True):
            valid = pl.col("split") == "valid"
            assert old.scores.filter(valid).equals(new.scores.filter(valid))
            reads_items = old.name not in ("user_rate", "neighbour_vote")
            assert old.scores.filter(~valid).equals(new.scores.filter(~valid)) != reads_items

    def test_similarity_weighs_votes(self):
        """A liker of similarity 1 against a disliker of 0 beats the reverse; below 0 counts as 0."""
        _, evidence = world()
        pairs = {"similarities": [[1.0, 0.0], [0.0, 1.0], [1.0, -0.5]], "answers": [[1, 0]] * 3}
        table = evidence["train"].head(3).drop(*pairs).hstack(pl.DataFrame(pairs, schema=NO_LISTS))
        features = counting_features(table, 0.5)
        high = np.log(3.5 / 2.5)  # (1 + 5 * .5) / (0 + 5 * .5)
        np.testing.assert_allclose(features[:, FEATURES.index("weighted_vote_log_odds")], [high, -high, high])

    def test_only_the_splits_asked_for(self):
        """Exploring needs no test evidence and scores no test row."""
        rows, evidence = world()
        floors = fit_floors(rows, {key: evidence[key] for key in ("train", "valid")}, splits=("valid",))
        assert set(floors[0].scores["split"]) == {"valid"}

    def test_errors_name_what_is_missing(self, fitted):
        """One-class train targets, a split without evidence and a target without evidence are DataErrors."""
        rows, evidence, floors = fitted
        with pytest.raises(DataError, match="both classes, found 540 targets, 0 positive"):
            fit_floors(rows.with_columns(label=pl.lit(0)), evidence)
        with pytest.raises(DataError, match="evidence table of test, found"):
            fit_floors(rows, {key: evidence[key] for key in ("train", "valid")})
        with pytest.raises(DataError, match="evidence table of valid has 179 rows for its 180 targets"):
            fit_floors(rows, evidence | {"valid": evidence["valid"].filter(pl.col("row_id") != 600)})
        with pytest.raises(DataError, match="item_rate has no score for 1 of 2 rows"):
            floors[0].logits([600, 0])


class TestFloorRows:
    def test_result_rows(self, fitted):
        """One row a floor for valid, test and the folds select and tune, none for certify; same metrics."""
        rows, _, floors = fitted
        found = floor_rows(floors, rows, draws=50)
        parts = [("valid", None), ("test", None), ("valid", "select"), ("valid", "tune")]
        assert [(r["name"], r["split"], r.get("fold")) for r in found] == [
            (n, s, f) for s, f in parts for n in NAMES
        ]
        tune = rows.filter((pl.col("fold") == "tune") & (pl.col("role") == "target"))
        metrics = head_metrics(floors[3].logits(tune["row_id"]), tune["label"], tune["user"])
        row = found[-5]
        assert row | metrics == row
        low, high = row["auc_interval"]
        assert low < row["auc"] < high

    def test_only_the_parts_asked_for(self, fitted):
        """A part's rows are the same whether all parts are asked for or it alone."""
        rows, _, floors = fitted
        everything = floor_rows(floors, rows, draws=20)
        tune = [row for row in everything if row.get("fold") == "tune"]
        assert floor_rows(floors, rows, draws=20, parts=[("valid", "tune")]) == tune

    def test_calibrated_on_select(self, fitted):
        """Every floor alike has a calibrated log loss, but on select, which it was fitted on.

        Floors times ten plus one sound far too sure: raw they lose, calibrated they are what they were.
        """
        rows, _, floors = fitted
        loud = [Floor(f.name, f.scores.with_columns(logit=10 * pl.col("logit") + 1)) for f in floors]
        found, other = (floor_rows(some, rows, draws=2) for some in (floors, loud))
        assert all(("calibrated" in row) == (row.get("fold") != "select") for row in found)
        for row, again in zip(found, other, strict=True):
            if "calibrated" in row:
                assert again["log_loss"] > row["log_loss"]
                assert again["calibrated"]["log_loss"] == pytest.approx(
                    row["calibrated"]["log_loss"], abs=1e-6
                )
                assert again["auc"] == pytest.approx(row["auc"], abs=1e-6)


class TestBestFloor:
    def floors(self, rows):
        """Right on tune only, and right everywhere but on tune."""
        valid = rows.filter((pl.col("split") == "valid") & (pl.col("role") == "target"))
        label, tune = valid["label"].cast(pl.Float64), (valid["fold"] == "tune").cast(pl.Float64)
        ids = valid.select("row_id", "split")
        return [
            Floor("elsewhere", ids.with_columns(logit=label * (1 - 2 * tune))),
            Floor("on_tune", ids.with_columns(logit=label * (2 * tune - 1))),
        ]

    def test_only_tune_decides(self):
        """The floor that is best on tune wins although it is wrong on every other row of valid."""
        rows, _ = world()
        assert best_floor(self.floors(rows), rows).name == "on_tune"

    def test_undefined(self):
        """One class on tune: no best floor."""
        rows, _ = world()
        assert best_floor(self.floors(rows), rows.with_columns(label=pl.lit(1))) is None


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
    evidence = {s: table.filter(pl.col("split") <= s) for s in SIZES}
    floors = fit_floors(rows, evidence)
    found = {(r["name"], r["split"]): r for r in floor_rows(floors, rows, draws=10) if "fold" not in r}
    anchors = {
        ("item_rate", "test"): 0.7098,
        ("user_rate", "test"): 0.6413,
        ("lr_rates", "valid"): 0.7401,
        ("lr_rates", "test"): 0.7423,
        ("gbdt_evidence", "valid"): 0.7414,
        ("gbdt_evidence", "test"): 0.7437,
    }
    assert {key: found[key]["auc"] for key in anchors} == pytest.approx(anchors, abs=0.005)
    assert found["gbdt_evidence", "test"]["log_loss"] == pytest.approx(0.5901, abs=0.005)
