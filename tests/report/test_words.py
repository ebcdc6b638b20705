import pytest
from example_run import CERTIFICATE

from project.report.words import (
    certificate_words,
    certified_words,
    headline,
    risk_on_test,
    savings,
    verdict,
)
from project.tables import number


class TestHeadline:
    @pytest.mark.parametrize(
        ("value", "interval", "word"),
        [
            (0.01, [0.002, 0.02], "is better than"),
            (-0.01, [-0.02, -0.002], "is worse than"),
            (0.01, [-0.002, 0.02], "cannot be told apart from"),
            (0.01, None, "cannot be told apart from"),
        ],
    )
    def test_interval_decides(self, value, interval, word):
        """Better or worse only where the interval leaves 0 out."""
        difference = {"layer": 6, "floor": "lr_rates", "value": value, "interval": interval}
        text = headline({"floor_difference": difference}, "test", None)
        assert text.startswith(
            f"On test, LLM exit 6 {word} the best floor (lr_rates): AUC {number(value, signed=True)}"
        )

    def test_adaptive(self):
        """With an interval where the file has one, else the difference of .7500 and .7412, called a plain one."""
        difference = {"layer": 6, "floor": "lr_rates", "value": 0.01, "interval": [0.0, 0.02]}
        result = {"floor_difference": difference, "adaptive": {"auc": 0.75}}
        assert "AUC +.0088 (no interval was computed)" in headline(result, "test", 0.7412)
        result["adaptive"]["floor_difference"] = difference | {"interval": [0.001, 0.02]}
        assert "the adaptive score is better than the best floor" in headline(result, "test", 0.7412)


def against(gain, interval=None, layer=4):
    return {"layer": layer, "auc": 0.75, "auc_gain": gain, "auc_gain_interval": interval}


class TestVerdict:
    @pytest.mark.parametrize(
        ("rival", "ratio", "said"),
        [
            (against(0.001), {"value": 1.3, "interval": [1.1, 1.5]}, "The adaptive policy wins over"),
            (against(0.0), 1.3, "The adaptive policy wins over"),
            (against(-0.001), 1.3, "Neither wins: the adaptive policy is cheaper"),
            (
                against(-0.001, [-0.003, 0.001]),
                1.3,
                "is cheaper than the static model of exit 4, the AUCs cannot be",
            ),
            (against(-0.001, [-0.003, -0.0005]), 1.3, "Neither wins: the adaptive policy is cheaper"),
            (against(0.001), 0.9, "Neither wins: the adaptive policy is not cheaper"),
            (against(0.001, [-0.001, 0.002]), 0.9, "does not beat the static model of exit 4"),
            (against(0.0), 1.0, "does not beat the static model of exit 4"),
            (
                against(-0.001),
                {"value": 1.1, "interval": [0.9, 1.3]},
                "does not beat the static model of exit 4",
            ),
            (against(None), 1.3, "is not decided"),
            (against(0.001), {"value": None, "interval": None}, "is not decided"),
        ],
    )
    def test_who_wins(self, rival, ratio, said):
        """A win takes both: a cost surely lower, and an AUC that is not lower."""
        assert said in verdict({"rival": rival, "speedup_over_rival": ratio})

    def test_counting_is_the_plan(self):
        """A plan that is its own rival, exit 0 for everyone, is no win: the LLM need not run."""
        rival = against(0.0, [0.0, 0.0], layer=0)
        said = verdict({"rival": rival, "equal_cost": rival, "speedup_over_rival": None, "mean_depth": 0.0})
        assert (
            said
            == "Counting alone is within the budget: everyone leaves at exit 0, and the LLM need not run."
        )

    def test_nobody_enters_the_trunk(self):
        """Everyone leaves at exit 0: no finite ratio, yet cheaper than any static model."""
        adaptive = {"rival": against(-0.01), "speedup_over_rival": {"value": None}, "mean_depth": 0.0}
        assert "is cheaper than the static model of exit 4 but its AUC is lower (no layer runs" in verdict(
            adaptive
        )
        assert "every row leaves at exit 0" in savings(adaptive, 6)[0]

    def test_equal_cost(self):
        """The static head that costs no more stands beside, with its paired interval."""
        adaptive = {"rival": against(0.0), "speedup_over_rival": 1.3}
        text = verdict(adaptive | {"equal_cost": against(0.019, [0.01, 0.028], layer=2)})
        assert text.endswith(
            "Against exit 2, the deepest static depth that costs no more: AUC +.0190 [+.0100, +.0280]."
        )

    def test_savings(self):
        """A loss that its interval leaves open is called so; full depth saves nothing and says it."""
        adaptive = {"mean_depth": 3.1, "token_layer_speedup": 1.92, "auc_drop": 0.0011}
        lines = savings(adaptive | {"auc_drop_interval": [-0.0003, 0.0027]}, 6)
        assert "x1.92" in lines[0]
        assert "+.0011 [-.0003, +.0027], positive is a loss; no loss is told apart from 0" in lines[1]
        assert "nothing saved" in savings({"mean_depth": 6, "token_layer_speedup": 1.0}, 6)[0]


class TestCertificate:
    @pytest.mark.parametrize(("passed", "word"), [(True, "the last step"), (False, "full depth is used")])
    def test_the_certificate_speaks_for_itself(self, passed, word):
        """Its own words, then what the mode makes of it, and that test is not promised."""
        text = " ".join(certificate_words(CERTIFICATE | {"passed": passed}, "risk"))
        assert text.startswith(CERTIFICATE["words"])
        assert f"Risk mode: {word}" in text
        assert "test risk is reported, not guaranteed" in text

    def test_certified(self):
        """What was tested after the budget's policy, and that its numbers are of tune."""
        found = {"words": "The certified policy is step 9, 2 faster.", "cost": 0.3125, "auc_drop": 0.0021}
        assert certified_words(found) == (
            "The certified policy is step 9, 2 faster. On tune that policy costs .312 of full depth's token-layers at "
            "an AUC drop of +.0021."
        )

    @pytest.mark.parametrize(("value", "word"), [(0.03, "within epsilon .05"), (0.06, "above epsilon .05")])
    def test_test_risk(self, value, word):
        """The risk on test stands against epsilon, or is said to be missing."""
        assert word in risk_on_test(CERTIFICATE, {"risk": "score_drift", "value": value})
        assert "in no result file" in risk_on_test(CERTIFICATE, None)
