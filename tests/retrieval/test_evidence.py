"""Retrieved features tables by split: what each split may read, the cache, and requests answered like the log."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.errors import ConfigError, DataError
from project.retrieval import (
    ItemKNN,
    LightGCN,
    MatrixFactorisation,
    NoRetriever,
    RandomRetriever,
    Retriever,
    request_retrieved,
    retrieved_tables,
    retrieved_warnings,
)
from project.retrieval.base import Edges, Snapshot
from project.retrieval.walk import WalkRows, block_cuts, fit_snapshots, reads_all_earlier, walk

SPLITS = ("train", "valid", "test")


def by_time(rows: pl.DataFrame) -> np.ndarray:
    time = rows["timestamp"].to_numpy()
    return (time >= 40).astype(int) + (time >= 60)


def inside_a_second(rows: pl.DataFrame) -> np.ndarray:
    """By time too, but the first row of a later split shares its second with an earlier one."""
    n = rows.height
    cuts = np.flatnonzero(np.diff(rows["timestamp"].to_numpy()) == 0) + 1
    first, second = (int(cuts[np.searchsorted(cuts, share * n)]) for share in (0.5, 0.75))
    return np.digitize(np.arange(n), [first, second])


def at_random(rows: pl.DataFrame) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, rows.height)


@pytest.mark.parametrize(
    ("assign", "every"), [(by_time, 0), (at_random, 0), (by_time, 3), (inside_a_second, 3), (at_random, 3)]
)
def test_each_table_is_a_walk_over_the_readable_rows(
    log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path, assign: Callable, every: int
):
    """The table of S is what a walk over rows of splits <= S alone gives, whether computed once or three times."""
    co_likes.similar_every = every
    rows = log_of(0)
    codes = assign(rows)
    split = split_of(rows, codes)
    tables = retrieved_tables(split, co_likes, 4, tmp_path)
    items = split.interactions.items
    for last, name in enumerate(SPLITS):
        readable = rows.filter(pl.Series(codes) <= last)
        cuts = block_cuts(rows["timestamp"].to_numpy(), 4)
        fitted = fit_snapshots(readable, co_likes, 12, items, cuts).fitted
        walked = walk(WalkRows.from_log(readable), co_likes, items, cuts, fitted)
        assert tables[name].drop("text", "text_weight").equals(walked)


def test_a_split_by_time_reads_all_earlier_rows():
    """Equal seconds may straddle a cut, unless their own second is read; a train row after a test row may not."""
    time = np.array([1.0, 2, 2, 3])
    assert reads_all_earlier(time, np.array([0, 1, 0, 2]))
    assert not reads_all_earlier(time, np.array([0, 1, 0, 0]))
    assert not reads_all_earlier(time, np.array([2, 1, 1, 1]))
    assert reads_all_earlier(time, np.array([0, 1, 1, 2]), own_second=True)
    assert not reads_all_earlier(time, np.array([0, 1, 0, 2]), own_second=True)


def test_a_split_by_time_is_fitted_once(
    log_of: Callable, split_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three tables cost one fit per block where they coincide, and none at all the second time."""
    calls = []
    fit = NoRetriever.fit
    monkeypatch.setattr(
        NoRetriever, "fit", lambda self, edges, block: calls.append(block) or fit(self, edges, block)
    )
    rows = log_of(0)
    split = split_of(rows, by_time(rows))
    first = retrieved_tables(split, NoRetriever(), 4, tmp_path)
    assert calls == list(range(1, len(block_cuts(rows["timestamp"].to_numpy(), 4)) + 1))
    calls.clear()
    second = retrieved_tables(split, NoRetriever(), 4, tmp_path)
    request_retrieved(split, NoRetriever(), 4, tmp_path, *request(rows.head(1)))
    assert calls == []
    assert all(first[name].equals(second[name]) for name in SPLITS)


