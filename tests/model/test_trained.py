"""Tests exit heads, adapters and vectors of numbers: how each starts, what trains, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from project.data.prompt import BYTE, LOWEST_ID, NUMBERS, SPAN, STEPS, STEPS_A_UNIT
from project.errors import ConfigError
from project.layout import Layout
from project.model.backbone import (
    FIRST_KNOT,
    KNOTS,
    LAST_KNOT,
    Backbone,
    NumberEmbedding,
)
from project.model.heads import ExitHead, answer_tokens
from project.model.module import LoraSettings, add_lora, frozen_names
from project.model.optim import (
    HEAD_FACTOR,
    WEIGHT_DECAY,
    OptimSettings,
    cosine_with_warmup,
    parameter_groups,
)

Make = Callable[..., Any]
SETTINGS = OptimSettings(learning_rate=1e-3)


def hidden_of(backbone: Backbone, layout: Layout) -> torch.Tensor:
    tokens = torch.randint(0, 64, layout.shape, generator=torch.Generator().manual_seed(0))
    return backbone.run(backbone.embed(tokens, layout), 0, 3).hidden


def test_a_head_owns_its_norm(tiny_config: Make) -> None:
    """The norm is a trainable copy: two heads and the backbone share no parameter."""
    backbone = Backbone.from_config(tiny_config())
    heads = [ExitHead(backbone.final_norm, torch.ones(32)) for _ in range(2)]
    pointers = [p.data_ptr() for m in (*heads, backbone.final_norm) for p in m.parameters()]
    # norm, logit; the backbone's norm
    assert len(pointers) == len(set(pointers)) == 2 * (1 + 2) + 1
    assert all(p.requires_grad for head in heads for p in head.parameters())
    assert not backbone.final_norm.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32(dtype: torch.dtype) -> None:
    """Whatever the backbone's type, and under autocast: no ties by rounding."""
    head = ExitHead(nn.LayerNorm(16, dtype=dtype), torch.linspace(-1, 1, 16))
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = head(hidden)
    assert logits.dtype == torch.float32
    assert len(logits.unique()) == len(logits) == 200


class Vocabulary:
    """A tokenizer of known words; any other text falls apart into unknown characters."""

    name_or_path = "toy"
    unk_token_id = 0

    def __init__(self, *words: str) -> None:
        self.ids = {word: i for i, word in enumerate(words, start=1)}

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
    ) -> list[int]:
        return [self.ids[text]] if text in self.ids else [0] * len(text)


def test_spellings() -> None:
    """All single-token spellings are found, the text as it stands first, each id once, unknowns never."""
    tokenizer = Vocabulary("yes", " yes", "Yes", " YES", "no", " No")
    assert answer_tokens(tokenizer, [" no", " yes"]) == ([6, 5], [2, 4, 1, 3])
    # no leading space: that token alone, where it is one
    assert answer_tokens(tokenizer, ["no", "Yes"]) == ([5], [3])
    assert answer_tokens(tokenizer, ["no", "YES"]) == ([5], [4, 2, 1, 3])


@pytest.mark.parametrize(
    ("answers", "words"), [([" never", " yes"], "' never'"), (["Yes", " yes"], "token 1")]
)
def test_answers_that_no_head_can_read(answers: list[str], words: str) -> None:
    """No single token, or one for both: a direction of nothing."""
    with pytest.raises(ConfigError, match=rf"data\.prompt\.answers.*{words}"):
        answer_tokens(Vocabulary("yes"), answers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_adapters_add_nothing_at_first(
    tiny_config: Make, random_layout: Make, family: str
) -> None:
    backbone = Backbone.from_config(tiny_config(family)).eval()
    before = hidden_of(backbone, random_layout(0))
    add_lora(backbone, LoraSettings(rank=2))
    torch.testing.assert_close(hidden_of(backbone, random_layout(0)), before)


def test_only_adapters_and_heads_train(tiny_config: Make, random_layout: Make) -> None:
    """One step moves every adapter's second factor and the head, and nothing else."""
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config())
    model = nn.ModuleDict(
        {"backbone": backbone, "head": ExitHead(backbone.final_norm, torch.ones(32))}
    )
    add_lora(backbone, LoraSettings(rank=2))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n in trainable if n.startswith("backbone")} == {
        "lora_A",
        "lora_B",
    }
    # layers, linear layers of each, factors; norm, logit
    assert len(trainable) == 3 * 7 * 2 + 3
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model["head"](hidden_of(backbone, random_layout(0))).sum().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # the first factors' gradient is zero while the second ones are
    assert moved == {n for n in trainable if "lora_A" not in n}


def test_frozen_names(tiny_config: Make) -> None:
    """Frozen are exactly the weights that the base model has; with what is trained they make up the state."""
    backbone = Backbone.from_config(tiny_config())
    base = set(backbone.state_dict())
    assert frozen_names(backbone) == {"final_norm.weight"}
    add_lora(backbone, LoraSettings(rank=2))
    frozen = frozen_names(backbone)
    assert {name.replace(".base_layer", "") for name in frozen} == base
    assert len(set(backbone.state_dict()) - frozen) == 3 * 7 * 2


def test_scale_of_an_adapter(tiny_config: Make) -> None:
    """It adds twice B A x, whatever the rank."""
    backbone = Backbone.from_config(tiny_config()).eval()
    add_lora(backbone, LoraSettings(rank=3))
    layer: Any = backbone.layers[0].self_attn.q_proj
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    expected = layer.base_layer(x) + 2.0 * layer.lora_B["default"](
        layer.lora_A["default"](x)
    )
    torch.testing.assert_close(layer(x), expected)


