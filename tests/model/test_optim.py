import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from project.errors import ConfigError
from project.model.backbone import Backbone
from project.model.heads import ExitHead
from project.model.optim import OptimSettings, cosine_with_warmup, depth_rate, parameter_groups

SETTINGS = OptimSettings(learning_rate=1e-3, depth_slope=0.6, head_factor=5.0, weight_decay=0.1)


@pytest.fixture
def model(tiny_config: Callable[..., Any]) -> tuple[Backbone, nn.ModuleDict]:
    """Three layers with heads at 1 and 3; Qwen2, whose layers have biases."""
    backbone = Backbone.from_config(tiny_config("qwen2"))
    return backbone, nn.ModuleDict({str(k): ExitHead(backbone.final_norm, torch.ones(32)) for k in (1, 3)})


def test_rates_by_depth(model: tuple[Backbone, nn.ModuleDict]) -> None:
    """lr(l) = base * (1 + slope * (1 - l / L)); a head learns at head_factor times the rate below it."""
    rates = {g["name"].split("/")[0]: g["lr"] for g in parameter_groups(*model, SETTINGS)}
    assert rates == pytest.approx(
        {
            "embeddings": 1.6e-3,
            "layer_1": 1.4e-3,  # 1 + .6 * 2/3
            "layer_2": 1.2e-3,
            "layer_3": 1.0e-3,
            "head_1": 7.0e-3,
            "head_3": 5.0e-3,
        }
    )


def test_each_parameter_once(model: tuple[Backbone, nn.ModuleDict]) -> None:
    """Every trainable parameter of backbone and heads is in exactly one group; frozen ones are in none."""
    backbone, heads = model
    backbone.embed_tokens.requires_grad_(False)
    backbone.learn_numbers()
    groups = parameter_groups(backbone, heads, SETTINGS)
    found = [p.data_ptr() for g in groups for p in g["params"]]
    expected = [p.data_ptr() for m in (backbone, heads) for p in m.parameters() if p.requires_grad]
    assert sorted(found) == sorted(expected)
    assert not any(g["name"].startswith("embeddings") for g in groups)
    rates = {g["name"].split("/")[0]: g["lr"] for g in groups}
    assert rates["numbers"] == pytest.approx(SETTINGS.head_factor * depth_rate(SETTINGS, 0, 3))
    torch.optim.AdamW(groups)


def test_no_decay_on_norms_and_biases(model: tuple[Backbone, nn.ModuleDict]) -> None:
    """Matrices decay, norms and biases do not."""
    for group in parameter_groups(*model, SETTINGS):
        matrices = {p.ndim > 1 for p in group["params"]}
        assert matrices == {group["weight_decay"] == 0.1}
        assert group["weight_decay"] in (0.0, 0.1)


def test_schedule_by_hand() -> None:
    """20 steps, 4 of warm-up, half a cosine over 16 down to a tenth."""
    factor = cosine_with_warmup(20, OptimSettings(warmup_share=0.2, minimum_share=0.1))
    found = [factor(step) for step in (0, 1, 3, 4, 12, 20, 25)]
    assert found == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_schedule_without_warm_up_or_steps() -> None:
    """No warm-up starts at the peak; a run of no steps does not divide by zero."""
    settings = OptimSettings(warmup_share=0.0)
    assert cosine_with_warmup(10, settings)(0) == 1.0
    assert cosine_with_warmup(0, settings)(0) == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -0.01),
        ("learning_rate", float("nan")),
        ("head_factor", -5.0),
        ("weight_decay", -1.0),
        ("depth_slope", -1.5),
        ("warmup_share", 2.0),
        ("minimum_share", -3.0),
        ("betas", [0.9]),
        ("betas", [0.9, 1.5]),
    ],
)
def test_refuses_settings(name: str, value: Any) -> None:
    """A number that cannot train names its key, before there is a model."""
    with pytest.raises(ConfigError, match=rf"model\.optim\.{name} is {re.escape(str(value))}; expected"):
        OptimSettings(**{name: value})


def test_slowest_shallow_layers() -> None:
    """Shallow layers may learn more slowly, at depth_slope -1 the embeddings not at all: 1 + -1 * (1 - 0 / 3) = 0."""
    assert depth_rate(OptimSettings(depth_slope=-1.0), 0, 3) == 0
