"""Metrics: by hand, against scikit-learn, on one class and without rows; intervals by resampling users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, ndcg_score, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from project.evaluation.bootstrap import UserBootstrap
from project.metrics import (
    auc,
    brier,
    ece,
    head_metrics,
    log_loss,
    probabilities,
    session_metrics,
)


def uauc(*args):
    return head_metrics(*args)["uauc"]


def sample(n=500, users=20, seed=0, tie=1):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(int)
    return (
        np.round(labels + 1.5 * rng.normal(size=n), tie),
        labels,
        rng.integers(0, users, n),
    )


class TestAUC:
    @given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
    def test_equals_sklearn_and_mirrors(self, rows):
        """Equal to scikit-learn under heavy ties; negated scores give 1 - AUC; None exactly for one class."""
        scores, labels = (np.array(column) for column in zip(*rows, strict=True))
        found = auc(scores, labels)
        if labels.all() or not labels.any():
            assert found is None
        else:
            assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
            assert auc(-scores, labels) == pytest.approx(1 - found, abs=1e-9)

    def test_refuses_what_is_no_score(self):
        """NaN scores, labels that are not 0/1 and wrong shapes are errors, not numbers."""
        with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
            auc([np.nan, 1.0], [0, 1])
        with pytest.raises(ValueError, match=r"0 or 1, found \[0\.0, 5\.0\]"):
            auc([0.0, 1.0], [0, 5])
        with pytest.raises(ValueError, match="2 scores but labels of shape"):
            auc([0.0, 1.0], [0, 1, 1])


class TestProbabilities:
    def test_sigmoid_is_stable_and_clipped(self):
        """Huge logits neither overflow nor leave [.001, .999]; inside, the plain sigmoid: log 3 -> .75."""
        assert probabilities([-1e6, -np.inf, 0, np.log(3), 1e6]).tolist() == [
            0.001,
            0.001,
            0.5,
            0.75,
            0.999,
        ]

    def test_equal_sklearn(self):
        """Log loss and Brier equal scikit-learn's to 1e-9 on the same probabilities."""
        scores, labels, _ = sample()
        p = probabilities(scores)
        assert log_loss(p, labels) == pytest.approx(sklearn_log_loss(labels, p), abs=1e-9)
        assert brier(p, labels) == pytest.approx(brier_score_loss(labels, p), abs=1e-9)


class TestECE:
    def test_golden(self):
        """Two bins of two: |.15 - .5| and |.7 - .5|, halves: .175 + .1 = .275."""
        assert ece([0.1, 0.6, 0.8, 0.2], [0, 1, 0, 1], bins=2) == pytest.approx(0.275)

    def test_ties_do_not_depend_on_row_order(self):
        """A constant equal to the base rate is calibrated whatever the order of rows: ECE 0."""
        assert ece([0.5] * 40, [0] * 20 + [1] * 20) == pytest.approx(0.0, abs=1e-12)
        scores, labels, _ = sample()
        order = np.random.default_rng(1).permutation(scores.size)
        p = probabilities(scores)
        assert ece(p[order], labels[order]) == pytest.approx(ece(p, labels), abs=1e-12)


class TestUserAUC:
    def test_equals_a_loop_over_users(self):
        """The one-pass ranks equal scikit-learn's AUC user by user, ties included."""
        scores, labels, users = sample(users=60, tie=0)
        by_user = [
            roc_auc_score(labels[users == u], scores[users == u])
            for u in np.unique(users)
            if 0 < labels[users == u].mean() < 1
        ]
        assert uauc(scores, labels, users)["value"] == pytest.approx(
            np.mean(by_user), abs=1e-9
        )
        assert uauc(scores, labels, users)["users"] == len(by_user)

    def test_the_best_forecaster_of_an_unknown_level_has_none(self):
        """Rows in time, a level drawn once a user, uniformly: Laplace's (likes + 1) / (rows + 2) beats 1/2 in log loss.

        Its user-AUC of two rows is 0: a like at 1/2 is followed by a dislike at 2/3, a dislike at 1/2 by a like at 1/3.
        """
        rng = np.random.default_rng(0)
        labels = (rng.random((4000, 2)) < rng.random((4000, 1))).astype(int)
        chance = np.stack([np.full(4000, 1 / 2), (labels[:, 0] + 1) / 3], axis=1)
        users = np.repeat(np.arange(4000), 2)
        assert log_loss(chance.ravel(), labels.ravel()) < np.log(2) - 0.02
        assert uauc(chance.ravel(), labels.ravel(), users)["value"] == 0