@pytest.fixture
def embedding() -> NumberEmbedding:
    torch.manual_seed(0)
    return NumberEmbedding(nn.Embedding(20, 8))


def an_id(kind: int, value: float) -> int:
    """Of a number, by the definition in project.data.prompt."""
    return -(1 + round((value + SPAN) * STEPS_A_UNIT)) * BYTE**kind


@pytest.mark.parametrize("frozen", [False, True])
def test_words_keep_their_vectors(frozen: bool) -> None:
    words = nn.Embedding(20, 8).requires_grad_(not frozen)
    found = NumberEmbedding(words)
    ids = torch.arange(20).view(4, 5)
    assert torch.equal(found(ids), words(ids))
    assert found.weight.data_ptr() == words.weight.data_ptr()
    assert found.weight.requires_grad is not frozen
    assert found.numbers.requires_grad


@pytest.mark.parametrize("kind", range(len(NUMBERS)))
def test_knots_and_lines(kind: int, embedding: NumberEmbedding) -> None:
    """At whole log-odds a knot, a quarter further a quarter of the way, and beyond the last the last."""
    knots = embedding.numbers[kind]
    for place in range(KNOTS):
        value = FIRST_KNOT + place
        assert torch.allclose(
            embedding(torch.tensor(an_id(kind, value))), knots[place], atol=1e-6
        )
        if place + 1 < KNOTS:
            line = torch.lerp(knots[place], knots[place + 1], 0.25)
            assert torch.allclose(
                embedding(torch.tensor(an_id(kind, value + 0.25))), line, atol=1e-5
            )
    assert max(-FIRST_KNOT, LAST_KNOT) < SPAN
    for value, knot in ((-SPAN, 0), (SPAN, -1)):
        assert torch.allclose(
            embedding(torch.tensor(an_id(kind, value))), knots[knot], atol=1e-6
        )


def test_several_numbers_are_summed(embedding: NumberEmbedding) -> None:
    """The id of all numbers is the sum of theirs, its vector the sum of theirs; every step has a vector."""
    ids = [an_id(0, -1.3), an_id(2, 0.0), an_id(len(NUMBERS) - 1, 5.0)]
    torch.testing.assert_close(
        embedding(torch.tensor(sum(ids))), embedding(torch.tensor(ids)).sum(0)
    )
    torch.testing.assert_close(
        embedding(torch.tensor(LOWEST_ID)), embedding.numbers[:, -1].sum(0)
    )
    assert (
        embedding(-torch.arange(1, STEPS + 1) * BYTE ** (len(NUMBERS) - 1)).isfinite().all()
    )


def test_gradients_reach_what_was_read(embedding: NumberEmbedding) -> None:
    """A number moves its two knots by their shares, a word its row, and nothing else; no number: zeros, not None."""
    embedding(torch.tensor([3, an_id(1, 0.25)])).sum().backward()
    assert embedding.numbers.grad is not None
    assert embedding.weight.grad is not None
    expected = torch.zeros(len(NUMBERS), KNOTS)
    expected[1, 4:6] = torch.tensor([0.75, 0.25])
    torch.testing.assert_close(embedding.numbers.grad.mean(-1), expected)
    assert embedding.weight.grad[3].eq(1).all()
    embedding.zero_grad()
    embedding(torch.tensor([3])).sum().backward()
    assert embedding.numbers.grad is not None


@pytest.fixture
def model(tiny_config: Make) -> tuple[Backbone, nn.ModuleDict]:
    """Three layers with heads at 1 and 3; Qwen2, whose layers have biases."""
    backbone = Backbone.from_config(tiny_config("qwen2"))
    return backbone, nn.ModuleDict(
        {str(k): ExitHead(backbone.final_norm, torch.ones(32)) for k in (1, 3)}
    )


def test_each_parameter_once(model: tuple[Backbone, nn.ModuleDict]) -> None:
    """Every trainable parameter of backbone and heads is in exactly one group; matrices decay, others do not."""
    backbone, heads = model
    backbone.embed_tokens.requires_grad_(False)
    backbone.learn(items=False)
    groups = parameter_groups(backbone, heads, SETTINGS)
    found = [p.data_ptr() for g in groups for p in g["params"]]
    expected = [
        p.data_ptr() for m in (backbone, heads) for p in m.parameters() if p.requires_grad
    ]
    assert sorted(found) == sorted(expected)
    rates = {g["name"].split("/")[0]: g["lr"] for g in groups}
    fast = HEAD_FACTOR * 1e-3
    assert rates == {"backbone": 1e-3, "numbers": fast, "heads": fast}
    for group in groups:
        assert group["weight_decay"] in (0.0, WEIGHT_DECAY)
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    torch.optim.AdamW(groups)


def test_schedule_by_hand() -> None:
    """80 steps, 4 of warm-up, half a cosine over 76 down to a tenth; none of either divides by zero."""
    factor = cosine_with_warmup(80)
    found = [factor(step) for step in (0, 1, 3, 4, 42, 80, 85)]
    assert found == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.55, 0.1, 0.1])
    for steps in (10, 0):
        assert cosine_with_warmup(steps)(0) == 1.0


@pytest.mark.parametrize("value", [-0.01, float("nan")])
def test_refuses_settings(value: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.optim\.learning_rate is"):
        OptimSettings(value)
