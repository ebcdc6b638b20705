"""Packing weights changes how products are made, not what they are, nor the module that was packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_engine import FAMILIES, World, make_adapted, make_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from project.engine import Engine
from project.engine.decisions import static_exits
from project.engine.engine import PackedLinear, copied, packed
from project.exits.criteria import Ratio


def linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_products(rows: int, bias: bool) -> None:
    """(1, rows, 48) by 48 x 32: the layer's own product to rounding, of slices of a larger tensor as well."""
    torch.manual_seed(rows)
    linear = nn.Linear(48, 32, bias=bias)
    x = torch.randn(1, rows, 96)[..., ::2]
    found = PackedLinear(linear)(x)
    assert found.shape == (1, rows, 32)
    torch.testing.assert_close(found, linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_backbone_is_packed(family: str) -> None:
    """Seven a layer, in a backbone of its own that shares parameters; a second time nothing is left to pack."""
    module = make_module(family=family)
    assert module.backbone is not None
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    found = packed(module.backbone)
    assert [type(part) for part in linears(found)] == [PackedLinear] * 7 * len(module.backbone.layers)
    assert {type(part) for part in linears(module.backbone)} == {nn.Linear}
    for mine, theirs in zip(found.parameters(), module.backbone.parameters(), strict=True):
        assert mine is theirs
    assert packed(found) is found
    assert found.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())


def test_an_engine_leaves_its_module_alone(world: World) -> None:
    """What it packs is its own; given a packed backbone, it packs nothing, and scores bit for bit the same."""
    decision = static_exits(world.plan(Ratio(), 0.4), 5)
    assert world.module.backbone is not None
    kept = linears(world.module.backbone)
    engine = Engine(world.module, decision)
    assert all(a is b for a, b in zip(kept, linears(world.module.backbone), strict=True))
    assert {type(part) for part in linears(engine.backbone)} == {PackedLinear}
    item_similarity = copied(world.module)
    item_similarity.backbone = shared = packed(world.module.backbone)
    other = Engine(item_similarity, decision)
    assert other.backbone is shared
    scores = [each.score(world.requests).requests for each in (engine, other)]
    for mine, theirs in zip(*scores, strict=True):
        np.testing.assert_array_equal(mine.logits, theirs.logits)


@torch.inference_mode()
def test_adapters_are_packed_too() -> None:
    """LoRA's base layers and adapters: the same output to rounding."""
    module = make_adapted(std=0.1)
    assert module.backbone is not None
    found = packed(module.backbone)
    assert {type(part) for part in linears(found)} == {PackedLinear}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.layers[0].mlp(x), module.backbone.layers[0].mlp(x), atol=1e-5, rtol=1e-5)


def test_what_onednn_does_not_multiply_stays() -> None:
    """float64."""
    layers = nn.Sequential(nn.Linear(4, 3).double())
    assert packed(layers)[0] is layers[0]


def test_what_is_cut_over_processes_stays() -> None:
    """FSDP's parameters are parts of a whole: each process multiplies by what it gathers."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        linear = nn.Linear(4, 3)
        whole = linear.weight.detach()
        linear.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,))))
        assert packed(nn.Sequential(linear))[0] is linear
    finally:
        torch.distributed.destroy_process_group()


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a build of torch multiplies as before."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layers = nn.Sequential(nn.Linear(4, 3))
    assert packed(layers)[0] is layers[0]


def test_copies_share_what_does_not_change() -> None:
    """Only what holds a plain linear layer is copied; a packed one is not packed again."""
    norm, own = nn.LayerNorm(4), PackedLinear(nn.Linear(4, 4))
    module = nn.Sequential(nn.Sequential(norm, nn.Linear(4, 4)), nn.Sequential(norm), own)
    found = packed(module)
    assert (found[0][0], found[1], found[2]) == (norm, module[1], own)
    assert [type(part[1]) for part in (module[0], found[0])] == [nn.Linear, PackedLinear]
