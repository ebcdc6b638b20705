"""Tests of a mean: golden capital, MAPIE's p-values, validity at the border, coverage, power."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

from project.exits.betting import (
    averaged_growth,
    averaged_p_value,
    averaged_upper_bound,
    hoeffding_bentkus_p_value,
    hoeffding_bentkus_upper_bound,
    log_capital,
    losses_needed,
    plug_in_bets,
    wsr_p_value,
    wsr_upper_bound,
)

DELTA = 0.1
DRAWS = 2000
LIMIT = DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / DRAWS)  # .1201


def heavy(rng, shape, mean):
    """Rare losses of 1 (chance mean / 2) over many small ones that supply the other half of the mean."""
    return np.where(rng.random(shape) < mean / 2, 1.0, rng.random(shape) * mean / (1 - mean / 2))


def spiky(rng, shape, mean):
    """Beta losses with shape parameters far below 1: nearly all at 0 or 1."""
    return rng.beta(0.05 * mean, 0.05 * (1 - mean), shape)


def signed(rng, shape, mean):
    """Signed losses in {-1, 0, 1} rescaled to [0, 1]: +1 more often than -1 by 2 * mean - 1."""
    fate, up = rng.random(shape), 0.06 + (2 * mean - 1)
    return np.where(fate < up, 1.0, np.where(fate > 0.94, 0.0, 0.5))


BORDERS = [(heavy, 0.05), (spiky, 0.05), (signed, 0.525), (heavy, 0.01)]


class TestCapital:
    def test_golden(self):
        """Bets 1, .5 at mean .2 on losses 0, 1: capital 1 + .2 = 1.2, then 1.2 * (1 - .4) = .72.

        The p-value's maximum includes the start, so it is 1 / 1.2 there and never above 1.
        """
        found = np.exp(log_capital([0, 1], [1, 0.5], 0.2))
        assert found == pytest.approx([1.2, 0.72])
        assert float(wsr_p_value([1.0, 1.0], 0.2, DELTA)) == 1

    def test_bets_golden(self):
        """First bet of n = 400 at delta .1: sqrt(2 ln 10 / (400 * .25)) = .2146; four losses cap it: .9 / .8."""
        bets = plug_in_bets(np.zeros(400), 0.2, DELTA)
        assert bets[0] == pytest.approx(0.21460, abs=1e-5)
        assert plug_in_bets(np.zeros(4), 0.2, DELTA)[0] == pytest.approx(0.9 / 0.8)

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.data())
    def test_bets_are_predictable_and_capital_positive(self, losses, data):
        """Changing losses from t on leaves bets up to t as they were; capital stays finite for any losses."""
        t = data.draw(st.integers(0, len(losses) - 1))
        changed = [*losses[:t], *(1 - x for x in losses[t:])]
        before, after = (plug_in_bets(x, 0.05, DELTA) for x in (losses, changed))
        assert np.array_equal(before[: t + 1], after[: t + 1])
        assert np.all(np.isfinite(log_capital(losses, before, 0.05)))

    def test_padding_bets_nothing(self):
        """A padded line gives the p-value of the line without padding, whatever the padding holds."""
        x = np.random.default_rng(0).random((1, 3, 40)) * 0.1
        padded = np.concatenate([x, np.ones((1, 3, 7))], axis=-1)
        counts = np.full((1, 3), 40)
        assert averaged_p_value(padded, 0.1, DELTA, counts) == pytest.approx(averaged_p_value(x, 0.1, DELTA))


class TestBounds:
    @settings(max_examples=60)
    @given(
        st.integers(0, 10_000), st.integers(5, 300), st.floats(0.01, 0.6), st.sampled_from([0.05, 0.1, 0.3])
    )
    def test_bound_below_epsilon_exactly_where_the_test_rejects(self, seed, n, epsilon, delta):
        """All three tests agree with their own bounds, and bounds lie above the mean."""
        rng = np.random.default_rng(seed)
        x = heavy(rng, (3, 4, n), rng.random() * epsilon)
        cases = [
            (wsr_p_value(x, epsilon, delta), wsr_upper_bound(x, epsilon, delta)),
            (averaged_p_value(x, epsilon, delta), averaged_upper_bound(x, epsilon, delta)),
            (
                hoeffding_bentkus_p_value(x.mean(-1), n, epsilon),
                hoeffding_bentkus_upper_bound(x.mean(-1), n, delta),
            ),
        ]
        for p, bound in cases:
            clear = np.abs(bound - epsilon) > 1e-9
            assert np.array_equal((p <= delta)[clear], (bound <= epsilon)[clear])
        assert np.all(cases[2][1] >= x.mean(-1) - 1e-9)

    def test_bounds_shrink_with_n(self):
        """Ten times the data: every mean bound comes closer to the true mean .02, from above."""
        rng = np.random.default_rng(0)
        for bound in (
            lambda x: wsr_upper_bound(x, 0.05, DELTA),
            lambda x: hoeffding_bentkus_upper_bound(x.mean(-1), x.shape[-1], DELTA),
            lambda x: averaged_upper_bound(x[:, None], 0.05, DELTA),
        ):
            found = [bound(heavy(rng, (50, n), 0.02)).mean() for n in (100, 1000, 10_000)]
            assert found[0] > found[1] > found[2] > 0.02

    def test_hoeffding_bentkus_equals_mapie(self):
        """P-values equal MAPIE's on a table of means, sizes and levels, means above the level included."""
        means, levels = np.linspace(0, 1, 41), np.array([0.01, 0.05, 0.1, 0.3])
        for n in (10, 100, 1001):
            mine = hoeffding_bentkus_p_value(means[:, None], n, levels[None])
            theirs = compute_hoeffding_bentkus_p_value(means, n, levels)
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-300)


