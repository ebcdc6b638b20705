from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from project.errors import ConfigError
from project.layout import Layout
from project.model.backbone import Backbone
from project.model.heads import ExitHead
from project.model.module import LoraSettings, add_lora, frozen_names

Make = Callable[..., Any]


def hidden_of(backbone: Backbone, layout: Layout) -> torch.Tensor:
    tokens = torch.randint(0, 64, layout.shape, generator=torch.Generator().manual_seed(0))
    return backbone.run(backbone.embed(tokens, layout), 0, 3).hidden


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_adds_nothing_at_first(tiny_config: Make, random_layout: Make, family: str) -> None:
    """Fresh adapters leave the forward as it was, through layers that still take the layout."""
    backbone = Backbone.from_config(tiny_config(family)).eval()
    layout = random_layout(0)
    before = hidden_of(backbone, layout)
    add_lora(backbone, LoraSettings(rank=2))
    torch.testing.assert_close(hidden_of(backbone, layout), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_and_heads_train(tiny_config: Make, random_layout: Make, checkpointing: bool) -> None:
    """One step moves every adapter's second factor and the head, and nothing else."""
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config())
    model = nn.ModuleDict({"backbone": backbone, "head": ExitHead(backbone.final_norm, torch.ones(32))})
    add_lora(backbone, LoraSettings(rank=2))
    backbone.gradient_checkpointing = checkpointing
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n in trainable if n.startswith("backbone")} == {"lora_A", "lora_B"}
    assert len(trainable) == 3 * 7 * 2 + 3  # layers, linear layers of each, factors; norm, logit
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(model["head"](hidden_of(backbone, random_layout(0)).flatten(0, 1))).sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # the first factors' gradient is zero while the second ones are
    assert moved == {n for n in trainable if "lora_A" not in n}


def test_frozen_names(tiny_config: Make) -> None:
    """Frozen are exactly the weights that the base model has; with what is trained they make up the state."""
    backbone = Backbone.from_config(tiny_config())
    base = set(backbone.state_dict())
    assert frozen_names(backbone) == {"final_norm.weight"}
    add_lora(backbone, LoraSettings(rank=2, target_modules=["q_proj", "down_proj"]))
    frozen = frozen_names(backbone)
    assert {name.replace(".base_layer", "") for name in frozen} == base
    assert len(set(backbone.state_dict()) - frozen) == 3 * 2 * 2


def test_scale(tiny_config: Make) -> None:
    """An adapter adds alpha / rank times B A x."""
    backbone = Backbone.from_config(tiny_config()).eval()
    add_lora(backbone, LoraSettings(rank=2, alpha=6.0, target_modules=["q_proj"]))
    layer: Any = backbone.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + 3.0 * layer.lora_B["default"](layer.lora_A["default"](x))
    torch.testing.assert_close(layer(x), expected)


def test_refuses_unknown_layers(tiny_config: Make) -> None:
    """A target that is no linear layer names the key and lists the layers."""
    with pytest.raises(ConfigError, match=r"model\.lora\.target_modules.*down_proj, gate_proj.*q_proj"):
        add_lora(Backbone.from_config(tiny_config()), LoraSettings(target_modules=["c_attn"]))
