"""Sides, rounds and rows: the arithmetic of a benchmark on runners whose clock is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from example_engine import make_module, random_request

from project.benchmark import sides as sides_module
from project.benchmark.cases import Case, cases
from project.benchmark.limits import Limits
from project.benchmark.rows import Against, ratio_interval, side_row
from project.benchmark.sides import Side, Unit, run_rounds
from project.benchmark.table import (
    HEADER,
    PACKING_HEADER,
    RETRIEVAL_HEADER,
    benchmark_table,
    render_benchmark,
    render_rows,
)
from project.engine import PreparedRequest, Scored, Scores
from project.verbs import print_tables


class Clock:
    """Time stands still but for what runners say they take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted:
    """Takes these seconds a call, all but a tenth of them in the trunk; layers and token-layers as told."""

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
        found.seconds["trunk"] = 0.9 * took
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all sides."""
    found = Clock()
    monkeypatch.setattr(sides_module, "time", found)
    return found


def units(count: int, at_once: int = 1) -> list[Unit]:
    rng = np.random.default_rng(0)
    return [[random_request(rng, f"{i}.{j}", 2, 3) for j in range(at_once)] for i in range(count)]


def test_rounds_take_turns(clock: Clock) -> None:
    """Unit by unit, all sides; who is first rotates; a slow side stops after its units and rounds."""
    log: list[str] = []
    sides = [
        Side("a", "", Scripted(clock, [1] * 9, 1, 1, log)),
        Side("b", "", Scripted(clock, [1] * 9, 2, 1, log), most=1, rounds=1),
    ]
    for number in range(2):
        run_rounds(sides, units(2), number)
    assert log == ["1/0.0", "2/0.0", "1/1.0", "1/0.0", "1/1.0"]
    assert (sides[0].units, sides[1].units) == (2, 1)


def test_row(clock: Clock) -> None:
    """Medians 2 and 4 s against 1 and 2 s on two requests: x2, a request in 1.5 s; .9 of both is the trunk's.

    Token-layers 2 x 100 against 2 x 25 are x4, so efficiency is 2 / 4; the rival needs 1.5 and 3 s: x1.5 over it.
    A side measured on the first request alone is compared on that one: 2 s against 8 s is x.25.
    """
    asked, module = units(2), make_module()
    full = Side("packed", "", Scripted(clock, [2, 4, 2, 4, 9, 4], 5, 100, []), {"auc": 0.75, "auc_drop": 0.0})
    rival = Side("fixed_depth_3", "", Scripted(clock, [1.5, 3] * 3, 3, 60, []))
    early = Side("early_exit", "p", Scripted(clock, [1, 2, 5, 2, 1, 2], 1, 25, []), {"auc": 0.749})
    slow = Side("pointwise", "", Scripted(clock, [8], 5, 300, []), most=1, rounds=1)
    for number in range(3):
        run_rounds([full, rival, early, slow], asked, number)
    against = Against(full, rival, Limits(100.0, 10.0, 1.0))
    row = side_row(early, against, asked, module, prepare_ms=500.0)
    assert row["requests_per_s"] == pytest.approx(2 / 3)
    assert row["candidates_per_s"] == pytest.approx(2)
    assert row["measured_speedup"] == pytest.approx(2)
    assert row["speedup_over_rival"]["value"] == pytest.approx(1.5)
    assert row["token_layer_speedup"] == 4
    assert row["efficiency"] == pytest.approx(0.5)
    assert (row["mean_depth"], row["auc"], row["requests"], row["rounds"]) == (1, 0.749, 2, 3)
    assert row["p50_ms"] == pytest.approx(2000)
    assert row["request_ms"] == pytest.approx(2000)  # half a second of preparation and 3 s of two requests
    assert row["request_speedup"] == pytest.approx(7 / 4)
    low, high = row["spread"]
    assert (low, high) == pytest.approx((2 / 7, 2 / 3))  # rounds of 3, 7 and 3 s
    assert (row["dtype"], row["gflops_ceiling"]) == ("float32", 100)
    assert side_row(slow, against, asked, module, 0.0)["measured_speedup"] == pytest.approx(2 / 8)
    counting = Against(full, None, Limits(100.0, 10.0, 1.0))
    unrivalled = side_row(early, counting, asked, module, prepare_ms=500.0)["speedup_over_rival"]
    assert unrivalled == {"value": None, "interval": None}  # counting runs no layer


def test_how_near_to_the_limit(clock: Clock) -> None:
    """Reading a layer takes 1 s, arithmetic less: five layers 5 s, in 9 s of trunk; one layer 1 s, in 3.6 s.

    Token-layers are x10, yet the least times are 5 to 1: more than .5 of efficiency the machine does not give.
    """
    asked, module = units(1), make_module()
    full = Side("packed", "", Scripted(clock, [10], 5, 100, []))
    early = Side("early_exit", "p", Scripted(clock, [4], 1, 10, []))
    run_rounds([full, early], asked, 0)
    against = Against(full, full, Limits(gflops=1e6, gbytes=1.0, layer_bytes=1e9))
    whole, row = (side_row(side, against, asked, module, 0.0) for side in (full, early))
    assert (whole["of_limit"], whole["efficiency_at_limit"]) == (pytest.approx(5 / 9), 1)
    assert (row["of_limit"], row["efficiency_at_limit"]) == (pytest.approx(1 / 3.6), pytest.approx(0.5))
    assert (row["gflops_ceiling"], row["gbytes_ceiling"]) == (1e6, 1.0)
    repeated = Side("pointwise", "", Scripted(clock, [90], 5, 3000, []))
    run_rounds([repeated], asked, 0)
    row = side_row(repeated, against, asked, module, 0.0)
    assert (row["of_limit"], row["efficiency_at_limit"]) == (pytest.approx(5 / 81), None)


def test_a_plan_that_lets_nobody_in(clock: Clock) -> None:
    """Everyone leaves at exit 0: no layer runs, so nothing can be said per token-layer; the clock still counts."""
    asked, module = units(1), make_module()
    full = Side("packed", "", Scripted(clock, [10], 5, 100, []))
    early = Side("early_exit", "p", Scripted(clock, [0.1], 0, 0, []))
    run_rounds([full, early], asked, 0)
    row = side_row(early, Against(full, full, Limits(1.0, 1.0, 1.0)), asked, module, 0.0)
    assert row["measured_speedup"] == pytest.approx(100)
    assert (row["token_layer_speedup"], row["efficiency"], row["efficiency_at_limit"]) == (None, None, None)
    assert (row["mean_depth"], row["gflops"], row["of_limit"]) == (0, 0, 0)
    shown = {
        "candidates": 64,
        "stream": "cold",
        "history": None,
        "rival": False,
        "speedup_over_rival": {"value": 1.0},
    }
    assert "| x100.00 | [100.00, 100.00] | x1.00 |  | 0 of 1 | .00 |" in render_rows([row | shown])


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
    assert {(c.candidates, c.stream) for c in found} == {
        (n, s) for n in (1, 8, 64, 256) for s in ("cold", "warm")
    }
    assert [c for c in found if c.history] == [
        Case(64, "cold", 50, plain=("pointwise", "shared_prefix")),
        Case(64, "warm", 50, plain=("shared_prefix",)),
    ]
    assert [(c.candidates, c.at_once, c.requests) for c in found if c.at_once > 1] == [(1, 8, 48), (8, 8, 24)]
    assert all("pointwise" not in c.plain for c in found if c.candidates >= 64 and c.history is None)


PROTOCOL = {"protocol": {"name": "p", "hash": "h", "counts": {}}}


def row(**changes: object) -> dict[str, object]:
    base: dict[str, object] = {
        "engine": "early_exit", "policy": "budget: learned", "candidates": 64, "stream": "cold", "history": None,
        "requests": 8, "at_once": 1, "requests_per_s": 0.5, "p50_ms": 1999.6, "p95_ms": 2500.0, "p99_ms": 2501.0,
        "auc": 0.76012, "mean_depth": 3.126, "token_layer_speedup": 2.0, "measured_speedup": 1.9,
        "measured_speedup_interval": [1.8, 2.04], "speedup_over_rival": {"value": 1.25}, "efficiency": 0.95,
        "gflops": 150.4, "gflops_ceiling": 200.0, "rival": False, "dtype": "float32",
    }  # fmt: skip
    return base | changes


def test_tables() -> None:
    """One line a row; names say what a side is; lists show overlap and precision in place of an AUC."""
    rows = [
        row(engine="packed", requests=8),
        row(engine="pointwise"),
        row(engine="fixed_depth_4", rival=True),
        row(),
        row(engine="top_k", policy="best 10", overlap=0.968, precision=0.78, stream="warm"),
        row(history=50, at_once=8),
        row(engine="packed", dtype="bfloat16"),
        row(dtype="int8"),
    ]
    lines = render_rows(rows).splitlines()
    assert lines[0].count("|") == len(HEADER) + 1
    names = [line.split("|")[3].strip() for line in lines[2:10]]
    assert names == [
        "packed, full depth",
        "transformers, a prompt per candidate",
        "static depth 4 (rival)",
        "early_exit, budget: learned",
        "top_k, best 10",
        "early_exit, budget: learned",
        "packed, full depth, bfloat16",
        "early_exit, budget: learned, int8",
    ]
    assert lines[5] == (
        "| 64 | cold | early_exit, budget: learned | .50 | 2000 | 2500 | 2501 | .7601 | 3.13 | x2.00 | x1.90 | "
        "[1.80, 2.04] | x1.25 | .95 | 150 of 200 |  |"
    )
    assert ".968 overlap, .780 precision" in lines[6]
    limited = render_rows([row(of_limit=0.812, efficiency_at_limit=0.97)]).splitlines()
    assert limited[2].endswith("| .95 of .97 | 150 of 200 | .81 |")
    more = render_rows([row(of_limit=0.02, efficiency_at_limit=29.9, token_layer_speedup=0.03)])
    assert "| .95 | 150 of 200 | .02 |" in more
    assert "whichever is longer" in limited[4]
    assert lines[7].startswith("| 64, 8 requests at once | cold, 50 items |")
    assert "8 of 64 candidates" in lines[11]
    assert "efficiency is over full depth with the same weights" in lines[11]
    assert benchmark_table(rows).row_count == 8
    assert "same weights" not in render_rows(rows[:6])


def test_a_short_table() -> None:
    """64 candidates one at a time; of static depths the rival; no policy that answers a question of its own."""
    shown = [
        row(),
        row(engine="fixed_depth_4", rival=True),
        row(engine="top_k", policy="best 5", overlap=0.9, precision=1),
    ]
    hidden = [
        row(candidates=8),
        row(at_once=8),
        row(engine="fixed_depth_2"),
        row(policy="budget without exit 0: learned"),
        row(policy="90% leave at each exit: learned"),
    ]
    result = {"rows": [*hidden, *shown]} | PROTOCOL
    assert render_benchmark(result) == render_rows(shown) + "\n\nProtocol p (hash h)\n"
    only = {**result, "rows": [row(candidates=8)]}
    assert render_benchmark(only).startswith(render_rows(only["rows"]))


def test_retrieval_table() -> None:
    """A row a side of `benchmark --only retrieval`: who, from what, how fast, and what its vote is worth."""
    side = {
        "retriever": "lightgcn", "cached": True, "ms_per_request": 0.1029, "total_ratio_to_lightgcn": 1.0,
        "vote_auc": 0.74001, "vote_auc_interval": [0.72, 0.7587], "requests": 37, "history_rows": 99.35,
    }  # fmt: skip
    text = side | {
        "retriever": "text",
        "cached": False,
        "ms_per_request": 35.1037,
        "total_ratio_to_lightgcn": 333.53,
    }
    result = {"verb": "benchmark", "retrieval": [side, text | {"vote_auc": None, "vote_auc_interval": None}]}
    lines = render_benchmark(result | PROTOCOL).splitlines()
    assert lines[:4] == [
        "| retriever | query | ms a request | over LightGCN | vote AUC | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| lightgcn | item vectors summed | .103 | x1.00 | .7400 | [.7200, .7587] |",
        "| text | history encoded | 35.104 | x333.53 | undefined | undefined |",
    ]
    assert lines[5].startswith("Timed on 37 requests of the test split for one candidate, 99 earlier rows")
    assert lines[7:] == ["Protocol p (hash h)"]


def test_packing_table() -> None:
    """Both rates of `benchmark --only packing`, their ratio and its spread."""
    packing = {
        "packed_targets_per_s": 49.71, "pointwise_targets_per_s": 1.164, "ratio": 43.5, "spread": [31.94, 52.74],
        "rounds": 8, "layers": 6, "context_tokens": 1024,
    }  # fmt: skip
    lines = render_benchmark({"verb": "benchmark", "packing": packing} | PROTOCOL).splitlines()
    assert lines[2:4] == ["| packed | 49.7 |", "| one prompt per candidate | 1.2 |"]
    assert lines[5] == "x43.50, median of 8 rounds ([31.94, 52.74]), 6 layers, windows of 1,024 tokens."


def test_kept_benchmarks_render(capsys: pytest.CaptureFixture[str]) -> None:
    """`table` prints the kept results of all three kinds, none as the table of exits."""
    results = Path(__file__).parents[2] / "results"
    names = (
        "whole_trunk_worded/benchmark.json",
        "retrieval/benchmark.json",
        "quickstart/benchmark-packing.json",
    )
    print_tables([str(results / name) for name in names])
    shown = capsys.readouterr().out
    assert shown.count("### benchmark") == 3
    assert "| scores | AUC |" not in shown
    for header in (HEADER, RETRIEVAL_HEADER, PACKING_HEADER):
        assert "| " + " | ".join(header) + " |" in shown
