"""The engine's benchmark: contenders on a clock of our own, ceilings and useful FLOPs by hand, the library's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from example_engine import LAYERS, make_module, random_request
from torch import nn

from project.benchmark import contenders as contenders_module
from project.benchmark import engine as limits_module
from project.benchmark import engine as requests
from project.benchmark.contenders import Case, Contender, Unit, cases, run_rounds
from project.benchmark.engine import Against, Limits, contender_row, ratio_interval, useful_flops
from project.benchmark.llama_cpp import LlamaCpp, can_run, load
from project.benchmark.transformers import Pointwise, SharedPrefix, library_model
from project.data.ragged import Ragged
from project.engine import Engine, PreparedRequest, RowExits, Scored, Scores, StreamTokens
from project.errors import ConfigError, NotFittedError
from project.exits.calibration import Calibration
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.exits.policy import Policy
from project.model.module import ExitRecommender, LoraSettings
from project.report.tables import render


class Clock:
    """Time stands still but for what runners say they take."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Scripted:
    """Takes these seconds a call, all but a tenth of them in the backbone; layers and token-layers as given."""

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
def make_contender(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contender]:
    """Makes contenders on one clock: (name, seconds, layer, token-layers)."""
    clock = Clock()
    monkeypatch.setattr(contenders_module, "time", clock)

    def make(
        name: str,
        seconds: Sequence[float],
        layer: int,
        token_layers: int,
        log: list[str] | None = None,
        accuracy: dict[str, float] | None = None,
        **most: int,
    ) -> Contender:
        log = [] if log is None else log
        return Contender(name, "", Scripted(clock, seconds, layer, token_layers, log), accuracy or {}, **most)

    return make


def units(count: int) -> list[Unit]:
    rng = np.random.default_rng(0)
    return [[random_request(rng, f"{i}", 2, 3)] for i in range(count)]


def test_rounds_take_turns(make_contender: Callable[..., Contender]) -> None:
    """Unit by unit, all contenders; who is first rotates; a slow contender stops after its units and rounds."""
    log: list[str] = []
    contenders = [
        make_contender("a", [1] * 9, 1, 1, log),
        make_contender("b", [1] * 9, 2, 1, log, most=1, rounds=1),
    ]
    for number in range(2):
        run_rounds(contenders, units(2), number)
    assert log == ["1/0", "2/0", "1/1", "1/0", "1/1"]
    assert (contenders[0].units, contenders[1].units) == (2, 1)


def test_row(make_contender: Callable[..., Contender]) -> None:
    """Medians 2 and 4 s against 1 and 2 s on two requests: x2, a request in 1.5 s; .9 of both is the backbone's.

    Token-layers 2 x 100 against 2 x 25 are x4, so efficiency is 2 / 4; the static exit needs 1.5 and 3 s: x1.5 over it.
    A contender measured on the first request alone is compared on that one: 2 s against 8 s is x.25.
    """
    sample, module = units(2), make_module()
    full = make_contender("packed", [2, 4, 2, 4, 9, 4], 5, 100, accuracy={"auc": 0.75, "auc_drop": 0.0})
    static_exit = make_contender("fixed_depth_3", [1.5, 3] * 3, 3, 60)
    early = make_contender("early_exit", [1, 2, 5, 2, 1, 2], 1, 25, accuracy={"auc": 0.749})
    slow = make_contender("pointwise", [8], 5, 300, most=1, rounds=1)
    for number in range(3):
        run_rounds([full, static_exit, early, slow], sample, number)
    against = Against(full, static_exit, Limits(100.0, 10.0, 1.0))
    row = contender_row(early, against, sample, module, prepare_ms=500.0)
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
    assert row["spread"] == pytest.approx([2 / 7, 2 / 3])  # rounds of 3, 7 and 3 s
    assert (row["dtype"], row["gflops_ceiling"]) == ("float32", 100)
    assert contender_row(slow, against, sample, module, 0.0)["measured_speedup"] == pytest.approx(2 / 8)
    exit_0 = Against(full, None, Limits(100.0, 10.0, 1.0))  # exit 0 runs no layer
    unpaired = contender_row(early, exit_0, sample, module, prepare_ms=500.0)["speedup_over_static"]
    assert unpaired == {"value": None, "interval": None}


