"""Sources are fetched once, verified and unpacked whole or not at all; a GGUF file becomes a folder."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from project.cache import default_cache
from project.data import download as sources
from project.data.download import SOURCES, Source, convert_gguf, fetch, resolve_model
from project.errors import SourceError


def pack(folder: Path, members: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "toy_set-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            # a fixed date: the same bytes again
            archive.writestr(zipfile.ZipInfo(f"toy/data/{name}"), text)
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the wheel of a registered source "toy" put there by hand, and no way to the network."""
    wheel = pack(
        tmp_path / "cache" / "wheels", {"a.txt": "A", "sub/b.txt": "B", "unused.txt": "C"}
    )
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = Source(
        "toy-set", "1.0", checksum, "toy/data", ("a.txt", "sub/b.txt"), "Toy licence."
    )
    monkeypatch.setitem(SOURCES, "toy", source)
    monkeypatch.setattr(
        sources,
        "_pip_download",
        lambda requirement, folder: f"no network for {requirement}",
    )
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_members_are_unpacked_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members and the licence note, no scratch folder; the second call neither looks for a wheel nor prints."""
    folder = fetch("toy")
    assert "Toy licence." in capsys.readouterr().err
    assert folder == cache / "sources" / "toy-1.0"
    found = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == {"a.txt": "A", "sub/b.txt": "B", "LICENCE-NOTE.txt": "Toy licence.\n"}
    assert list(folder.parent.iterdir()) == [folder]
    next((cache / "wheels").iterdir()).unlink()
    assert fetch("toy") == folder
    assert capsys.readouterr().err == ""


def test_download_is_used_where_no_wheel_is_at_hand(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next((cache / "wheels").iterdir()).unlink()
    with pytest.raises(SourceError, match="no network for toy-set"):
        fetch("toy")

    def download(requirement: str, folder: Path) -> str:
        assert requirement == "toy-set==1.0"
        pack(folder, {"a.txt": "A", "sub/b.txt": "B", "unused.txt": "C"})
        return ""

    monkeypatch.setattr(sources, "_pip_download", download)
    assert (fetch("toy") / "a.txt").read_text() == "A"
    assert not list(cache.rglob("*.whl"))


def test_build_step_makes_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(members: Path, out: Path) -> None:
        (out / "built.txt").write_text((members / "a.txt").read_text() * 3)

    monkeypatch.setitem(SOURCES, "toy", replace(SOURCES["toy"], build=build))
    folder = fetch("toy")
    assert sorted(path.name for path in folder.iterdir()) == [
        "LICENCE-NOTE.txt",
        "built.txt",
    ]
    assert (folder / "built.txt").read_text() == "AAA"


def test_wrong_checksum_names_both_and_unpacks_nothing(cache: Path) -> None:
    wheel = next((cache / "wheels").iterdir())
    wheel.write_bytes(wheel.read_bytes() + b"x")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(
        SourceError, match=rf"(?s)(?=.*{found})(?=.*{SOURCES['toy'].sha256})"
    ):
        fetch("toy")
    assert list((cache / "sources").iterdir()) == []


def test_pip_is_this_pythons_and_installs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: a\n\nERROR: b\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert sources._pip_download("toy-set==1.0", tmp_path) == "WARNING: a | ERROR: b"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", str(tmp_path), "toy-set==1.0"} <= set(
        commands[0]
    )


def test_models_resolve_to_folders_or_hub_names(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is fetched into $PROJECT_CACHE, a folder stays itself, a hub name is handed on, others are errors."""
    monkeypatch.delenv("PROJECT_CACHE", raising=False)
    assert default_cache() == Path.home() / ".cache" / "exitrec"
    monkeypatch.setenv("PROJECT_CACHE", str(cache))
    assert resolve_model("toy") == str(cache / "sources" / "toy-1.0")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for missing in (str(tmp_path / "none"), "./none", "~/none"):
        with pytest.raises(SourceError, match="does not exist"):
            resolve_model(missing)


@pytest.mark.parametrize("harmful", [os.system, eval])
def test_a_pickle_with_another_name_runs_nothing(tmp_path: Path, harmful: object) -> None:
    """The one pickle that is read may name numpy's arrays and pandas' containers; any other name ends it."""
    (tmp_path / "movielens.pkl.compress").write_bytes(lzma.compress(pickle.dumps(harmful)))
    with pytest.raises(pickle.UnpicklingError, match="not expected in this file"):
        sources._convert_latest_small(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


HIDDEN, HEADS, MLP, LAYERS = 32, 2, 64, 2


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A two-layer llama with random float32 weights and a byte-level tokenizer."""
    path = tmp_path / "in" / "tiny.gguf"
    path.parent.mkdir()
    tokens = [*sorted(ByteLevel.alphabet()), "no", "<end>"]
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
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    )
    writer.add_token_merges(["n o"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": (HIDDEN, HIDDEN)
            for name in ("attn_q", "attn_k", "attn_v", "attn_output")
        }
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (MLP, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, MLP)
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{name}.weight", generator.standard_normal(shape, dtype=np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
def test_folder_computes_what_the_file_computes(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    convert_gguf(tiny_gguf.parent, folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[5, 100, 256, 17]])
    with torch.no_grad():
        direct = AutoModelForCausalLM.from_pretrained(
            tiny_gguf.parent, gguf_file=tiny_gguf.name
        )
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
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == (
        "llama",
        30,
        576,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (
        9,
        3,
        49_152,
    )
    assert config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.encode(" yes"), tokenizer.encode(" no")) == ([9805], [787])
