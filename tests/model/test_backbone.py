"""Tests that the backbone is the library's forward, with attention that reads only what a layout shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from world import dense_mask

from project.errors import ConfigError
from project.layout import Layout
from project.model.attention import segments_attention
from project.model.backbone import FAMILIES, Backbone

HEADS, KV_HEADS, DIM = 6, 2, 8
Make = Callable[..., Any]


def inputs(layout: Layout, seed: int, kv_heads: int = KV_HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*layout.shape, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_()
        for shape in shapes
    ]


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """The same attention with the rule written out; padding gives zero."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(
        query, key, value, dense_mask(layout)[:, None], scale=0.3
    )
    return out.transpose(1, 2) * (layout.sequence >= 0)[:, :, None, None]


def blocked(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    out, weights = segments_attention(
        nn.Identity(), query, key, value, None, layout=layout, scaling=0.3
    )
    assert weights is None
    return out


@pytest.mark.parametrize("block_tokens", [5, 16, 256])
@pytest.mark.parametrize("seed", range(6))
def test_attention_equals_dense_mask(
    random_layout: Make, seed: int, block_tokens: int
) -> None:
    """Output and gradients, with ties, packed sequences, candidates, padding, grouped queries and without."""
    layout = random_layout(seed, block_tokens=block_tokens)
    tensors = inputs(layout, seed, HEADS if seed == 3 else KV_HEADS)
    expected, found = dense(*tensors, layout), blocked(*tensors, layout)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert (found[layout.sequence < 0] == 0).all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected)
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_invisible_keys_do_not_matter(random_layout: Make) -> None:
    """Changing everything a query does not see leaves its output bit for bit the same."""
    layout = random_layout(4)
    query, key, value = (t.detach() for t in inputs(layout, 0))
    at = int((layout.sequence[0] >= 0).nonzero().max())
    hidden = ~dense_mask(layout)[0, at]
    assert hidden.any()
    before = blocked(query, key, value, layout)[0, at]
    key[0, :, hidden] = 100.0
    value[0, :, hidden] = -100.0
    assert torch.equal(blocked(query, key, value, layout)[0, at], before)


def tokens_of(layout: Layout) -> Tensor:
    return torch.randint(0, 64, layout.shape, generator=torch.Generator().manual_seed(0))


def hidden_of(backbone: Backbone, layout: Layout, tokens: Tensor | None = None) -> Tensor:
    state = backbone.embed(tokens_of(layout) if tokens is None else tokens, layout)
    return backbone.run(state, 0, len(backbone.layers)).hidden


