"""A layer read at answer positions alone is the layer, in every family; what it saves is not seen in the cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_engine import EXITS, FAMILIES, World, make_module, random_request, raw_outputs

from project.engine import Engine, RowExits, StreamCache
from project.engine.decisions import static_exits
from project.exits.criteria import Ratio


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_whole_layer(family: str) -> None:
    """Static depths 1, 3 and 5, early exits and cached streams, against the backbone's own layers, one by one: 1e-5.

    Biases (Qwen2) and norms (Qwen3) are drawn, since they start at 0 and 1, where a missing one would not show.
    """
    module = make_module(family=family)
    assert module.backbone is not None
    for name, weight in module.backbone.layers.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    rng = np.random.default_rng(5)
    requests = [random_request(rng, f"r{i}", *size) for i, size in enumerate([(0, 3), (5, 1), (4, 6)])]
    with torch.no_grad():
        world = World(module, requests, [raw_outputs(module, r) for r in requests])
    plan = world.plan(Ratio(), 0.4)
    for cache in (None, StreamCache()):
        for layer in (1, 3, 5):
            scores = Engine(module, static_exits(plan, layer), cache).score(requests)
            for i, scored in enumerate(scores.requests):
                column = world.calibrated(plan, i).logits[:, plan.layers.index(layer)]
                np.testing.assert_allclose(scored.logits, column.numpy(), atol=1e-5)
        early = Engine(module, RowExits(plan), cache, read_tokens=0).score(requests).requests
        for i, scored in enumerate(early):
            layer, logit = (t.numpy() for t in plan.emitted(world.calibrated(plan, i)))
            np.testing.assert_array_equal(scored.exit_layers, layer)
            np.testing.assert_allclose(scored.logits, logit, atol=1e-5)


def test_who_leaves_never_runs_the_layer_that_was_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At static depth 3 layers 0 and 1 run whole, layer 2 is read; its MLP sees one token a candidate."""
    backbone = world.module.backbone
    assert backbone is not None
    tokens = dict[int, list[int]]()
    for index, layer in enumerate(backbone.layers):
        mlp = layer.mlp.forward

        def count(x: torch.Tensor, index: int = index, mlp: object = mlp) -> torch.Tensor:
            tokens.setdefault(index, []).append(x.numel() // x.shape[-1])
            return mlp(x)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(layer.mlp, "forward", count)
    request = world.requests[2]
    Engine(world.module, static_exits(world.plan(Ratio(), 0.4), 3)).score([request])
    whole = len(request.stream) + len(request.candidates.values)
    assert tokens == {0: [whole], 1: [whole], 2: [len(request)]}


def test_a_stream_in_front_of_a_layer_goes_on_from_there(world: World) -> None:
    """The first request leaves at exit 2, where layer 1 is only read; the second runs it whole, and is not charged."""
    cache, plan = StreamCache(), world.plan(Ratio(), 0.4)
    request = world.requests[8]
    Engine(world.module, static_exits(plan, 2), cache).score([request])
    deep = Engine(world.module, static_exits(plan, EXITS[-1]), cache).score([request]).requests[0]
    plain = Engine(world.module, static_exits(plan, EXITS[-1])).score([request]).requests[0]
    np.testing.assert_allclose(deep.logits, plain.logits, atol=1e-5)
    own = EXITS[-1] * len(request.candidates.values)
    assert deep.token_layers == own + (EXITS[-1] - 2) * len(request.stream)
