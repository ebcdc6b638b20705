"""Tests that the engine gives every candidate the exit and score that it has by itself, whatever runs beside it.

The reference (tests/example_engine.py) runs one candidate at a time through the backbone's own layout and attention and
takes exits from the simulation (`ExitPlan.emitted`): it runs no code of the engine.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from example_engine import (
    EXITS,
    World,
    make_module,
    random_request,
    raw_outputs,
    subset,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from project.data.ragged import Ragged
from project.engine import Engine, RowExits, Scored, StreamCache
from project.engine import engine as engine_module
from project.engine.decisions import nobody_leaves, static_exits
from project.engine.engine import EngineBatch, answers_of_layer
from project.errors import ConfigError
from project.exits.cost import request_cost
from project.exits.criteria import Consistency, Criterion, Learned, Ratio, RatioConsistency
from project.exits.plan import ExitPlan
from project.model.backbone import FAMILIES

CRITERIA = [Ratio(), Consistency(), RatioConsistency(), Learned()]
NEAR = 1e-4  # of a threshold: rounding may decide
Members = list[tuple[int, np.ndarray[Any, Any]]]


def near_threshold(plan: ExitPlan, world: World, request: int) -> np.ndarray[Any, Any]:
    """Candidates of a request whose confidence comes so near a threshold that rounding may move their exit."""
    outputs = world.calibrated(plan, request)
    near = torch.zeros(outputs.logits.shape[0], dtype=torch.bool)
    for head in range(outputs.heads - 1):
        gap = plan.criterion.confidence(outputs.until(head)) - plan.thresholds[head]
        near |= gap.abs() < NEAR
    return near.numpy()


def check(plan: ExitPlan, world: World, members: Members, scores: list[Scored]) -> int:
    """Compare scores of (request, its candidates) with the simulation; returns how many were near a threshold."""
    close = 0
    for (i, index), scored in zip(members, scores, strict=True):
        layer, logit = (t.numpy()[index] for t in plan.emitted(world.calibrated(plan, i)))
        clear = ~near_threshold(plan, world, i)[index]
        np.testing.assert_array_equal(scored.exit_layers[clear], layer[clear])
        np.testing.assert_allclose(scored.logits[clear], logit[clear], atol=1e-5)
        close += int((~clear).sum())
    return close


def everyone(world: World) -> Members:
    return [(i, np.arange(len(r))) for i, r in enumerate(world.requests)]


@pytest.mark.parametrize("cached", [False, True], ids=["not_cached", "cached"])
@pytest.mark.parametrize("exit_0", [True, False], ids=["exit_0", "no_exit_0"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_engine_equals_the_simulation(
    world: World, criterion: Criterion, exit_0: bool, cached: bool
) -> None:
    """Same exits and, to 1e-5, same logits as candidate by candidate; candidates leave at several depths."""
    plan = world.plan(criterion, 0.4, exit_0)
    scores = Engine(world.module, RowExits(plan), StreamCache() if cached else None).score(
        world.requests
    )
    assert check(plan, world, everyone(world), scores) <= 1
    assert len(np.unique(np.concatenate([r.exit_layers for r in scores]))) >= 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_candidates_change_nothing(world: World, data: Any) -> None:
    """Any requests, in any order, with any of their candidates in any order, in batches of any size, cached or not."""
    members: Members = []
    for i in data.draw(
        st.lists(st.integers(0, len(world.requests) - 1), min_size=1, max_size=8)
    ):
        n = len(world.requests[i])
        index = data.draw(
            st.lists(st.integers(0, n - 1), min_size=1, max_size=n + 2), label=f"of {i}"
        )
        members.append((i, np.array(index)))
    plan = world.plan(
        data.draw(st.sampled_from(CRITERIA)), data.draw(st.sampled_from([0.2, 0.5, 0.8]))
    )
    cache = data.draw(st.sampled_from([None, StreamCache()]))
    size = data.draw(st.sampled_from([1, 60, 200, 10_000]))
    read = data.draw(st.sampled_from([0, 50, 10_000]))
    engine = Engine(
        world.module, RowExits(plan), cache, batch_tokens=size, read_tokens=read
    )
    scores = engine.score([subset(world.requests[i], index) for i, index in members])
    assert check(plan, world, members, scores) <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_read_at_answer_positions_is_the_whole_layer(family: str) -> None:
    """Static depths 1, 3 and 5, early exits and cached streams, against the backbone's own layers, one by one: 1e-5.

    Biases (Qwen2) and norms (Qwen3) are drawn, since they start at 0 and 1, where a missing one would not show.
    """
    module = make_module(family=family)
    assert module.backbone is not None
    for name, weight in module.backbone.layers.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    rng = np.random.default_rng(5)
    requests = [
        random_request(rng, f"r{i}", *size)
        for i, size in enumerate([(0, 3), (5, 1), (4, 6)])
    ]
    with torch.no_grad():
        world = World(module, requests, [raw_outputs(module, r) for r in requests])
    plan = world.plan(Ratio(), 0.4)
    for cache in (None, StreamCache()):
        for layer in (1, 3, 5):
            scores = Engine(module, static_exits(plan, layer), cache).score(requests)
            for i, scored in enumerate(scores):
                column = world.calibrated(plan, i).logits[:, plan.layers.index(layer)]
                np.testing.assert_allclose(scored.logits, column.numpy(), atol=1e-5)
        early = Engine(module, RowExits(plan), cache, read_tokens=0).score(requests)
        assert check(plan, world, everyone(world), early) == 0


def test_who_leaves_never_runs_the_layer_that_was_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At static depth 3 layers 0 and 1 run whole, layer 2 is read; its MLP sees one token a candidate."""
    backbone = world.module.backbone
    assert backbone is not None
    tokens = dict[int, list[int]]()
    for index, layer in enumerate(backbone.layers):

        def count(x: torch.Tensor, index: int = index, mlp: Any = layer.mlp.forward) -> Any:
            tokens.setdefault(index, []).append(x.numel() // x.shape[-1])
            return mlp(x)

        monkeypatch.setattr(layer.mlp, "forward", count)
    request = world.requests[2]
    Engine(world.module, static_exits(world.plan(Ratio(), 0.4), 3)).score([request])
    whole = len(request.stream) + len(request.candidates.values)
    assert tokens == {0: [whole], 1: [whole], 2: [len(request)]}


def test_without_exits_it_is_the_plain_forward_bit_for_bit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of infinity: heads at every exit, nobody leaves, and the last logits are those of one run 0..L.

    The last layer for answer positions alone, as a static model reads it: same shapes, same kernels.
    """
    plan = world.plan(Ratio(), 0.4)
    states, embed = [], EngineBatch._embed

    def kept(self: EngineBatch) -> Any:
        states.append((self, embed(self)))
        return states[-1][1]

    monkeypatch.setattr(EngineBatch, "_embed", kept)
    engine = Engine(world.module, RowExits(nobody_leaves(plan)))
    scores = engine.score(world.requests)
    batch, state = states[0]
    backbone = engine.backbone
    with torch.inference_mode():
        state = backbone.run(state, 0, EXITS[-1] - 1)
        hidden = answers_of_layer(backbone.layers[EXITS[-1] - 1], state, batch.structure)
        logits = world.module.heads[str(EXITS[-1])](hidden).double()
        exit_0 = torch.from_numpy(np.concatenate([r.exit_0 for r in world.requests]))
        plain = plan.calibration.apply(
            torch.stack([exit_0, exit_0, exit_0, exit_0, logits], dim=1)
        )[:, -1]
    np.testing.assert_array_equal(np.concatenate([r.logits for r in scores]), plain.numpy())
    assert all((r.exit_layers == EXITS[-1]).all() for r in scores)


@pytest.mark.parametrize("layer", [0, 1, 3, 5])
def test_static_depth_is_that_head_for_everyone(world: World, layer: int) -> None:
    """One head, token-layers = layer * tokens."""
    plan = world.plan(Ratio(), 0.4)
    scores = Engine(world.module, static_exits(plan, layer)).score(world.requests)
    column = plan.layers.index(layer)
    for i, (request, scored) in enumerate(zip(world.requests, scores, strict=True)):
        expected = world.calibrated(plan, i).logits[:, column].numpy()
        np.testing.assert_allclose(scored.logits, expected, atol=1e-5)
        assert (scored.exit_layers == layer).all()
        assert scored.token_layers == layer * (
            len(request.stream) + len(request.candidates.values)
        )


@pytest.mark.parametrize("read", [0, 10_000], ids=["read", "whole"])
@pytest.mark.parametrize("exit_0", [True, False], ids=["exit_0", "no_exit_0"])
def test_counter_is_the_reported_cost(world: World, exit_0: bool, read: int) -> None:
    """Token-layers that ran = `exits.cost.request_cost` of the exit layers, with no stream cached and with all."""
    plan, cache = world.plan(Ratio(), 0.4, exit_0), StreamCache()
    not_cached = Engine(world.module, RowExits(plan), read_tokens=read).score(
        world.requests
    )
    Engine(world.module, static_exits(plan, EXITS[-1]), cache).score(world.requests)
    cached = Engine(world.module, RowExits(plan), cache, read_tokens=read).score(
        world.requests
    )
    request = torch.cat([torch.full((len(r),), i) for i, r in enumerate(world.requests)])
    own = torch.from_numpy(np.concatenate([r.candidates.lengths for r in world.requests]))
    shared = torch.tensor([len(world.requests[i].stream) for i in request.tolist()])
    spent = []
    for scores, prefix_cached in ((cached, True), (not_cached, False)):
        layers = torch.from_numpy(np.concatenate([r.exit_layers for r in scores]))
        expected = request_cost(request, layers, own, shared, prefix_cached)
        assert [r.token_layers for r in scores] == expected.tolist()
        spent.append(sum(r.token_layers for r in scores))
    assert 0 < spent[0] < spent[1]


@pytest.mark.parametrize("exit_0", [True, False], ids=["exit_0", "no_exit_0"])
@pytest.mark.parametrize("head", range(5))
@pytest.mark.parametrize("policy", ["plan", "never"])
def test_past_its_deadline_a_request_leaves_at_the_next_exit(
    world: World, monkeypatch: pytest.MonkeyPatch, policy: str, head: int, exit_0: bool
) -> None:
    """The clock, which is read once an exit, passes the deadline of every second request in front of exit `head`.

    Its candidates leave where the plan has them leave, or at that exit with its calibrated logit, if they come so far;
    the other requests are not touched, and read no clock where all have no deadline.
    """
    plan = world.plan(Ratio(), 0.4, exit_0)
    if policy == "never":
        plan = nobody_leaves(plan)
    engine, cut, ticks = (
        Engine(world.module, RowExits(plan)),
        min(head, len(plan.layers) - 1),
        count(),
    )
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: float(next(ticks)))
    hurried = [
        replace(r, deadline=cut - 0.5 if i % 2 else np.inf)
        for i, r in enumerate(world.requests)
    ]
    scores, plain = engine.score(hurried), engine.score(world.requests)
    assert next(ticks) == cut + 1
    for i, (scored, free) in enumerate(zip(scores, plain, strict=True)):
        deepest = plan.layers[cut] if i % 2 else EXITS[-1]
        expected = world.calibrated(plan, i).logits.numpy()
        layers = np.minimum(free.exit_layers, deepest)
        np.testing.assert_array_equal(scored.exit_layers, layers)
        heads = [plan.layers.index(layer) for layer in layers]
        np.testing.assert_allclose(
            scored.logits, expected[np.arange(len(heads)), heads], atol=1e-5
        )
        assert scored.late == bool((free.exit_layers > deepest).any())
        assert scored.token_layers == free.token_layers or scored.late


def test_unusable_requests_do_not_affect_the_others(world: World) -> None:
    """No candidate, no history at all, a candidate twice, unknown tokens, NaN features, an empty candidate."""
    plan, few = world.plan(Ratio(), 0.4), world.requests[6]
    bare = replace(random_request(np.random.default_rng(1), "bare", 0, 3), user=None)
    bare = replace(
        bare, stream=type(bare.stream).of(Ragged.of([]), np.zeros(0, dtype=np.int64))
    )
    broken = {
        "token ids from": replace(few, candidates=Ragged.of([[3], [64]])),
        "NaN": replace(few, retrieved=np.full((2, 3), np.nan)),
        "no token": replace(few, candidates=Ragged.of([[3], []])),
        "exit 0 of shape (1,)": replace(few, exit_0=few.exit_0[:1]),
    }
    nothing, twice = (
        subset(few, np.array(index, dtype=np.int64)) for index in ([], [1, 1, 0])
    )
    requests = [world.requests[2], twice, *broken.values(), nothing, bare]
    scores = Engine(world.module, RowExits(plan), StreamCache()).score(requests)
    first, second, *failed, empty, alone = scores
    check(plan, world, [(2, np.arange(12)), (6, np.array([1, 1, 0]))], [first, second])
    assert second.logits[0] == pytest.approx(second.logits[1], abs=1e-6)
    assert (len(empty.logits), empty.error, empty.token_layers) == (0, None, 0)
    for words, scored in zip(broken, failed, strict=True):
        assert words in str(scored.error)
        assert np.isnan([*scored.logits, *scored.probabilities]).all()
    assert {first.error, second.error, alone.error} == {None}
    with torch.no_grad():
        layer, logit = plan.emitted(plan.calibrated(raw_outputs(world.module, bare)))
    np.testing.assert_array_equal(alone.exit_layers, layer.numpy())
    np.testing.assert_allclose(alone.logits, logit.numpy(), atol=1e-5)


def test_a_plan_of_other_exits_is_refused(world: World) -> None:
    plan, layers = world.plan(Ratio(), 0.4), (0, 1, 2, 4, 5)
    other = replace(plan, calibration=replace(plan.calibration, layers=layers))
    with pytest.raises(ConfigError, match=r"\(0, 1, 2, 4, 5\).*\[1, 2, 3, 5\]"):
        Engine(world.module, RowExits(other))
    with pytest.raises(ConfigError, match="exit of layer 4"):
        static_exits(plan, 4)
