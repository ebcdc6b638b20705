"""The engine gives every candidate the exit and the score that it has all by itself, in whatever company it runs.

Unusual here: the reference (tests/example_engine.py) runs one candidate at a time through the backbone's own layout and
attention and asks the simulation (`ExitPlan.emitted`), so structured attention, compaction, packing and the served
policy are all compared with code that knows nothing of the engine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from example_engine import EXITS, World, random_request, raw_outputs, subset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from project.data.ragged import Ragged
from project.engine import Engine, ListExits, RowExits, Scores, StreamCache
from project.engine.decisions import static_exits
from project.engine.engine import EngineBatch, answers_of_layer
from project.errors import ConfigError
from project.exits.cost import request_cost
from project.exits.criteria import Consistency, Criterion, Learned, Ratio, RatioConsistency
from project.exits.plan import ExitPlan
from project.exits.policy import Policy
from project.exits.top_k import TopK

CRITERIA = [Ratio(), Consistency(), RatioConsistency(), Learned()]
NEAR = 1e-4  # of a threshold: rounding may decide


def near_threshold(plan: ExitPlan, world: World, request: int) -> np.ndarray:
    """Candidates of a request whose confidence comes so near a threshold that rounding may move their exit."""
    outputs = world.calibrated(plan, request)
    near = torch.zeros(outputs.logits.shape[0], dtype=torch.bool)
    for head in range(outputs.heads - 1):
        gap = plan.policy.criterion.confidence(outputs.until(head)) - plan.policy.thresholds[head]
        near |= gap.abs() < NEAR
    return near.numpy()


def check(plan: ExitPlan, world: World, members: list[tuple[int, np.ndarray]], scores: Scores) -> int:
    """Compare scores of (request, its candidates) with the simulation; returns how many were near a threshold."""
    close = 0
    for (i, index), scored in zip(members, scores.requests, strict=True):
        layer, logit = (t.numpy()[index] for t in plan.emitted(world.calibrated(plan, i)))
        clear = ~near_threshold(plan, world, i)[index]
        np.testing.assert_array_equal(scored.exit_layers[clear], layer[clear])
        np.testing.assert_allclose(scored.logits[clear], logit[clear], atol=1e-5)
        close += int((~clear).sum())
    return close


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
@pytest.mark.parametrize("exit_0", [True, False], ids=["exit_0", "no_exit_0"])
@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_engine_does_what_the_simulation_says(
    world: World, criterion: Criterion, exit_0: bool, cached: bool
) -> None:
    """Same exits and, to 1e-5, same logits as candidate by candidate; candidates leave at several depths."""
    plan = world.plan(criterion, 0.4, exit_0)
    engine = Engine(world.module, RowExits(plan), StreamCache() if cached else None)
    scores = engine.score(world.requests)
    everyone = [(i, np.arange(len(r))) for i, r in enumerate(world.requests)]
    assert check(plan, world, everyone, scores) <= 1
    assert len(np.unique(np.concatenate([r.exit_layers for r in scores.requests]))) >= 3


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_company_changes_nothing(world: World, data: Any) -> None:
    """Any requests, in any order, with any of their candidates in any order, in batches of any size, cached or not."""
    chosen = data.draw(st.lists(st.integers(0, len(world.requests) - 1), min_size=1, max_size=8))
    members = []
    for i in chosen:
        n = len(world.requests[i])
        index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n + 2), label=f"of {i}")
        members.append((i, np.array(index)))
    plan = world.plan(data.draw(st.sampled_from(CRITERIA)), data.draw(st.sampled_from([0.2, 0.5, 0.8])))
    cache = data.draw(st.sampled_from([None, StreamCache()]))
    size = data.draw(st.sampled_from([1, 60, 200, 10_000]))
    read = data.draw(st.sampled_from([0, 50, 10_000]))
    engine = Engine(world.module, RowExits(plan), cache, batch_tokens=size, read_tokens=read)
    scores = engine.score([subset(world.requests[i], index) for i, index in members])
    assert check(plan, world, members, scores) <= 2


def test_without_exits_it_is_the_plain_forward_bit_for_bit(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of infinity: heads at every exit, nobody leaves, and the last logits are those of one run 0..L.

    The last layer for answer positions alone, as a static model reads it. Same shapes, same kernels, so equality is
    exact; that both are right is said by the tests above.
    """
    plan = world.plan(Ratio(), 0.4)
    thresholds = torch.full_like(plan.policy.thresholds, torch.inf)
    thresholds[-1] = -torch.inf
    never = replace(plan, policy=Policy(Ratio(), thresholds, plan.layers))
    states = []
    embed = EngineBatch._embed
    monkeypatch.setattr(
        EngineBatch, "_embed", lambda self: states.append((self, embed(self))) or states[-1][1]
    )
    engine = Engine(world.module, RowExits(never))
    scores = engine.score(world.requests)
    assert scores.syncs == 1  # the results
    batch, state = states[0]
    backbone = engine.backbone
    with torch.inference_mode():
        state = backbone.run(state, 0, EXITS[-1] - 1)
        hidden = answers_of_layer(backbone.layers[EXITS[-1] - 1], state, batch.structure)
        logits = world.module.heads[str(EXITS[-1])](hidden).double()
        exit_0 = torch.from_numpy(np.concatenate([r.exit_0 for r in world.requests]))
        plain = plan.calibration.apply(torch.stack([exit_0, exit_0, exit_0, exit_0, logits], dim=1))[:, -1]
    np.testing.assert_array_equal(np.concatenate([r.logits for r in scores.requests]), plain.numpy())
    assert all((r.exit_layers == EXITS[-1]).all() for r in scores.requests)


