"""MatrixFactorisation: strictly earlier rows only, the penalised optimum, and requests answered like the log."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize

from project.errors import ConfigError
from project.features import FEATURES, feature_matrix
from project.retrieval import MatrixFactorisation, NoRetriever, request_retrieved, retrieved_tables
from project.retrieval.walk import WalkRows, block_cuts

MF = MatrixFactorisation(dim=2, bias_penalty=1.0, vector_penalty=3.0, iterations=30)
REFITS = 4


def by_time(rows: pl.DataFrame) -> np.ndarray:
    time = rows["timestamp"].to_numpy()
    return (time >= 40).astype(int) + (time >= 60)


def at_random(rows: pl.DataFrame) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, rows.height)


def chances_of(
    rows: pl.DataFrame, mf: MatrixFactorisation = MF, num_items: int = 9, log: pl.DataFrame | None = None
) -> np.ndarray:
    """Of rows of a log, which has the cuts of all its rows."""
    time = (rows if log is None else log)["timestamp"].to_numpy()
    snapshots = mf.fit(rows, num_items, block_cuts(time, REFITS))
    return mf.chances(WalkRows.from_log(rows), snapshots)


def test_it_is_the_penalised_optimum_over_the_users_earlier_rows(log_of: Callable):
    """Row by row equal to scipy's minimum of log loss plus penalty over just the strictly earlier own rows."""
    rows = log_of(3)
    time, user, item, label = (rows[c].to_numpy() for c in ("timestamp", "user", "item", "label"))
    snapshots = MF.fit(rows, 9, block_cuts(time, REFITS))
    found, penalty = chances_of(rows), np.array([1.0, 3.0, 3.0])
    checked = 0
    for row in np.flatnonzero(~np.isnan(found))[::7]:
        fitted = snapshots.fitted[int(np.searchsorted(snapshots.cuts, time[row], side="right")) - 1]
        past = (user == user[row]) & (time < time[row])
        x, known, sign = fitted["vectors"][item[past]], fitted["known"][item[past]], 2.0 * label[past] - 1

        def loss(v: np.ndarray, x=x, known=known, sign=sign) -> float:
            return float(np.logaddexp(0, -sign * (known + x @ v)).sum() + 0.5 * penalty @ v**2)

        best = minimize(loss, np.zeros(3), tol=1e-10).x
        logit = fitted["known"][item[row]] + fitted["vectors"][item[row]] @ best
        assert found[row] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
        checked += past.any()
    assert checked > 5


@pytest.mark.parametrize("row", [5, 60, 100])
def test_an_answer_moves_no_mf_of_its_own_second_or_before(log_of: Callable, row: int):
    """Leak canary: flip one answer; every change is strictly later, and there is one."""
    rows = log_of(1)
    flipped = rows.with_columns(
        label=pl.when(pl.col("row_id") == row).then(1 - pl.col("label")).otherwise("label").cast(pl.Int8)
    )
    before, after = chances_of(rows), chances_of(flipped)
    changed = ~np.isclose(before, after, rtol=0, atol=1e-12, equal_nan=True)
    time = rows["timestamp"].to_numpy()
    assert changed.any()
    assert time[changed].min() > time[row]


def test_one_kind_of_answer_is_no_error_and_says_so(log_of: Callable):
    """Where all earlier answers are likes nothing can be factorised: (likes + .5) / (rows + 1), and the user's bias."""
    rows = log_of(0).with_columns(label=pl.lit(1, pl.Int8))
    found = chances_of(rows)
    time = rows["timestamp"].to_numpy()
    assert np.array_equal(np.isnan(found), time < block_cuts(time, REFITS)[0])
    assert (found[~np.isnan(found)] > 0.5).all()


@pytest.mark.parametrize("assign", [by_time, at_random])
def test_requests_are_answered_like_the_log(
    log_of: Callable, split_of: Callable, tmp_path: Path, assign: Callable
):
    """A user's own history as a request gives the factorisation that the log has for the same rows."""
    rows = log_of(2)
    split = split_of(rows, assign(rows))
    log = retrieved_tables(split, NoRetriever(), REFITS, tmp_path, MF)["test"]
    asked = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(fraction=1, shuffle=True, seed=0)
    columns = [asked[name].to_numpy() for name in ("user", "item", "timestamp", "label")]
    found = request_retrieved(
        split, NoRetriever(), REFITS, tmp_path, *columns, own=np.ones(len(asked), dtype=bool), mf=MF
    )
    expected = asked.select("row_id").join(log, on="row_id", maintain_order="left")["mf"]
    assert expected.null_count() < len(expected)
    assert found["mf"].is_null().to_list() == expected.is_null().to_list()
    np.testing.assert_allclose(found["mf"].drop_nulls(), expected.drop_nulls(), atol=1e-6)


def test_each_split_reads_its_own_rows(log_of: Callable, split_of: Callable, tmp_path: Path):
    """Under a split at random train's factorisation is that of a log of train rows alone."""
    rows = log_of(4)
    split = split_of(rows, at_random(rows))
    table = retrieved_tables(split, NoRetriever(), REFITS, tmp_path, MF)["train"]
    alone = chances_of(rows.filter(pl.Series(at_random(rows) == 0)), log=rows)
    np.testing.assert_allclose(table["mf"].to_numpy(), alone.astype(np.float32), atol=1e-7)


def test_the_feature_is_its_log_odds_and_without_one_the_rates_summed(without_neighbours: pl.DataFrame):
    """log(.8 / .2); and for item rate 3/4 of 4, user rate 1/2 of 2, base .5: log(5.5 / 3.5) + log(3.5 / 3.5) - 0."""
    table = without_neighbours.with_columns(mf=pl.Series([0.8, None], dtype=pl.Float32))
    at = FEATURES.index("mf_log_odds")
    found = feature_matrix(table, 0.5)[:, at]
    np.testing.assert_allclose(found, [np.log(4), np.log(5.5 / 3.5)], atol=1e-6)
    absent = feature_matrix(table.drop("mf"), 0.5)[:, at]
    np.testing.assert_allclose(absent, np.log(5.5 / 3.5), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 0), ("dim", -3), ("iterations", 0), ("bias_penalty", -1.0), ("vector_penalty", 0.0)],
)
def test_what_cannot_be_fitted_is_refused(name: str, value: float):
    """The error names the YAML key, the value and what was expected."""
    with pytest.raises(ConfigError, match=rf"data\.mf\.{name} is {value}; expected"):
        MatrixFactorisation(**{name: value})
