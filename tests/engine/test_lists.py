"""Tests that candidates of a list leave as the simulation says, whatever runs beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from example_engine import EXITS, World, random_request, subset, with_thresholds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from project.engine import Engine, ListExits, RowExits, StreamCache
from project.engine.decisions import EveryHead
from project.exits.criteria import HeadOutputs, Ratio
from project.exits.plan import ExitPlan
from project.exits.ranking import Lists, list_keys
from project.exits.top_k import TopK, overlap_at_k
from project.request import Scored

# margins at exits 0, 1, 2, 3 and 5 for lists of 1, and of 2 to 4
LISTS = Lists(
    {
        1: torch.tensor([1.0, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64),
        4: torch.tensor([0.9, 0.4, torch.inf, 0.1, 0.0], dtype=torch.float64),
    }
)
NEAR = 1e-4  # of a margin: rounding may decide


def simulated(plan: ExitPlan, k: int, outputs: HeadOutputs) -> tuple[Tensor, bool]:
    """Heads (n,) that one request's candidates leave at, and whether rounding cannot move them."""
    if not k:
        exits = plan.exits(outputs)
        confidence = [plan.criterion.confidence(outputs.until(h)) for h in range(4)]
        gaps = torch.stack(confidence, dim=1) - plan.thresholds[:4]
        return exits, bool((gaps.abs() > NEAR).all())
    request = torch.zeros(len(outputs.logits), dtype=torch.int64)
    margins = LISTS.top_k(k).margins
    found = [TopK(k, margins + move).exits(request, outputs) for move in (0.0, NEAR, -NEAR)]
    return found[0], all(torch.equal(found[0], other) for other in found)


def check(plan: ExitPlan, k: int, outputs: HeadOutputs, scored: Scored) -> bool:
    """Compare a request's scores with the simulation; returns whether rounding could have moved them."""
    candidates = len(outputs.logits)
    k = k if k <= 4 and k < candidates else 0
    exits, clear = simulated(plan, k, outputs)
    assert (scored.list_of, scored.error) == (k, None)
    if clear:
        layers = np.array(plan.layers)[exits.numpy()]
        np.testing.assert_array_equal(scored.exit_layers, layers)
        left_with = outputs.logits.gather(1, exits[:, None]).squeeze(1)
        np.testing.assert_allclose(scored.logits, left_with.numpy(), atol=1e-5)
        if k:
            listed = torch.zeros(candidates, dtype=torch.float64)
            listed[scored.best_first(k)] = 1
            one = torch.zeros(candidates, dtype=torch.int64)
            assert overlap_at_k(one, listed, list_keys(outputs, exits), k).item() == 1
            assert set(scored.exit_layers[scored.best_first(k)]) == {EXITS[-1]}
    return not clear


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lists_and_scores_share_a_batch(world: World, data: Any) -> None:
    """Any requests with lists of any length or none, any candidates, batches of any size, cached or not."""
    requests = []
    expected = []
    plan = world.plan(Ratio(), data.draw(st.sampled_from([0.2, 0.5, 0.8])))
    places = st.lists(st.integers(0, len(world.requests) - 1), min_size=1, max_size=8)
    for i in data.draw(places):
        n = len(world.requests[i])
        some = st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True)
        index = np.array(data.draw(some))
        k = data.draw(st.sampled_from([0, 1, 2, 4, 5, 50]))
        requests.append(replace(subset(world.requests[i], index), list_of=k))
        outputs = world.calibrated(plan, i).rows(torch.from_numpy(index))
        expected.append((k, outputs))
    cache = data.draw(st.sampled_from([None, StreamCache()]))
    size = data.draw(st.sampled_from([1, 200, 10_000]))
    read = data.draw(st.sampled_from([0, 50, 10_000]))
    decision = ListExits(plan, LISTS)
    engine = Engine(world.module, decision, cache, batch_tokens=size, read_tokens=read)
    scores = engine.score(requests)
    near = sum(
        check(plan, *own, scored) for own, scored in zip(expected, scores, strict=True)
    )
    assert near <= 2


@pytest.mark.slow
def test_ten_thousand_requests(world: World) -> None:
    """Small random requests, half of them for lists: every exit is the simulation's on scores of all heads."""
    rng = np.random.default_rng(0)
    requests = [
        replace(
            random_request(rng, f"r{i}", int(rng.integers(3)), int(rng.integers(1, 8))),
            list_of=int(rng.choice([0, 0, 1, 2, 4, 9])),
        )
        for i in range(10_000)
    ]
    plan = world.plan(Ratio(), 0.4)
    every = EveryHead(plan.calibration)
    Engine(world.module, every).score(requests)
    outputs = HeadOutputs(
        plan.layers,
        torch.cat([batch.logits for batch in every.outputs]),
        torch.cat([batch.retrieved for batch in every.outputs]),
    )
    scores = Engine(world.module, ListExits(plan, LISTS)).score(requests)
    start = near = left = 0
    for request, scored in zip(requests, scores, strict=True):
        n = len(request)
        own = outputs.rows(torch.arange(start, start + n))
        start += n
        near += check(plan, request.list_of, own, scored)
        left += bool(scored.list_of) and scored.exit_layers.min() < EXITS[-1]
    assert near < 100
    assert left > 1000


