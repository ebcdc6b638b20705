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
