"""A cached stream changes what a request costs, never what it scores: cold == warm == extended == cut == rebuilt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from example_engine import EXITS, World, random_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from project.data.ragged import Ragged
from project.engine import Engine, PreparedRequest, RowExits, StreamCache, StreamTokens
from project.engine.decisions import static_exits
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.exits.policy import Policy


def history(first: int, stop: int, tied: int = 0) -> StreamTokens:
    """The instruction, then segments first..stop-1 of one endless history; the last `tied` share a group."""
    rng = np.random.default_rng(7)
    endless = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 7, 40)]
    group = 1 + np.arange(stop - first)
    if tied:
        group[-tied:] = group[-tied]
    return StreamTokens.of(Ragged.of([[5, 6, 7], *endless[first:stop]]), np.concatenate([[0], group]))


def asked(stream: StreamTokens, seed: int = 3, candidates: int = 6) -> PreparedRequest:
    """Random candidates behind a stream, of one and the same user."""
    return replace(random_request(np.random.default_rng(seed), "x", 0, candidates), stream=stream, user="u")


def never(world: World) -> ExitPlan:
    """Heads at every exit, and nobody leaves before the last."""
    plan = world.plan(Ratio(), 0.4)
    thresholds = torch.tensor([torch.inf] * (len(plan.layers) - 1) + [-torch.inf], dtype=torch.float64)
    return replace(plan, policy=Policy(Ratio(), thresholds, plan.layers))


def tokens_run(world: World, cache: StreamCache | None, request: PreparedRequest) -> tuple[np.ndarray, int]:
    """Logits at full depth, and token-layers."""
    plan = world.plan(Ratio(), 0.4)
    scored = Engine(world.module, static_exits(plan, EXITS[-1]), cache).score([request]).requests[0]
    return scored.logits, scored.token_layers


def test_growing_history_extends_the_stream(world: World) -> None:
    """Only new tokens and candidates run; a history that ends earlier is served from the same stream."""
    cache = StreamCache()
    for stop, before in ((4, 0), (9, 4), (9, 9), (6, 9), (12, 6)):
        request = asked(history(0, stop))
        known = len(history(0, min(stop, before))) if before else 0
        expected, _ = tokens_run(world, None, request)
        logits, spent = tokens_run(world, cache, request)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        new = len(request.stream) - known
        assert spent == EXITS[-1] * (new + len(request.candidates.values))


def test_dropping_the_oldest_half_rebuilds_the_stream(world: World) -> None:
    """Behind the instruction, whose three tokens stay, everything has moved: it runs again."""
    cache = StreamCache()
    tokens_run(world, cache, asked(history(0, 12)))
    request = asked(history(6, 13))
    expected, _ = tokens_run(world, None, request)
    logits, spent = tokens_run(world, cache, request)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert spent == EXITS[-1] * (len(request.stream) - 3 + len(request.candidates.values))


def test_a_row_of_the_last_second_joins_its_group(world: World) -> None:
    """A segment that ties with the last one moves nothing before it: the stream is extended, and scores are right."""
    cache = StreamCache()
    tokens_run(world, cache, asked(history(0, 8)))
    request = asked(history(0, 9, tied=2))
    expected, _ = tokens_run(world, None, request)
    logits, spent = tokens_run(world, cache, request)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    new = len(request.stream) - len(history(0, 8))
    assert spent == EXITS[-1] * (new + len(request.candidates.values))


def test_a_stream_is_deepened_only_when_needed(world: World) -> None:
    """A shallow request runs the stream to its own depth; a deeper one adds the missing layers, not more.

    A layer of the stream by the first request (static depth 1), none by the same again, one more at depth 2, then 3.
    """
    plan, cache = world.plan(Ratio(), 0.4), StreamCache()
    request = asked(history(0, 9))
    own, shared = len(request.candidates.values), len(request.stream)
    for layer, stream_layers in ((1, 1), (1, 0), (2, 1), (2, 0), (5, 3), (5, 0), (3, 0)):
        scored = Engine(world.module, static_exits(plan, layer), cache).score([request]).requests[0]
        plain = Engine(world.module, static_exits(plan, layer)).score([request]).requests[0]
        np.testing.assert_allclose(scored.logits, plain.logits, atol=1e-5)
        assert scored.token_layers == layer * own + stream_layers * shared


def test_requests_of_one_call_share_their_users_stream(world: World) -> None:
    """Two requests of one user asked together: the second finds the stream that the first has just run."""
    engine = Engine(world.module, static_exits(world.plan(Ratio(), 0.4), EXITS[-1]), StreamCache())
    request = asked(history(0, 9))
    first, second = engine.score([request, request]).requests
    own = EXITS[-1] * len(request.candidates.values)
    assert (first.token_layers, second.token_layers) == (own + EXITS[-1] * len(request.stream), own)
    np.testing.assert_allclose(first.logits, second.logits, atol=1e-5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 12),
            st.integers(1, 14),
            st.integers(0, 3),
            st.sampled_from([0.2, 0.5, 0.8, 1.0, None]),
            st.sampled_from([0, 10_000]),
        ),
        min_size=1,
        max_size=6,
    ),
    together=st.booleans(),
)
def test_any_sequence_of_requests_scores_as_cold(
    world: World, steps: list[tuple[int, int, int, float | None, int]], together: bool
) -> None:
    """Histories grow, shrink, move and tie; candidates leave early, late or never, alone or together: cold == cached.

    Exits read a layer first or run it whole, in any order, so streams wait at all depths.
    """
    cache, requests, policies, reads = StreamCache(), [], [], []
    for k, (first, length, tied, share, read) in enumerate(steps):
        reads.append(read)
        stop = min(first + length, 40)
        requests.append(asked(history(first, stop, min(tied, stop - first)), seed=k, candidates=1 + k))
        policies.append(RowExits(never(world) if share is None else world.plan(Ratio(), share)))
    if together:
        policies = policies[:1] * len(policies)
        warm = Engine(world.module, policies[0], cache, read_tokens=reads[0]).score(requests).requests
    else:
        warm = [
            Engine(world.module, p, cache, read_tokens=read).score([r]).requests[0]
            for p, r, read in zip(policies, requests, reads, strict=True)
        ]
    for policy, request, scored in zip(policies, requests, warm, strict=True):
        cold = Engine(world.module, policy).score([request]).requests[0]
        same = scored.exit_layers == cold.exit_layers
        assert (~same).sum() <= 1  # a row near a threshold
        np.testing.assert_allclose(scored.logits[same], cold.logits[same], atol=1e-5)
        assert scored.token_layers <= cold.token_layers or not same.all()


def test_the_user_away_longest_is_forgotten(world: World) -> None:
    """A capacity of one stream and a half holds the last of three users."""
    cache = StreamCache(capacity=len(history(0, 8)) * 3 // 2)
    for name in "abc":
        tokens_run(world, cache, replace(asked(history(0, 8)), user=name))
    assert len(cache) == 1
    request = replace(asked(history(0, 8)), user="c")
    assert tokens_run(world, cache, request)[1] == EXITS[-1] * len(request.candidates.values)


def test_a_failed_batch_leaves_nothing_half_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device error in the middle of the backbone: the stream is forgotten, the next request is right."""
    plan, cache = world.plan(Ratio(), 0.4), StreamCache()
    engine = Engine(world.module, static_exits(plan, 5), cache)
    request = asked(history(0, 9))
    expected = engine.score([request]).requests[0].logits

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backbone.layers[3], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.score([replace(request, stream=history(0, 12))])
    assert len(cache) == 0
    np.testing.assert_allclose(engine.score([request]).requests[0].logits, expected, atol=1e-5)


def test_users_without_a_name_are_not_cached(world: World) -> None:
    """user=None runs whole each time, also beside cached ones."""
    cache = StreamCache()
    named, nameless = asked(history(0, 5)), replace(asked(history(2, 9)), user=None)
    plan = world.plan(Ratio(), 0.4)
    engine = Engine(world.module, RowExits(plan), cache)
    first, again = (engine.score([named, nameless]).requests for _ in range(2))
    plain = Engine(world.module, RowExits(plan)).score([named, nameless]).requests
    for scored in (first, again):
        for mine, theirs in zip(scored, plain, strict=True):
            np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-5)
    assert len(cache) == 1
    assert again[1].token_layers == plain[1].token_layers
    assert again[0].token_layers < plain[0].token_layers
