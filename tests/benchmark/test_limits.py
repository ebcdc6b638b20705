"""What a machine allows: FLOPs by layer and least seconds of a backbone, by hand; ceilings on a clock of our own."""

from __future__ import annotations

import numpy as np
import pytest
from example_engine import make_module, random_request

from project.benchmark import engine as limits_module
from project.benchmark.engine import Limits, useful_flops
from project.engine import Scored

LINEAR = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # weights of a layer


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tick around every layer with one row, one around a product of 10 tokens, 32 x 48 weights.

    So 5 layers of 4 bytes a weight are read in 1 s, and there are 2 * 10 * 32 * 48 FLOPs in 1 s.
    """
    module = make_module()
    assert module.backbone is not None
    asked: list[int] = []
    for layer in module.backbone.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    ticks = iter([1.0, 2.0, 5.0, 6.0])
    monkeypatch.setattr(limits_module.time, "perf_counter", lambda: next(ticks))
    found = Limits.measure(module, tokens=10)
    size = LINEAR * 4
    assert found == Limits(
        pytest.approx(2 * 10 * 32 * 48 / 1e9), pytest.approx(5 * size / 1e9), pytest.approx(size)
    )
    assert sorted(asked) == [1] * 5 + [10]


def test_useful_flops() -> None:
    """By hand, exits at layers 0, 1 and 3 of three candidates of o tokens after a stream of s tokens that ran.

    Layer 1: whole for the third candidate and the stream; keys and values of the second candidate, the rest of its
    answer slot alone. Layer 2: whole for the third and the stream. Layer 3, the last: keys and values of the third
    and the stream, the rest of one answer slot. A query sees the stream and itself; 4 heads of width 8.
    """
    module = make_module()
    request = random_request(np.random.default_rng(0), "r", 3, 3)
    s, o = len(request.stream), request.candidates.lengths.astype(float)
    scored = Scored("r", np.zeros(3), np.array([0, 1, 3]), int(o[1] + 3 * o[2] + 3 * s))
    owed, of_stream, of_third = 2 * 32 * 16, s * (s + 1) / 2, o[2] * s + o[2] * (o[2] + 1) / 2
    linear = [
        LINEAR * (o[2] + s) + owed * o[1] + (LINEAR - owed),
        LINEAR * (o[2] + s),
        owed * (o[2] + s) + (LINEAR - owed),
    ]
    seen = [of_third + of_stream + s + o[1], of_third + of_stream, s + o[2]]
    expected = [2 * a + 4 * 4 * 8 * b for a, b in zip(linear, seen, strict=True)]
    np.testing.assert_allclose(useful_flops(scored, request, module), expected)
    cached = Scored("r", np.zeros(3), np.array([0, 1, 3]), int(o[1] + 3 * o[2]))
    least = 2 * LINEAR * s + 4 * 4 * 8 * of_stream
    np.testing.assert_allclose(
        useful_flops(scored, request, module) - useful_flops(cached, request, module),
        [least, least, 2 * owed * s],
    )


def test_who_never_enters_the_backbone_owes_nothing() -> None:
    """Exit 0 for all, and a request that could not be scored: no layer."""
    module, request = make_module(), random_request(np.random.default_rng(0), "r", 2, 3)
    for layer in (0, -1):
        scored = Scored("r", np.zeros(3), np.full(3, layer), 0)
        assert useful_flops(scored, request, module).shape == (0,)
    assert Limits(1.0, 1.0, 1.0).least_seconds([]) == 0


def test_least_seconds() -> None:
    """At 10 GFLOP/s, weights of 4 GB at 2 GB/s: a layer takes 2 s at least, 20 GFLOP are as long.

    Alone: 30 and 5 GFLOP take 3 + 2 s. With a request of 25, 10 and 10 GFLOP: 55, 15 and 10 take 5.5 + 2 + 2 s, less
    than the 5 and 6.5 s of the two apart.
    """
    limits = Limits(gflops=10.0, gbytes=2.0, layer_bytes=4e9)
    one, other = np.array([30e9, 5e9]), np.array([25e9, 10e9, 10e9])
    assert limits.least_seconds([one]) == pytest.approx(5)
    assert limits.least_seconds([other]) == pytest.approx(6.5)
    assert limits.least_seconds([one, other]) == pytest.approx(9.5)


def test_median() -> None:
    """Each ceiling's own."""
    found = Limits.median([Limits(1.0, 30.0, 5.0), Limits(2.0, 10.0, 5.0), Limits(9.0, 20.0, 5.0)])
    assert found == Limits(2.0, 20.0, 5.0)