@pytest.fixture
def saved(tiny_config: Make, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Saves a random causal LM and returns it, in eval mode, with its folder."""
    from transformers import AutoModelForCausalLM

    def save(family: str = "llama", **changes: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM
        model = model.from_config(
            tiny_config(family, **changes), attn_implementation="eager"
        ).eval()
        # a fresh norm is all ones and would hide a norm that is left out
        with torch.no_grad():
            model.model.norm.weight.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(saved: Make, causal_layout: Make, family: str) -> None:
    """On a plain causal prompt the backbone equals the library's forward, layer by layer and in one run."""
    model, folder = saved(family)
    backbone = Backbone.from_pretrained(folder).eval()
    layout = causal_layout(2, 43)
    tokens = tokens_of(layout)
    with torch.no_grad():
        expected = model.model(tokens, output_hidden_states=True).hidden_states
        state = backbone.embed(tokens, layout)
        torch.testing.assert_close(state.hidden, expected[0])
        for layer in (1, 2):
            state = backbone.run(state, layer - 1, layer)
            torch.testing.assert_close(state.hidden, expected[layer], atol=1e-5, rtol=1e-5)
        # the library's last hidden state is after the final norm, the backbone's is before
        staged = backbone.run(state, 2, 3).hidden
        torch.testing.assert_close(
            backbone.final_norm(staged), expected[3], atol=1e-5, rtol=1e-5
        )
        assert torch.equal(hidden_of(backbone, layout), staged)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_short(
    saved: Make, causal_layout: Make, family: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """`num_layers` keeps the first layers and the final norm with their weights, silently."""
    model, folder = saved(family)
    backbone = Backbone.from_pretrained(folder, num_layers=2).eval()
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert len(backbone.layers) == backbone.config.num_hidden_layers == 2
    assert torch.equal(backbone.final_norm.weight, model.model.norm.weight)
    layout = causal_layout(1, 12)
    with torch.no_grad():
        expected = model.model(tokens_of(layout), output_hidden_states=True).hidden_states[
            2
        ]
        torch.testing.assert_close(
            hidden_of(backbone, layout), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_stand_alone(
    tiny_config: Make, random_layout: Make, family: str
) -> None:
    """Each segment alone with the context that it sees, at the same positions, has the same hidden state."""
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config(family)).eval()
    layout = random_layout(2)
    tokens, mask = tokens_of(layout), dense_mask(layout)
    names = ("sequence", "segment", "group", "context", "position")
    checked = 0
    with torch.no_grad():
        packed = hidden_of(backbone, layout)
        for row in range(2):
            inside = layout.sequence[row] >= 0
            for segment in layout.segment[row][inside].unique():
                end = int((inside & (layout.segment[row] == segment)).nonzero().max())
                part = (row, mask[row, end].nonzero()[:, 0])
                alone = Layout.build(*(getattr(layout, name)[part][None] for name in names))
                hidden = hidden_of(backbone, alone, tokens[part][None])
                torch.testing.assert_close(
                    hidden[0, -1], packed[row, end], atol=1e-4, rtol=1e-4
                )
                checked += 1
    assert checked > 20


def test_autocast_to_bfloat16(tiny_config: Make, random_layout: Make) -> None:
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config(initializer_range=0.05)).eval()
    layout = random_layout(0)
    with torch.no_grad():
        exact = hidden_of(backbone, layout)
        with torch.autocast("cpu", torch.bfloat16):
            rough = hidden_of(backbone, layout)
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


def test_from_config(tiny_config: Make) -> None:
    """The caller's configuration is copied, not cut; no LM head is saved or trained."""
    config = tiny_config("qwen2", tie_word_embeddings=False)
    backbone = Backbone.from_config(config, num_layers=1)
    assert len(backbone.layers) == 1
    assert config.num_hidden_layers == len(config.layer_types) == 3
    assert {name.split(".")[0] for name in backbone.state_dict()} == {
        "embed_tokens",
        "layers",
        "final_norm",
    }
    assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == {
        "final_norm.weight"
    }


@pytest.mark.parametrize("tied", [True, False])
def test_answer_direction(saved: Make, tied: bool) -> None:
    """Mean of the yes rows minus mean of the no rows of the LM head, tied to the embeddings or not."""
    model, folder = saved(tie_word_embeddings=tied)
    rows = model.lm_head.weight.detach()
    assert torch.equal(rows, model.model.embed_tokens.weight) == tied
    backbone = Backbone.from_pretrained(folder)
    torch.testing.assert_close(
        backbone.answer_direction([3, 9], [5]), (rows[3] + rows[9]) / 2 - rows[5]
    )
    backbone.release_lm_head()
    with pytest.raises(IndexError):
        backbone.answer_direction([3], [5])


LINEAR = ["full_attention", "linear_attention", "full_attention"]
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 4096}, "'mistral'.*sliding_window = 4096"),
        ("qwen2", {"layer_types": LINEAR}, "'qwen2'.*linear_attention"),
        ("llama", {"rope_parameters": DYNAMIC}, "'llama'.*'dynamic'"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_refuses_what_it_would_compute_wrongly(
    tiny_config: Make, family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)model\.backbone.*{words}"):
        Backbone.from_config(tiny_config(family, **changes))


WINDOWS = (
    "sliding_window = 4096; layers of type sliding_attention; rotary .* differ by layer"
)


def test_refuses_other_backbones(tiny_config: Make, tmp_path: Path) -> None:
    """All that other families need and is missing, more layers than there are, a folder without a model."""
    from transformers import AutoConfig

    for config, layers, words in (
        *((AutoConfig.for_model(f"gemma3{part}"), None, WINDOWS) for part in ("", "_text")),
        (
            AutoConfig.for_model("qwen3_next"),
            None,
            "linear_attention; decoder .*'qwen3_next'",
        ),
        (AutoConfig.for_model("mamba"), None, "linear_attention; positions .* not rotary"),
        (AutoConfig.for_model("gpt2"), None, "'gpt2'"),
        (tiny_config(), 4, r"model\.exit_layers ends at 4.* has 3 layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            Backbone.from_config(config, num_layers=layers)
    with pytest.raises(ConfigError, match=r"model\.backbone is .*nothing"):
        Backbone.from_pretrained(tmp_path / "nothing")


def test_refuses_missing_weights(saved: Make) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = saved()
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "layers.2.mlp" not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 3 weights.*layers\.2\.mlp"):
        Backbone.from_pretrained(folder)
