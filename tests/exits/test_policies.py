import pytest
import torch

from project.errors import ConfigError
from project.exits.criteria import HeadOutputs, ItemCount, Ratio, confidence_table
from project.exits.policy import Policy, leave, oracle_exits, random_exits

NEVER, ALWAYS = torch.inf, -torch.inf


def thresholds(*values):
    return torch.tensor([*values, ALWAYS], dtype=torch.float64)


class TestLeave:
    def test_golden(self):
        """First head that reaches the threshold, equality included; who never does goes to the last head."""
        confidence = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.0, 0.0], [0.4, 0.6, 0.0]])
        assert leave(confidence, torch.tensor([0.5, 0.7, ALWAYS])).tolist() == [1, 0, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_lower_thresholds_never_delay(self, seed):
        """Lowering any threshold lets no row leave later."""
        generator = torch.Generator().manual_seed(seed)
        confidence, high = torch.rand(500, 5, generator=generator), torch.rand(5, generator=generator)
        low = high - torch.rand(5, generator=generator) * 0.3
        assert (leave(confidence, low) <= leave(confidence, high)).all()


class TestPolicy:
    @pytest.mark.parametrize("seed", range(3))
    def test_engine_equals_simulation(self, make_criterion, outputs, seed):
        """`leaves`, asked head by head of who is still running, gives the exits of `leave` on the whole table."""
        criterion = make_criterion()
        criterion.fit(outputs)
        table = confidence_table(criterion, outputs)
        generator = torch.Generator().manual_seed(seed)
        share = torch.rand(6, generator=generator, dtype=torch.float64) * 0.6
        limits = [table[:, k].quantile(1 - share[k]) if k >= criterion.first else NEVER for k in range(6)]
        limits = thresholds(*limits)
        expected = leave(table, limits)
        # the item's rows are the same at every head, so only a lower threshold than all before lets anybody out
        assert expected.unique().numel() >= (2 if isinstance(criterion, ItemCount) else 5)
        assert torch.equal(Policy(criterion, limits, outputs.layers).exits(outputs), expected)

    def test_infinite_thresholds_are_the_full_model(self, make_criterion, outputs):
        """+inf before the last head: everyone leaves at the last head."""
        criterion = make_criterion()
        criterion.fit(outputs)
        assert (Policy(criterion, thresholds(*[NEVER] * 6), outputs.layers).exits(outputs) == 6).all()

    @pytest.mark.parametrize("k", range(6))
    def test_everyone_leaves_at_k_is_fixed_depth(self, make_criterion, outputs, k):
        """-inf at head k only: the same exits as the static model of that depth."""
        criterion = make_criterion()
        criterion.fit(outputs)
        limits = thresholds(*[ALWAYS if head == k else NEVER for head in range(6)])
        found = Policy(criterion, limits, outputs.layers).exits(outputs)
        assert torch.equal(found, torch.full((600,), k))

    @pytest.mark.parametrize(
        "limits",
        [torch.tensor([0.5, ALWAYS]), torch.tensor([0.1, torch.nan, ALWAYS]), torch.tensor([0.1, 0.2, 0.3])],
    )
    def test_refuses_bad_thresholds(self, limits):
        """Too few, NaN (never calibrated), or a last exit that would not take everyone."""
        with pytest.raises(ConfigError, match=r"layers \(2, 4, 6\).*calibrate"):
            Policy(Ratio(), limits, (2, 4, 6))

    def test_refuses_other_layers(self):
        """A policy for other exits than the model's names both."""
        policy = Policy(Ratio(), thresholds(0.5), (2, 4))
        with pytest.raises(ConfigError, match=r"\(2, 4\), found \(2, 6\)"):
            policy.exits(HeadOutputs.of((2, 6), torch.zeros(1, 2)))


class TestControls:
    def test_random_shares(self, outputs):
        """A share of .25 per head reached: .25 leave at head 0, .75 * .25 = .1875 at head 1, within 4 sd of 600."""
        found = random_exits(outputs, 0.25)
        assert (found == 0).double().mean() == pytest.approx(0.25, abs=0.071)
        assert (found == 1).double().mean() == pytest.approx(0.1875, abs=0.064)
        assert torch.equal(found, random_exits(outputs, 0.25))

    def test_random_extremes(self, outputs):
        """Share 0 is full depth, share 1 takes everyone at head 0."""
        assert (random_exits(outputs, 0.0) == 6).all()
        assert (random_exits(outputs, 1.0) == 0).all()

    def test_oracle_keeps_its_tolerance(self, outputs):
        """No row leaves further from the last head than the tolerance, and none could have left earlier."""
        found = oracle_exits(outputs, 0.03)
        drift = (outputs.probabilities - outputs.probabilities[:, -1:]).abs()
        assert (drift.gather(1, found[:, None]) <= 0.03).all()
        earlier = torch.arange(7) < found[:, None]
        assert (drift[earlier] > 0.03).all()