def test_how_near_to_the_limit(make_contender: Callable[..., Contender]) -> None:
    """Reading a layer takes 1 s, arithmetic less: five layers 5 s, in 9 s of backbone; one layer 1 s, in 3.6 s.

    Token-layers are x10, yet the least times are 5 to 1: more than .5 of efficiency the machine does not give.
    """
    sample, module = units(1), make_module()
    full, early = make_contender("packed", [10], 5, 100), make_contender("early_exit", [4], 1, 10)
    repeated = make_contender("pointwise", [90], 5, 3000)
    run_rounds([full, early, repeated], sample, 0)
    against = Against(full, full, Limits(gflops=1e6, gbytes=1.0, layer_bytes=1e9))
    rows = [contender_row(each, against, sample, module, 0.0) for each in (full, early, repeated)]
    assert [r["of_limit"] for r in rows] == pytest.approx([5 / 9, 1 / 3.6, 5 / 81])
    assert [r["efficiency_at_limit"] for r in rows] == [1, pytest.approx(0.5), None]
    assert (rows[1]["gflops_ceiling"], rows[1]["gbytes_ceiling"]) == (1e6, 1.0)


def test_a_plan_whose_rows_all_leave_at_exit_0(make_contender: Callable[..., Contender]) -> None:
    """Everyone leaves at exit 0: no layer runs, so nothing can be said per token-layer; the clock still counts."""
    sample, module = units(1), make_module()
    full, early = make_contender("packed", [10], 5, 100), make_contender("early_exit", [0.1], 0, 0)
    run_rounds([full, early], sample, 0)
    row = contender_row(early, Against(full, full, Limits(1.0, 1.0, 1.0)), sample, module, 0.0)
    assert row["measured_speedup"] == pytest.approx(100)
    assert (row["token_layer_speedup"], row["efficiency"], row["efficiency_at_limit"]) == (None, None, None)
    assert (row["mean_depth"], row["gflops"], row["of_limit"]) == (0, 0, 0)
    row |= {"candidates": 64, "prefix_cached": False, "history": None, "static_exit": False}
    result = {"command": "benchmark", "protocol": {"name": "p", "hash": "h"}, "rows": [row]}
    assert "x100.00 [x100.00, x100.00]" in render(result)


