"""Certificates: the walk along the path, bad input, promises kept at the border, one certificate a fold."""

import json
import time

import numpy as np
import pytest

from project.errors import ConfigError, DataError
from project.exits.certifiers import CertificateSettings
from project.exits.certify import certify, certify_losses, last_that_passed
from project.exits.ledger import CertificateLedger, scores_digest
from project.exits.risks import user_means

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
        assert not certify_losses(losses, CertificateSettings("overlap_loss", unit="requests")).passed

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
    def test_a_path_of_sixty_steps_is_quick(self, risk, unit, certifier):
        """Every certifier walks 60 steps of 4,000 rows in < 2 s of processor time, and returns one between.

        Nearly unchanged scores pass, noise as large as the scores does not. (80 users are too few for betting.)
        """
        rng = np.random.default_rng(0)
        full, _, labels, users = failing_rows(rng, 80, 50, 0.2, 0.0)
        full = full + rng.normal(size=4000)
        noise = rng.normal(size=4000)
        path = np.stack([full + noise * k / 20 for k in range(60)])
        settings = CertificateSettings(risk, 0.05, DELTA, unit, certifier)
        start = time.process_time()
        found = certify(path, full, labels, users, settings)
        assert time.process_time() - start < 2
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
            certify([full], full, None, users, CertificateSettings("overlap_loss", unit="requests"))


class TestLedger:
    def test_a_second_certificate_is_refused(self):
        """The identical one may be computed again; another epsilon, criterion or seed on the same scores may not.

        Other scores or another protocol are another fold. The file is JSON in between.
        """
        scores = scores_digest(np.arange(5), np.array(["a", "b"], dtype=object))
        first = CertificateLedger(None).admit(CertificateSettings(), "consistency", "risk", "p1", scores)
        previous = json.loads(json.dumps({"ledger": first}))
        ledger = CertificateLedger(previous)
        assert ledger.admit(CertificateSettings(), "consistency", "risk", "p1", scores) == first
        for settings, criterion in (
            (CertificateSettings(epsilon=0.1), "consistency"),
            (CertificateSettings(), "ratio"),
            (CertificateSettings(seed=1), "consistency"),
        ):
            with pytest.raises(ConfigError, match=r"already issued .* voids delta"):
                ledger.admit(settings, criterion, "risk", "p1", scores)
        with pytest.raises(ConfigError, match=r"exits.certificate.epsilon 0.05 -> 0.1"):
            ledger.admit(CertificateSettings(epsilon=0.1), "consistency", "risk", "p1", scores)
        other = scores_digest(np.arange(5), np.array(["a", "c"], dtype=object))
        for protocol, digest in (("p2", scores), ("p1", other)):
            kept = ledger.admit(CertificateSettings(epsilon=0.1), "ratio", "risk", protocol, digest)
            assert len(kept) == 2
            assert kept[0] == first[0]

    def test_digest_sees_values_order_and_type(self):
        """One changed bit, a swapped row or another column order gives another digest; a copy does not."""
        a, b = np.arange(4.0), np.array([0, 1, 1, 0])
        changed = a.copy()
        changed[2] = np.nextafter(2, 3)
        seen = [scores_digest(*x) for x in ((a, b), (changed, b), (a[::-1], b), (b, a), (a.reshape(2, 2), b))]
        assert len(set(seen)) == 5
        assert scores_digest(a.copy(), list(b)) == seen[0]


@pytest.mark.slow
class TestPromises:
    """1,000 draws a certifier; a violation is a returned step whose true risk is at epsilon or above."""

    @pytest.mark.parametrize("certifier", ["wsr", "hoeffding_bentkus"])
    def test_users_with_correlated_rows(self, certifier):
        """Steps of true risk 0, .02, .05, .08 at epsilon .05, heavy tails, all rows of a user alike.

        As users the promise is kept and the safe step passes often; as rows (a hundredth of the truth's
        independence) it is broken several times too often: the unit matters.
        """
        rng = np.random.default_rng(0)
        users, rows = 400, 20
        owner = np.repeat(np.arange(users), rows)
        steps = {"users": [], "rows": []}
        for _ in range(DRAWS):
            size = rng.random(users)
            harm = [
                np.where(size < mean / 2, 1.0, rng.random(users) * mean / (1 - mean / 2))
                for mean in (0.02, 0.05, 0.08)
            ]
            losses = np.stack([np.zeros(users), *harm])
            for unit, found in steps.items():
                values = losses[:, owner] if unit == "rows" else user_means(losses[:, owner], owner)
                settings = CertificateSettings("overlap_loss", 0.05, DELTA, "requests", certifier)
                found.append(certify_losses(values, settings).path_step or 0)
        broken = {unit: (np.array(found) >= 2).mean() for unit, found in steps.items()}
        assert broken["users"] <= LIMIT
        assert broken["rows"] > 2 * DELTA
        assert (np.array(steps["users"]) >= 1).mean() > 0.5

    @pytest.mark.parametrize("certifier", ["wsr", "hoeffding_bentkus"])
    def test_sequence_behind_a_budget(self, certifier):
        """The budget's policy (risk .01), then faster ones of .025, .055, .08, .12; epsilon .05; harm is nested.

        Tested in order at one delta, the last that passes breaks the promise in at most delta of draws, while it is
        faster than the budget's policy in half of them. The budget's own verdict is the one it has when tested alone.
        """
        rng = np.random.default_rng(3)
        risks = np.array([0.01, 0.025, 0.055, 0.08, 0.12])
        settings = CertificateSettings("overlap_loss", 0.05, DELTA, "requests", certifier)
        last = []
        for _ in range(DRAWS):
            harmed = rng.random(300)
            losses = np.concatenate([np.zeros((1, 300)), harmed < risks[:, None]])
            own, further = certify_losses(losses[:2], settings), certify_losses(losses, settings)
            assert own.passed == further.passed
            last.append(further.path_step or 0)
        assert (np.array(last) >= 3).mean() <= LIMIT
        assert (np.array(last) >= 2).mean() > 0.5

    @pytest.mark.parametrize(
        ("certifier", "unit", "users", "rows"),
        [
            ("averaged_e_values", "rows", 600, 1),
            ("averaged_e_values", "users", 150, 6),
            ("delong", "rows", 600, 1),
            ("delong", "users", 200, 6),
        ],
    )
    def test_auc_gap_at_the_border(self, certifier, unit, users, rows):
        """The true gap is exactly epsilon = .1: passes in at most delta + 3 standard errors of 1,000 draws."""
        rng = np.random.default_rng(1)
        settings = CertificateSettings("auc_gap", 0.1, DELTA, unit, certifier)
        passed = 0
        for _ in range(DRAWS):
            full, adaptive, labels, user = failing_rows(rng, users, rows, 0.15, 0.1)
            passed += certify([full, adaptive], full, labels, user, settings).passed
        assert passed / DRAWS <= LIMIT

    @pytest.mark.parametrize(
        ("certifier", "unit"),
        [("averaged_e_values", "rows"), ("averaged_e_values", "users"), ("delong", "users")],
    )
    def test_auc_gap_has_power(self, certifier, unit):
        """The same certifiers at a true gap of 0 and epsilon .1 pass in more than half of 50 draws of 400 users."""
        rng = np.random.default_rng(2)
        settings = CertificateSettings("auc_gap", 0.1, DELTA, unit, certifier)
        passed = 0
        for _ in range(50):
            full, adaptive, labels, user = failing_rows(rng, 400, 6, 0.1, 0.0)
            passed += certify([full, adaptive], full, labels, user, settings).passed
        assert passed > 25
