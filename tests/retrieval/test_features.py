"""Tests retrieved features tables: what a split may read, the cache, factorisation, requests answered like the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from example_logs import (
    CoLikes,
    at_random,
    by_time,
    columns,
    flip,
    make_log,
    make_split,
    request,
)
from scipy.optimize import minimize

from project.errors import ConfigError
from project.features import FEATURES, feature_matrix
from project.metrics import auc
from project.retrieval import (
    ItemKNN,
    LightGCN,
    MatrixFactorisation,
    NoRetriever,
    RetrievedFeatures,
    Retriever,
)
from project.retrieval.base import Edges, Neighbours, Raters, Snapshot
from project.retrieval.factorisation import Factorisation, answers, scale_of
from project.retrieval.features import reads_all_earlier
from project.retrieval.past import WalkRows
from project.retrieval.walk import block_cuts, fit_snapshots, walk

SPLITS, REFITS = ("train", "valid", "test"), 4
COMPARED = pl.exclude("row_id")


def inside_a_second(rows: pl.DataFrame) -> np.ndarray:
    """By time too, but the first row of a later split shares its second with an earlier one."""
    n = rows.height
    cuts = np.flatnonzero(np.diff(rows["timestamp"].to_numpy()) == 0) + 1
    first, second = (int(cuts[np.searchsorted(cuts, share * n)]) for share in (0.5, 0.75))
    return np.digitize(np.arange(n), [first, second])


@pytest.mark.parametrize(
    ("assign", "every"),
    [(by_time, 0), (at_random, 0), (by_time, 3), (inside_a_second, 3), (at_random, 3)],
)
def test_each_table_is_a_walk_over_the_readable_rows(
    assign: Callable, every: int, tmp_path: Path
) -> None:
    """The table of S is what a walk over rows of splits <= S alone gives, whether computed once or three times."""
    rows, retriever = make_log(0), CoLikes(neighbours=4, similar_every=every)
    codes = assign(rows)
    split = make_split(rows, codes)
    tables = RetrievedFeatures(split, retriever, REFITS, tmp_path).tables()
    items = split.interactions.items
    for last, name in enumerate(SPLITS):
        readable = rows.filter(pl.Series(codes) <= last)
        cuts = block_cuts(rows["timestamp"].to_numpy(), REFITS)
        fitted = fit_snapshots(readable, retriever, 12, items, cuts).fitted
        walked = walk(WalkRows.from_log(readable), retriever, items, cuts, fitted)
        assert tables[name].drop("text", "text_weight").equals(walked)


def test_a_split_by_time_reads_all_earlier_rows() -> None:
    """Equal seconds may straddle a cut, unless their own second is read; a train row after a test row may not."""
    time = np.array([1.0, 2, 2, 3])
    assert reads_all_earlier(time, np.array([0, 1, 0, 2]))
    assert not reads_all_earlier(time, np.array([0, 1, 0, 0]))
    assert not reads_all_earlier(time, np.array([2, 1, 1, 1]))
    assert reads_all_earlier(time, np.array([0, 1, 1, 2]), own_second=True)
    assert not reads_all_earlier(time, np.array([0, 1, 0, 2]), own_second=True)


class FitSizes(NoRetriever):
    """Keeps the number of rows of every fit."""

    fits: list[int]

    def fit(self, edges: Edges, block: int) -> Snapshot:
        self.fits.append(edges.user.size)
        return {}


def test_a_split_by_time_is_fitted_once(tmp_path: Path) -> None:
    """Three tables cost one fit per block where they coincide, and none at all the second time."""
    rows, retriever = make_log(0), FitSizes()
    retriever.fits = []
    split = make_split(rows, by_time(rows))
    first = RetrievedFeatures(split, retriever, REFITS, tmp_path).tables()
    assert len(retriever.fits) == len(block_cuts(rows["timestamp"].to_numpy(), REFITS))
    second = RetrievedFeatures(split, retriever, REFITS, tmp_path).tables()
    RetrievedFeatures(split, retriever, REFITS, tmp_path).of_requests(request(rows.head(1)))
    assert len(retriever.fits) == len(block_cuts(rows["timestamp"].to_numpy(), REFITS))
    assert all(first[name].equals(second[name]) for name in SPLITS)


class Stopped(FitSizes):
    """Is interrupted while it walks, until it is told to go on."""

    stops = True

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        if self.stops and timestamp > 40:
            raise KeyboardInterrupt
        return super().select(user, item, timestamp, raters)


def test_who_stops_while_walking_has_fitted_already(tmp_path: Path) -> None:
    """The next run walks with what was fitted, and then nothing but its tables is left."""
    rows, retriever = make_log(0), Stopped()
    retriever.fits, split = [], make_split(rows, by_time(rows))
    with pytest.raises(KeyboardInterrupt):
        RetrievedFeatures(split, retriever, REFITS, tmp_path).tables()
    retriever.fits, retriever.stops = [], False
    tables = RetrievedFeatures(split, retriever, REFITS, tmp_path).tables()
    assert retriever.fits == []
    assert list((tmp_path / "fitted").iterdir()) == []
    retriever.fits = []
    calm = RetrievedFeatures(split, retriever, REFITS, tmp_path / "calm").tables()
    assert retriever.fits
    assert all(tables[name].equals(calm[name]) for name in SPLITS)


def test_all_splits_have_the_whole_logs_cuts(tmp_path: Path) -> None:
    """Train is every second row in time: its fits, made last, are at the log's quarters, not at its own."""
    rows, retriever = make_log(0), FitSizes()
    retriever.fits, codes = [], np.arange(rows.height) % 2
    RetrievedFeatures(
        make_split(rows, codes), retriever, REFITS, tmp_path, MatrixFactorisation(dim=2)
    ).tables()
    time = rows["timestamp"].to_numpy()
    assert retriever.fits[-3:] == [
        int(((codes == 0) & (time < cut)).sum()) for cut in block_cuts(time, REFITS)
    ]


