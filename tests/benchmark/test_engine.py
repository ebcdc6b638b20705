"""The engine benchmark: configurations on a clock of our own, a row's arithmetic, and its cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from example_engine import random_request

from project.benchmark import configurations as timed
from project.benchmark.configurations import Case, Configuration, cases, run_rounds
from project.benchmark.engine import configuration_row, possible_cases, run_engine
from project.engine import PreparedRequest, Scored
from project.errors import NotFittedError
from project.report.tables import render


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Configurations on one clock: (name, seconds a call, layer, token-layers, AUC)."""
    now = 0.0
    monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=lambda: now))

    def make(
        name: str, seconds: list[float], layer: int, token_layers: int, **known: float
    ) -> Configuration:
        def score(requests: Sequence[PreparedRequest]) -> list[Scored]:
            nonlocal now
            took = seconds.pop(0)
            now += took
            (request,) = requests
            n = len(request)
            scored = Scored(
                request.request_id, np.zeros(n), np.full(n, layer), token_layers
            )
            return [scored]

        runner: Any = SimpleNamespace(score=score)
        return Configuration(name, "", runner, **known)

    return make


def requests_of(count: int) -> list[list[PreparedRequest]]:
    """Turns of one request each."""
    rng = np.random.default_rng(0)
    return [[random_request(rng, f"{i}", 2, 3)] for i in range(count)]


def test_rounds_take_turns(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Request by request, all configurations; who is first rotates."""
    log: list[str] = []
    both = [made("a", [1.0] * 9, 1, 1), made("b", [1.0] * 9, 2, 1)]
    score = Configuration.score

    def noted(own: Configuration, requests: Sequence[PreparedRequest]) -> None:
        log.append(f"{own.engine}{requests[0].request_id}")
        score(own, requests)

    monkeypatch.setattr(Configuration, "score", noted)
    for number in range(2):
        run_rounds(both, requests_of(2), number)
    assert log == ["a0", "b0", "b1", "a1", "b0", "a0", "a1", "b1"]


def test_row(made: Callable[..., Any]) -> None:
    """Medians 2 and 4 s against 1 and 2 s on two requests: x2.

    Token-layers 2 x 100 against 2 x 25 are x4; the static exit needs 1.5 and 3 s: x1.5 over it.
    Who leaves at exit 0 runs no layer; the clock still counts.
    """
    full = made("packed", [2.0, 4, 2, 4, 9, 4], 5, 100)
    static_exit = made("fixed_depth_3", [1.5, 3] * 3, 3, 60)
    early = made("early_exit", [1.0, 2, 5, 2, 1, 2], 1, 25, auc=0.749)
    exit_0 = made("early_exit", [0.1] * 6, 0, 0)
    for number in range(3):
        run_rounds([full, static_exit, early, exit_0], requests_of(2), number)
    row = configuration_row(early, full, static_exit)
    assert (row["measured_speedup"], row["speedup_over_static"]["value"]) == pytest.approx(
        (2, 1.5)
    )
    assert row["token_layer_speedup"] == 4
    assert row["auc"] == 0.749
    row = configuration_row(exit_0, full, None)
    assert row["speedup_over_static"] == {"value": None, "interval": None}
    assert row["token_layer_speedup"] is None
    workload = {
        "candidates": 64,
        "prefix_cached": False,
        "history": None,
        "at_once": 1,
        "dtype": "float32",
    }
    result = {
        "command": "benchmark",
        "protocol": {"name": "p", "hash": "h"},
        "rows": [workload | row],
    }
    # 6 s over .2; a request alone is x20 or x40
    assert "x30.00 [x20.00, x40.00]" in render(result)


def test_cases() -> None:
    """Every size cached and not, from 64 on also eight at once; of 64 also a short history."""
    found = cases([1, 8, 64, 256])
    alone = [c for c in found if c.at_once == 1 and not c.history]
    sizes = {(n, cached) for n in (1, 8, 64, 256) for cached in (False, True)}
    assert {(c.candidates, c.prefix_cached) for c in alone} == sizes
    together = [(c.candidates, c.prefix_cached) for c in found if c.at_once == 8]
    assert together == [(64, True), (256, True), (64, False)]
    assert [c for c in found if c.history] == [Case(64, False, 50)]


def test_sizes_that_the_catalogue_can_fill() -> None:
    """Of 20 items; no history has the 50 rows of the fixed one."""
    rows = pl.DataFrame({"split": ["test"], "role": ["target"], "hist": [3]})
    split: Any = SimpleNamespace(
        interactions=SimpleNamespace(items=pl.DataFrame({"item": range(20)})), rows=rows
    )
    assert {case.candidates for case in possible_cases([1, 64, 8, 256], split)} == {1, 8}
    with pytest.raises(NotFittedError, match="--ckpt_path"):
        run_engine(*[None] * 5, seconds=1.0, sizes=[1])  # type: ignore[arg-type]
