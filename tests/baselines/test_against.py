"""Heads against a baseline: the arithmetic of one difference, and which rows may be read for it."""

import numpy as np
import polars as pl
import pytest

from project.errors import DataError
from project.evaluation.baselines import AgainstBaseline, Baseline
from project.evaluation.bootstrap import UserBootstrap

SELECT = [1, 1, 1, 0, 0, 0, 0, 1]  # answers at baseline logits 1, 1, 1, 1, -1, -1, -1, -1
TEST = [1, 0, 1, 0, 1, 0]
BASELINE = [1.0, -1.0] * 3


def world(select=SELECT, test=TEST):
    """Eight rows of select, six of test (users 10, 11, 12), and a baseline's scores of them."""
    n, users = len(select), np.repeat([10, 11, 12], 2)
    rows = pl.DataFrame(
        {
            "row_id": np.arange(n + len(test)),
            "user": [*range(n), *users],
            "label": [*select, *test],
            "split": ["valid"] * n + ["test"] * len(test),
            "fold": ["select"] * n + [None] * len(test),
            "role": ["target"] * (n + len(test)),
        }
    )
    scores = rows.select("row_id", "split").with_columns(
        logit=pl.Series([*np.repeat([1.0, -1.0], 4), *BASELINE])
    )
    return rows, Baseline("lr_rates", scores)


IDS = np.arange(8, 14)
SURE = np.log(9) * np.array(BASELINE)  # chances .9 and .1


def test_golden():
    """Select makes the baseline's 1 and -1 chances of 3/4 and 1/4; the head says .9 and .1; all are right on test.

    Both rank perfectly: 0. Log loss: log(10/9) of the head minus log(4/3) of the baseline is log(5/6), for every user.
    """
    rows, baseline = world()
    found = AgainstBaseline(baseline, IDS, rows).difference(SURE)
    assert found["baseline"] == "lr_rates"
    assert (found["value"], found["interval"]) == (0.0, [0.0, 0.0])
    assert found["log_loss"]["value"] == pytest.approx(np.log(5 / 6))
    assert found["log_loss"]["interval"] == pytest.approx([np.log(5 / 6)] * 2)


def test_auc_golden():
    """The head has one of three users turned round: 3 likes, 3 dislikes, logits 1 and -1, so pairs by ties.

    A like at 1 beats two dislikes at -1 and ties with one: 2.5 of 3, twice; the like at -1 ties with two: 1 of 3.
    AUC 6 / 9 against the baseline's 1: -1/3.
    """
    rows, baseline = world()
    turned = np.array(BASELINE) * [1, 1, 1, 1, -1, -1]
    assert AgainstBaseline(baseline, IDS, rows).difference(turned)["value"] == pytest.approx(6 / 9 - 1)


def test_rows_in_any_order():
    """Baseline, answers and users follow the row ids."""
    rows, baseline = world(test=[1, 0, 0, 1, 1, 1])
    order = np.array([5, 0, 3, 1, 4, 2])
    head = np.arange(6.0)
    first = AgainstBaseline(baseline, IDS, rows).difference(head)
    again = AgainstBaseline(baseline, IDS[order], rows).difference(head[order])
    assert again["value"] == first["value"]
    assert again["interval"] == pytest.approx(first["interval"])
    assert again["log_loss"]["interval"] == pytest.approx(first["log_loss"]["interval"])


def test_without_select_the_log_loss_is_undefined():
    """No calibration, no comparison of log losses; the AUCs are compared as ever."""
    rows, baseline = world(select=[1] * 8)
    found = AgainstBaseline(baseline, IDS, rows).difference(SURE)
    assert found["log_loss"] == {"value": None, "interval": None}
    assert found["value"] == 0.0


def test_one_class():
    """One class on test: no AUC; the log loss is still one."""
    rows, baseline = world(test=[1] * 6)
    found = AgainstBaseline(baseline, IDS, rows).difference(SURE)
    assert (found["value"], found["interval"]) == (None, None)
    assert found["log_loss"]["value"] is not None


def test_a_baseline_of_other_rows():
    """A baseline that did not score the rows is one error."""
    rows, baseline = world()
    with pytest.raises(DataError, match="no score for 1 of 6 rows"):
        AgainstBaseline(Baseline("mf", baseline.scores.head(13)), IDS, rows)


def test_remembered_draws_are_those_of_the_scores():
    """What a bootstrap remembers of other scores and other answers does not change an interval."""
    rng = np.random.default_rng(0)
    users, labels = np.arange(60) % 12, rng.integers(0, 2, (2, 60))
    scores = rng.normal(size=(2, 60))
    shared = UserBootstrap(users, 50)
    for _ in range(2):
        for answers in labels:
            alone = UserBootstrap(users, 50).difference_interval(*scores, answers)
            assert shared.difference_interval(*scores, answers) == alone