def test_the_cache_key_covers_what_retrieved_features_depend_on(tmp_path: Path) -> None:
    """Other settings, number of refits or log make another folder; the same make none."""
    rows = make_log(0)
    split, other = (
        make_split(table, by_time(rows)) for table in (rows, flip(rows, pl.lit(True)))
    )
    for _ in range(2):
        for log, retriever, refits in (
            (split, ItemKNN(), 4),
            (split, ItemKNN(neighbours=7), 4),
            (split, ItemKNN(), 3),
            (split, NoRetriever(), 4),
            (split, CoLikes(), 4),
            (split, CoLikes(item_neighbours=5), 4),
            (other, ItemKNN(), 4),
        ):
            RetrievedFeatures(log, retriever, refits, tmp_path).tables()
        assert len(list((tmp_path / "retrieved").iterdir())) == 7


@pytest.mark.parametrize("assign", [by_time, at_random])
@pytest.mark.parametrize(
    "retriever",
    [
        CoLikes(neighbours=4),
        CoLikes(neighbours=4, item_neighbours=3),
        LightGCN(dim=4, epochs=1),
        NoRetriever(),
    ],
    ids=["co_likes", "item_similarity", "lightgcn", "none"],
)
def test_a_users_own_history_as_a_request_is_answered_like_the_log(
    assign: Callable, retriever: Retriever, tmp_path: Path
) -> None:
    """Explicit history of users of the log, in any order, gives the features the log has for the same rows."""
    rows = make_log(2)
    split = make_split(rows, assign(rows))
    features = RetrievedFeatures(split, retriever, REFITS, tmp_path)
    log = features.tables()["test"]
    chosen = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(
        fraction=1, shuffle=True, seed=0
    )
    found = features.of_requests(request(chosen))
    expected = chosen.select("row_id").join(log, on="row_id", maintain_order="left")
    assert found["row_id"].to_list() == [-1 - position for position in range(chosen.height)]
    assert found.select(COMPARED).equals(expected.select(COMPARED))
    if "item_similarity" in expected:
        assert expected["item_similarity"].drop_nulls().len() > 5


