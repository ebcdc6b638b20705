from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from project.errors import ConfigError
from project.model.backbone import Backbone
from project.model.heads import ExitHead, answer_tokens

Make = Callable[..., Any]


class Vocabulary:
    """A tokenizer of known words; any other text falls apart into unknown characters."""

    name_or_path = "toy"
    unk_token_id = 0

    def __init__(self, *words: str) -> None:
        self.ids = {word: i for i, word in enumerate(words, start=1)}

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]:
        assert not add_special_tokens
        return [self.ids[text]] if text in self.ids else [0] * len(text)


def test_starts_as_the_lm(tiny_config: Make, causal_layout: Make) -> None:
    """At the last layer a fresh head's logit is the LM's logit of yes minus its logit of no."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(tiny_config(), attn_implementation="segments").eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    backbone = Backbone(model).eval()
    head = ExitHead(backbone.final_norm, backbone.answer_direction([7], [11]))
    layout = causal_layout(1, 17)
    tokens = torch.randint(0, 64, (1, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = backbone.run(backbone.embed(tokens, layout), 0, 3).hidden[0]
        expected = model.lm_head(backbone.final_norm(hidden))
        torch.testing.assert_close(head(hidden), expected[:, 7] - expected[:, 11], atol=1e-5, rtol=1e-5)


def test_owns_its_norm(tiny_config: Make) -> None:
    """The norm is a trainable copy: two heads and the backbone share no parameter."""
    backbone = Backbone.from_config(tiny_config())
    heads = [ExitHead(backbone.final_norm, torch.ones(32)) for _ in range(2)]
    pointers = [p.data_ptr() for m in (*heads, backbone.final_norm) for p in m.parameters()]
    assert len(pointers) == len(set(pointers)) == 2 * (1 + 2) + 1  # norm, logit; the backbone's norm
    assert all(p.requires_grad for head in heads for p in head.parameters())
    assert not backbone.final_norm.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_are_float32(dtype: torch.dtype) -> None:
    """Whatever the backbone's type, and under autocast, logits are computed in float32: no ties by rounding."""
    head = ExitHead(nn.LayerNorm(16, dtype=dtype), torch.linspace(-1, 1, 16))
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = head(hidden)
    assert logits.shape == (200,)
    assert logits.dtype == torch.float32
    assert len(logits.unique()) == 200


def test_spellings() -> None:
    """All single-token spellings are found, the text as it stands first, each id once, unknowns never."""
    tokenizer = Vocabulary("yes", " yes", "Yes", " YES", "no", " No")
    assert answer_tokens(tokenizer, [" no", " yes"]) == ([6, 5], [2, 4, 1, 3])
    assert answer_tokens(tokenizer, ["no", "Yes"]) == ([5, 6], [3, 2, 4, 1])


def test_refuses_answers_without_a_token() -> None:
    """An answer with no single token names the key, the tokenizer and the word."""
    with pytest.raises(ConfigError, match=r"data\.prompt\.answers.*'toy'.*' never'"):
        answer_tokens(Vocabulary("yes", "no"), [" never", " yes"])


def test_refuses_answers_that_share_a_token() -> None:
    """Two answers that are spellings of each other would give a direction of nothing."""
    with pytest.raises(ConfigError, match=r"data\.prompt\.answers.*both have the token 1"):
        answer_tokens(Vocabulary("yes"), ["Yes", " yes"])
