"""Mean pooling: golden numbers, no influence of company or padding, cuts, special tokens, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from project.errors import ConfigError, SourceError
from project.retrieval.text import MeanPooling, mean_of_tokens

TEXTS = ["sea", "a movie about the sea", "dog", "two friends and one dog in a winter night by the river"]


def by_hand(folder: Path, text: str) -> np.ndarray:
    """One text alone, without padding: mean of all its tokens, divided by its length."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder)(tokens).last_hidden_state[0].mean(0).numpy()
    found: np.ndarray = mean / np.linalg.norm(mean)
    return found


def test_golden_mean() -> None:
    """Two of three tokens are there: ((1, 0) + (3, 4)) / 2 = (2, 2); the third, (9, 9), is padding."""
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]], [[0.0, 6.0], [0.0, 0.0], [3.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_of_tokens(hidden, mask).tolist() == [[2.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_model"])
def test_company_does_not_matter(kind: str, request: pytest.FixtureRequest) -> None:
    """A text's vector is that of the text alone, in the order given, of a sentence encoder and of a causal LM."""
    folder = request.getfixturevalue(kind)
    found = MeanPooling(str(folder), 64).encode(TEXTS)
    assert found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=True):
        assert vector == pytest.approx(by_hand(folder, text), abs=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.01


def test_special_tokens_count(tiny_encoder: Path) -> None:
    """A sentence encoder's [CLS] and [SEP] are part of the mean: even an empty text has a vector."""
    empty = MeanPooling(str(tiny_encoder), 64).encode([""])
    assert empty[0] == pytest.approx(by_hand(tiny_encoder, ""), abs=1e-5)


def test_a_text_without_tokens_has_no_direction(tiny_model: Path) -> None:
    """An LLM's tokenizer makes nothing of an empty text: its vector is zero, and that of its neighbour is not."""
    empty, other = MeanPooling(str(tiny_model), 64).encode(["", "dog"])
    assert not empty.any()
    assert np.linalg.norm(other) == pytest.approx(1)
    assert MeanPooling(str(tiny_model), 64).encode([]).shape == (0, 32)


def test_a_long_text_is_cut(tiny_model: Path) -> None:
    """With max_tokens 3 the rest of a text does not matter; with more it does."""
    texts = ["sea sea sea sea", "sea sea sea dog"]
    short, long = (MeanPooling(str(tiny_model), length).encode(texts) for length in (3, 64))
    assert short[0] == pytest.approx(short[1], abs=1e-6)
    assert np.abs(long[0] - long[1]).max() > 0.01


def test_fewer_layers(tiny_model: Path) -> None:
    """One layer of three is another vector: the library's own hidden state after layer 1, normed, then pooled."""
    model = AutoModel.from_pretrained(tiny_model)
    tokens = AutoTokenizer.from_pretrained(tiny_model)("dog", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model.norm(model(tokens, output_hidden_states=True).hidden_states[1])[0].mean(0).numpy()
    found = MeanPooling(str(tiny_model), 64, num_layers=1).encode(["dog"])[0]
    assert found == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


def test_too_much_is_asked(tiny_model: Path) -> None:
    """More layers or positions than the model has: both numbers and the YAML key."""
    with pytest.raises(ConfigError, match=r"init_args\.num_layers is 4, but .* has 3: expected 1 to 3"):
        MeanPooling(str(tiny_model), 64, num_layers=4).encode(["dog"])
    with pytest.raises(ConfigError, match=r"init_args\.max_tokens is 5000, but .* has 4096"):
        MeanPooling(str(tiny_model), 5000).encode(["dog"])
    with pytest.raises(ConfigError, match=r"init_args\.num_layers is 0, but .*: expected 1 to 3"):
        MeanPooling(str(tiny_model), 64, num_layers=0).encode(["dog"])


def test_no_model_to_read(tmp_path: Path) -> None:
    """An empty folder and one that does not exist are named, under the argument they came from."""
    with pytest.raises(ConfigError, match=r"init_args\.encoder is .* cannot be read"):
        MeanPooling(str(tmp_path), 64).encode(["dog"])
    with pytest.raises(SourceError, match="does not exist"):
        MeanPooling(str(tmp_path / "none"), 64).encode(["dog"])


def test_what_names_the_weights(tmp_path: Path) -> None:
    """A folder is its files, wherever it lies; a known source its checksum; a name on the hub itself."""
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    a, b, c = (MeanPooling(str(tmp_path / name), 64).weights for name in "abc")
    assert a == b != c
    assert len(MeanPooling("all-minilm-l6-v2", 64).weights) == 64
    assert MeanPooling("org/name", 64).weights == "org/name"