@pytest.mark.parametrize("layer", [0, 1, 3, 5])
def test_static_depth_is_that_head_for_everyone(world: World, layer: int) -> None:
    """One head, no sync on the way, token-layers = layer * tokens."""
    plan = world.plan(Ratio(), 0.4)
    scores = Engine(world.module, static_exits(plan, layer)).score(world.requests)
    column = plan.layers.index(layer)
    for i, (request, scored) in enumerate(zip(world.requests, scores.requests, strict=True)):
        np.testing.assert_allclose(
            scored.logits, world.calibrated(plan, i).logits[:, column].numpy(), atol=1e-5
        )
        assert (scored.exit_layers == layer).all()
        assert scored.token_layers == layer * (len(request.stream) + len(request.candidates.values))
    assert scores.syncs == 1


@pytest.mark.parametrize("read", [0, 10_000], ids=["read", "whole"])
@pytest.mark.parametrize("exit_0", [True, False], ids=["exit_0", "no_exit_0"])
def test_counter_is_the_reported_cost(world: World, exit_0: bool, read: int) -> None:
    """Token-layers that ran = `exits.cost.request_cost` of the exit layers, cold, and warm with all streams cached."""
    plan = world.plan(Ratio(), 0.4, exit_0)
    cache = StreamCache()
    cold = Engine(world.module, RowExits(plan), read_tokens=read).score(world.requests)
    Engine(world.module, static_exits(plan, EXITS[-1]), cache).score(world.requests)
    warm = Engine(world.module, RowExits(plan), cache, read_tokens=read).score(world.requests)
    request = torch.cat([torch.full((len(r),), i) for i, r in enumerate(world.requests)])
    own = torch.from_numpy(np.concatenate([r.candidates.lengths for r in world.requests]))
    shared = torch.tensor([len(world.requests[i].stream) for i in request.tolist()])
    for scores, cached in ((cold, False), (warm, True)):
        layers = torch.from_numpy(np.concatenate([r.exit_layers for r in scores.requests]))
        expected = request_cost(request, layers, own, shared, cached)
        assert [r.token_layers for r in scores.requests] == expected.tolist()
    assert 0 < warm.token_layers < cold.token_layers


