"""When reading a layer first pays: a matter of two timings, which are given here."""

from __future__ import annotations

import pytest
from example_engine import make_module

from project.engine import reading


@pytest.mark.parametrize(
    ("short", "long", "expected"),
    [
        # c = (13 - 1) / 120 = .1, f = 1 - .8 = .2; keys and values are 2*32*8*2 of 7,680 weights: .1333
        (1.0, 13.0, 0.2 / (0.1 * (0.5 - 0.05 - 1024 / 7680))),
        (0.8, 12.8, 0.0),  # nothing is fixed: always
        (2.0, 2.0, float("inf")),  # everything is fixed, as with kernels that wait for launches: never
    ],
)
def test_break_even(monkeypatch: pytest.MonkeyPatch, short: float, long: float, expected: float) -> None:
    """Solved for n: f + c n (kv + .05) = c n / 2, from the times of 8 and 128 tokens."""
    trunk = make_module().trunk
    assert trunk is not None
    monkeypatch.setattr(reading, "_seconds", lambda _, tokens: {8: short, 128: long}[tokens])
    assert reading.tokens_worth_reading(trunk) == pytest.approx(expected, abs=1e-9)


def test_layers_are_timed_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers of the trunk, whole, with the tokens of one candidate: all that few tokens cost is in it."""
    trunk = make_module().trunk
    assert trunk is not None
    asked: list[tuple[int, int]] = []
    for number, layer in enumerate(trunk.layers):
        layer.register_forward_hook(lambda _, given, __, k=number: asked.append((k, given[0].shape[1])))
    reading.tokens_worth_reading(trunk)
    passes = [8] + [8] * reading.PASSES + [128] * reading.PASSES  # the first one warms up
    assert asked == [(layer, tokens) for tokens in passes for layer in range(4)]
