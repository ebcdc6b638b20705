"""bfloat16 and int8 weights move scores a little, and nothing else: not cost, not company, not the module given.

Unusual here: this model's attention is far sharper than a trained one's, so rounding moves it more. bfloat16 has steps
of 2^-8; the engine and the candidate-by-candidate loop add in another order, so they differ as much from each other as
both do from float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from example_engine import (
    EXITS,
    FAMILIES,
    World,
    alone,
    make_adapted,
    make_module,
    random_request,
    raw_outputs,
    subset,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from project.engine import Engine, PreparedRequest, RowExits, Scores, StreamCache
from project.engine.decisions import static_exits
from project.engine.int8 import Int8Linear
from project.engine.packed import packed
from project.engine.rotary import RotaryTable
from project.engine.trunk_weights import Weights, with_weights
from project.errors import ConfigError
from project.exits.criteria import Consistency, Criterion, Ratio, RatioConsistency
from project.exits.plan import ExitPlan
from project.model.module import ExitRecommender

MARGIN = 0.05  # of a threshold: bfloat16's rounding may decide (calibrated logits have a spread of about 1)
FURTHEST = 0.2  # that a logit may be off
TYPICAL = 0.04  # root mean square of what logits are off


@pytest.fixture(scope="module")
def half(world: World) -> World:
    """The same requests and module with bfloat16 weights, candidate by candidate."""
    module = with_weights(world.module, "bfloat16")
    with torch.no_grad():
        return World(module, world.requests, [raw_outputs(module, r) for r in world.requests])


def together(scores: Scores, name: str) -> np.ndarray:
    found: np.ndarray = np.concatenate([getattr(r, name) for r in scores.requests])
    return found


def plan_of(module: ExitRecommender, request: PreparedRequest) -> ExitPlan:
    """By |logit|, made on this request."""
    with torch.no_grad():
        return World(module, [request], [raw_outputs(module, request)]).plan(Ratio(), 0.4)


def rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(difference**2)))


def looped(world: World, plan: ExitPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all candidates, one by one: where they leave, with which logit, and how near they came to a threshold."""
    layers, logits, nearest = [], [], []
    for i in range(len(world.requests)):
        outputs = world.calibrated(plan, i)
        layer, logit = plan.emitted(outputs)
        gaps = [
            (plan.policy.criterion.safety(outputs.until(h)) - plan.policy.thresholds[h]).abs()
            for h in range(outputs.heads - 1)
        ]
        met = torch.tensor(plan.layers[:-1])[None] <= layer[:, None]
        nearest.append(torch.where(met, torch.stack(gaps, dim=1), torch.inf).amin(dim=1))
        layers.append(layer)
        logits.append(logit)
    return tuple(torch.cat(part).numpy() for part in (layers, logits, nearest))  # type: ignore[return-value]


@pytest.mark.parametrize("read", [0, 10_000], ids=["read", "whole"])
@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
def test_bfloat16_engine_does_what_its_loop_says(half: World, cached: bool, read: int) -> None:
    """Exits of the bfloat16 loop, but for rows within .05 of a threshold (1 of 51); logits to .2, typically to .04."""
    plan = half.plan(Ratio(), 0.4)
    cache = StreamCache() if cached else None
    scores = Engine(half.module, RowExits(plan), cache, read_tokens=read).score(half.requests)
    layer, logit, nearest = looped(half, plan)
    near = nearest < MARGIN
    assert near.sum() <= 3
    np.testing.assert_array_equal(together(scores, "exit_layers")[~near], layer[~near])
    off = (together(scores, "logits") - logit)[~near]
    assert np.abs(off).max() < FURTHEST
    assert rms(off) < TYPICAL
    assert len(np.unique(layer)) >= 3


@pytest.mark.parametrize("criterion", [Consistency(), RatioConsistency()], ids=lambda c: type(c).__name__)
def test_bfloat16_moves_few_exits(half: World, criterion: Criterion) -> None:
    """Criteria of differences come near their thresholds more often: at most 4 of 51 rows leave elsewhere."""
    plan = half.plan(criterion, 0.4)
    scores = Engine(half.module, RowExits(plan)).score(half.requests)
    layer, logit, _ = looped(half, plan)
    same = together(scores, "exit_layers") == layer
    assert (~same).sum() <= 4
    assert np.abs(together(scores, "logits") - logit)[same].max() < FURTHEST


