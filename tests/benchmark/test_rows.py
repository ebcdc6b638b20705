"""Contenders, rounds and rows: the arithmetic of a benchmark on runners whose clock is written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from example_engine import make_module, random_request

from project.benchmark import contenders as contenders_module
from project.benchmark.contenders import Case, Contender, Unit, cases, run_rounds
from project.benchmark.engine import Against, Limits, contender_row, ratio_interval
from project.engine import PreparedRequest, Scored, Scores
from project.report.tables import render


class Clock:
    """Time stands still but for what runners say they take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted:
    """Takes these seconds a call, all but a tenth of them in the backbone; layers and token-layers as told."""

    def __init__(
        self, clock: Clock, seconds: Sequence[float], layer: int, token_layers: int, log: list[str]
    ) -> None:
        self.clock, self.seconds, self.layer, self.token_layers = clock, list(seconds), layer, token_layers
        self.log = log

    def score(self, requests: Sequence[PreparedRequest]) -> Scores:
        took = self.seconds.pop(0)
        self.clock.now += took
        self.log.append(f"{self.layer}/{requests[0].request_id}")
        found = Scores(
            [
                Scored(r.request_id, np.zeros(len(r)), np.full(len(r), self.layer), self.token_layers)
                for r in requests
            ]
        )
        found.seconds["backbone"] = 0.9 * took
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all contenders."""
    found = Clock()
    monkeypatch.setattr(contenders_module, "time", found)
    return found


def units(count: int, at_once: int = 1) -> list[Unit]:
    rng = np.random.default_rng(0)
    return [[random_request(rng, f"{i}.{j}", 2, 3) for j in range(at_once)] for i in range(count)]


def test_rounds_take_turns(clock: Clock) -> None:
    """Unit by unit, all contenders; who is first rotates; a slow side stops after its units and rounds."""
    log: list[str] = []
    contenders = [
        Contender("a", "", Scripted(clock, [1] * 9, 1, 1, log)),
        Contender("b", "", Scripted(clock, [1] * 9, 2, 1, log), most=1, rounds=1),
    ]
    for number in range(2):
        run_rounds(contenders, units(2), number)
    assert log == ["1/0.0", "2/0.0", "1/1.0", "1/0.0", "1/1.0"]
    assert (contenders[0].units, contenders[1].units) == (2, 1)


def test_row(clock: Clock) -> None:
    """Medians 2 and 4 s against 1 and 2 s on two requests: x2, a request in 1.5 s; .9 of both is the backbone's.

    Token-layers 2 x 100 against 2 x 25 are x4, so efficiency is 2 / 4; the static exit needs 1.5 and 3 s: x1.5 over it.
    A side measured on the first request alone is compared on that one: 2 s against 8 s is x.25.
    """
    asked, module = units(2), make_module()
    full = Contender(
        "packed", "", Scripted(clock, [2, 4, 2, 4, 9, 4], 5, 100, []), {"auc": 0.75, "auc_drop": 0.0}
    )
    static_exit = Contender("fixed_depth_3", "", Scripted(clock, [1.5, 3] * 3, 3, 60, []))
    early = Contender("early_exit", "p", Scripted(clock, [1, 2, 5, 2, 1, 2], 1, 25, []), {"auc": 0.749})
    slow = Contender("pointwise", "", Scripted(clock, [8], 5, 300, []), most=1, rounds=1)
    for number in range(3):
        run_rounds([full, static_exit, early, slow], asked, number)
    against = Against(full, static_exit, Limits(100.0, 10.0, 1.0))
    row = contender_row(early, against, asked, module, prepare_ms=500.0)
    assert row["requests_per_s"] == pytest.approx(2 / 3)
    assert row["candidates_per_s"] == pytest.approx(2)
    assert row["measured_speedup"] == pytest.approx(2)
    assert row["speedup_over_static"]["value"] == pytest.approx(1.5)
    assert row["token_layer_speedup"] == 4
    assert row["efficiency"] == pytest.approx(0.5)
    assert (row["mean_depth"], row["auc"], row["requests"], row["rounds"]) == (1, 0.749, 2, 3)
    assert row["p50_ms"] == pytest.approx(2000)
    assert row["request_ms"] == pytest.approx(2000)  # half a second of preparation and 3 s of two requests
    assert row["request_speedup"] == pytest.approx(7 / 4)
    low, high = row["spread"]
    assert (low, high) == pytest.approx((2 / 7, 2 / 3))  # rounds of 3, 7 and 3 s
    assert (row["dtype"], row["gflops_ceiling"]) == ("float32", 100)
    assert contender_row(slow, against, asked, module, 0.0)["measured_speedup"] == pytest.approx(2 / 8)
    exit_0 = Against(full, None, Limits(100.0, 10.0, 1.0))
    unrivalled = contender_row(early, exit_0, asked, module, prepare_ms=500.0)["speedup_over_static"]
    assert unrivalled == {"value": None, "interval": None}  # counting runs no layer


def test_how_near_to_the_limit(clock: Clock) -> None:
    """Reading a layer takes 1 s, arithmetic less: five layers 5 s, in 9 s of backbone; one layer 1 s, in 3.6 s.

    Token-layers are x10, yet the least times are 5 to 1: more than .5 of efficiency the machine does not give.
    """
    asked, module = units(1), make_module()
    full = Contender("packed", "", Scripted(clock, [10], 5, 100, []))
    early = Contender("early_exit", "p", Scripted(clock, [4], 1, 10, []))
    run_rounds([full, early], asked, 0)
    against = Against(full, full, Limits(gflops=1e6, gbytes=1.0, layer_bytes=1e9))
    whole, row = (contender_row(contender, against, asked, module, 0.0) for contender in (full, early))
    assert (whole["of_limit"], whole["efficiency_at_limit"]) == (pytest.approx(5 / 9), 1)
    assert (row["of_limit"], row["efficiency_at_limit"]) == (pytest.approx(1 / 3.6), pytest.approx(0.5))
    assert (row["gflops_ceiling"], row["gbytes_ceiling"]) == (1e6, 1.0)
    repeated = Contender("pointwise", "", Scripted(clock, [90], 5, 3000, []))
    run_rounds([repeated], asked, 0)
    row = contender_row(repeated, against, asked, module, 0.0)
    assert (row["of_limit"], row["efficiency_at_limit"]) == (pytest.approx(5 / 81), None)


def test_a_plan_that_lets_nobody_in(clock: Clock) -> None:
    """Everyone leaves at exit 0: no layer runs, so nothing can be said per token-layer; the clock still counts."""
    asked, module = units(1), make_module()
    full = Contender("packed", "", Scripted(clock, [10], 5, 100, []))
    early = Contender("early_exit", "p", Scripted(clock, [0.1], 0, 0, []))
    run_rounds([full, early], asked, 0)
    row = contender_row(early, Against(full, full, Limits(1.0, 1.0, 1.0)), asked, module, 0.0)
    assert row["measured_speedup"] == pytest.approx(100)
    assert (row["token_layer_speedup"], row["efficiency"], row["efficiency_at_limit"]) == (None, None, None)
    assert (row["mean_depth"], row["gflops"], row["of_limit"]) == (0, 0, 0)
    shown = {
        "candidates": 64,
        "prefix_cached": False,
        "history": None,
        "static_exit": False,
        "speedup_over_static": {"value": 1.0},
    }
    result = {"command": "benchmark", "protocol": {"name": "p", "hash": "h"}, "rows": [row | shown]}
    assert "| .00 |  | x100.00 [x100.00, x100.00] | x1.00 |  |" in render(result)


def test_ratio_interval() -> None:
    """Equal ratios leave no doubt; unequal ones leave an interval around the ratio of sums, 30 / 12 = 2.5."""
    even = ratio_interval(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    assert (even["value"], even["interval"]) == (2.0, [2.0, 2.0])
    found = ratio_interval(np.array([10.0, 20.0]), np.array([8.0, 4.0]))
    assert found["value"] == pytest.approx(2.5)
    assert found["interval"] == pytest.approx([1.25, 5.0])


def test_cases() -> None:
    """Cold and warm for every size; a fixed history at 64, many at once for small ones, 64 prompts only there."""
    found = cases([1, 8, 64, 256])
    assert {(c.candidates, c.prefix_cached) for c in found} == {
        (n, s) for n in (1, 8, 64, 256) for s in (False, True)
    }
    assert [c for c in found if c.history] == [
        Case(64, False, 50, plain=("pointwise", "shared_prefix")),
        Case(64, True, 50, plain=("shared_prefix",)),
    ]
    assert [(c.candidates, c.at_once, c.requests) for c in found if c.at_once > 1] == [(1, 8, 48), (8, 8, 24)]
    assert all("pointwise" not in c.plain for c in found if c.candidates >= 64 and c.history is None)
