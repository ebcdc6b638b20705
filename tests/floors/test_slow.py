"""The slower floors on small logs: their arithmetic by hand, and canaries for what they may not read."""

from __future__ import annotations

import hashlib

import numpy as np
import polars as pl
import pytest

from project.data.interactions import Interactions
from project.data.splits import FOLDS, ROLES, SPLITS, Protocol, SplitInteractions
from project.evaluation.metrics import auc
from project.floors.slow import GraphSource, dots, last_answers, more_floors, rates_summed
from project.retrieval import LightGCN, NoRetriever, evidence_tables
from project.retrieval.factorisation import Factorisation
from project.retrieval.snapshots import Snapshots

NAMES = ["rates_summed", "last_10", "mf", "lightgcn_dot"]
USERS, ITEMS = 8, 6


def make_split(rows: pl.DataFrame, items: int = ITEMS) -> SplitInteractions:
    """A split log from rows with user, item, timestamp, label and split, in time order; all are targets."""
    rows = rows.with_columns(
        pl.col("user", "item").cast(pl.Int32),
        pl.col("timestamp").cast(pl.Float64),
        pl.col("label").cast(pl.Int8),
        pl.col("split").cast(pl.Enum(SPLITS)),
        row_id=pl.int_range(pl.len(), dtype=pl.Int64),
        fold=pl.lit(None, pl.Enum(FOLDS)),
        role=pl.lit("target", pl.Enum(ROLES)),
    )
    users = pl.DataFrame({"user": np.arange(USERS, dtype=np.int32)})
    table = pl.DataFrame({"item": np.arange(items, dtype=np.int32)})
    digest = hashlib.sha256(rows.write_csv().encode()).hexdigest()[:16]
    return SplitInteractions(Interactions(rows, users, table, {}), rows, Protocol(), {}, digest)


