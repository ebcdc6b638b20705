"""Tests that packed weights give the same products, and that packing does not change the module."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_engine import World, make_adapted, make_module
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from project.engine import Engine
from project.engine.decisions import static_exits
from project.engine.prepacked import PrepackedLinear, copied, prepacked
from project.exits.criteria import Ratio
from project.model.backbone import FAMILIES


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
    found = PrepackedLinear(linear)(x)
    assert found.shape == (1, rows, 32)
    torch.testing.assert_close(found, linear(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("onednn", [True, False])
@torch.inference_mode()
def test_products_in_bfloat16(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of rounded numbers, itself rounded: 8 bits, 2^-8 of it. What comes out is float32 again.

    The same on devices that oneDNN does not know.
    """
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    x = torch.randn(1, 7, 48)
    if not onednn:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    packed = prepacked(nn.Sequential(linear), bfloat16=True)[0]
    found = packed(x)
    assert (type(packed), found.dtype) == (PrepackedLinear, torch.float32)
    rounded = [part.bfloat16().double() for part in (x, linear.weight, linear.bias)]
    expected = nn.functional.linear(*rounded).float()
    torch.testing.assert_close(found, expected, atol=2**-8, rtol=2**-8)
    assert not torch.equal(found, linear(x))


def test_an_engine_in_bfloat16(world: World) -> None:
    """Under bf16-mixed every product of the backbone is; scores move by less than .1, and are other ones."""
    decision, module = static_exits(world.plan(Ratio(), 0.4), 5), copied(world.module)
    module.compute_in("bf16-mixed")
    engine = Engine(module, decision)
    assert all(part._dtype == torch.bfloat16 for part in linears(engine.backbone))  # type: ignore[comparison-overlap]
    for mine, whole in zip(
        engine.score(world.requests),
        Engine(world.module, decision).score(world.requests),
        strict=True,
    ):
        assert 0 < np.abs(mine.logits - whole.logits).max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_the_backbone_is_packed(family: str) -> None:
    """Seven a layer, in a backbone of its own that shares parameters; a second time nothing is left to pack."""
    backbone = make_module(family=family).backbone
    assert backbone is not None
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    found = prepacked(backbone)
    assert [type(part) for part in linears(found)] == [PrepackedLinear] * 7 * len(
        backbone.layers
    )
    assert {type(part) for part in linears(backbone)} == {nn.Linear}
    assert all(
        a is b for a, b in zip(found.parameters(), backbone.parameters(), strict=True)
    )
    assert prepacked(found) is found
    assert found.state_dict().keys() == before.keys()
    assert all(
        torch.equal(value, before[name]) for name, value in backbone.state_dict().items()
    )


def test_an_engine_does_not_change_its_module(world: World) -> None:
    """What it packs is its own; given a packed backbone, it packs nothing, and scores bit for bit the same."""
    decision, backbone = static_exits(world.plan(Ratio(), 0.4), 5), world.module.backbone
    assert backbone is not None
    kept = linears(backbone)
    engine = Engine(world.module, decision)
    assert all(a is b for a, b in zip(kept, linears(backbone), strict=True))
    assert {type(part) for part in linears(engine.backbone)} == {PrepackedLinear}
    packed_module = copied(world.module)
    packed_module.backbone = prepacked(backbone)
    other = Engine(packed_module, decision)
    assert other.backbone is packed_module.backbone
    scores = [each.score(world.requests) for each in (engine, other)]
    for mine, theirs in zip(*scores, strict=True):
        np.testing.assert_array_equal(mine.logits, theirs.logits)


@torch.inference_mode()
def test_adapters_are_packed_too() -> None:
    """LoRA's base layers and adapters: the same output to rounding."""
    backbone = make_adapted(std=0.1).backbone
    assert backbone is not None
    found = prepacked(backbone)
    assert {type(part) for part in linears(found)} == {PrepackedLinear}
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        found.layers[0].mlp(x), backbone.layers[0].mlp(x), atol=1e-5, rtol=1e-5
    )


def test_what_cannot_be_packed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, parts of a whole under FSDP, and everything in a build of torch without oneDNN."""
    double, parted, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3), nn.Linear(4, 3)
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        parted.weight = nn.Parameter(distribute_tensor(parted.weight.detach(), mesh))
        for linear in (double, parted):
            assert prepacked(nn.Sequential(linear))[0] is linear
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert prepacked(nn.Sequential(plain))[0] is plain
