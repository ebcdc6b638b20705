"""Losses, pairs and the AUC gap's variance against hand arithmetic, brute force and a user bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.errors import ConfigError, DataError
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import auc
from project.exits.risks import (
    RISKS,
    auc_gap,
    find_risk,
    pair_losses,
    row_pairings,
    user_means,
    user_pairings,
)

PROBABILITY = st.floats(0.001, 0.999)


def scored(n=300, users=30, seed=0, tie=1, effect=0.7):
    """Labels, full and adaptive scores with ties and a user effect, users of unequal size."""
    rng = np.random.default_rng(seed)
    owner = np.sort(rng.choice(users, n, p=rng.dirichlet(np.full(users, 2.0))))
    labels = (rng.random(n) < 0.4).astype(int)
    full = labels + rng.normal(size=n) + 0.5 * rng.normal(size=users)[owner]
    adaptive = full + rng.normal(size=n) * 0.5 + effect * rng.normal(size=users)[owner] * (labels - 0.5)
    return labels, np.round(full, tie), np.round(adaptive, tie), owner


class TestLosses:
    def test_golden(self):
        """Full .8 -> adaptive .5, label 1, and full .4 -> adaptive .6, label 0.

        Drift .3, .2; squared .09, .04; .5 counts as yes, so only the second disagrees; log loss
        ln(.8/.5) = .4700, ln(.6/.4) = .4055; Brier .25 - .04 = .21, .36 - .16 = .20.
        """
        full, adaptive, labels = [0.8, 0.4], [0.5, 0.6], [1, 0]
        expected = {
            "score_drift": [0.3, 0.2],
            "score_drift_squared": [0.09, 0.04],
            "disagreement": [0.0, 1.0],
            "log_loss_gap": [np.log(1.6), np.log(1.5)],
            "brier_gap": [0.21, 0.20],
        }
        for name, losses in expected.items():
            assert RISKS[name].losses(adaptive, full, labels) == pytest.approx(losses, abs=1e-12), name

    @given(PROBABILITY, PROBABILITY, st.integers(0, 1))
    def test_ranges_hold_and_are_reached(self, adaptive, full, label):
        """Every loss lies in its range, rescaling is inverted by restoring, and corners reach both ends."""
        for risk in (risk for risk in RISKS.values() if risk.over == "rows"):
            loss = risk.losses([adaptive], [full], [label])
            assert risk.low <= loss[0] <= risk.high
            assert risk.restore(risk.rescale(loss)) == pytest.approx(loss, abs=1e-12)
            corners = risk.losses([0.001, 0.999, 0.5], [0.999, 0.001, 0.5], [1, 1, 1])
            assert corners.max() == pytest.approx(risk.high)
            assert corners.min() == pytest.approx(risk.low)
            assert risk.losses([full], [full], [label])[0] == 0

    def test_refusals(self):
        """Unknown risks name the key; missing labels and logits in place of probabilities are errors."""
        with pytest.raises(
            ConfigError, match=r"exits.certificate.risk: found 'auc', expected one of score_drift"
        ):
            find_risk("auc")
        with pytest.raises(DataError, match="log_loss_gap needs labels"):
            RISKS["log_loss_gap"].losses([0.5], [0.5])
        with pytest.raises(ValueError, match=r"found -1\.2"):
            RISKS["score_drift"].losses([-1.2], [0.5])
        with pytest.raises(ValueError, match="over pairs"):
            RISKS["auc_gap"].losses([0.5], [0.5], [1])

    def test_user_means(self):
        """Users b, a, b with losses 1, 2, 3: a 2, b 2; a second step 0, 0, 4: a 0, b 2. No rows: no users."""
        assert user_means([[1, 2, 3], [0, 0, 4]], ["b", "a", "b"]).tolist() == [[2, 2], [0, 2]]
        assert user_means(np.zeros((2, 0)), []).shape == (2, 0)


class TestPairs:
    def test_mean_over_all_pairs_is_the_gap(self):
        """Over every (positive, negative) pair the mean loss is AUC full - AUC adaptive, ties included."""
        labels, full, adaptive, _ = scored()
        grid = np.meshgrid(np.flatnonzero(labels == 1), np.flatnonzero(labels == 0))
        losses = pair_losses(adaptive, full, *grid)
        assert losses.mean() == pytest.approx(auc(full, labels) - auc(adaptive, labels), abs=1e-12)
        assert set(np.unique(losses)) <= {-1, -0.5, 0, 0.5, 1}

    def test_rows_are_disjoint(self):
        """A pairing holds every row at most once, the rarer class whole, and pairings differ."""
        labels = scored()[0]
        positives, negatives, counts = row_pairings(labels, 20, seed=0)
        assert counts.tolist() == [labels.sum()] * 20
        assert np.all(labels[positives] == 1)
        assert np.all(labels[negatives] == 0)
        for side in (positives, negatives):
            assert all(np.unique(line).size == line.size for line in side)
        assert not np.array_equal(np.sort(negatives[0]), np.sort(negatives[1]))

    def test_users_are_disjoint(self):
        """A pairing holds every user at most once; each side has its label; every row is drawn at some time."""
        labels, _, _, users = scored()
        positives, negatives, counts = user_pairings(labels, users, 3000, seed=0)
        assert counts.max() <= np.unique(users).size // 2
        for up, down, count in zip(positives[:200], negatives[:200], counts[:200], strict=True):
            rows = np.r_[up[:count], down[:count]]
            assert np.unique(users[rows]).size == rows.size
            assert labels[rows].tolist() == [1] * count + [0] * count
        real = np.arange(positives.shape[1]) < counts[:, None]
        assert np.union1d(positives[real], negatives[real]).size == labels.size

    def test_users_without_a_class_take_only_the_side_they_have(self):
        """Users 0 to 3 have positives only, 4 negatives only: every pair's negative is user 4's row."""
        labels, users = np.array([1, 1, 1, 1, 0]), np.arange(5)
        _, negatives, counts = user_pairings(labels, users, 50, seed=0)
        assert set(counts.tolist()) == {0, 1}
        assert np.all(negatives[counts == 1, 0] == 4)


class TestAUCGap:
    def test_equals_brute_force(self):
        """Gap = difference of exact AUCs; variance = DeLong's from the full matrix of pairs, ties half.

        With d(i, j) the loss of pair (i, j): var of row means / m + var of column means / n, both with n - 1.
        """
        labels, full, adaptive, _ = scored()
        pairs = np.meshgrid(np.flatnonzero(labels == 1), np.flatnonzero(labels == 0), indexing="ij")
        d = pair_losses(adaptive, full, *pairs)
        gap, error = auc_gap(adaptive, full, labels)
        assert gap == pytest.approx(auc(full, labels) - auc(adaptive, labels), abs=1e-12)
        variance = d.mean(axis=1).var(ddof=1) / d.shape[0] + d.mean(axis=0).var(ddof=1) / d.shape[1]
        assert error == pytest.approx(np.sqrt(variance), rel=1e-9)

    def test_user_error_matches_the_user_bootstrap(self):
        """With a user effect the clustered error is within 15 % of the bootstrap's, the row error far below.

        A 95 % interval is 3.92 standard errors wide.
        """
        labels, full, adaptive, users = scored(n=3000, users=150, seed=1, tie=3, effect=2.0)
        low, high = UserBootstrap(users, draws=1000).difference_interval(full, adaptive, labels)["interval"]
        _, by_user = auc_gap(adaptive, full, labels, users)
        _, by_row = auc_gap(adaptive, full, labels)
        assert by_user == pytest.approx((high - low) / 3.92, rel=0.15)
        assert by_row < 0.8 * by_user

    def test_one_user_a_row_is_the_row_error(self):
        """Where every row is its own user the two errors agree up to n / (n - 1)."""
        labels, full, adaptive, _ = scored(n=2000)
        by_user, by_row = (auc_gap(adaptive, full, labels, users) for users in (np.arange(2000), None))
        assert by_user == pytest.approx(by_row, rel=2e-3)

    def test_same_order_has_no_error(self):
        """A monotone change of scores: gap 0, error 0."""
        labels, full, _, _ = scored()
        assert auc_gap(3 * full + 1, full, labels) == (0.0, 0.0)
