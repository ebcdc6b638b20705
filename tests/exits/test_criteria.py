"""Criteria: golden confidences, what every criterion may read, what is learned, and criteria of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from project.errors import ConfigError, DataError
from project.exits.calibration import fit_calibration
from project.exits.criteria import (
    Consistency,
    Criterion,
    HeadOutputs,
    Learned,
    Ratio,
    RatioConsistency,
    confidence_table,
    out_of_fold_confidence,
    try_out,
)
from project.exits.plan import ExitSettings


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


@pytest.fixture
def fitted(make_criterion, outputs):
    """One of the criteria, fitted on the world."""
    criterion = make_criterion()
    criterion.fit(outputs)
    return criterion


class TestEveryCriterion:
    def test_is_blind_to_the_batch(self, fitted, outputs):
        """Confidence of a row is the same alone, in another order and beside other rows, at every head."""
        table = confidence_table(fitted, outputs)
        index = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:301]
        for part in (index, index[:1]):
            found = confidence_table(fitted, outputs.rows(part))
            torch.testing.assert_close(found, table[part], atol=1e-9, rtol=1e-9)

    def test_reads_no_later_head(self, fitted, outputs):
        """Scrambling heads behind k changes no confidence at k: not even the fit can leak it."""
        table = confidence_table(fitted, outputs)
        for k in range(outputs.heads - 1):
            logits = outputs.logits.clone()
            logits[:, k + 1 :] = 7.0
            changed = HeadOutputs.of(outputs.layers, logits, outputs.retrieved)
            assert torch.equal(confidence_table(fitted, changed)[:, k], table[:, k])

    def test_decides_from_its_first_head_on(self, fitted, outputs):
        """Before its first head confidence is -inf for all, from then on finite for all; the last column is +inf."""
        table, first = confidence_table(fitted, outputs), isinstance(fitted, Consistency)
        assert (table[:, :first] == -torch.inf).all()
        assert table[:, first:-1].isfinite().all()
        assert (table[:, -1] == torch.inf).all()

    def test_float32_and_double_agree(self, fitted, outputs):
        """A policy fitted in double decides on float32 logits, as an engine has them, by the same confidence."""
        single = HeadOutputs(
            outputs.layers, outputs.logits.float(), outputs.retrieved.float()
        )
        found = confidence_table(fitted, single)
        assert found.dtype == torch.float32
        first = isinstance(fitted, Consistency)
        difference = (found - confidence_table(fitted, outputs))[:, first:-1].abs()
        # a quantile moves by one of 1,000 steps, and a neighbour at equal distance may
        # change places
        assert difference.quantile(0.99) < 2e-3

    def test_safer_rows_drift_less(self, make_criterion, outputs, tune):
        """The more confident half of new rows at a head moves less from there to the last head than the other half."""
        criterion = make_criterion()
        criterion.fit(tune.calibrated())
        confidence = confidence_table(criterion, outputs)[:, 2]
        drift = (outputs.probabilities[:, 2] - outputs.probabilities[:, -1]).abs()
        safe = confidence > confidence.median()
        assert drift[safe].mean() < 0.9 * drift[~safe].mean()


class TestSimple:
    def test_golden(self):
        """Probabilities .5, .6, .9: last change .3; then .6, .9, .8: .1."""
        heads = HeadOutputs.of((2, 4, 6), logit([[0.5, 0.6, 0.9], [0.6, 0.9, 0.8]]))
        torch.testing.assert_close(
            Consistency().confidence(heads), torch.tensor([-0.3, -0.1], dtype=torch.float64)
        )
        torch.testing.assert_close(Ratio().confidence(heads), logit([0.9, 0.8]))

    def test_ratio_consistency_is_the_smaller_quantile(self, outputs):
        """At a head, its confidence is min(share of tune rows less confident, share that moved more), to 1/1000."""
        criterion = RatioConsistency()
        criterion.fit(outputs)
        part = outputs.until(3)
        ratio, consistency = Ratio().confidence(part), Consistency().confidence(part)
        ranks = [
            x.argsort().argsort().double() / (len(x) - 1) for x in (ratio, consistency)
        ]
        torch.testing.assert_close(
            criterion.confidence(part), torch.minimum(*ranks), atol=2e-3, rtol=0
        )


class TestLearning:
    def test_predicts_the_drift_of_new_rows(self, tune, fresh):
        """On rows of another draw the predicted drift is right in the mean and closer than any constant."""
        calibration = fit_calibration(tune.raw, tune.labels, tune.layers, exit_0=True)
        criterion = Learned()
        criterion.fit(tune.outputs(calibration))
        other = fresh.outputs(calibration)
        for k in (0, 3):
            drift = (other.probabilities[:, k] - other.probabilities[:, -1]).abs()
            predicted = -criterion.confidence(other.until(k))
            assert predicted.mean() == pytest.approx(float(drift.mean()), rel=0.1)
            assert (predicted - drift).square().mean() < 0.92 * drift.var()

    def test_fits_where_autograd_is_off(self, outputs):
        """A validation loop runs under inference_mode; what is fitted there still goes into a checkpoint."""
        with torch.inference_mode():
            inside = Learned()
            inside.fit(outputs)
        outside = Learned()
        outside.fit(outputs)
        assert torch.equal(
            inside.confidence(outputs.until(2)), outside.confidence(outputs.until(2))
        )

    def test_out_of_fold_sees_no_row_of_the_user(self, world, outputs):
        """Changing how one user's rows end changes no out-of-fold confidence of any user in its own half."""
        table = out_of_fold_confidence(Learned, outputs, world.users)
        mine = world.users == 3
        logits = outputs.logits.clone()
        logits[mine, -1] = -logits[mine, -1]
        changed = HeadOutputs.of(outputs.layers, logits, outputs.retrieved)
        again = out_of_fold_confidence(Learned, changed, world.users)
        same = torch.isclose(again[:, 0], table[:, 0], atol=1e-12)
        assert same[mine].all()
        halves = {bool(same[world.users == u].all()) for u in range(80)}
        assert halves == {True, False}
        assert 0.3 < same.double().mean() < 0.7

    def test_folds_do_not_follow_row_order(self, world, outputs):
        """Out-of-fold confidence follows the rows when they are shuffled: the split is by user hash alone."""
        index = torch.randperm(600, generator=torch.Generator().manual_seed(2))
        names = np.array([f"u{u}" for u in world.users.tolist()])
        table = out_of_fold_confidence(Learned, outputs, names)
        again = out_of_fold_confidence(Learned, outputs.rows(index), names[index.numpy()])
        torch.testing.assert_close(again, table[index], atol=1e-8, rtol=1e-8)


