"""A criterion of one's own that returns something else: one clear error, already when settings are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from project.errors import ConfigError
from project.exits.criteria import Criterion, HeadOutputs, Learned, confidence_table, try_out
from project.exits.plan import ExitSettings


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
    "None": (lambda o: None, "returned a NoneType"),
    "NumPy": (lambda o: o.logits[:, -1].numpy(), "returned a ndarray"),
    "a float": (lambda o: 0.5, "returned a float"),
    "all heads": (
        lambda o: o.logits.expand(-1, o.heads).reshape(-1, o.heads),
        r"returned a tensor \(\d+, 1\)",
    ),
    "one number": (lambda o: o.logits.mean(), r"returned a tensor \(\)"),
    "NaN": (lambda o: o.logits[:, -1] * torch.nan, "returned NaN where the logits are numbers"),
}


@pytest.mark.parametrize(("made", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_confidence_names_class_and_shape(outputs: HeadOutputs, made: Any, words: str) -> None:
    """After training, on real outputs, and before it: the class, what it returned and what was expected."""
    expected = rf"test_checks\.Mine.*{words}.*torch tensor of shape \(rows,\)"
    with pytest.raises(ConfigError, match=expected):
        confidence_table(Mine(made), outputs)
    with pytest.raises(ConfigError, match=expected):
        ExitSettings(criterion=Mine(made))
    with pytest.raises(ConfigError, match=expected):
        ExitSettings(compare=[Learned(), Mine(made)])


def test_trying_out_leaves_no_trace() -> None:
    """The criterion itself is not fitted, random numbers go on as they would, and an error there is no verdict."""

    def noisy(outputs: HeadOutputs) -> torch.Tensor:
        return torch.rand(outputs.logits.shape[0])

    def fussy(outputs: HeadOutputs) -> torch.Tensor:
        raise ZeroDivisionError

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    criterion = Mine(noisy)
    for one in (criterion, Mine(fussy)):
        try_out(one, exit_0=True)
    assert torch.equal(torch.rand(3), expected)
    assert not criterion.fitted
    assert confidence_table(criterion, HeadOutputs.of((1, 2), torch.zeros(4, 2))).shape == (4, 2)