def test_the_cache_knows_what_retrieved_depends_on(log_of: Callable, split_of: Callable, tmp_path: Path):
    """Other settings, number of refits or log make another folder; the same make none."""
    rows = log_of(0)
    split, other = (
        split_of(table, by_time(table)) for table in (rows, rows.with_columns(label=1 - pl.col("label")))
    )
    for n in range(2):
        for log, retriever, refits in (
            (split, RandomRetriever(), 4),
            (split, RandomRetriever(seed=1), 4),
            (split, RandomRetriever(), 3),
            (split, NoRetriever(), 4),
            (other, RandomRetriever(), 4),
        ):
            retrieved_tables(log, retriever, refits, tmp_path)
        assert len(list((tmp_path / "retrieved").iterdir())) == 5, n


def request(rows: pl.DataFrame, user: int | None = None, own: bool = True) -> tuple[np.ndarray, ...]:
    """Log rows as a request's rows: user, item, timestamp, label, own."""
    users = rows["user"].to_numpy() if user is None else np.full(rows.height, user)
    label = rows["label"].to_numpy() if own else np.full(rows.height, -1)
    return users, rows["item"].to_numpy(), rows["timestamp"].to_numpy(), label, np.full(rows.height, own)


COMPARED = pl.exclude("row_id")


@pytest.mark.parametrize("assign", [by_time, at_random])
@pytest.mark.parametrize("kind", ["co_likes", "lightgcn", "random", "none"])
def test_a_users_own_history_as_a_request_is_answered_like_the_log(
    log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path, assign: Callable, kind: str
):
    """Explicit history of users of the log, in any order, gives the features the log has for the same rows."""
    retriever = {
        "co_likes": co_likes,
        "lightgcn": LightGCN(dim=4, epochs=1),
        "random": RandomRetriever(),
        "none": NoRetriever(),
    }[kind]
    rows = log_of(2)
    split = split_of(rows, assign(rows))
    log = retrieved_tables(split, retriever, 4, tmp_path)["test"]
    asked = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(fraction=1, shuffle=True, seed=0)
    found = request_retrieved(split, retriever, 4, tmp_path, *request(asked))
    expected = asked.select("row_id").join(log, on="row_id", maintain_order="left")
    assert found["row_id"].to_list() == [-1 - position for position in range(asked.height)]
    assert found.select(COMPARED).equals(expected.select(COMPARED))


def test_candidates_without_history_use_the_logs_past(
    log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path
):
    """A known user's candidate is answered from that user's log rows; its own label is not needed."""
    rows = log_of(2)
    split = split_of(rows, by_time(rows))
    log = retrieved_tables(split, co_likes, 4, tmp_path)["test"]
    found = request_retrieved(split, co_likes, 4, tmp_path, *request(rows, own=False))
    assert found.select(COMPARED).equals(log.select(COMPARED))


def test_requests_do_not_change_each_other(
    log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path
):
    """Asking about one user's rows alone or among other users' gives the same retrieved features."""
    rows = log_of(2)
    split = split_of(rows, by_time(rows))
    together = request_retrieved(split, co_likes, 4, tmp_path, *request(rows))
    for user in (1, 4):
        mine = rows["user"] == user
        alone = request_retrieved(split, co_likes, 4, tmp_path, *request(rows.filter(mine)))
        assert alone.select(COMPARED).equals(together.filter(mine).select(COMPARED))


def test_unseen_users_and_items(log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path):
    """A new user with history has neighbours; without, only rates; a new item has neither raters nor a vector."""
    rows = log_of(2)
    split = split_of(rows, by_time(rows))
    late = float(rows["timestamp"].max()) + 10
    user, item = np.array([90, 90, 90, 91]), np.array([0, 77, 1, 1])
    time, label = np.array([late, late, late + 1, late + 1]), np.array([1, 0, -1, -1])
    found = request_retrieved(split, co_likes, 4, tmp_path, user, item, time, label, label >= 0).to_dicts()
    assert found[1]["item_count"] == 0
    assert found[2]["neighbour_count"] == 4
    assert (found[2]["user_rate"], found[2]["user_count"]) == (0.5, 2)
    assert (found[3]["neighbour_count"], found[3]["user_count"]) == (0, 0)
    assert found[3]["item_count"] == found[2]["item_count"] == rows.filter(pl.col("item") == 1).height