class TestBadInput:
    def test_too_little_to_learn_from(self, outputs):
        with pytest.raises(DataError, match="tune"):
            Learned().fit(outputs.rows(torch.arange(0)))
        with pytest.raises(DataError, match="1 users of the fold tune cannot make 2 parts"):
            out_of_fold_confidence(Learned, outputs, np.zeros(600))


class Mine(Criterion):
    """Returns what a function makes of the outputs."""

    def __init__(self, made: Callable[[HeadOutputs], Any]) -> None:
        self.made = made
        self.fitted = False

    def fit(self, outputs: HeadOutputs) -> None:
        self.fitted = True

    def confidence(self, outputs: HeadOutputs) -> torch.Tensor:
        found: torch.Tensor = self.made(outputs)
        return found


WRONG: dict[str, tuple[Callable[[HeadOutputs], Any], str]] = {
    "a float": (lambda o: 0.5, "returned 0.5"),
    "one number": (lambda o: o.logits.mean(), r"returned tensor"),
    "NaN": (lambda o: o.logits[:, -1] * torch.nan, r"with \d+ NaN"),
}


@pytest.mark.parametrize(("made", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_confidence_names_class_and_shape(
    outputs: HeadOutputs, made: Any, words: str
) -> None:
    """After training, on real outputs, and before it: the class, what it returned and what was expected."""
    expected = (
        rf"(?s)test_criteria\.Mine.*{words}.*torch tensor of shape \(rows,\) without NaN"
    )
    with pytest.raises(ConfigError, match=expected):
        confidence_table(Mine(made), outputs)
    with pytest.raises(ConfigError, match=expected):
        ExitSettings(criterion=Mine(made))


def test_an_argument_under_another_name_is_named_before_training() -> None:
    class Renamed(Ratio):
        def __init__(self, window: int) -> None:
            self.size = window

    with pytest.raises(
        ConfigError, match=r"Renamed has no attribute window; .*self\.window"
    ):
        ExitSettings(criterion=Renamed(3))


def test_trying_out_leaves_no_trace() -> None:
    """The criterion itself is not fitted, random numbers go on as they would, and an error there is the criterion's."""

    def noisy(outputs: HeadOutputs) -> torch.Tensor:
        return torch.rand(outputs.logits.shape[0])

    def fussy(outputs: HeadOutputs) -> torch.Tensor:
        raise ZeroDivisionError

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    criterion = Mine(noisy)
    try_out(criterion, exit_0=True)
    with pytest.raises(
        ConfigError, match=r"Mine failed on made-up rows.*ZeroDivisionError"
    ):
        try_out(Mine(fussy), exit_0=True)
    assert torch.equal(torch.rand(3), expected)
    assert not criterion.fitted
    assert confidence_table(criterion, HeadOutputs.of((1, 2), torch.zeros(4, 2))).shape == (
        4,
        2,
    )
