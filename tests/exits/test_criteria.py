import numpy as np
import pytest
import torch

from project.errors import ConfigError, DataError
from project.exits.calibration import fit_calibration
from project.exits.criteria import (
    Consistency,
    HeadOutputs,
    Learned,
    Ratio,
    RatioConsistency,
    confidence_table,
    name,
    out_of_fold_confidence,
)


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


class TestEveryCriterion:
    def test_is_blind_to_the_batch(self, make_criterion, outputs):
        """Confidence of a row is the same alone, in another order and beside other rows, at every head."""
        criterion = make_criterion()
        criterion.fit(outputs)
        table = confidence_table(criterion, outputs)
        index = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:301]
        torch.testing.assert_close(
            confidence_table(criterion, outputs.rows(index)), table[index], atol=1e-9, rtol=1e-9
        )
        alone = confidence_table(criterion, outputs.rows(index[:1]))
        torch.testing.assert_close(alone, table[index[:1]], atol=1e-9, rtol=1e-9)

    def test_reads_no_later_head(self, make_criterion, outputs):
        """Scrambling heads behind k changes no confidence at k: not even the fit can leak it."""
        criterion = make_criterion()
        criterion.fit(outputs)
        table = confidence_table(criterion, outputs)
        for k in range(outputs.heads - 1):
            logits = outputs.logits.clone()
            logits[:, k + 1 :] = 7.0
            changed = HeadOutputs.of(outputs.layers, logits, outputs.retrieved)
            assert torch.equal(confidence_table(criterion, changed)[:, k], table[:, k])

    def test_state_round_trip(self, make_criterion, outputs, tmp_path):
        """Fitted state survives a checkpoint read with weights_only, and gives the same confidence."""
        criterion, fresh = make_criterion(), make_criterion()
        criterion.fit(outputs)
        torch.save(dict(criterion.tensors), tmp_path / "state.pt")
        fresh.tensors = torch.load(tmp_path / "state.pt", weights_only=True)
        assert torch.equal(confidence_table(fresh, outputs), confidence_table(criterion, outputs))

    def test_decides_from_its_first_head_on(self, make_criterion, outputs):
        """Before `first` confidence is -inf for all, from then on finite for all; the last column is +inf."""
        criterion = make_criterion()
        criterion.fit(outputs)
        table = confidence_table(criterion, outputs)
        assert (table[:, : criterion.first] == -torch.inf).all()
        assert table[:, criterion.first : -1].isfinite().all()
        assert (table[:, -1] == torch.inf).all()

    def test_float32_and_double_agree(self, make_criterion, outputs):
        """A policy fitted in double decides on float32 logits, as an engine has them, by the same confidence."""
        criterion = make_criterion()
        criterion.fit(outputs)
        single = HeadOutputs(outputs.layers, outputs.logits.float(), outputs.retrieved.float())
        found = confidence_table(criterion, single)
        assert found.dtype == torch.float32
        difference = (found - confidence_table(criterion, outputs))[:, criterion.first : -1].abs()
        # a quantile moves by one of 1,000 steps, and a neighbour at equal distance may change places
        assert difference.quantile(0.99) < 2e-3

    def test_safer_rows_drift_less(self, make_criterion, outputs, tune):
        """The safer half of new rows at a head moves less from there to the last head than the other half."""
        criterion = make_criterion()
        criterion.fit(tune.calibrated())
        confidence = confidence_table(criterion, outputs)[:, 2]
        drift = (outputs.probabilities[:, 2] - outputs.probabilities[:, -1]).abs()
        safe = confidence > confidence.median()
        assert drift[safe].mean() < 0.9 * drift[~safe].mean()


class TestSimple:
    def test_golden(self):
        """Probabilities .5, .6, .9: last change .3, largest of the last two .3; then .6, .9, .8: .1 and .3."""
        heads = HeadOutputs.of((2, 4, 6), logit([[0.5, 0.6, 0.9], [0.6, 0.9, 0.8]]))
        torch.testing.assert_close(
            Consistency().confidence(heads), torch.tensor([-0.3, -0.1], dtype=torch.float64)
        )
        torch.testing.assert_close(
            Consistency(2).confidence(heads), torch.tensor([-0.3, -0.3], dtype=torch.float64)
        )
        torch.testing.assert_close(Ratio().confidence(heads), logit([0.9, 0.8]))

    def test_ratio_consistency_is_the_smaller_quantile(self, outputs):
        """At a head, its confidence is min(share of tune rows less confident, share that moved more), to 1/1000."""
        criterion = RatioConsistency()
        criterion.fit(outputs)
        part = outputs.until(3)
        ratio, consistency = Ratio().confidence(part), Consistency().confidence(part)
        ranks = [x.argsort().argsort().double() / (len(x) - 1) for x in (ratio, consistency)]
        torch.testing.assert_close(criterion.confidence(part), torch.minimum(*ranks), atol=2e-3, rtol=0)

    def test_names(self):
        """The name in result files is the class in snake_case."""
        assert [name(c) for c in (Ratio(), RatioConsistency())] == ["ratio", "ratio_consistency"]


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
        assert torch.equal(inside.confidence(outputs.until(2)), outside.confidence(outputs.until(2)))

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
    @pytest.mark.parametrize(
        ("make", "word"),
        [
            (lambda: Consistency(0), "heads is 0"),
            (lambda: Learned(ridge=0.0), "ridge is 0"),
        ],
    )
    def test_arguments(self, make, word):
        """A constructor argument out of range is named with its value."""
        with pytest.raises(ConfigError, match=word):
            make()

    def test_no_rows(self, outputs):
        """A fit on no rows names the fold."""
        with pytest.raises(DataError, match="tune"):
            Learned().fit(outputs.rows(torch.arange(0)))

    def test_one_user_cannot_be_split(self, outputs):
        """Out-of-fold needs two users."""
        with pytest.raises(DataError, match="1 users of the fold tune cannot make 2 parts"):
            out_of_fold_confidence(Learned, outputs, np.zeros(600))