class TestNeeded:
    def test_golden(self):
        """Losses of 0, epsilon .05: capital grows by 1 + (.9 / .95) * .05 a loss: ln 10 / ln 1.04737 = 49.8."""
        assert losses_needed(np.zeros(7), 0.05, DELTA) == 50
        assert losses_needed([0.0, 0.2], 0.05, DELTA) is None

    def test_pairings_gain_by_averaging(self):
        """One pairing: the growth that `losses_needed` divides by, so ln 10 * 500 / growth is its answer (1 %).

        Fifty orders of overlapping halves of one sample never grow less than their single pairings' mean growth.
        """
        rng = np.random.default_rng(0)
        x = signed(rng, 500, 0.51)
        one = averaged_growth(x[None], 0.525, [500])
        assert np.log(1 / DELTA) * 500 / one == pytest.approx(losses_needed(x, 0.525, DELTA), rel=0.01)
        halves = np.stack([x[rng.permutation(500)[:250]] for _ in range(50)])
        together = averaged_growth(halves, 0.525, np.full(50, 250))
        assert together >= averaged_growth(halves.reshape(1, -1), 0.525, [halves.size]) / 50 > 0

    @pytest.mark.slow
    def test_as_many_as_said_pass_half_the_time(self):
        """At the extrapolated n between 30 % and 80 % of draws pass; at half of it fewer, at twice it more."""
        rng = np.random.default_rng(0)
        for draw, mean, epsilon in ((heavy, 0.03, 0.05), (signed, 0.51, 0.525)):
            needed = losses_needed(draw(rng, 200_000, mean), epsilon, DELTA)
            share = [
                float((wsr_p_value(draw(rng, (400, int(needed * k)), mean), epsilon, DELTA) <= DELTA).mean())
                for k in (0.5, 1, 2)
            ]
            assert 0.3 < share[1] < 0.8
            assert share[0] < share[1] < share[2]


@pytest.mark.slow
class TestValidity:
    @pytest.mark.parametrize(("draw", "mean"), BORDERS)
    def test_wsr_at_the_border(self, draw, mean):
        """True mean exactly epsilon, heavy tails, 2,000 draws: rejects at most delta + 3 standard errors."""
        x = draw(np.random.default_rng(1), (DRAWS, 500), mean)
        assert (wsr_p_value(x, mean, DELTA) <= DELTA).mean() <= LIMIT

    @pytest.mark.parametrize(("draw", "mean"), BORDERS)
    def test_hoeffding_bentkus_at_the_border(self, draw, mean):
        """The same for Hoeffding-Bentkus."""
        x = draw(np.random.default_rng(2), (DRAWS, 500), mean)
        assert (hoeffding_bentkus_p_value(x.mean(-1), 500, mean) <= DELTA).mean() <= LIMIT

    @pytest.mark.parametrize(("draw", "mean"), BORDERS)
    def test_averaged_at_the_border(self, draw, mean):
        """The same for e-values averaged over 20 orders of half of each draw: dependent, as pairings are."""
        rng = np.random.default_rng(3)
        x = draw(rng, (DRAWS, 300), mean)
        orders = np.stack([rng.permutation(300)[:150] for _ in range(20)])
        assert (averaged_p_value(x[:, orders], mean, DELTA) <= DELTA).mean() <= LIMIT

    def test_bounds_cover_and_tests_have_power(self):
        """Bounds lie above the true mean .02 in 1 - delta of draws; at epsilon .05, n = 1,000 wsr nearly always passes.

        So do averaged e-values of 1,000; without power validity would be empty.
        """
        x = heavy(np.random.default_rng(4), (DRAWS, 1000), 0.02)
        for bound in (
            wsr_upper_bound(x, 0.05, DELTA),
            hoeffding_bentkus_upper_bound(x.mean(-1), 1000, DELTA),
            averaged_upper_bound(x[:, None], 0.05, DELTA),
        ):
            assert (bound < 0.02).mean() <= LIMIT
            assert (bound <= 0.05).mean() > 0.9
