from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from project.errors import ConfigError
from project.layout import Layout
from project.model.backbone import FAMILIES, Backbone

PARTS = ("sequence", "segment", "group", "context", "position")
Make = Callable[..., Any]


def tokens_of(layout: Layout, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, layout.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tiny_config: Make, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Saves a random causal LM and returns it, in eval mode, with its folder."""
    from transformers import AutoModelForCausalLM

    def save(family: str = "llama", **changes: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM
        model = model.from_config(tiny_config(family, **changes), attn_implementation="eager").eval()
        with torch.no_grad():  # a fresh norm is all ones and would hide a norm that is left out
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
        torch.testing.assert_close(backbone.final_norm(staged), expected[3], atol=1e-5, rtol=1e-5)
        assert torch.equal(backbone.run(backbone.embed(tokens, layout), 0, 3).hidden, staged)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_stand_alone(tiny_config: Make, random_layout: Make, family: str) -> None:
    """Each segment alone with the context that it sees, at the same positions, has the same hidden state."""
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config(family)).eval()
    layout = random_layout(2)
    tokens = tokens_of(layout)
    mask = layout.dense_mask()
    checked = 0
    with torch.no_grad():
        packed = backbone.run(backbone.embed(tokens, layout), 0, 3).hidden
        for row in range(2):
            for segment in layout.segment[row][layout.sequence[row] >= 0].unique():
                own = (layout.segment[row] == segment) & (layout.sequence[row] >= 0)
                end = int(own.nonzero().max())
                part = (row, mask[row, end].nonzero()[:, 0])
                alone = Layout.build(
                    *(
                        getattr(layout, name)[part][None]
                        for name in ("sequence", "segment", "group", "context", "position")
                    )
                )
                hidden = backbone.run(backbone.embed(tokens[part][None], alone), 0, 3).hidden
                torch.testing.assert_close(hidden[0, -1], packed[row, end], atol=1e-4, rtol=1e-4)
                checked += 1
    assert checked > 20


def test_ties_see_no_answers(tiny_config: Make) -> None:
    """Where rows share a timestamp, changing one of them leaves the others' states bit for bit the same."""
    backbone = Backbone.from_config(tiny_config()).eval()
    segment = torch.arange(4).repeat_interleave(5)[None]
    group = torch.tensor([0, 1, 1, 2]).repeat_interleave(5)[None]
    layout = Layout.build(torch.zeros_like(segment), segment, group, segment >= 0, torch.arange(20)[None])
    tokens = tokens_of(layout)
    changed = tokens.clone()
    changed[0, 5:10] = (changed[0, 5:10] + 1) % 64
    with torch.no_grad():
        before, after = (backbone.run(backbone.embed(t, layout), 0, 3).hidden[0] for t in (tokens, changed))
    assert torch.equal(before[10:15], after[10:15])
    assert not torch.allclose(before[15:], after[15:])


def test_gradient_checkpointing_changes_nothing(tiny_config: Make, random_layout: Make) -> None:
    """Recomputing activations gives the same output and the same gradients."""
    backbone = Backbone.from_config(tiny_config())
    layout = random_layout(0)
    results = []
    for backbone.gradient_checkpointing in (False, True):
        backbone.zero_grad()
        hidden = backbone.run(backbone.embed(tokens_of(layout), layout), 0, 3).hidden
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_through_a_frozen_backbone(tiny_config: Make, random_layout: Make) -> None:
    """With all but the last layer frozen, recomputation still brings gradients to the last layer."""
    backbone = Backbone.from_config(tiny_config()).requires_grad_(False)
    backbone.layers[2].requires_grad_(True)
    backbone.gradient_checkpointing = True
    layout = random_layout(0)
    backbone.run(backbone.embed(tokens_of(layout), layout), 0, 3).hidden.square().sum().backward()
    assert all(p.grad is not None for p in backbone.layers[2].parameters())


def test_autocast_to_bfloat16(tiny_config: Make, random_layout: Make) -> None:
    """Under autocast (bf16-mixed) the backbone runs, within bfloat16's rounding of float32."""
    torch.manual_seed(0)
    backbone = Backbone.from_config(tiny_config(initializer_range=0.05)).eval()
    layout = random_layout(0)
    tokens = tokens_of(layout)
    with torch.no_grad():
        exact = backbone.run(backbone.embed(tokens, layout), 0, 3).hidden
        with torch.autocast("cpu", torch.bfloat16):
            rough = backbone.run(backbone.embed(tokens, layout), 0, 3).hidden
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


def test_weights_in_bfloat16(saved: Make, random_layout: Make) -> None:
    """States have the type of the weights."""
    backbone = Backbone.from_pretrained(saved()[1]).to(torch.bfloat16)
    layout = random_layout(0)
    state = backbone.run(backbone.embed(tokens_of(layout), layout), 0, 3)
    assert {p.dtype for p in backbone.parameters()} == {state.hidden.dtype} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_short(saved: Make, causal_layout: Make, family: str, capfd: pytest.CaptureFixture[str]) -> None:
    """`num_layers` keeps the first layers and the final norm with their weights, silently."""
    model, folder = saved(family)
    backbone = Backbone.from_pretrained(folder, num_layers=2).eval()
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    assert len(backbone.layers) == backbone.config.num_hidden_layers == 2
    assert torch.equal(backbone.final_norm.weight, model.model.norm.weight)
    layout = causal_layout(1, 12)
    with torch.no_grad():
        expected = model.model(tokens_of(layout), output_hidden_states=True).hidden_states[2]
        found = backbone.run(backbone.embed(tokens_of(layout), layout), 0, 2).hidden
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_from_config_leaves_the_config_alone(tiny_config: Make) -> None:
    """The caller's configuration is copied, not cut."""
    config = tiny_config("qwen2")
    assert len(Backbone.from_config(config, num_layers=1).layers) == 1
    assert config.num_hidden_layers == len(config.layer_types) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_answer_direction(saved: Make, tied: bool) -> None:
    """Mean of the yes rows minus mean of the no rows of the LM head, tied to the embeddings or not."""
    model, folder = saved(tie_word_embeddings=tied)
    rows = model.lm_head.weight.detach()
    assert torch.equal(rows, model.model.embed_tokens.weight) == tied
    backbone = Backbone.from_pretrained(folder)
    expected = (rows[3] + rows[9]) / 2 - rows[5]
    torch.testing.assert_close(backbone.answer_direction([3, 9], [5]), expected)
    backbone.release_lm_head()
    with pytest.raises(IndexError):
        backbone.answer_direction([3], [5])


def test_lm_head_is_neither_saved_nor_trained(tiny_config: Make) -> None:
    """State and parameters hold embeddings, layers and a frozen final norm; no LM head, no whole model."""
    backbone = Backbone.from_config(tiny_config(tie_word_embeddings=False))
    assert {name.split(".")[0] for name in backbone.state_dict()} == {"embed_tokens", "layers", "final_norm"}
    assert {n for n, p in backbone.named_parameters() if not p.requires_grad} == {"final_norm.weight"}


def test_starts_in_training_mode(saved: Make) -> None:
    """Loaded modules are in training mode, so that dropout of adapters works in fit."""
    assert all(module.training for module in Backbone.from_pretrained(saved()[1]).modules())


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window = 4096"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "linear_attention",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ],
)
def test_refuses_by_name(tiny_config: Make, family: str, changes: dict[str, Any], named: str) -> None:
    """What the backbone would compute wrongly is refused: key, family, finding and supported list."""
    with pytest.raises(ConfigError) as error:
        Backbone.from_config(tiny_config(family, **changes))
    for part in ("model.backbone", repr(family), named, "Qwen3 and Mistral"):
        assert part in str(error.value)