def test_best_k_leave_as_simulated(world: World) -> None:
    """Ranking exits: same exits as `TopK.exits` on candidate-by-candidate outputs."""
    plan = world.plan(Ratio(), 0.4)
    top_k = TopK(2, torch.tensor([1.5, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64))
    scores = Engine(world.module, ListExits(top_k, plan.calibration)).score(world.requests)
    left = 0
    for i, scored in enumerate(scores.requests):
        outputs = world.calibrated(plan, i)
        exits = top_k.exits(torch.zeros(len(scored.logits), dtype=torch.int64), outputs)
        np.testing.assert_array_equal(scored.exit_layers, np.array(plan.layers)[exits.numpy()])
        left += int((exits < 4).sum())
    assert left > 5


def test_unusable_requests_cost_the_others_nothing(world: World) -> None:
    """No candidate, no history at all, a candidate twice, unknown tokens, NaN in features, an empty candidate."""
    plan = world.plan(Ratio(), 0.4)
    good, few = world.requests[2], world.requests[6]
    rng = np.random.default_rng(1)
    bare = replace(random_request(rng, "bare", 0, 3), user=None)
    nothing = Ragged.of([])
    bare = replace(bare, stream=type(bare.stream).of(nothing, np.zeros(0, dtype=np.int64)))
    requests = [
        good,
        subset(few, np.array([], dtype=np.int64)),
        replace(few, request_id="vocabulary", candidates=Ragged.of([[3], [64]])),
        replace(few, request_id="nan", retrieved=np.full((2, 3), np.nan)),
        replace(few, request_id="hollow", candidates=Ragged.of([[3], []])),
        replace(few, request_id="short", exit_0=few.exit_0[:1]),
        subset(few, np.array([1, 1, 0])),
        bare,
    ]
    scores = Engine(world.module, RowExits(plan), StreamCache()).score(requests)
    usable = [scores.requests[0], scores.requests[6]]
    check(plan, world, [(2, np.arange(12)), (6, np.array([1, 1, 0]))], Scores(usable))
    assert scores.requests[6].logits[0] == pytest.approx(scores.requests[6].logits[1], abs=1e-6)
    empty = scores.requests[1]
    assert (len(empty.logits), empty.error, empty.token_layers) == (0, None, 0)
    texts = [r.error for r in scores.requests]
    assert [i for i, text in enumerate(texts) if text is not None] == [2, 3, 4, 5]
    assert "token ids from" in str(texts[2])
    assert "NaN" in str(texts[3])
    assert "no token" in str(texts[4])
    assert "exit 0 of shape (1,)" in str(texts[5])
    assert all(np.isnan(scores.requests[i].logits).all() for i in (2, 3, 4, 5))
    assert all(np.isnan(scores.requests[i].probabilities).all() for i in (2, 3, 4, 5))
    with torch.no_grad():
        layer, logit = plan.emitted(plan.calibrated(raw_outputs(world.module, bare)))
    np.testing.assert_array_equal(scores.requests[7].exit_layers, layer.numpy())
    np.testing.assert_allclose(scores.requests[7].logits, logit.numpy(), atol=1e-5)


def test_a_plan_of_other_exits_is_refused(world: World) -> None:
    """A plan for a layer without a head names both."""
    plan = world.plan(Ratio(), 0.4)
    layers = (0, 1, 2, 4, 5)
    other = replace(
        plan,
        policy=Policy(Ratio(), plan.policy.thresholds, layers),
        calibration=replace(plan.calibration, layers=layers),
    )
    with pytest.raises(ConfigError, match=r"\(0, 1, 2, 4, 5\).*\[1, 2, 3, 5\]"):
        Engine(world.module, RowExits(other))
    with pytest.raises(ConfigError, match="depth 4"):
        static_exits(plan, 4)