def test_ratio_interval() -> None:
    """Equal ratios give an interval of one point, unequal ones an interval around the ratio of sums, 30 / 12 = 2.5."""
    even = ratio_interval(np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    assert (even["value"], even["interval"]) == (2.0, [2.0, 2.0])
    found = ratio_interval(np.array([10.0, 20.0]), np.array([8.0, 4.0]))
    assert found["value"] == pytest.approx(2.5)
    assert found["interval"] == pytest.approx([1.25, 5.0])


def test_cases() -> None:
    """Every size with prefix cached and not; a fixed history at 64, many at once for small ones."""
    found = cases([1, 8, 64, 256])
    sizes = {(n, s) for n in (1, 8, 64, 256) for s in (False, True)}
    assert {(c.candidates, c.prefix_cached) for c in found} == sizes
    assert [c for c in found if c.history] == [
        Case(64, False, 50, plain=("pointwise", "shared_prefix")),
        Case(64, True, 50, plain=("shared_prefix",)),
    ]
    assert [(c.candidates, c.at_once, c.requests) for c in found if c.at_once > 1] == [(1, 8, 48), (8, 8, 24)]
    assert all("pointwise" not in c.plain for c in found if c.candidates >= 64 and c.history is None)


LINEAR = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # weights of a layer


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tick around every layer with one row, one around a product of 10 tokens, 32 x 48 weights.

    So 5 layers of 4 bytes a weight are read in 1 s, and there are 2 * 10 * 32 * 48 FLOPs in 1 s.
    """
    module = make_module()
    assert module.backbone is not None
    rows: list[int] = []
    for layer in module.backbone.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    ticks = iter([1.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(limits_module.time, "perf_counter", lambda: next(ticks))
    found = Limits.measure(module, tokens=10)
    expected = [2 * 10 * 32 * 48 / 1e9, 5 * LINEAR * 4 / 1e9, LINEAR * 4]
    assert [found.gflops, found.gbytes, found.layer_bytes] == pytest.approx(expected)
    assert sorted(rows) == [1] * 5 + [10]
    three = [Limits(1.0, 30.0, 5.0), Limits(2.0, 10.0, 5.0), Limits(9.0, 20.0, 5.0)]
    assert Limits.median(three) == Limits(2.0, 20.0, 5.0)


def test_useful_flops() -> None:
    """By hand, exits at layers 0, 1 and 3 of three candidates of o tokens after a stream of s tokens that ran.

    Layer 1: whole for the third candidate and the stream; keys and values of the second candidate, the rest of its
    answer slot alone. Layer 2: whole for the third and the stream. Layer 3, the last: keys and values of the third
    and the stream, the rest of one answer slot. A query sees the stream and itself; 4 heads of width 8.
    """
    module, request = make_module(), random_request(np.random.default_rng(0), "r", 3, 3)
    s, o = len(request.stream), request.candidates.lengths.astype(float)
    exits = np.array([0, 1, 3])
    scored = Scored("r", np.zeros(3), exits, int(o[1] + 3 * o[2] + 3 * s))
    owed, of_stream, of_third = 2 * 32 * 16, s * (s + 1) / 2, o[2] * s + o[2] * (o[2] + 1) / 2
    linear = [
        LINEAR * (o[2] + s) + owed * o[1] + (LINEAR - owed),
        LINEAR * (o[2] + s),
        owed * (o[2] + s) + (LINEAR - owed),
    ]
    seen = [of_third + of_stream + s + o[1], of_third + of_stream, s + o[2]]
    whole = useful_flops(scored, request, module)
    expected = [2 * a + 4 * 4 * 8 * b for a, b in zip(linear, seen, strict=True)]
    np.testing.assert_allclose(whole, expected)
    cached = Scored("r", np.zeros(3), exits, int(o[1] + 3 * o[2]))
    least = 2 * LINEAR * s + 4 * 4 * 8 * of_stream
    saved = whole - useful_flops(cached, request, module)
    np.testing.assert_allclose(saved, [least, least, 2 * owed * s])
    for layer in (0, -1):  # exit 0 for all, and a request that could not be scored
        nobody = Scored("r", np.zeros(3), np.full(3, layer), 0)
        assert useful_flops(nobody, request, module).shape == (0,)


def test_least_seconds() -> None:
    """At 10 GFLOP/s, weights of 4 GB at 2 GB/s: a layer takes 2 s at least, 20 GFLOP are as long.

    Alone: 30 and 5 GFLOP take 3 + 2 s. With a request of 25, 10 and 10 GFLOP: 55, 15 and 10 take 5.5 + 2 + 2 s, less
    than the 5 and 6.5 s of the two apart.
    """
    limits = Limits(gflops=10.0, gbytes=2.0, layer_bytes=4e9)
    one, other = np.array([30e9, 5e9]), np.array([25e9, 10e9, 10e9])
    found = [limits.least_seconds(requests) for requests in ([one], [other], [one, other], [])]
    assert found == pytest.approx([5, 6.5, 9.5, 0])


@pytest.fixture(scope="module")
def module() -> ExitRecommender:
    """Random weights."""
    return make_module()


def untied(seed: int, name: str, segments: int, candidates: int) -> PreparedRequest:
    """A request whose history has one segment a second: there our visibility rule is plain causality."""
    request = random_request(np.random.default_rng(seed), name, segments, candidates)
    lists = Ragged(request.stream.tokens, np.searchsorted(request.stream.segment, np.arange(segments + 2)))
    return replace(request, stream=StreamTokens.of(lists, np.arange(segments + 1)))


RUNNERS: dict[str, Callable[..., Pointwise | SharedPrefix]] = {
    "pointwise": Pointwise,
    "shared_prefix, not cached": SharedPrefix,
    "shared_prefix, cached": lambda module: SharedPrefix(module, cached=True),
}


def full_depth(module: ExitRecommender, requests: Sequence[PreparedRequest]) -> list[Scored]:
    """Packed, uncalibrated."""
    calibration = Calibration((LAYERS,), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    policy = Policy(Ratio(), torch.tensor([-torch.inf], dtype=torch.float64), (LAYERS,))
    return Engine(module, RowExits(ExitPlan(calibration, policy, exit_0=False))).score(requests).requests


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
def test_the_library_has_the_engines_logits(module: ExitRecommender, runner: Callable[..., Any]) -> None:
    """Without ties its causal forward and packed full depth agree to 1e-4, for one and many candidates, twice."""
    requests = [untied(n, f"r{n}", segments, n) for n, segments in ((1, 5), (7, 3), (70, 4))]
    ours, theirs = full_depth(module, requests), runner(module)
    for _ in range(2):  # a kept history must not have grown
        for mine, found in zip(ours, theirs.score(requests).requests, strict=True):
            np.testing.assert_allclose(found.logits, mine.logits, atol=1e-4)
            assert (found.exit_layers == LAYERS).all()


@pytest.mark.parametrize("cached", [False, True])
def test_llama_cpp_has_the_engines_logits(module: ExitRecommender, cached: bool) -> None:
    """Its keys and values are float16, 11 bits: logits of -2 to 2 differ by less than .02, twice; history runs once."""
    pytest.importorskip("llama_cpp_py_sync", reason="needs the extra `llama`")
    assert can_run(module)
    assert not can_run(make_module(family="qwen2"))
    requests = [untied(n, f"r{n}", segments, n) for n, segments in ((1, 5), (70, 4), (7, 3))]
    ours, theirs = full_depth(module, requests), LlamaCpp(module, load(module), cached)
    expected = np.concatenate([scored.logits for scored in ours])
    for again in (False, True):
        scores = theirs.score(requests)
        logits = np.concatenate([scored.logits for scored in scores.requests])
        np.testing.assert_allclose(logits, expected, atol=0.02)
        assert np.corrcoef(logits, expected)[0, 1] > 0.9999
        ran = sum(len(r.candidates.values) + len(r.stream) * (not (cached and again)) for r in requests)
        assert scores.token_layers == ran * LAYERS


def test_batches_do_not_matter_to_the_library(module: ExitRecommender) -> None:
    """One prompt at a time or all at once: padding is neither read nor scored."""
    request = untied(1, "r", 6, 9)
    logits = [Pointwise(module, size).score([request]).requests[0].logits for size in (1, 10_000)]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_token_layers_of_the_library(module: ExitRecommender) -> None:
    """S stream and O own tokens of n candidates, L layers: (n S + O) L alone, (S + O) L shared, then O L."""
    request = untied(2, "r", 4, 5)
    s, own = len(request.stream), len(request.candidates.values)
    assert Pointwise(module).score([request]).token_layers == (5 * s + own) * LAYERS
    shared = SharedPrefix(module, cached=True)
    assert [shared.score([request]).token_layers for _ in range(2)] == [(s + own) * LAYERS, own * LAYERS]


def test_the_library_computes_with_the_backbones_own_weights(
    module: ExitRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is copied, and the backbone keeps its attention; a LoRA backbone has layers that it does not know."""
    model, backbone = library_model(module), module.backbone
    assert backbone is not None
    mine = dict(backbone.layers.named_parameters())
    for name, weight in model.layers.named_parameters():
        assert weight.data_ptr() == mine[name].data_ptr()
    assert (model.config._attn_implementation, backbone.config._attn_implementation) == ("sdpa", "segments")
    monkeypatch.setattr(module, "lora", LoraSettings())
    with pytest.raises(ConfigError, match=r"model\.lora is set"):
        library_model(module)


class Reached(Exception):
    """Everything that comes before measuring went well."""


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of `run_engine` for a catalogue of 20 items; it ends where measuring would begin."""
    rows = pl.DataFrame({"split": ["test"], "role": ["target"], "hist": [3]})
    log = SimpleNamespace(items=pl.DataFrame({"item": range(20)}))
    split = SimpleNamespace(interactions=log, rows=rows)

    def load(model: nn.Module, *_: object) -> object:
        model.backbone = nn.Linear(2, 2)
        return SimpleNamespace(plan=SimpleNamespace(calibration=None))

    def bench(model: nn.Module, *others: Any) -> None:
        assert {p.device for p in model.parameters()} == {others[-1]}
        raise Reached("measured")

    monkeypatch.setattr(requests, "load_run", load)
    monkeypatch.setattr(requests, "Bench", bench)
    return {
        "model": nn.Module(),
        "data": SimpleNamespace(prepare_data=lambda: None, tokenizer=None, split=split),
        "checkpoint": "last.ckpt",
        "folder": Path(),
        "settings": None,
        "device": torch.device("cpu"),
        "seconds": 1.0,
        "sizes": [1, 8],
    }


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({}, Reached, "measured"),
        (
            {"device": torch.device("meta")},
            Reached,
            "measured",
        ),  # also the backbone, which is there once the run is loaded
        ({"sizes": [1, 64, 8, 256]}, Reached, "measured"),  # those that the catalogue can fill are measured
        ({"sizes": []}, ConfigError, "--sizes is .*from 1 to 20"),
        ({"sizes": [0]}, ConfigError, "--sizes is .*from 1 to 20"),
        ({"sizes": [21, 64]}, ConfigError, "--sizes is .*from 1 to 20"),
        ({"checkpoint": None}, NotFittedError, "--ckpt_path"),
    ],
    ids=str,
)
def test_what_is_checked_before_measuring(
    arguments: dict[str, Any], changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        requests.run_engine(**arguments | changes)
