"""Tests that a cached stream changes what a request costs and never its scores."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from example_engine import EXITS, World, random_request, with_thresholds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from project.data.ragged import Ragged
from project.engine import (
    Engine,
    PreparedRequest,
    RowExits,
    Scored,
    StreamCache,
    StreamTokens,
)
from project.engine.decisions import nobody_leaves, static_exits
from project.engine.prepacked import copied, prepacked
from project.exits.criteria import Ratio


@pytest.fixture(scope="module")
def world(world_of_every_layer: World) -> World:
    """The same with its weights packed once, as many engines are made here."""
    module = copied(world_of_every_layer.module)
    assert module.backbone is not None
    module.backbone = prepacked(module.backbone)
    return replace(world_of_every_layer, module=module)


@pytest.fixture(autouse=True)
def no_memory_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of streams are NaN where nothing was written."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan)
    )


def history(first: int, stop: int, tied: int = 0) -> StreamTokens:
    """The instruction, then segments first..stop-1 of one long history; the last `tied` share a group."""
    rng = np.random.default_rng(7)
    segments = [rng.integers(0, 64, n).tolist() for n in rng.integers(1, 7, 40)]
    group = 1 + np.arange(stop - first)
    if tied:
        group[-tied:] = group[-tied]
    return StreamTokens.of(
        Ragged.of([[5, 6, 7], *segments[first:stop]]), np.concatenate([[0], group])
    )


def request_of(stream: StreamTokens, seed: int = 3, candidates: int = 6) -> PreparedRequest:
    """Random candidates behind a stream, of one and the same user."""
    return replace(
        random_request(np.random.default_rng(seed), "x", 0, candidates),
        stream=stream,
        user="u",
    )


def at_exit(world: World, layer: int, cache: StreamCache | None) -> Engine:
    """An engine with a static exit."""
    return Engine(world.module, static_exits(world.plan(Ratio(), 0.4), layer), cache)


def at_depth(
    world: World,
    cache: StreamCache | None,
    request: PreparedRequest,
    layer: int = EXITS[-1],
) -> Scored:
    """The request at a static depth."""
    return at_exit(world, layer, cache).score([request])[0]


# first and last segment, tied segments, and up to which segment the stream is known: 0 is
# the instruction alone
CHANGES: dict[str, list[tuple[int, int, int, int | None]]] = {
    "it grows, or ends earlier": [
        (0, 4, 0, None),
        (0, 9, 0, 4),
        (0, 9, 0, 9),
        (0, 6, 0, 6),
        (0, 12, 0, 6),
    ],
    "the oldest half is dropped, so everything behind the instruction moves": [
        (0, 12, 0, None),
        (6, 13, 0, 0),
    ],
    "a row joins the last second, which moves nothing before it": [
        (0, 8, 0, None),
        (0, 9, 2, 8),
    ],
}


@pytest.mark.parametrize("steps", CHANGES.values(), ids=CHANGES)
def test_a_history_changes(
    world: World, steps: list[tuple[int, int, int, int | None]]
) -> None:
    """Only new tokens and candidates run, and scores are those without a cache."""
    cache = StreamCache()
    for first, stop, tied, known in steps:
        request = request_of(history(first, stop, tied))
        scored = at_depth(world, cache, request)
        np.testing.assert_allclose(
            scored.logits, at_depth(world, None, request).logits, atol=1e-5
        )
        new = len(request.stream) - (0 if known is None else len(history(0, known)))
        assert scored.token_layers == EXITS[-1] * (new + len(request.candidates.values))


def test_a_stream_is_deepened_only_when_needed(world: World) -> None:
    """A layer of the stream by the first request (static depth 1), none by the same again, one more at depth 2, then 3.

    At exit 2 layer 1 is only read: the request at depth 5 runs it whole, and is not counted again.
    """
    cache, request = StreamCache(), request_of(history(0, 9))
    own, shared = len(request.candidates.values), len(request.stream)
    for layer, stream_layers in ((1, 1), (1, 0), (2, 1), (2, 0), (5, 3), (5, 0), (3, 0)):
        scored = at_depth(world, cache, request, layer)
        np.testing.assert_allclose(
            scored.logits, at_depth(world, None, request, layer).logits, atol=1e-5
        )
        assert scored.token_layers == layer * own + stream_layers * shared


def test_a_stream_waits_in_front_of_the_last_layer(world: World) -> None:
    """Exit 4 of 5 runs its layer whole and everyone leaves: full depth runs the stream's last layer, then reads it.

    A history that has grown since adds its new tokens alone.
    """
    cache, request, grown = (
        StreamCache(),
        request_of(history(0, 9)),
        request_of(history(0, 11)),
    )
    plan, own = nobody_leaves(world.plan(Ratio(), 0.4)), len(request.candidates.values)
    at_4 = RowExits(with_thresholds(plan, [np.inf] * 4 + [-np.inf] * 2))
    shared, new = len(request.stream), len(grown.stream) - len(request.stream)
    steps = [
        (request, at_4, 4 * (own + shared)),
        (request, RowExits(plan), 5 * own + shared),
        (grown, at_4, 4 * (own + new)),
        (grown, RowExits(plan), 5 * own + new),
        (grown, RowExits(plan), 5 * own),
    ]
    for asked, decision, token_layers in steps:
        scored = Engine(world.module, decision, cache, read_tokens=10_000).score([asked])[0]
        plain = Engine(world.module, decision).score([asked])[0]
        np.testing.assert_allclose(scored.logits, plain.logits, atol=1e-5)
        assert scored.token_layers == token_layers


def test_nan_scores_refuse_one_request(world: World) -> None:
    """A token whose embedding is NaN: who shows it gets an error and is not cached, company is as alone."""
    decision, cache = RowExits(nobody_leaves(world.plan(Ratio(), 0.4))), StreamCache()
    good = replace(
        request_of(history(0, 5)), candidates=Ragged.of([[3, 4], [5]]), user="good"
    )
    good = replace(good, exit_0=good.exit_0[:2], retrieved=good.retrieved[:2])
    rare = int(np.setdiff1d(np.arange(6, 64), good.stream.tokens)[0])
    bad = replace(good, candidates=Ragged.of([[3, 4], [rare]]), user="bad")
    module = copied(world.module)
    assert module.backbone is not None
    module.backbone = copied(module.backbone)
    module.backbone._modules["embed_tokens"] = copy.deepcopy(module.backbone.embed_tokens)
    with torch.no_grad():
        module.backbone.embed_tokens.weight[rare] = torch.nan
    first, second = Engine(module, decision, cache).score([bad, good])
    assert first.error == "the model's scores of 1 of 2 candidates are NaN"
    assert np.isnan(first.logits).all()
    alone = Engine(world.module, decision).score([good])[0]
    np.testing.assert_allclose(second.logits, alone.logits, atol=1e-5)
    assert (len(cache), cache.common("good", good.stream)) == (1, len(good.stream))


def test_full_depth_costs_what_an_engine_at_full_depth_runs(world: World) -> None:
    """Request by request: of one user twice in a call, longer histories, and tokens that stopped shallow and go on."""
    full = at_exit(world, EXITS[-1], StreamCache())
    cache = StreamCache()
    first = request_of(history(0, 9))
    steps = [(1, [first, first]), (5, [first]), (3, [request_of(history(0, 11))] * 2)]
    saved = list[int]()
    for layer, requests in steps:
        scores = at_exit(world, layer, cache).score(requests)
        for scored, whole in zip(scores, full.score(requests), strict=True):
            assert scored.full_depth_token_layers == whole.token_layers
            assert scored.cached == whole.cached == bool(saved)
            saved.append(whole.token_layers - scored.token_layers)
    # four layers of the history were saved first, and run later
    own = len(first.candidates.values)
    shared = len(first.stream)
    assert saved[:3] == [4 * (own + shared), 4 * own, -4 * shared]


STEP = st.tuples(
    st.integers(0, 12),  # first segment
    st.integers(1, 14),  # length
    st.integers(0, 3),  # tied
    st.sampled_from([0.2, 0.5, 0.8, 1.0, None]),  # share that leaves at each exit
    st.sampled_from([0, 10_000]),  # tokens up to which a layer is run whole
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=6), together=st.booleans())
def test_any_sequence_of_requests_scores_as_without_a_cache(
    world: World, steps: list[tuple[int, int, int, float | None, int]], together: bool
) -> None:
    """Histories grow, shrink, move and tie; candidates leave early, late or never, alone or together: same scores.

    Exits read a layer first or run it whole, in any order, so streams wait at all depths.
    """
    cache, requests, policies = StreamCache(), [], []
    for k, (first, length, tied, share, _) in enumerate(steps):
        stop = min(first + length, 40)
        requests.append(
            request_of(
                history(first, stop, min(tied, stop - first)), seed=k, candidates=1 + k
            )
        )
        policies.append(
            RowExits(
                nobody_leaves(world.plan(Ratio(), 0.4))
                if share is None
                else world.plan(Ratio(), share)
            )
        )
    reads = [step[-1] for step in steps]
    if together:
        policies = policies[:1] * len(policies)
        cached = Engine(world.module, policies[0], cache, read_tokens=reads[0]).score(
            requests
        )
    else:
        cached = [
            Engine(world.module, p, cache, read_tokens=read).score([r])[0]
            for p, r, read in zip(policies, requests, reads, strict=True)
        ]
    for policy, request, scored in zip(policies, requests, cached, strict=True):
        not_cached = Engine(world.module, policy).score([request])[0]
        same = scored.exit_layers == not_cached.exit_layers
        assert (~same).sum() <= 1  # a row near a threshold
        np.testing.assert_allclose(scored.logits[same], not_cached.logits[same], atol=1e-5)
        assert scored.token_layers <= not_cached.token_layers or not same.all()


def test_the_least_recently_used_stream_is_forgotten(world: World) -> None:
    """Room for one stream and a half holds the last of three users."""
    cache, request = StreamCache(), request_of(history(0, 8))
    at_depth(world, cache, request)
    cache = StreamCache(mib=1.5 * cache.bytes / 2**20)
    for name in "abc":
        at_depth(world, cache, replace(request, user=name))
    assert len(cache) == 1
    again = at_depth(world, cache, replace(request, user="c"))
    assert again.token_layers == EXITS[-1] * len(request.candidates.values)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcd"), STEP), min_size=1, max_size=8),
    mib=st.floats(0, 0.1),
)
def test_a_cache_never_keeps_more_than_it_may(
    world: World,
    steps: list[tuple[str, tuple[int, int, int, float | None, int]]],
    mib: float,
) -> None:
    """Any requests of four users: the count is the sum over all tensors that are kept, and within the bound."""
    cache = StreamCache(mib)
    for user, (first, length, tied, share, read) in steps:
        stop = min(first + length, 40)
        request = replace(
            request_of(history(first, stop, min(tied, stop - first))), user=user
        )
        policy = RowExits(
            nobody_leaves(world.plan(Ratio(), 0.4))
            if share is None
            else world.plan(Ratio(), share)
        )
        Engine(world.module, policy, cache, read_tokens=read).score([request])
        streams = [stream for stream, _ in cache._kept.values()]
        tensors = [
            x for s in streams for pair in s._pairs if pair is not None for x in pair
        ]
        tensors += [x for s in streams for x in s.waiting.values()]
        kept = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors
        }
        assert cache.bytes == sum(kept.values()) <= mib * 2**20


def test_a_failed_batch_forgets_its_streams(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device error in the middle of the backbone: the stream is forgotten, the next request is right."""
    cache, request = StreamCache(), request_of(history(0, 9))
    engine = Engine(world.module, static_exits(world.plan(Ratio(), 0.4), 5), cache)
    expected = engine.score([request])[0].logits

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backbone.layers[3], "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.score([replace(request, stream=history(0, 12))])
    assert len(cache) == 0
    np.testing.assert_allclose(engine.score([request])[0].logits, expected, atol=1e-5)


def test_users_without_a_name_are_not_cached(world: World) -> None:
    """user=None runs whole each time, also beside cached ones."""
    cache, policy = StreamCache(), RowExits(world.plan(Ratio(), 0.4))
    requests = [request_of(history(0, 5)), replace(request_of(history(2, 9)), user=None)]
    engine = Engine(world.module, policy, cache)
    first, again = (engine.score(requests) for _ in range(2))
    plain = Engine(world.module, policy).score(requests)
    for found in (first, again):
        for mine, theirs in zip(found, plain, strict=True):
            np.testing.assert_allclose(mine.logits, theirs.logits, atol=1e-5)
    assert len(cache) == 1
    assert again[1].token_layers == plain[1].token_layers
    assert again[0].token_layers < plain[0].token_layers