def test_history_without_an_answer_is_refused(log_of: Callable, split_of: Callable, tmp_path: Path):
    """An own row needs a label; the error names the row."""
    rows = log_of(0)
    user, item, time, label, own = request(rows.head(3))
    label = np.where(np.arange(3) == 1, -1, label)
    with pytest.raises(DataError, match="request row 1 is history"):
        request_retrieved(
            split_of(rows, by_time(rows)), NoRetriever(), 4, tmp_path, user, item, time, label, own
        )


def test_refits_below_one_is_refused(log_of: Callable, split_of: Callable, tmp_path: Path):
    """The error names the YAML key."""
    rows = log_of(0)
    with pytest.raises(ConfigError, match=r"data\.refits is 0"):
        retrieved_tables(split_of(rows, by_time(rows)), NoRetriever(), 0, tmp_path)


class Told(NoRetriever):
    """Keeps what it was fitted on."""

    def fit(self, edges: Edges, block: int) -> Snapshot:
        self.fits = [*getattr(self, "fits", []), edges.user.size]
        return {}


def test_all_splits_have_the_whole_logs_cuts(log_of: Callable, split_of: Callable, tmp_path: Path):
    """Train is every second row in time: its fits, made last, are at the log's quarters, not at its own.

    So a block of train's fits holds half as many rows, all of them strictly before the log's cut.
    """
    rows = log_of(0)
    codes = np.arange(rows.height) % 2
    split, told = split_of(rows, codes), Told()
    retrieved_tables(split, told, 4, tmp_path, MatrixFactorisation(dim=2))
    time = rows["timestamp"].to_numpy()
    cuts = block_cuts(time, 4)
    assert told.fits[-3:] == [int(((codes == 0) & (time < cut)).sum()) for cut in cuts]


def test_a_split_without_early_rows(
    log_of: Callable, split_of: Callable, co_likes: Retriever, tmp_path: Path
):
    """Where all of train lies in the last third, what is fitted before the first cuts has seen no row: no error."""
    rows = log_of(0)
    codes = np.where(np.arange(rows.height) < rows.height * 2 // 3, 1, 0)
    for retriever in (co_likes, ItemKNN(), LightGCN(dim=4, epochs=1)):
        tables = retrieved_tables(split_of(rows, codes), retriever, 10, tmp_path, MatrixFactorisation(dim=2))
        assert tables["train"].height == (codes == 0).sum()


class TestWarnings:
    def test_a_retriever_that_was_never_fitted(self, log_of: Callable, split_of: Callable, tmp_path: Path):
        """One block has no past: LightGCN was fitted for no split; with ten there is nothing to warn of."""
        rows = log_of(0, 300)
        split = split_of(rows, by_time(rows))
        retriever = LightGCN(dim=4, epochs=1)
        for refits, words in ((1, "LightGCN was never fitted before the"), (10, None)):
            tables = retrieved_tables(split, retriever, refits, tmp_path)
            found = retrieved_warnings(split, tables, retriever, refits)
            assert len(found) == (3 if words else 0)
            assert all(words in line and "Raise data.refits" in line for line in found)

    def test_features_that_are_all_alike(self, log_of: Callable, split_of: Callable, tmp_path: Path):
        """Nobody likes anything: rates are 0 or nothing, votes too where somebody is asked for them."""
        rows = log_of(0).with_columns(label=pl.lit(0, pl.Int8))
        split = split_of(rows, by_time(rows))
        for retriever, names in (
            (ItemKNN(), "item_rate, user_rate, vote"),
            (NoRetriever(), "item_rate, user_rate"),
        ):
            tables = retrieved_tables(split, retriever, 4, tmp_path)
            found = retrieved_warnings(split, tables, retriever, 4)
            assert len(found) == 3
            assert all(f": {names} has one value or none" in line for line in found)
