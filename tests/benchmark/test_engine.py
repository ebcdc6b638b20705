"""The engine benchmark: configurations on a clock of our own, a row's arithmetic, and transformers' logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from example_engine import LAYERS, make_module, random_request

from project.benchmark import configurations as timed
from project.benchmark import transformers
from project.benchmark.configurations import Case, Configuration, cases, run_rounds
from project.benchmark.engine import configuration_row, possible_cases, run_engine
from project.benchmark.transformers import Pointwise, SharedPrefix, library_model
from project.data.ragged import Ragged
from project.engine import Engine, PreparedRequest, RowExits, Scored, Scores, StreamTokens
from project.errors import NotFittedError
from project.exits.calibration import Calibration
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.exits.policy import Policy
from project.model.module import ExitRecommender
from project.report.tables import render


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Configurations on one clock: (name, seconds a call, layer, token-layers)."""
    now = 0.0
    monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=lambda: now))

    def make(
        name: str, seconds: list[float], layer: int, token_layers: int, **most: Any
    ) -> Configuration:
        def score(requests: Sequence[PreparedRequest]) -> Scores:
            nonlocal now
            took = seconds.pop(0)
            now += took
            (request,) = requests
            n = len(request)
            scored = Scored(
                request.request_id, np.zeros(n), np.full(n, layer), token_layers
            )
            return Scores([scored], {})

        runner: Any = SimpleNamespace(score=score)
        return Configuration(name, "", runner, **most)

    return make


def requests_of(count: int) -> list[list[PreparedRequest]]:
    """Turns of one request each."""
    rng = np.random.default_rng(0)
    return [[random_request(rng, f"{i}", 2, 3)] for i in range(count)]