def test_candidates_without_history_use_the_logs_past_alone_or_together(
    tmp_path: Path,
) -> None:
    """A known user's candidate is answered from that user's log rows; other users' requests change nothing."""
    rows, co_likes = make_log(2), CoLikes(neighbours=4)
    split = make_split(rows, by_time(rows))
    features = RetrievedFeatures(split, co_likes, REFITS, tmp_path)
    log = features.tables()["test"]
    found = features.of_requests(request(rows, own=False))
    assert found.select(COMPARED).equals(log.select(COMPARED))
    together = features.of_requests(request(rows))
    for user in (1, 4):
        mine = rows["user"] == user
        alone = features.of_requests(request(rows.filter(mine)))
        assert alone.select(COMPARED).equals(together.filter(mine).select(COMPARED))


def test_unseen_users_and_items(tmp_path: Path) -> None:
    """A new user with history has neighbours; without, only rates; a new item has neither raters nor a vector."""
    rows = make_log(2)
    split = make_split(rows, by_time(rows))
    late = float(rows["timestamp"].max()) + 10  # type: ignore[arg-type]
    chosen = pl.DataFrame({"user": [90, 90, 90, 91], "item": [0, 77, 1, 1]}).with_columns(
        timestamp=pl.Series([late, late, late + 1, late + 1]),
        label=pl.Series([1, 0, -1, -1]),
        rating=pl.Series([5.0, 1.0, None, None]),
        candidate=pl.Series([False, False, True, True]),
    )
    features = RetrievedFeatures(split, CoLikes(neighbours=4), REFITS, tmp_path)
    found = features.of_requests(chosen).to_dicts()
    assert found[1]["item_count"] == 0
    assert found[2]["neighbour_count"] == 4
    assert (found[2]["user_rate"], found[2]["user_count"]) == (0.5, 2)
    assert (found[3]["neighbour_count"], found[3]["user_count"]) == (0, 0)
    assert (
        found[3]["item_count"]
        == found[2]["item_count"]
        == rows.filter(pl.col("item") == 1).height
    )


def test_no_block_is_an_error(tmp_path: Path) -> None:
    rows = make_log(0)
    split = make_split(rows, by_time(rows))
    with pytest.raises(ConfigError, match=r"data\.refits is 0"):
        RetrievedFeatures(split, NoRetriever(), 0, tmp_path).tables()


