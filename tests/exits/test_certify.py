"""Certificates: the walk along the path, bad input, promises kept at the border, one certificate a fold."""

import json
from dataclasses import replace

import numpy as np
import pytest

from project.errors import ConfigError, DataError
from project.exits.certifiers import CertificateSettings
from project.exits.certify import certify, certify_losses, last_that_passed
from project.exits.criteria import Consistency, Ratio
from project.exits.ledger import CertificateLedger, asked_of_fold
from project.exits.risks import user_means
from project.exits.settings import ExitSettings

DELTA = 0.1
DRAWS = 1000
LIMIT = DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / DRAWS)  # .1285


def failing_rows(rng, users, rows, share, worse):
    """Full and adaptive scores whose AUC gap is exactly `worse`, pooled and between users, with user effects.

    A positive is scored below every negative with the user's own chance, of mean `share` in the full model
    and `share + worse` in the adaptive one; otherwise above every negative. So AUC = 1 - chance.
    """
    user = np.repeat(np.arange(users), rows)
    labels = (rng.random(user.size) < 0.5).astype(int)
    chance = [rng.beta(4 * mean, 4 * (1 - mean), users)[user] for mean in (share, share + worse)]
    jitter = rng.random(user.size)
    scores = [np.where(rng.random(user.size) < c, -2.0, 2.0) * labels + jitter for c in chance]
    return scores[0], scores[1], labels, user