@pytest.mark.parametrize("layer", EXITS)
def test_bfloat16_is_near_float32(world: World, half: World, layer: int) -> None:
    """A static depth, full depth among them: logits off by some, typically by less than .04 of a spread of about 1.

    The engine is no further off than the loop in bfloat16 is, but for a half: it rounds where the loop rounds.
    """
    plan = world.plan(Ratio(), 0.4)
    exact, rounded = (
        Engine(w.module, static_exits(plan, layer)).score(world.requests) for w in (world, half)
    )
    a, b = (together(scores, "logits") for scores in (exact, rounded))
    column = plan.layers.index(layer)
    loop = np.concatenate([half.calibrated(plan, i).logits[:, column] for i in range(len(half.requests))])
    assert 0 < rms(b - a) < TYPICAL * a.std() * 1.25
    assert rms(b - a) < 1.5 * rms(loop - a)
    assert rounded.token_layers == exact.token_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_runs_is_bfloat16(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, cached keys, values and masks are bfloat16 in every family; heads read and answer float32."""
    module = with_weights(make_module(family=family), "bfloat16")
    assert module.trunk is not None
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *tensors: Tensor) -> None:
        seen.setdefault(name, set()).update(t.dtype for t in tensors)

    for layer in module.trunk.layers:
        layer.register_forward_hook(lambda _, given, found: note("hidden", *given, found))
    for head in module.heads.values():
        head.norm.register_forward_hook(lambda _, given, found: note("head", *given, found))
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor, **rest: object) -> Tensor:
        note("stream", *tensors, attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    cache, request = StreamCache(), random_request(np.random.default_rng(0), "r", 5, 4)
    plan = plan_of(module, request)
    seen.clear()
    Engine(module, RowExits(plan), cache).score([request])
    kept = cache.take(request.user, request.stream, len(module.trunk.layers))
    for pair in kept._pairs:
        note("cache", *(pair or ()))
    assert seen == {
        name: {torch.bfloat16 if name != "head" else torch.float32}
        for name in ("hidden", "stream", "cache", "head")
    }


def test_positions_are_computed_in_float32(world: World, half: World) -> None:
    """Cosines and sines of 4,000 positions are float32's, rounded last."""
    assert half.module.trunk is not None
    assert world.module.trunk is not None
    positions = np.arange(4_000)
    exact, rounded = (RotaryTable(w.module.trunk).at(positions) for w in (world, half))  # type: ignore[arg-type]
    assert half.module.trunk.rotary_emb is world.module.trunk.rotary_emb
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b)


def test_a_late_position_scores_as_in_float32() -> None:
    """A request behind 3,000 positions: as near float32 as elsewhere, so no frequency was rounded."""
    module = make_module()
    request = random_request(np.random.default_rng(0), "late", 6, 8)
    stream = replace(request.stream, position=request.stream.position + 3_000)
    found = []
    for served in (module, with_weights(module, "bfloat16")):
        with torch.no_grad():
            late = replace(request, stream=stream)
            found.append(torch.stack([alone(served, late, c)[0] for c in range(len(late))]))
    assert rms((found[0] - found[1]).numpy()) < TYPICAL


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_module_given_stays_as_it_is(weights: Weights) -> None:
    """Same parameters, modules and buffers as before, also after an engine ran the copy; heads are shared."""
    module = make_module()
    assert module.trunk is not None
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kinds = {name: type(part) for name, part in module.named_modules()}
    places = {name: value.data_ptr() for name, value in module.named_parameters()}
    found = with_weights(module, weights)
    assert found.trunk is not None
    request = random_request(np.random.default_rng(0), "r", 3, 4)
    plan = plan_of(module, request)
    Engine(found, RowExits(plan)).score([request])
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert {name: value.data_ptr() for name, value in module.named_parameters()} == places
    assert {name: type(part) for name, part in module.named_modules()} == kinds
    assert found.heads is module.heads
    assert found.trunk is not module.trunk


def test_a_packed_trunk_is_not_converted() -> None:
    """Its products would stay as they were packed; asked for the type they have, it is what it was."""
    module = make_module()
    assert module.trunk is not None
    module.trunk = packed(module.trunk)
    assert with_weights(module, "float32") is module
    with pytest.raises(AssertionError, match="pack afterwards"):
        with_weights(module, "bfloat16")


def test_bfloat16_halves_the_trunk() -> None:
    """Every parameter of the trunk is bfloat16, two bytes each; names and shapes stay."""
    module = make_module()
    found = with_weights(module, "bfloat16")
    assert module.trunk is not None
    assert found.trunk is not None
    old, new = dict(module.trunk.named_parameters()), dict(found.trunk.named_parameters())
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in new.values())
    assert sum(p.nbytes for p in new.values()) * 2 == sum(p.nbytes for p in old.values())