class TestHeadMetrics:
    def test_one_class_stays_none_and_does_not_spread(self):
        """One class: AUCs None, the rest a number. No rows: all None."""
        found = head_metrics([0.0, 1.0], [1, 1], [0, 1])
        assert found["auc"] is None
        assert found["uauc"] == {"value": None, "users": 0}
        assert found["log_loss"] > 0
        empty = head_metrics([], [], [])
        assert (empty["n"], empty["auc"], empty["log_loss"], empty["ece"]) == (
            0,
            None,
            None,
            None,
        )


class TestUserBootstrap:
    def test_draws_are_repeated_users(self):
        """Every draw equals the AUC of the drawn users' rows physically repeated."""
        scores, labels, users = sample(n=60, users=6)
        bootstrap = UserBootstrap(users, draws=20, seed=3)
        for times, drawn in zip(
            bootstrap._times, bootstrap._auc_draws(scores, labels), strict=True
        ):
            assert times.sum() == 6
            rows = np.repeat(np.arange(60), times[users].astype(int))
            assert drawn == pytest.approx(
                roc_auc_score(labels[rows], scores[rows]), abs=1e-9
            )

    def test_chunks_do_not_matter(self, monkeypatch):
        """The interval is the same when draws are worked off one by one."""
        scores, labels, users = sample()
        whole = UserBootstrap(users, draws=50).auc_interval(scores, labels)
        monkeypatch.setattr("project.evaluation.bootstrap.CHUNK_ELEMENTS", 1)
        assert UserBootstrap(users, draws=50).auc_interval(scores, labels) == whole

    def test_difference_is_paired(self):
        """A model against itself has the interval [0, 0]; against noise, the AUCs' difference."""
        scores, labels, users = sample()
        bootstrap = UserBootstrap(users)
        same = {"value": 0.0, "interval": [0.0, 0.0]}
        assert bootstrap.difference_interval(scores, 2 * scores, labels) == same
        noise = np.random.default_rng(9).normal(size=scores.size)
        found = bootstrap.difference_interval(scores, noise, labels)
        assert found["value"] == pytest.approx(auc(scores, labels) - auc(noise, labels))
        assert 0 < found["interval"][0] < found["value"] < found["interval"][1]

    def test_log_loss_difference(self):
        """Equals the difference of clipped log losses; the interval's ends lie around it."""
        scores, labels, users = sample()
        found = UserBootstrap(users).log_loss_difference_interval(
            scores, np.zeros(500), labels
        )
        assert found["value"] == pytest.approx(
            log_loss(probabilities(scores), labels) - np.log(2)
        )
        assert found["interval"][0] < found["value"] < found["interval"][1]

    def test_undefined(self):
        """One class or no rows: None, no warning and no NaN."""
        bootstrap = UserBootstrap([0, 0, 1])
        assert bootstrap.auc_interval([1.0, 2.0, 3.0], [1, 1, 1]) is None
        nothing = {"value": None, "interval": None}
        assert bootstrap.difference_interval([1.0, 2, 3], [3.0, 2, 1], [0, 0, 0]) == nothing
        assert UserBootstrap([]).log_loss_difference_interval([], [], []) == nothing
        assert UserBootstrap([]).auc_interval([], []) is None

    def test_one_class_draws_are_left_out(self):
        """Two users of one class each: half of the draws are undefined, the others all have AUC 1."""
        assert UserBootstrap([0, 1]).auc_interval([0.0, 1.0], [0, 1]) == [1.0, 1.0]

    def test_rows_must_match(self):
        """Scores of other rows than the bootstrap's are refused."""
        with pytest.raises(ValueError, match="made for 3 rows, found 2"):
            UserBootstrap([0, 0, 1]).auc_interval([1.0, 2.0], [0, 1])

    def test_covers(self):
        """In 100 samples of 40 users with a user effect, 95 % intervals hold the true AUC at least 88 times.

        A row bootstrap on the same samples holds it fewer than 88 times (checked here too, so this can fail).
        """
        rng = np.random.default_rng(0)

        def draw(users, rows):
            person = np.repeat(np.arange(users), rows)
            generosity = 2 * rng.normal(size=users)[person]
            score = generosity + rng.normal(size=users * rows)
            label = rng.random(score.size) < probabilities(
                2 * rng.normal(size=users)[person] + 0.5 * score
            )
            return score, label, person

        truth = auc(*draw(40_000, 10)[:2])
        hits = {"users": 0, "rows": 0}
        for seed in range(100):
            scores, labels, person = draw(40, 10)
            for unit, ids in (("users", person), ("rows", np.arange(person.size))):
                low, high = UserBootstrap(ids, draws=200, seed=seed).auc_interval(
                    scores, labels
                )
                hits[unit] += low <= truth <= high
        assert hits["users"] >= 88 > hits["rows"]