class TestWalk:
    def test_returns_the_last_that_passed(self):
        """The known bug returns the first that failed: .01 .09 .3 .01 at delta .1 -> index 1, not 2 and not 3."""
        assert last_that_passed([0.01, 0.09, 0.3, 0.01], DELTA) == 1
        assert last_that_passed([0.01, 0.09, 0.3, 0.01], DELTA, first=1) == 2
        assert last_that_passed([0.1, 0.1], DELTA) == 1
        assert last_that_passed([0.2, 0.0], DELTA) is None
        assert last_that_passed([0.0, float("nan"), 0.0], DELTA) == 0
        assert last_that_passed([], DELTA) is None

    def test_reads_nothing_behind_the_failure(self):
        """Steps after the first failure are not tested at all."""

        def p_values():
            yield from (0.0, 0.5)
            raise AssertionError("read past the failure")

        assert last_that_passed(p_values(), DELTA) == 0

    @pytest.mark.parametrize("certifier", ["wsr", "hoeffding_bentkus"])
    def test_step_of_a_hand_made_path(self, certifier):
        """Constant losses 0, .01, .02, .3, .01 of 500 units at epsilon .05: step 2, with a bound in (.02, .05]."""
        losses = np.repeat([[0.0], [0.01], [0.02], [0.3], [0.01]], 500, axis=1)
        found = certify_losses(losses, CertificateSettings(certifier=certifier))
        assert (found.path_step, found.passed, found.n, found.kind) == (2, True, 500, "finite-sample")
        assert found.estimate == pytest.approx(0.02)
        assert 0.02 < found.bound <= 0.05
        assert found.rows_needed is None

    def test_sorted_units_do_not_fool_the_bets(self):
        """800 losses of 0 before 200 of 1, mean .2: read in this order capital would soar first; shuffled it fails."""
        losses = np.zeros((2, 1000))
        losses[1, 800:] = 1
        assert not certify_losses(losses, CertificateSettings("overlap_loss")).passed

    def test_nothing_passes(self):
        """Ten users cannot show .05: no step, and the need of losses of 0.01 is said; with as many it passes."""
        settings = CertificateSettings()
        losses = np.repeat([[0.0], [0.01]], 10, axis=1)
        found = certify_losses(losses, settings)
        assert (found.path_step, found.passed) == (None, False)
        assert found.bound > 0.05
        assert f"about {found.rows_needed} users would be needed" in found.in_words()
        more = np.repeat([[0.0], [0.01]], found.rows_needed + 1, axis=1)
        assert certify_losses(more, settings).passed
        hopeless = certify_losses(np.repeat([[0.0], [0.06]], 10, axis=1), settings)
        assert hopeless.rows_needed is None
        assert "more data would not cure" in hopeless.in_words()

    @pytest.mark.parametrize("certifier", ["wsr", "hoeffding_bentkus"])
    def test_no_units_and_no_exits(self, certifier):
        """An empty fold says how many units perfect exits would need; a path of step 0 alone certifies no exit."""
        settings = CertificateSettings(certifier=certifier)
        empty = certify_losses(np.zeros((2, 0)), settings)
        assert (empty.passed, empty.n, empty.estimate) == (False, 0, None)
        assert 40 < empty.rows_needed < 60  # ln 10 / .05 = 46
        alone = certify_losses(np.zeros((1, 30)), settings)
        assert (alone.path_step, alone.passed, alone.bound) == (0, True, 0.0)
        assert alone.in_words().startswith("No exit certified")
        json.dumps([empty.to_dict(), alone.to_dict()], allow_nan=False)

    def test_order_of_rows_and_size_of_users(self):
        """Units of users: the certificate is that of the users' mean losses, whatever the number of rows."""
        rng = np.random.default_rng(0)
        users = rng.integers(0, 100, 3000)
        full = rng.normal(size=3000)
        path = np.stack([full, full + 0.1 * rng.normal(size=3000)])
        found = certify(path, full, None, users, CertificateSettings())
        drift = np.abs(1 / (1 + np.exp(-path)) - 1 / (1 + np.exp(-full)))
        again = certify_losses(user_means(drift, users), CertificateSettings())
        assert found.n == 100
        assert found.bound == pytest.approx(again.bound, abs=1e-9)
        assert found.estimate == pytest.approx(np.mean([drift[1][users == u].mean() for u in range(100)]))

    @pytest.mark.parametrize(
        ("risk", "unit", "certifier"),
        [
            ("brier_gap", "rows", "wsr"),
            ("log_loss_gap", "rows", "hoeffding_bentkus"),
            ("auc_gap", "rows", "averaged_e_values"),
            ("auc_gap", "users", "averaged_e_values"),
            ("auc_gap", "users", "delong"),
        ],
    )
    def test_a_path_of_sixty_steps(self, risk, unit, certifier):
        """Every certifier walks 60 steps of 4,000 rows and returns one between.

        Nearly unchanged scores pass, noise as large as the scores does not. (80 users are too few for betting.)
        """
        rng = np.random.default_rng(0)
        full, _, labels, users = failing_rows(rng, 80, 50, 0.2, 0.0)
        full = full + rng.normal(size=4000)
        noise = rng.normal(size=4000)
        path = np.stack([full + noise * k / 20 for k in range(60)])
        settings = CertificateSettings(risk, 0.05, DELTA, unit, certifier)
        found = certify(path, full, labels, users, settings)
        assert found.kind == ("asymptotic" if certifier == "delong" else "finite-sample")
        if (risk, unit, certifier) == ("auc_gap", "users", "averaged_e_values"):
            assert not found.passed
            assert found.rows_needed > 80
        elif risk == "log_loss_gap":
            assert not found.passed  # its range is 13.8 wide and Hoeffding-Bentkus sees the mean alone
        else:
            assert 0 < found.path_step < 59
            assert found.bound <= 0.05


class TestBadInput:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                {"epsilon": 0.0},
                "exits.certificate.epsilon: found 0.0, expected a number above 0 and below 0.998",
            ),
            ({"epsilon": 1.0, "risk": "auc_gap"}, "exits.certificate.epsilon: found 1.0, .* below 1"),
            ({"epsilon": float("nan")}, "exits.certificate.epsilon: found nan"),
            ({"delta": 0.0}, "exits.certificate.delta: found 0.0, expected a number above 0 and at most 0.5"),
            ({"delta": 0.6}, "exits.certificate.delta: found 0.6"),
            ({"risk": "auc"}, "exits.certificate.risk: found 'auc'"),
            ({"unit": "sessions"}, "exits.certificate.unit: found 'sessions', expected users or rows"),
            (
                {"risk": "auc_gap", "certifier": "wsr"},
                "exits.certificate.certifier: found 'wsr', expected averaged_e_values",
            ),
            (
                {"certifier": "delong"},
                "exits.certificate.certifier: found 'delong', expected wsr or hoeffding_bentkus",
            ),
            ({"pairings": 0}, "exits.certificate.pairings: found 0"),
        ],
    )
    def test_settings(self, values, message):
        """Each value that cannot work names its key and what is legal."""
        with pytest.raises(ConfigError, match=message):
            CertificateSettings(**values)

    def test_data(self):
        """NaN, shapes, step 0 that is not full depth, one class, losses outside the range: DataError."""
        full, users, settings = np.zeros(4), np.arange(4), CertificateSettings()
        with pytest.raises(DataError, match="1 logits are NaN"):
            certify([full, [0, np.nan, 0, 0]], full, None, users, settings)
        with pytest.raises(DataError, match="do not fit together"):
            certify([full, full], full, None, users[:3], settings)
        with pytest.raises(DataError, match="step 0 of a path must be full depth"):
            certify([full + 1], full, None, users, settings)
        with pytest.raises(DataError, match="two positives and two negatives"):
            certify([full], full, np.ones(4), users, CertificateSettings("auc_gap"))
        with pytest.raises(DataError, match="1 losses outside"):
            certify_losses([[0.0, 0.0], [0.1, 1.2]], settings)
        with pytest.raises(DataError, match="step 0"):
            certify_losses([[0.0, 0.1]], settings)
        with pytest.raises(ConfigError, match="overlap_loss is a risk of ranking requests"):
            certify([full], full, None, users, CertificateSettings("overlap_loss"))