def test_a_split_without_early_rows(tmp_path: Path) -> None:
    """Where all of train lies in the last third, what is fitted before the first cuts has seen no row: no error."""
    rows = make_log(0)
    codes = np.where(np.arange(rows.height) < rows.height * 2 // 3, 1, 0)
    for retriever in (CoLikes(), ItemKNN(), LightGCN(dim=4, epochs=1)):
        tables = RetrievedFeatures(
            make_split(rows, codes), retriever, 10, tmp_path, MatrixFactorisation(dim=2)
        ).tables()
        assert tables["train"].height == (codes == 0).sum()


@pytest.mark.parametrize(
    ("retriever", "refits", "liked", "words"),
    [
        (LightGCN(dim=4, epochs=1), 1, True, "LightGCN was never fitted"),
        (LightGCN(dim=4, epochs=1), 10, True, None),
        (ItemKNN(), 4, False, ": item_rate, user_rate, vote has one value or none"),
        (NoRetriever(), 4, False, ": item_rate, user_rate has one value or none"),
    ],
)
def test_warnings(
    retriever: Retriever, refits: int, liked: bool, words: str | None, tmp_path: Path
) -> None:
    """A retriever that one block never fitted, and features of one value where nobody likes anything."""
    rows = make_log(0, 300)
    split = make_split(
        rows if liked else rows.with_columns(label=pl.lit(0, pl.Int8)), by_time(rows)
    )
    features = RetrievedFeatures(split, retriever, refits, tmp_path)
    found = features.warnings(features.tables())
    assert len(found) == (3 if words else 0)
    assert all(str(words) in line for line in found)


MF = MatrixFactorisation(dim=2)


def chances_of(
    rows: pl.DataFrame, log: pl.DataFrame | None = None, ratings: bool = True
) -> np.ndarray:
    """Factorisation of rows of a log, with the cuts of all its rows."""
    time = (rows if log is None else log)["timestamp"].to_numpy()
    fitted = MF.fit(rows, 9, block_cuts(time, REFITS), ratings)
    return MF.chances(WalkRows.from_log(rows), fitted)


def test_mf_is_the_penalised_optimum_over_the_users_earlier_rows() -> None:
    """Row by row equal to scipy's minimum of log loss plus penalty over just the strictly earlier own rows.

    The answer is the rating's place among ratings before the block: the share below, and half of its equals; of a label
    alone the mean of such places.
    """
    rows = make_log(3)
    user, item, time, label = columns(rows)
    rating = rows["rating"].to_numpy()  # NaN where only a label is there
    snapshots = MF.fit(rows, 9, block_cuts(time, REFITS), ratings=True)
    found, penalty, checked = chances_of(rows), np.array([1.0, 3.0, 3.0]), 0
    for row in np.flatnonzero(~np.isnan(found))[::7]:
        block = int(np.searchsorted(snapshots.cuts, time[row], side="right")) - 1
        fitted = snapshots.fitted[block]
        past = (user == user[row]) & (time < time[row])
        x = fitted["vectors"][item[past]]
        known = fitted["known"][item[past]]
        rated = (time < snapshots.cuts[block]) & ~np.isnan(rating)
        before = rating[rated]
        place = {r: np.mean(before < r) + np.mean(before == r) / 2 for r in range(1, 6)}
        of_label = [
            np.mean([place[r] for r in rating[rated & (label == y)]]) for y in (0, 1)
        ]
        own = zip(label[past], rating[past], strict=True)
        answer = np.array([of_label[y] if np.isnan(r) else place[r] for y, r in own])

        def loss(v: np.ndarray, x=x, known=known, answer=answer) -> float:
            logit = known + x @ v
            lost = np.logaddexp(0, logit).sum() - answer @ logit
            return lost + 0.5 * penalty @ v**2

        best = minimize(loss, np.zeros(3), tol=1e-10).x
        logit = fitted["known"][item[row]] + fitted["vectors"][item[row]] @ best
        assert found[row] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
        checked += past.any()
    assert checked > 5


@pytest.mark.parametrize("row", [5, 60, 100])
def test_an_answer_moves_no_mf_of_its_own_second_or_before(row: int) -> None:
    """Leak canary: flip one answer; every change is strictly later, and there is one."""
    rows = make_log(1)
    before, after = chances_of(rows), chances_of(flip(rows, pl.col("row_id") == row))
    changed = ~np.isclose(before, after, rtol=0, atol=1e-12, equal_nan=True)
    time = rows["timestamp"].to_numpy()
    assert changed.any()
    assert time[changed].min() > time[row]


def test_answers_of_ratings() -> None:
    """Of 1, 2, 2, 5: 2 has 1/4 below it and 2/4 beside it, so .5; 3.5 is half way to 5.

    Likes are 5 and 2, so one without a rating is (.875 + .5) / 2.
    """
    label, rating = np.array([1, 1, 1, 0, 0]), np.array([5.0, 2, np.nan, 1, 2])
    asked = np.array([1.0, 2, 3.5, 5, np.nan])
    scale = scale_of(label, rating)
    np.testing.assert_allclose(
        answers(np.ones(5, int), asked, scale), [0.125, 0.5, 0.6875, 0.875, 0.6875]
    )


def test_mf_of_one_kind_of_answer() -> None:
    """Where all earlier answers are likes nothing can be factorised: (likes + .5) / (rows + 1), and the user's bias."""
    rows = make_log(0).with_columns(label=pl.lit(1, pl.Int8))
    found, time = chances_of(rows, ratings=False), rows["timestamp"].to_numpy()
    assert np.array_equal(np.isnan(found), time < block_cuts(time, REFITS)[0])
    assert (found[~np.isnan(found)] > 0.5).all()


@pytest.mark.parametrize("assign", [by_time, at_random])
def test_mf_of_a_request_is_that_of_the_log_and_each_split_has_its_own(
    assign: Callable, tmp_path: Path
) -> None:
    """Train's factorisation is that of a log of train rows alone."""
    rows = make_log(2)
    split = make_split(rows, assign(rows))
    features = RetrievedFeatures(split, NoRetriever(), REFITS, tmp_path, MF)
    tables = features.tables()
    chosen = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(
        fraction=1, shuffle=True, seed=0
    )
    asked = features.of_requests(request(chosen))
    known = chosen.select("row_id").join(tables["test"], on="row_id", maintain_order="left")
    of_train = rows.filter(pl.Series(assign(rows) == 0))
    for name in ("mf", "mf_rating"):
        found, expected = asked[name], known[name]
        assert expected.null_count() < len(expected)
        np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), atol=1e-6)
        alone = chances_of(of_train, log=rows, ratings=name == "mf_rating")
        np.testing.assert_allclose(
            tables["train"][name].to_numpy(), alone.astype(np.float32), atol=1e-7
        )


