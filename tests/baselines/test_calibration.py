import numpy as np
import pytest

from project.evaluation.baselines import BaselineCalibration
from project.metrics import auc, log_loss, probabilities


def test_golden():
    """At logit 1 three of four are liked, at -1 one of four: slope log 3, offset 0, so the chances are 3/4 and 1/4."""
    logits, labels = np.repeat([1.0, -1.0], 4), np.array([1, 1, 1, 0, 0, 0, 0, 1])
    found = BaselineCalibration.fit(logits, labels)
    assert found is not None
    assert (found.slope, found.offset) == pytest.approx((np.log(3), 0), abs=1e-6)
    expected = -(3 * np.log(0.75) + np.log(0.25)) / 4
    summary = found.summary(logits, labels)
    assert summary["log_loss"] == pytest.approx(expected)
    assert summary["brier"] == pytest.approx((3 * 0.25**2 + 0.75**2) / 4)
    assert summary["ece"] == pytest.approx(0, abs=1e-6)


def test_a_loud_baseline_becomes_quiet():
    """Logits ten times too large cost more than knowing nothing; calibrated they cost what the right ones do."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=4000)
    labels = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(int)
    found = BaselineCalibration.fit(10 * logits[:2000], labels[:2000])
    assert found is not None
    loud, quiet = 10 * logits[2000:], found.apply(10 * logits[2000:])
    costs = [log_loss(probabilities(x), labels[2000:]) for x in (loud, quiet, logits[2000:])]
    assert costs[0] > np.log(2) > costs[1]
    assert costs[1] == pytest.approx(costs[2], abs=0.01)


def test_the_ranking_stays_even_where_it_is_wrong():
    """A baseline that ranks backwards keeps its AUC: the slope is held above zero."""
    logits, labels = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1, 1, 0, 0])
    found = BaselineCalibration.fit(logits, labels)
    assert found is not None
    assert found.slope == pytest.approx(1e-3)
    assert auc(found.apply(logits), labels) == 0.0


def test_a_constant_baseline_gets_an_offset():
    """Where select tells nothing of the slope it is 1; the offset gives select's share of likes, here 1/4."""
    found = BaselineCalibration.fit(np.full(4, 2.0), np.array([1, 0, 0, 0]))
    assert found is not None
    assert found.apply(np.array([2.0, 3.0])) == pytest.approx([np.log(1 / 3), np.log(1 / 3) + 1])


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_nothing_to_fit(labels):
    """Without both classes there is no calibration, rather than an infinite one."""
    assert BaselineCalibration.fit(np.arange(float(len(labels))), np.array(labels)) is None