class TestLedger:
    SETTINGS = ExitSettings()

    def ledger(self):
        """After one certificate of default settings; the file is JSON in between."""
        first = CertificateLedger(None).admit(asked_of_fold(self.SETTINGS), "p1")
        return first, CertificateLedger(json.loads(json.dumps({"ledger": first})))

    def test_the_same_is_recorded_once(self):
        """The identical certificate may be computed again; another protocol is another fold."""
        first, ledger = self.ledger()
        assert ledger.admit(asked_of_fold(ExitSettings()), "p1") == first
        other = ledger.admit(asked_of_fold(ExitSettings(max_auc_drop=0.01)), "p2")
        assert [record["protocol_hash"] for record in other] == ["p1", "p2"]
        assert other[0] == first[0]

    @pytest.mark.parametrize(
        "change",
        [
            {"criterion": Ratio()},
            {"compare": [Ratio()]},
            {"compare": [Ratio(), Consistency(2)]},
            {"prior": "none"},
            {"mode": "risk"},
            {"max_auc_drop": 0.01},
            {"max_cost": 0.5},
            {"stream": "warm"},
            {"alpha": 0.2},
        ],
        ids=str,
    )
    def test_what_chooses_the_tested_policy_counts(self, change):
        """Every setting that may send another policy to the fold is another try; the message names its key."""
        _, ledger = self.ledger()
        key = "criterion" if "compare" in change else next(iter(change))
        with pytest.raises(ConfigError, match=rf"already issued .*exits\.{key} .* -> .*voids delta"):
            ledger.admit(asked_of_fold(ExitSettings(**change)), "p1")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"epsilon": 0.1}, r"epsilon 0\.02 -> 0\.1"),
            ({"seed": 1}, "seed 0 -> 1"),
            ({"delta": 0.2}, "delta"),
        ],
        ids=str,
    )
    def test_the_promise_counts(self, change, words):
        """Another epsilon, delta or order of the units is another try."""
        _, ledger = self.ledger()
        promise = replace(self.SETTINGS.certificate, **change)
        with pytest.raises(ConfigError, match=rf"exits\.certificate\.{words}"):
            ledger.admit(asked_of_fold(ExitSettings(certificate=promise)), "p1")

    def test_what_has_no_part_does_not_count(self):
        """Criteria that are only drawn, a budget where nothing is chosen by it."""
        one = {"criterion": Ratio(), "mode": "risk"}
        same = {**one, "compare": [Consistency()], "max_auc_drop": 0.5, "max_cost": 0.5}
        assert asked_of_fold(ExitSettings(**one)) == asked_of_fold(ExitSettings(**same))
        several = {"compare": [Ratio(), Consistency()], "mode": "risk"}  # the budget chooses among them
        assert asked_of_fold(ExitSettings(**several)) != asked_of_fold(ExitSettings(**several, max_cost=0.5))

    def test_setting_of_a_later_version(self):
        """A key that an issued certificate does not have cannot have changed."""
        first, ledger = self.ledger()
        later = {**asked_of_fold(self.SETTINGS), "exits.later": 1}
        assert len(ledger.admit(later, "p1")) == len(first) + 1
