"""Which decision follows from which numbers."""

import copy

import pytest
from example_result import ABOVE, AROUND, BELOW, result

from project.report.tables import decide, render

CASES = {
    "cheaper at equal accuracy": ({}, ("plan", "", ""), "Deploy the plan"),
    "more accurate, not cheaper": ({"static": 0.01, "static_interval": ABOVE, "faster": 0.9}, ("plan", "", ""), ""),
    "cheaper, less accurate": ({"static_interval": BELOW}, ("exit", "", ""), "Deploy exit 4 for every row"),
    "neither": ({"faster": 0.9}, ("exit", "", ""), "Deploy exit 4"),
    "baseline better": ({"gain": BELOW}, ("no_llm", "gbdt", "better"), "Do not deploy the LLM"),
    "baseline as good": ({"gain": AROUND}, ("no_llm", "gbdt", "as good"), "gbdt is as good"),
    "not shown better": ({"gain": [-0.001, 0.02]}, ("no_llm", "gbdt", "not better"), "not shown to be better"),
    "exit 0 near the best static exit": ({"gain": AROUND, "static_exit": 0}, ("no_llm", "exit 0", "as good"), ""),
    "exit 0 as good as the plan": ({"static_exit": 0}, ("no_llm", "exit 0", "as good"), "exit 0 is as good"),
    "plan better than exit 0": ({"static_exit": 0, "static_interval": ABOVE}, ("plan", "", ""), "Deploy the plan"),
    "no layer runs": ({"depth": 0.0}, ("no_llm", "exit 0", "as good"), "exit 0 is as good"),
    "no layer runs for a loss": (
        {"depth": 0.0, "drop": 0.01, "drop_interval": ABOVE}, ("no_llm", "exit 0", "budget"), "within the budget"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_decision(case):
    """The sentence's kind, and that the rendered answer begins with it."""
    changes, expected, said = CASES[case]
    made = result(**changes)
    answer = decide(made)
    assert (answer.kind, answer.instead, answer.how) == expected
    first = render(made).splitlines()[0]
    assert said in first
    assert first.startswith("**D")


def test_best_static_exit_where_only_that_is_better():
    """The plan is not shown better, exit 6 with exit 0 in its calibration is: that is deployed."""
    made = result(gain=AROUND)
    made["chosen_exit_by_exit_0"] = {
        "with_exit_0": {"baseline_difference": {"baseline": "gbdt", "value": 0.01, "interval": ABOVE}}
    }
    answer = decide(made)
    assert (answer.kind, answer.layer, answer.calibrated) == ("exit", 6, True)
    assert answer.gain["value"] == 0.01


def test_before_calibration_and_without_exits():
    """Without a plan the best static exit answers; baselines alone deploy nothing; a missing class decides nothing."""
    made = result()
    del made["adaptive"]
    assert decide(made).kind == "no_llm"
    made["baseline_difference"]["interval"] = ABOVE
    assert (decide(made).kind, decide(made).layer) == ("exit", 6)
    undefined = copy.deepcopy(made)
    undefined["baseline_difference"] |= {"value": None, "interval": None}
    assert decide(undefined).kind == "undecided"
    assert decide({"baselines": []}).kind == "baselines"


@pytest.mark.parametrize(
    ("passed", "depth", "said"),
    [
        (True, 3.0, "The certificate passed: The gap"),
        (False, 3.0, "The certificate did not pass: The gap"),
        (None, 3.0, "There is no certificate: The gap"),
        (True, 0.0, "The certificate says nothing"),
    ],
)
def test_certificate(passed, depth, said):
    """Passed, failed, not enough users; never passed for a plan that runs no layer."""
    made = result(depth=depth) | {"certificate": {"passed": passed, "words": "The gap is at most .02."}}
    answer = render(made).splitlines()[0]
    assert said in answer
    assert ("passed" in answer) == (said.startswith("The certificate passed"))