def test_int8_quarters_linear_layers() -> None:
    """All of them are rounded, one byte a weight and a scale a row; embeddings are shared."""
    module = make_module()
    small = with_weights(module, "int8")
    assert module.trunk is not None
    assert small.trunk is not None
    assert small.trunk.embed_tokens is module.trunk.embed_tokens
    rounded = [m for m in small.trunk.modules() if isinstance(m, Int8Linear)]
    exact = [m for m in module.trunk.modules() if isinstance(m, nn.Linear)]
    assert len(rounded) == len(exact) == 5 * 7
    assert not any(isinstance(m, nn.Linear) for m in small.trunk.modules())
    assert sum(m.nbytes for m in rounded) < 0.3 * sum(4 * m.weight.numel() for m in exact)


def test_int8_scores_are_close_and_cost_is_the_same(world: World) -> None:
    """Off by less than a tenth of the logits' spread (root mean square) at every static depth; token-layers equal."""
    small, plan = with_weights(world.module, "int8"), world.plan(Ratio(), 0.4)
    for layer in EXITS:
        exact, rounded = (
            Engine(m, static_exits(plan, layer)).score(world.requests) for m in (world.module, small)
        )
        assert rounded.token_layers == exact.token_layers
        a, b = (together(scores, "logits") for scores in (exact, rounded))
        assert 0 < rms(a - b) < 0.1 * a.std()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_company_hardly_matters(world: World, weights: Weights) -> None:
    """Two candidates of twelve, scored alone: off by rounding only.

    Attention adds in another order in other company, and a last bit can tip an activation over half a step.
    """
    served, plan = with_weights(world.module, weights), world.plan(Ratio(), 0.4)
    engine = Engine(served, static_exits(plan, EXITS[-1]))
    whole = engine.score(world.requests)
    few = engine.score([subset(world.requests[2], np.array([5, 3]))]).requests[0].logits
    spread = together(whole, "logits").std()
    np.testing.assert_allclose(few, whole.requests[2].logits[[5, 3]], atol=0.1 * spread)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_trunk_with_adapters(weights: Weights) -> None:
    """With LoRA it scores as in float32, to rounding; in bfloat16 no parameter is left behind, in int8 adapters are."""
    module = make_adapted(std=0.02)
    found = with_weights(module, weights)
    assert found.trunk is not None
    if weights == "bfloat16":
        assert {p.dtype for p in found.trunk.parameters()} == {torch.bfloat16}
    else:
        kinds = {name: type(part) for name, part in found.trunk.named_modules()}
        left = [name for name, kind in kinds.items() if kind is torch.nn.Linear]
        assert left
        assert all(".lora_" in name for name in left)
        assert Int8Linear in kinds.values()
    request = random_request(np.random.default_rng(0), "r", 5, 8)
    with torch.no_grad():
        exact, rounded = (raw_outputs(m, request) for m in (module, found))
    assert 0 < rms((exact.logits - rounded.logits).numpy()) < 1.5 * TYPICAL  # whatever the adapters


def test_the_type_it_has_is_the_module_itself() -> None:
    """None, float32 of a float32 trunk and bfloat16 of a bfloat16 one convert nothing."""
    module = make_module()
    assert with_weights(module, None) is with_weights(module, "float32") is module
    half = with_weights(module, "bfloat16")
    assert with_weights(half, "bfloat16") is half


def test_int8_is_only_for_float32_on_a_cpu() -> None:
    """What was found, and what helps."""
    half = with_weights(make_module(), "bfloat16")
    with pytest.raises(ConfigError, match=r"bfloat16 on cpu.*leave int8 out"):
        with_weights(half, "int8")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_trunk_that_is_cut_is_refused(weights: Weights) -> None:
    """FSDP's parameters are parts of a whole: nothing is converted, and the message says how to get it whole."""
    module = make_module()
    assert module.trunk is not None
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        cut = distribute_tensor(module.trunk.embed_tokens.weight.detach(), mesh)
        module.trunk.embed_tokens.weight = nn.Parameter(cut)
        with pytest.raises(ConfigError, match=rf"--weights {weights}.*cut over 2 processes.*strategy auto"):
            with_weights(module, weights)
        assert with_weights(module, "float32") is module
    finally:
        torch.distributed.destroy_process_group()