def test_infinite_margins_are_full_depth(world: World) -> None:
    """Nobody leaves, so nobody that left could overtake a listed one; heads between cost no wait."""
    plan = world.plan(Ratio(), 0.4)
    never = Lists({50: torch.full((5,), torch.inf, dtype=torch.float64)})
    asked = [replace(r, list_of=max(1, len(r) - 1)) for r in world.requests]
    decision = ListExits(plan, never)
    scores = Engine(world.module, decision).score(asked)
    assert [decision.known(h, np.array([3, 7])) for h in range(5)] == [*[False] * 4, True]
    for i, scored in enumerate(scores):
        if scored.list_of:
            full = world.calibrated(plan, i).logits[:, -1].numpy()
            assert set(scored.exit_layers) == {EXITS[-1]}
            assert scored.best_first() == np.argsort(-full, kind="stable").tolist()


def test_a_list_as_long_as_the_request_is_scored_by_the_plan(world: World) -> None:
    """As are longer ones, those beyond the longest margins, requests of one candidate; full depth decides no list."""
    plan = world.plan(Ratio(), 0.4)
    plain = Engine(world.module, RowExits(plan)).score(world.requests)
    for asked in (12, 50):
        requests = [replace(r, list_of=asked) for r in world.requests]
        for decision in (ListExits(plan, LISTS), RowExits(plan)):
            for scored, expected in zip(
                Engine(world.module, decision).score(requests), plain, strict=True
            ):
                assert scored.list_of == 0
                np.testing.assert_array_equal(scored.exit_layers, expected.exit_layers)
    lengths = [LISTS.length(k, n) for k, n in ((1, 1), (1, 2), (4, 4), (4, 5), (5, 9))]
    assert lengths == [0, 1, 0, 4, 0]
    outputs = world.calibrated(plan, 2)
    one = torch.zeros(12, dtype=torch.int64)
    for k in (12, 13):
        assert (TopK(k, torch.zeros(5)).exits(one, outputs) == 4).all()


def test_a_request_whose_scores_are_nan_costs_the_others_nothing(world: World) -> None:
    """Two requests beside one without numbers, whose candidates leave with them; ties at the border all stay."""
    decision = ListExits(world.plan(Ratio(), 0.4), LISTS)
    logits = torch.tensor([[3.0, 2.5, 2.5, 1.0, 5.0, 5.0, 5.0, 0.0]], dtype=torch.float64).T
    request = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    outputs = HeadOutputs.of((0,), logits)
    alone = decision.leaves(request, np.array([1] * 4 + [2] * 4), outputs)
    # below 3 - 1 leave, and below 5 - .9
    assert alone.tolist() == [False, False, False, True, False, False, False, True]
    mixed = HeadOutputs.of(
        (0,), torch.cat([logits[:4], logits[:2] * torch.nan, logits[4:]])
    )
    among = decision.leaves(
        torch.cat([request[:4], torch.tensor([1, 1]), request[4:]]),
        np.array([1] * 6 + [2] * 4),
        mixed,
    )
    assert among[[0, 1, 2, 3, 6, 7, 8, 9]].tolist() == alone.tolist()
    assert among[4:6].all()


def test_best_first() -> None:
    """Those that stayed longer come first in a list, else the more probable; ties in the order of the request."""
    scored = Scored("", np.array([3.0, 1, 2, 2]), np.array([0, 6, 6, 6]))
    assert scored.best_first() == [0, 2, 3, 1]
    assert replace(scored, list_of=2).best_first(2) == [2, 3]
    assert replace(scored, list_of=2).best_first() == [2, 3, 1, 0]
    assert scored.left_at == {0: 1, 6: 3}


def test_who_cannot_reach_the_list_runs_no_layer(world: World) -> None:
    """With margin 0 at exit 0 two of twelve run; a request whose plan has everyone leave there runs no history."""
    plan = world.plan(Ratio(), 0.4)
    at_once = Lists({2: torch.tensor([0.0, *[torch.inf] * 4], dtype=torch.float64)})
    leaves = with_thresholds(plan, [-np.inf] * 5)
    listed = replace(world.requests[2], list_of=2)
    first, second = Engine(world.module, ListExits(leaves, at_once)).score(
        [listed, world.requests[7]]
    )
    assert first.left_at == {0: 10, EXITS[-1]: 2}
    stayed = np.flatnonzero(first.exit_layers)
    own = int(listed.candidates.lengths[stayed].sum())
    assert first.token_layers == EXITS[-1] * (len(listed.stream) + own)
    assert (second.left_at, second.token_layers) == ({0: len(second.logits)}, 0)
