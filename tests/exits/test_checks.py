"""A criterion of one's own that returns something else: one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from project.errors import ConfigError
from project.exits.criteria import Criterion, HeadOutputs, confidence_table


class Mine(Criterion):
    """Returns what a function makes of the outputs."""

    def __init__(self, made: Callable[[HeadOutputs], Any]) -> None:
        self.made = made

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
    """The message names the class, what it returned and what was expected."""
    expected = rf"test_checks\.Mine.*{words}.*torch tensor of shape \(rows,\)"
    with pytest.raises(ConfigError, match=expected):
        confidence_table(Mine(made), outputs)