def test_refuses_rotary_by_layer(tiny_config: Make) -> None:
    """Rotary parameters by layer type are refused."""
    config = tiny_config("qwen3")
    config.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    with pytest.raises(ConfigError, match="differ by layer"):
        Backbone.from_config(config)


def test_refuses_other_families() -> None:
    """A family that is not on the list is named."""
    from transformers import GPT2Config

    with pytest.raises(ConfigError, match=r"'gpt2'.*model_type llama, qwen2, qwen3, mistral"):
        Backbone.from_config(GPT2Config())


def test_refuses_too_many_layers(tiny_config: Make) -> None:
    """A depth that the backbone does not have names the key, the value and the backbone's depth."""
    with pytest.raises(ConfigError, match=r"model\.exit_layers ends at 4.* has 3 layers"):
        Backbone.from_config(tiny_config(), num_layers=4)


def test_refuses_a_folder_without_a_model(tmp_path: Path) -> None:
    """A folder that is no model names the key and the folder."""
    with pytest.raises(ConfigError, match=r"model\.backbone is .*nothing"):
        Backbone.from_pretrained(tmp_path / "nothing")


def test_refuses_missing_weights(saved: Make) -> None:
    """A model whose files lack a layer is refused instead of being filled with random numbers."""
    from safetensors.torch import load_file, save_file

    _, folder = saved()
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "layers.2.mlp" not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 3 weights.*layers\.2\.mlp"):
        Backbone.from_pretrained(folder)