def test_ratio_interval():
    """Users spend (4, 2), (2, 2): 6 / 4 = 1.5; resampled pairs give 2, 1.5 or 1, so the interval is [1, 2]."""
    found = UserBootstrap([0, 1, 1], draws=500, seed=0).ratio_interval([4, 1, 1], [2, 1, 1])
    assert found == {"value": 1.5, "interval": [1.0, 2.0]}
    assert UserBootstrap([0]).ratio_interval([1], [0]) == {"value": None, "interval": None}


class TestSessions:
    def test_equals_sklearn_with_ties_and_sessions_of_one_row(self):
        """Means of scikit-learn's ndcg_score and AUC of each session with both labels; others do not count."""
        scores, labels, sessions = sample(n=3000, users=400, seed=1, tie=0)
        sessions[:50] = 1000 + np.arange(50)  # of one row
        sessions[50:90] = 2000  # longer than 10 rows
        ndcg, aucs, rows = [], [], []
        for session in np.unique(sessions):
            inside = sessions == session
            truth, given = labels[inside], scores[inside]
            if truth.min() < truth.max():
                ndcg.append(ndcg_score(truth[None], given[None], k=10))
                aucs.append(roc_auc_score(truth, given))
                rows.append(inside.sum())
        shuffled = np.random.default_rng(0).permutation(labels.size)
        found = session_metrics(*(x[shuffled] for x in (scores, labels, sessions)))
        assert found["sessions"] == len(ndcg) < np.unique(sessions).size - 50
        assert found["ndcg"] == pytest.approx(np.mean(ndcg))
        assert found["gauc"] == pytest.approx(np.average(aucs, weights=rows))

    def test_by_hand(self):
        """First like at rank 2, and in a tie of one like and two others behind one: 1 + 1 + 2/2 = 3; hits both."""
        scores = [3, 2, 1, 9, 5, 5, 5]
        labels = [0, 1, 0, 0, 0, 1, 0]
        found = session_metrics(scores, labels, [0] * 3 + [1] * 4)
        assert found["mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)
        assert (found["hits"], found["sessions"]) == (1.0, 2)
        # eleven better ones: the like is at rank 12
        late = session_metrics([*range(11), -1], [0] * 11 + [1], [0] * 12)
        assert (late["hits"], late["ndcg"], late["mrr"]) == (
            0.0,
            0.0,
            pytest.approx(1 / 12),
        )
        nothing = session_metrics([1, 2], [1, 1], [0, 0])
        assert nothing == {
            "sessions": 0,
            "ndcg": None,
            "mrr": None,
            "hits": None,
            "gauc": None,
        }