def test_rounds_take_turns(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Request by request, all configurations; who is first rotates; a slow one is timed on its requests alone."""
    log: list[str] = []
    both = [made("a", [1.0] * 9, 1, 1), made("b", [1.0] * 9, 2, 1, most=1)]
    score = Configuration.score

    def noted(own: Configuration, requests: Sequence[PreparedRequest]) -> None:
        log.append(f"{own.engine}{requests[0].request_id}")
        score(own, requests)

    monkeypatch.setattr(Configuration, "score", noted)
    for number in range(2):
        run_rounds(both, requests_of(2), number)
    assert log == ["a0", "b0", "a1", "b0", "a0", "a1"]


def test_row(made: Callable[..., Any]) -> None:
    """Medians 2 and 4 s against 1 and 2 s on two requests: x2.

    Token-layers 2 x 100 against 2 x 25 are x4; the static exit needs 1.5 and 3 s: x1.5 over it.
    With half a second of preparation a request takes 2 s instead of 3.5. What is timed on the first request alone is
    compared on that one: 2 s against 8 s is x.25. Who leaves at exit 0 runs no layer; the clock still counts.
    """
    full = made("packed", [2.0, 4, 2, 4, 9, 4], 5, 100)
    static_exit = made("fixed_depth_3", [1.5, 3] * 3, 3, 60)
    early = made("early_exit", [1.0, 2, 5, 2, 1, 2], 1, 25, auc=0.749)
    slow = made("pointwise", [8.0] * 3, 5, 300, most=1)
    exit_0 = made("early_exit", [0.1] * 6, 0, 0)
    for number in range(3):
        run_rounds([full, static_exit, early, slow, exit_0], requests_of(2), number)
    row = configuration_row(early, full, static_exit, prepare_ms=500.0)
    assert (row["measured_speedup"], row["speedup_over_static"]["value"]) == pytest.approx(
        (2, 1.5)
    )
    assert row["token_layer_speedup"] == 4
    assert (row["mean_depth"], row["auc"], row["requests"]) == (1, 0.749, 2)
    assert (row["p50_ms"], row["whole_ms"], row["whole_speedup"]) == pytest.approx(
        (2000, 2000, 7 / 4)
    )
    assert configuration_row(slow, full, static_exit, None)[
        "measured_speedup"
    ] == pytest.approx(2 / 8)
    row = configuration_row(exit_0, full, None, None)
    assert row["speedup_over_static"] == {"value": None, "interval": None}
    assert (row["token_layer_speedup"], row["whole_ms"]) == (None, None)
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
    """Every size cached and not, from 64 on also eight at once; a prompt a candidate behind a short history."""
    found = cases([1, 8, 64, 256])
    alone = [c for c in found if c.at_once == 1 and not c.history]
    sizes = {(n, cached) for n in (1, 8, 64, 256) for cached in (False, True)}
    assert {(c.candidates, c.prefix_cached) for c in alone} == sizes
    together = [(c.candidates, c.prefix_cached) for c in found if c.at_once == 8]
    assert together == [(64, True), (256, True), (64, False)]
    assert [c for c in found if c.history] == [Case(64, False, 50)]
    assert [c for c in found if c.pointwise] == [
        Case(1, False),
        Case(8, False),
        Case(64, False, 50),
    ]


@pytest.fixture(scope="module")
def module() -> ExitRecommender:
    """Random weights."""
    return make_module()


def untied(seed: int, name: str, segments: int, candidates: int) -> PreparedRequest:
    """A request whose history has one segment a second: there our visibility rule is plain causality."""
    request = random_request(np.random.default_rng(seed), name, segments, candidates)
    lists = Ragged(
        request.stream.tokens,
        np.searchsorted(request.stream.segment, np.arange(segments + 2)),
    )
    return replace(request, stream=StreamTokens.of(lists, np.arange(segments + 1)))


@pytest.mark.parametrize("cached", [None, False, True])
def test_the_library_has_the_engines_logits(
    module: ExitRecommender, cached: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ties its causal forward and full depth agree to 1e-4, for one and many candidates, twice.

    S prefix and O own tokens of n candidates run n S + O tokens alone, S + O shared, then O. Batches do not matter:
    padding is neither read nor scored.
    """
    requests = [
        untied(n, f"r{n}", segments, n) for n, segments in ((1, 5), (70, 4), (7, 3))
    ]
    calibration = Calibration(
        (LAYERS,), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    )
    policy = Policy(Ratio(), torch.tensor([-torch.inf], dtype=torch.float64), (LAYERS,))
    ours = Engine(module, RowExits(ExitPlan(calibration, policy, exit_0=False))).score(
        requests
    )
    theirs = Pointwise(module) if cached is None else SharedPrefix(module, cached)
    for again in (False, True):
        monkeypatch.setattr(transformers, "BATCH_TOKENS", 1 if again else 16_384)
        scores = theirs.score(requests)
        for own, found, request in zip(
            ours.requests, scores.requests, requests, strict=True
        ):
            np.testing.assert_allclose(found.logits, own.logits, atol=1e-4)
            prefixes = len(request) if cached is None else int(not (cached and again))
            tokens = prefixes * len(request.stream) + len(request.candidates.values)
            assert found.token_layers == tokens * LAYERS


def test_the_library_computes_with_the_backbones_own_weights(
    module: ExitRecommender,
) -> None:
    """No weight is copied, and the backbone keeps its attention."""
    model = library_model(module)
    backbone = module.backbone
    assert backbone is not None
    mine = dict(backbone.layers.named_parameters())
    for name, weight in model.layers.named_parameters():
        assert weight.data_ptr() == mine[name].data_ptr()
    assert (model.config._attn_implementation, backbone.config._attn_implementation) == (
        "sdpa",
        "segments",
    )


def test_sizes_that_the_catalogue_can_fill() -> None:
    """Of 20 items; no history has the 50 rows of the fixed one."""
    rows = pl.DataFrame({"split": ["test"], "role": ["target"], "hist": [3]})
    split: Any = SimpleNamespace(
        interactions=SimpleNamespace(items=pl.DataFrame({"item": range(20)})), rows=rows
    )
    assert {case.candidates for case in possible_cases([1, 64, 8, 256], split)} == {1, 8}
    with pytest.raises(NotFittedError, match="--ckpt_path"):
        run_engine(*[None] * 5, seconds=1.0, sizes=[1])  # type: ignore[arg-type]
