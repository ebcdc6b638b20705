import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from project.data.download import convert_gguf, fetch

HIDDEN, HEADS, MLP, LAYERS = 32, 2, 64, 2


def alphabet() -> list[str]:
    """The 256 byte symbols of a byte-level tokenizer (GPT-2's table), then one merge."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))] + ["no"]


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A two-layer llama with random float32 weights and a byte-level tokenizer."""
    path = tmp_path / "in" / "tiny.gguf"
    path.parent.mkdir()
    tokens = [*alphabet(), "<end>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["n o"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (MLP, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, MLP)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_folder_computes_what_the_file_computes(tiny_gguf: Path, tmp_path: Path) -> None:
    """Model and tokenizer loaded from the folder equal those that transformers loads from the GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    convert_gguf(tiny_gguf.parent, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[5, 100, 256, 17]])
    with torch.no_grad():
        direct = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
        stored = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(stored(ids).logits, direct(ids).logits)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    text = "A word, no more: naïve 1994"
    before = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    after = AutoTokenizer.from_pretrained(folder)
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(text, add_special_tokens=False)) == text


@pytest.mark.real
def test_real_smollm2() -> None:
    """SmolLM2-135M as known: 30 layers of 576, vocabulary 49,152, " yes" = 9805, " no" = 787."""
    from transformers import AutoConfig, AutoTokenizer

    folder = fetch("smollm2-135m-instruct")
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49_152)
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.encode(" yes"), tokenizer.encode(" no")) == ([9805], [787])
