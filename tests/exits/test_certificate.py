"""Certificates: losses by hand arithmetic, bets, promises kept at the border, the ledger."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.errors import ConfigError, DataError
from project.exits.certificate import (
    CertificateSettings,
    OverlapPromise,
    UserPairs,
    certify,
    certify_losses,
    p_value,
    plug_in_bets,
    upper_bound,
    user_means,
)
from project.exits.criteria import Ratio, StaticExit
from project.exits.plan import ExitSettings, admit
from project.metrics import auc

DELTA = 0.1
LISTS = OverlapPromise(0.05)


def limit(draws):
    """Delta and three standard errors of a share: .1285 at 1,000 draws."""
    return DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / draws)


def heavy(rng, shape, mean):
    """Rare losses of 1 (chance mean / 2) over many small ones that supply the other half of the mean."""
    return np.where(
        rng.random(shape) < mean / 2, 1.0, rng.random(shape) * mean / (1 - mean / 2)
    )


def signed(rng, shape, mean):
    """Signed losses in {-1, 0, 1} rescaled to [0, 1]: +1 more often than -1 by 2 * mean - 1."""
    fate, up = rng.random(shape), 0.06 + (2 * mean - 1)
    return np.where(fate < up, 1.0, np.where(fate > 0.94, 0.0, 0.5))


class TestLosses:
    def test_user_means(self):
        """Users b, a, b with losses 1, 2, 3: a 2, b 2; a second step 0, 0, 4: a 0, b 2."""
        assert user_means([[1, 2, 3], [0, 0, 4]], ["b", "a", "b"]).tolist() == [
            [2, 2],
            [0, 2],
        ]

    def test_auc_of_two_users_is_brute_force(self):
        """Users of 3 and 13 rows with ties: every pairing's share is that of all pairs of rows across the two."""
        rng = np.random.default_rng(0)
        user = np.repeat([0, 1], [3, 13])
        labels, scores = rng.integers(0, 2, 16), rng.integers(0, 5, 16).astype(float)
        labels[:2] = [0, 1]
        shares = [
            (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
            for i in np.flatnonzero(labels == 1)
            for j in np.flatnonzero(labels == 0)
            if user[i] != user[j]
        ]
        assert UserPairs(labels, user).auc(scores) == pytest.approx(np.mean(shares))

    def test_pairs(self):
        """Users of one row each: pairs of one class are NaN, the mean of the others is the pooled AUC (1e-2)."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 4000)
        scores = labels + rng.normal(size=4000)
        found = UserPairs(labels, np.arange(4000)).auc(scores)
        assert found.shape == (20, 2000)
        assert np.isnan(found).mean() == pytest.approx(0.5, abs=0.02)
        assert np.nanmean(found) == pytest.approx(auc(scores, labels), abs=0.01)

    def test_a_giant_user_counts_once(self):
        """One of 1,001 users holds nearly all rows, all of them turned round: the gap stays below 1 / 200."""
        user = np.r_[np.zeros(50_000, int), np.repeat(np.arange(1, 1001), 4)]
        labels = np.tile([0, 1], len(user) // 2)
        full = labels.astype(float)
        adaptive = np.where(user == 0, -full, full)
        pairs = UserPairs(labels, user)
        gap = float(np.mean(pairs.auc(full) - pairs.auc(adaptive)))
        assert 0 < gap < 0.005
        assert auc(full, labels) - auc(adaptive, labels) > 0.9


class TestBets:
    def test_golden(self):
        """Mean tested .2, first bet capped at .99 / .8 = 1.2375: a loss of 0 makes capital 1.2475, p = 1 / 1.2475.

        A loss of 1 only loses, and the p-value's maximum includes the start, so p is 1. Pairings are averaged:
        capitals 1.2475 and 1 - 1.2375 * .8 = .01 make p = 2 / 1.2575, which is above 1.
        """
        for losses, expected in (
            ([[0.0]], 1 / 1.2475),
            ([[1.0, 1.0]], 1),
            ([[0.0], [1.0]], 1),
            ([[0.0]] * 2, 1 / 1.2475),
        ):
            assert p_value(np.array(losses), 0.2, DELTA) == pytest.approx(expected)

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.data())
    def test_bets_are_predictable_and_capital_positive(self, losses, data):
        """Changing losses from t on leaves bets up to t as they were; the p-value is in (0, 1] for any losses."""
        t = data.draw(st.integers(0, len(losses) - 1))
        changed = [*losses[:t], *(1 - x for x in losses[t:])]
        before, after = (
            plug_in_bets(np.array([x]), 0.05, DELTA)[0] for x in (losses, changed)
        )
        assert np.array_equal(before[: t + 1], after[: t + 1])
        assert 0 < p_value(np.array([losses]), 0.05, DELTA) <= 1

    def test_missing_losses_bet_nothing(self):
        """Losses that are not there change nothing, wherever they stand."""
        x = np.random.default_rng(0).random((3, 40)) * 0.1
        holes = np.insert(x, [5, 20], np.nan, axis=1)
        assert p_value(holes, 0.1, DELTA) == pytest.approx(p_value(x, 0.1, DELTA))

    @pytest.mark.parametrize("lines", [1, 5])
    def test_bound_below_epsilon_exactly_where_the_test_rejects(self, lines):
        """For 60 samples the bound is at most epsilon where p <= delta, and never below the mean by much."""
        rng, passed = np.random.default_rng(0), 0
        for _ in range(60):
            epsilon = rng.uniform(0.05, 0.5)
            x = heavy(rng, (lines, 200), rng.random() * epsilon)
            p, bound = p_value(x, epsilon, DELTA), upper_bound(x, epsilon, DELTA)
            assert abs(bound - epsilon) < 1e-9 or (p <= DELTA) == (bound <= epsilon)
            passed += p <= DELTA
        assert 10 < passed < 50


class TestAnswers:
    def test_sorted_users_do_not_fool_the_bets(self):
        """800 losses of 0 before 200 of 1, mean .2: read in this order capital would grow first; shuffled it fails."""
        losses = np.zeros(1000)
        losses[800:] = 1
        assert certify_losses(losses, LISTS)["passed"] is False

    def test_not_enough_users(self):
        """Capital grows by 1 + .99 * .05 / (1 - .05) at most: ln 10 / ln 1.0521 = 45.3, so of 45 nothing is tested.

        With 46 losses of 0 it passes; losses whose mean is not below epsilon do not pass with any number. One user,
        whose scores the plan does not change, has no spread.
        """
        few = certify_losses(np.zeros(45), LISTS)
        assert (few["passed"], few["bound"], few["users_needed"]) == (None, None, 46)
        assert "it takes about 46 users, not 45, to" in few["words"]
        enough = certify_losses(np.full(500, 0.02), LISTS)
        assert (enough["passed"], enough["n"], enough["users_needed"]) == (True, 500, None)
        assert enough["estimate"] == pytest.approx(0.02)
        assert 0.02 < enough["bound"] <= 0.05
        assert certify_losses(np.zeros(46), LISTS)["passed"] is True
        hopeless = certify_losses(np.full(100, 0.06), LISTS)
        assert (hopeless["passed"], hopeless["users_needed"]) == (False, None)
        json.dumps([few, hopeless], allow_nan=False)
        full, labels = np.arange(40.0), np.tile([0, 1], 20)
        one = certify(full, full, labels, np.zeros(40), CertificateSettings())
        assert (one["n"], one["passed"], one["users_needed"]) == (1, None, 232)

    @pytest.mark.parametrize(("epsilon", "needed"), [(0.02, 232), (0.05, 92)])
    def test_users_of_an_auc_gap(self, epsilon, needed):
        """Pairs whose gap is 0: 2 * ceil(ln 10 / ln(1 + .99 * (epsilon / 2) / ((1 - epsilon) / 2))) users.

        Where .02 of pairs lose all, a sample of 115 pairs shows none with a chance of .98 ** 115 = .098, just below
        delta: no test that passes such samples does with fewer.
        """
        assert CertificateSettings(epsilon).users_needed() == needed
        assert 0.98**114 < DELTA < 0.98**113

    def test_as_many_as_said(self):
        """Of plans that fail for want of users about half pass with as many users as the certificate names."""
        rng, passed = np.random.default_rng(0), []
        needed = certify_losses(heavy(rng, 100, 0.03) * 0.99, LISTS)["users_needed"]
        assert needed > 100
        sample = LISTS.users_needed(heavy(rng, 100_000, 0.03) * 0.99)
        for _ in range(60):
            losses = heavy(rng, sample, 0.03) * 0.99
            passed.append(certify_losses(losses, LISTS)["passed"])
        assert 0.25 < np.mean(passed) < 0.85


class TestBadInput:
    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ({"epsilon": 0.0}, "epsilon"),
            ({"epsilon": 1.0}, "epsilon"),
            ({"epsilon": float("nan")}, "epsilon"),
            ({"delta": 0.0}, "delta"),
            ({"delta": 0.6}, "delta"),
        ],
    )
    def test_settings_name_their_key(self, values, key):
        with pytest.raises(ConfigError, match=rf"exits\.certificate\.{key}: found"):
            CertificateSettings(**values)

    @pytest.mark.parametrize(
        ("emitted", "message"),
        [([0, np.nan, 0, 0], "NaN"), ([0.0] * 300, "both classes")],
    )
    def test_rows(self, emitted, message):
        n = len(emitted)
        with pytest.raises(DataError, match=message):
            certify(emitted, np.zeros(n), [1] * n, np.arange(n), CertificateSettings())

    def test_losses(self):
        with pytest.raises(DataError, match="1 losses outside"):
            certify_losses([0.1, 1.2], LISTS)


class TestValidity:
    @pytest.mark.parametrize(
        ("draw", "mean"), [(heavy, 0.05), (signed, 0.525), (heavy, 0.01)]
    )
    def test_mean_at_the_border(self, draw, mean):
        """True mean exactly epsilon, 1,000 draws of 300 losses: passes at most delta + 3 s.e.; at half of it often."""
        rng = np.random.default_rng(1)
        rates = [
            np.mean(
                [p_value(draw(rng, (1, 300), m), mean, DELTA) <= DELTA for _ in range(1000)]
            )
            for m in (mean, mean / 2 if draw is heavy else 0.5)
        ]
        assert rates[0] <= limit(1000)
        assert rates[1] > rates[0]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "world", ["log-normal sizes", "equal sizes", "one giant user", "rare bad users"]
    )
    def test_auc_gap_at_the_border(self, world):
        """Risk at epsilon, 300 draws: bets pass at most delta + 3 standard errors at 30, 80 and 300 users.

        Without a drop 300 users pass in most draws; with fewer than 232 nothing is tested.
        """
        study = runpy.run_path(
            str(Path(__file__).parents[2] / "research" / "certificates.py")
        )
        strength, gap = study["strength_of"](world, 0.02, users=6000)
        assert gap == pytest.approx(0.02, abs=0.001)
        for users, draws in ((30, 1200), (80, 1200), (300, 300)):
            found = study["rates"](world, users, strength, draws)
            assert found["bets_alone"] <= limit(300)
            assert found["not_enough_users"] == (users < 232)
        assert study["rates"](world, 300, 0.0, 100)["passed"] > 0.5


class TestLedger:
    def ledger(self):
        """After one certificate of default settings, through JSON."""
        return json.loads(json.dumps(admit([], ExitSettings(), "heads", "p1")))

    def test_the_same_is_recorded_once(self):
        first = self.ledger()
        assert admit(first, ExitSettings(), "heads", "p1") == first
        other = admit(first, ExitSettings(max_auc_drop=0.01), "heads", "p2")
        assert [record["protocol_hash"] for record in other] == ["p1", "p2"]
        # issued by a version that had no such setting: it cannot have changed
        earlier = self.ledger()
        del earlier[0]["settings"]["exits.alpha"]
        assert admit(earlier, ExitSettings(alpha=0.2), "heads", "p1")

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("criterion", {"criterion": Ratio()}),
            ("criterion", {"criterion": StaticExit(2)}),
            ("exit_0", {"exit_0": False}),
            ("max_auc_drop", {"max_auc_drop": 0.01}),
            ("certificate.epsilon", {"certificate": CertificateSettings(epsilon=0.1)}),
            ("certificate.delta", {"certificate": CertificateSettings(delta=0.2)}),
        ],
    )
    def test_whatever_chooses_the_tested_policy_or_the_promise_counts(self, key, change):
        with pytest.raises(ConfigError, match=rf"exits\.{key} .*voids delta"):
            admit(self.ledger(), ExitSettings(**change), "heads", "p1")