def random_rows(kind: str, seed: int = 0, size: int = 160) -> pl.DataFrame:
    """Few users, items and seconds, so that ties are common; cut by time, or at random."""
    rng = np.random.default_rng(seed)
    table = pl.DataFrame(
        {
            "user": rng.integers(0, USERS, size),
            "item": rng.integers(0, ITEMS, size),
            "timestamp": rng.integers(0, size // 3, size),
            "label": rng.integers(0, 2, size),
        }
    ).sort("timestamp", "user", "item")
    late = table["timestamp"].to_numpy() / (size // 3)
    code = (late > 0.6).astype(int) + (late > 0.8) if kind == "by_time" else rng.integers(0, 3, size)
    return table.with_columns(split=pl.Series([SPLITS[c] for c in code]))


def flip(rows: pl.DataFrame, at: np.ndarray) -> pl.DataFrame:
    return rows.with_columns(label=pl.Series(np.where(at, 1 - rows["label"].to_numpy(), rows["label"])))


class TestLastAnswers:
    def test_golden(self):
        """K = 2, base 1/2, so (likes + 2.5) / (dislikes + 2.5): other users' rows and the own second do not count.

        User 0 answers 1 at 1 s, 0 at 2 s, 1 and 1 at 3 s, 0 at 4 s: nothing read 0; [1] log(3.5 / 2.5); [1, 0] 0,
        twice, as the two rows of 3 s do not see each other; [1, 1] log(4.5 / 2.5).
        """
        rows = pl.DataFrame(
            {
                "user": [0, 1, 0, 0, 0, 1, 0],
                "item": [0, 0, 1, 2, 3, 4, 5],
                "timestamp": [1, 1, 2, 3, 3, 3, 4],
                "label": [1, 0, 0, 1, 1, 0, 0],
                "split": ["train"] * 7,
            }
        )
        found = last_answers(make_split(rows).rows, "train", 0.5, last=2)
        own = found[[0, 2, 3, 4, 6]]
        np.testing.assert_allclose(own, [0, np.log(3.5 / 2.5), 0, 0, np.log(4.5 / 2.5)], atol=1e-12)

    def test_context_is_read_and_later_splits_are_not(self):
        """A valid row reads an earlier context row of train, but not an earlier row of test."""
        rows = pl.DataFrame(
            {
                "user": [0, 0, 0],
                "item": [0, 1, 2],
                "timestamp": [1, 2, 3],
                "label": [1, 0, 1],
                "split": ["train", "test", "valid"],
            }
        )
        rows = make_split(rows).rows.with_columns(
            role=pl.Series(["context", "target", "target"], dtype=pl.Enum(ROLES))
        )
        np.testing.assert_allclose(last_answers(rows, "valid", 0.5), [np.log(3.5 / 2.5)])


def test_rates_summed_golden():
    """Base .8, log-odds log 4: item log-odds 2 and user log-odds 1 make 3 - log 4; at base twice it is base."""
    features = np.zeros((2, 8))
    features[:, [0, 2]] = [[2.0, 1.0], [np.log(4), np.log(4)]]
    np.testing.assert_allclose(rates_summed(features, 0.8), [3 - np.log(4), np.log(4)])


class TestFactorisation:
    def fitted(self, seed: int = 0, vector_penalty: float = 1.0, iterations: int = 500):
        rng = np.random.default_rng(seed)
        user, item = rng.integers(0, 30, 2000), rng.integers(0, 20, 2000)
        taste, kind = rng.choice([-1, 1], 30), rng.choice([-1, 1], 20)
        label = (rng.random(2000) < 1 / (1 + np.exp(-2 * taste[user] * kind[item]))).astype(int)
        train = np.arange(2000) < 1500
        model = Factorisation.fit(
            user[train], item[train], label[train], 4, 2.0, vector_penalty, iterations, seed
        )
        return model, (user, item, label, train)

    def test_biases_are_stationary(self):
        """At the minimum penalty * b = sum of (label - p) over its rows, for each user and each item."""
        model, (user, item, label, train) = self.fitted()
        left = label - 1 / (1 + np.exp(-model.logits(user, item)))
        for codes, bias in ((user, model.user_bias), (item, model.item_bias)):
            pull = np.bincount(codes[train], left[train])
            np.testing.assert_allclose(2.0 * bias[:-1], pull, atol=0.05)
            assert np.abs(pull).max() > 1

    def test_vectors_find_what_biases_cannot(self):
        """Labels are the product of a taste and a kind: with vectors held at 0 held-out AUC is near .5, else > .8."""
        found = []
        for penalty in (1.0, 1e6):
            model, (user, item, label, train) = self.fitted(vector_penalty=penalty)
            found.append(auc(model.logits(user, item)[~train], label[~train]))
        assert found[0] > 0.8
        assert found[1] < 0.6

    def test_unseen_codes_fall_back_to_biases(self):
        """Unseen user: offset + item bias; unseen item: offset + user bias; both: offset, the log-odds of 3/4."""
        model = Factorisation.fit([1, 1, 3, 3], [2, 5, 2, 5], [1, 0, 1, 1], iterations=20)
        found = model.logits([0, 9, 3, 0], [2, 5, 7, 0])
        expected = model.offset + np.array([model.item_bias[0], model.item_bias[1], model.user_bias[1], 0])
        np.testing.assert_array_equal(found, expected)
        assert model.offset == pytest.approx(np.log(3))

    def test_same_again_and_blind_to_other_codes(self):
        """Fitting is deterministic, and how codes are numbered does not matter: only their order draws vectors."""
        first, (user, item, label, train) = self.fitted(iterations=20)
        again = Factorisation.fit(
            7 * user[train] + 3, item[train], label[train], 4, 2.0, 1.0, iterations=20, seed=0
        )
        np.testing.assert_array_equal(first.logits(user, item), again.logits(7 * user + 3, item))


class TestDots:
    def test_golden(self):
        """Item vectors (1, 0), (0, 2), (3, 1); one block from 10 s; a dislike weighs -1/2.

        Before 10 s item 0 has 4 likes, items 1 and 2 none (so they count as 1): weighted is (.5, 0), (0, 2), (3, 1).
        User 0 liked item 0 at 1 s and disliked item 1 at 10 s. At 10 s the user's vector is (.5, 0), of one row; times
        item 1 is 0. At 11 s it is (.5, 0) - (0, 1) = (.5, -1), of two rows; times item 2 it is
        (1.5 - 1) / sqrt 2 = .5 / sqrt 2.
        """
        rows = pl.DataFrame(
            {
                "user": [0, 1, 2, 3, 0, 0],
                "item": [0, 0, 0, 0, 1, 2],
                "timestamp": [1, 1, 1, 1, 10, 11],
                "label": [1, 1, 1, 1, 0, 1],
                "split": ["train"] * 6,
            }
        )
        weighted = np.array([[0.5, 0], [0, 2], [3, 1]], np.float32)
        found = dots(
            make_split(rows, 3), Snapshots(np.array([10.0]), [{"weighted": weighted}]), -0.5, "train"
        )
        np.testing.assert_allclose(found["dot"], [0, 0, 0, 0, 0, 0.5 / np.sqrt(2)], atol=1e-12)

    @pytest.mark.parametrize("kind", ["by_time", "random"])
    def test_a_row_changes_only_later_scores(self, tmp_path, kind):
        """Flipping any row leaves last-10 answers and dots up to its own second alone, and changes some later."""
        rows = random_rows(kind)
        changed = 0
        for k in (20, 70, 110):
            at, time = np.arange(rows.height) == k, rows["timestamp"][k]
            found = []
            for log in (rows, flip(rows, at)):
                split = make_split(log)
                source = GraphSource(LightGCN(dim=4, epochs=1), 40, tmp_path)
                table = dots(split, source.snapshots(split, "test"), -0.5, "test")
                answers = last_answers(split.rows.with_columns(split=pl.lit("test")), "test", 0.5)
                found.append(table.with_columns(answers=answers, timestamp=log["timestamp"]))
            before, after = (table.filter(pl.col("timestamp") <= time) for table in found)
            assert before.equals(after)
            changed += sum(not found[0][name].equals(found[1][name]) for name in ("dot", "answers"))
        assert changed >= 5


class TestMoreFloors:
    def scores(self, rows: pl.DataFrame, folder) -> dict[str, pl.DataFrame]:
        split = make_split(rows)
        evidence = evidence_tables(split, NoRetriever(), 40, folder)
        source = GraphSource(LightGCN(dim=4, epochs=1), 40, folder)
        return {floor.name: floor.scores for floor in more_floors(split, evidence, source)}

    @pytest.mark.parametrize("kind", ["by_time", "random"])
    def test_own_and_later_labels_do_not_count(self, tmp_path, kind):
        """Flip test rows from a second on, or all of them: valid is as it was, and test up to that second.

        Under the random split test rows lie before valid rows, so a floor that read later splits would show. The
        matrix factorisation knows train alone: nothing at all changes. The others do change later test rows.
        """
        rows = random_rows(kind)
        before = self.scores(rows, tmp_path)
        assert list(before) == NAMES
        test, time = (rows["split"] == "test").to_numpy(), rows["timestamp"].to_numpy()
        for first in (0, int(np.median(time[test]))):
            after = self.scores(flip(rows, test & (time >= first)), tmp_path)
            early = pl.Series(time <= first)
            for name in NAMES:
                tables = [found[name].sort("row_id") for found in (before, after)]
                same = tables[0]["logit"] == tables[1]["logit"]
                ids = tables[0]["row_id"].to_numpy()
                assert same.filter(early.gather(ids) | (tables[0]["split"] == "valid")).all()
                assert same.all() == (name == "mf")
                assert tables[0]["logit"].is_finite().all()
                assert ids.size == (rows["split"] != "train").sum()

    def test_valid_labels_reach_later_rows_only(self, tmp_path):
        """Flipping all of valid changes no score of mf, and valid scores of the first second not either."""
        rows = random_rows("by_time")
        valid = (rows["split"] == "valid").to_numpy()
        before, after = self.scores(rows, tmp_path), self.scores(flip(rows, valid), tmp_path)
        first = set(
            rows.with_row_index().filter(valid).filter(pl.col("timestamp").rank("dense") == 1)["index"]
        )
        for name in NAMES:
            same = before[name]["logit"] == after[name]["logit"]
            assert same.filter(before[name]["row_id"].is_in(list(first))).all()
            assert same.all() == (name == "mf")

    def test_without_lightgcn_one_is_fitted(self, tmp_path):
        """The floor is made whatever the run's retriever is, and then found again in the cache."""
        split = make_split(random_rows("by_time"))
        source = GraphSource(NoRetriever(), 40, tmp_path)
        made = source.snapshots(split, "test")
        (folder,) = (tmp_path / "floors").iterdir()
        stamp = (folder / "snapshots.npz").stat().st_mtime_ns
        again = source.snapshots(split, "test")
        assert (folder / "snapshots.npz").stat().st_mtime_ns == stamp
        np.testing.assert_array_equal(made.fitted[-1]["weighted"], again.fitted[-1]["weighted"])
        assert len(made.fitted) == 3  # 160 rows in blocks of 40