def test_log_odds_of_mf_and_of_item_similarity() -> None:
    """An item liked 3 of 4 times, a user who liked 1 of 2, base .5.

    Factorisation .8 is log(.8 / .2); without one log(5.5 / 3.5) + log(3.5 / 3.5) of the rates, of ratings 0. Item
    similarity .75 of weight 4 is log((3 + 2.5) / (1 + 2.5)); without similar items, or without the column, 0.
    """
    table = pl.DataFrame(
        {
            "row_id": [0, 1],
            "item_rate": [0.75] * 2,
            "item_count": [4] * 2,
            "user_rate": [0.5] * 2,
        }
        | {"user_count": [2] * 2, "vote": [None] * 2, "neighbour_count": [0] * 2}
        | {"mf": [0.8, None], "mf_rating": [0.8, None]}
        | {"item_similarity": [0.75, None], "item_similarity_weight": [4.0, 0.0]},
        schema_overrides={"vote": pl.Float32},
    )
    names = ("mf_log_odds", "mf_rating_log_odds", "item_similarity_log_odds")
    at = [FEATURES.index(name) for name in names]
    rates = np.log(5.5 / 3.5)
    found = feature_matrix(table, 0.5)[:, at]
    expected = [[np.log(4), np.log(4), rates], [rates, 0, 0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    columns = ("mf", "mf_rating", "item_similarity", "item_similarity_weight")
    without = feature_matrix(table.drop(*columns), 0.5)[:, at]
    np.testing.assert_allclose(without, [[rates, 0, 0]] * 2, atol=1e-6)


def factorised():
    """A model, logits of 2,000 rows and the rows; a user's and an item's sign make the label, 1,500 rows are fitted."""
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 2000), rng.integers(0, 20, 2000)
    user_sign, item_sign = rng.choice([-1, 1], 30), rng.choice([-1, 1], 20)
    label = (
        rng.random(2000) < 1 / (1 + np.exp(-2 * user_sign[user] * item_sign[item]))
    ).astype(int)
    train = np.arange(2000) < 1500
    model = Factorisation.fit(user[train], item[train], label[train], 4)
    dot = (model.user_vectors[user] * model.item_vectors[item]).sum(1)
    logits = model.offset + model.user_bias[user] + model.item_bias[item] + dot
    return model, logits, (user, item, label, train)


def test_factorisation_is_stationary_and_finds_what_biases_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the minimum penalty * b = sum of (label - p) over its rows; with vectors held at 0 held-out AUC is near .5."""
    constants = {"BIAS_PENALTY": 2.0, "VECTOR_PENALTY": 1.0, "ITERATIONS": 500}
    for name, value in constants.items():
        monkeypatch.setattr(f"project.retrieval.factorisation.{name}", value)
    model, logits, (user, item, label, train) = factorised()
    left = label - 1 / (1 + np.exp(-logits))
    for codes, bias in ((user, model.user_bias), (item, model.item_bias)):
        pull = np.bincount(codes[train], left[train])
        np.testing.assert_allclose(2.0 * bias, pull, atol=0.05)
        assert np.abs(pull).max() > 1
    monkeypatch.setattr("project.retrieval.factorisation.VECTOR_PENALTY", 1e6)
    held = factorised()[1]
    assert auc(logits[~train], label[~train]) > 0.8  # type: ignore[operator]
    assert auc(held[~train], label[~train]) < 0.6  # type: ignore[operator]
