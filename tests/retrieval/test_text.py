"""Tests texts: mean pooling, what retrievers read of items and histories, and text similarity to own rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from example_logs import flip, make_log, retrieved
from transformers import AutoModel, AutoTokenizer

from project.arrays import F32
from project.errors import ConfigError, SourceError
from project.retrieval import TextEncoder, own_text
from project.retrieval.base import Edges
from project.retrieval.own_text import SHRINK, item_vectors, text_similarity
from project.retrieval.past import WalkRows
from project.retrieval.text import (
    MeanPooling,
    TextVectors,
    encode_once,
    item_texts,
)

TEXTS = [
    "sea",
    "a movie about the sea",
    "dog",
    "two friends and one dog in a winter night by the river",
]


def by_hand(folder: Path, text: str, layer: int | None = None) -> np.ndarray:
    """One text alone, without padding: mean of all its tokens, divided by its length."""
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        hidden = (
            out.last_hidden_state if layer is None else model.norm(out.hidden_states[layer])
        )
    mean = hidden[0].mean(0).numpy()
    found: np.ndarray = mean / np.linalg.norm(mean)
    return found


@pytest.mark.parametrize("kind", ["tiny_encoder", "tiny_model"])
def test_other_texts_change_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    """A text's vector is that of the text alone, in the order given, of a sentence encoder and of a causal LM."""
    folder = request.getfixturevalue(kind)
    found = MeanPooling(str(folder), 64).encode(TEXTS)
    assert found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=True):
        assert vector == pytest.approx(by_hand(folder, text), abs=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.01


def test_an_empty_text(tiny_encoder: Path, tiny_model: Path) -> None:
    """A sentence encoder's [CLS] and [SEP] are part of the mean; an LLM has no token, and the vector is zero."""
    empty = MeanPooling(str(tiny_encoder), 64).encode([""])
    assert empty[0] == pytest.approx(by_hand(tiny_encoder, ""), abs=1e-5)
    llm = MeanPooling(str(tiny_model), 64)
    assert np.linalg.norm(llm.encode(["", "dog"]), axis=1) == pytest.approx([0, 1])
    assert llm.encode([]).shape == (0, 32)


def test_a_long_text_is_cut(tiny_model: Path) -> None:
    texts = ["sea sea sea sea", "sea sea sea dog"]
    short, long = (MeanPooling(str(tiny_model), length).encode(texts) for length in (3, 64))
    assert short[0] == pytest.approx(short[1], abs=1e-6)
    assert np.abs(long[0] - long[1]).max() > 0.01


def test_fewer_layers(tiny_model: Path) -> None:
    """One layer of three: the library's own hidden state after layer 1, normed, then pooled."""
    found = MeanPooling(str(tiny_model), 64, num_layers=1).encode(["dog"])[0]
    assert found == pytest.approx(by_hand(tiny_model, "dog", layer=1), abs=1e-5)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """An empty folder, and one that does not exist."""
    with pytest.raises(ConfigError, match=r"init_args\..*cannot be read"):
        MeanPooling(str(tmp_path), 64).encode(["dog"])
    with pytest.raises(SourceError, match="does not exist"):
        MeanPooling(str(tmp_path / "none"), 64).encode(["dog"])


def test_identity_of_the_weights(tmp_path: Path) -> None:
    """A folder is its files, wherever it lies; a known source its checksum; a name on the hub itself.

    So a model that was retrained in its folder changes the settings, though not the arguments.
    """
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    a, b, c = (MeanPooling(str(tmp_path / name), 64).weights for name in "abc")
    assert a == b != c
    assert len(MeanPooling("all-minilm-l6-v2", 64).weights) == 64
    assert MeanPooling("org/name", 64).weights == "org/name"
    before = TextEncoder(encoder=str(tmp_path / "a")).settings()
    (tmp_path / "a" / "config.json").write_text("3")
    after = TextEncoder(encoder=str(tmp_path / "a")).settings()
    assert before["init_args"] == after["init_args"]
    assert before != after
    assert set(TextEncoder().settings()) == {"class_path", "init_args"}


ITEMS = pl.DataFrame(
    {
        "item": [0, 1, 2],
        "item_id": ["7", "8", "9"],
        "title": ["Alien", "Babe", "Clue"],
        "year": ["1979", "", "1985"],
        "genres": ["Horror Sci-Fi", "Comedy", ""],
    }
)


class Lengths(MeanPooling):
    """Encodes a text as (its length, 1) and counts its calls."""

    weights = "lengths"
    calls = 0

    def __init__(self) -> None:
        super().__init__("unused", 64)

    def encode(self, texts: Sequence[str]) -> F32:
        self.calls += 1
        return np.array([[len(text), 1] for text in texts], np.float32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    return tmp_path


def test_texts_of_items() -> None:
    """Everything that is known, title first, ids left out."""
    assert item_texts(ITEMS) == ["Alien, 1979, Horror Sci-Fi", "Babe, Comedy", "Clue, 1985"]


def test_texts_are_read_once(cache: Path) -> None:
    """Other texts are read, and vectors of other weights, depth or cut are never taken for these."""
    reader, texts = Lengths(), ["a", "bcd"]
    first, second = (encode_once(reader, texts, cache) for _ in range(2))
    assert reader.calls == 1
    assert first.tolist() == second.tolist() == [[1, 1], [3, 1]]
    assert encode_once(reader, ["bcd", "a"], cache).tolist() == [[3, 1], [1, 1]]
    assert reader.calls == 2
    for change in ({"weights": "others"}, {"num_layers": 2}, {"max_tokens": 8}):
        other = Lengths()
        vars(other).update(change)
        encode_once(other, texts, cache)
        assert other.calls == 1


def test_a_text_is_embedded_once() -> None:
    reader = Lengths()
    vectors = TextVectors(reader)
    assert vectors.absent(["a", "bcd", "a"]) == ["a", "bcd"]
    assert reader.calls == 0
    assert vectors.of(["bcd", "a", "bcd"]).tolist() == [[3, 1], [1, 1], [3, 1]]
    assert vectors.absent(["a", "ef"]) == ["ef"]
    assert vectors.of(["a", "bcd"]).tolist() == [[1, 1], [3, 1]]
    assert reader.calls == 1


def test_texts_that_were_not_asked_for_lately_are_forgotten() -> None:
    """Room for two vectors of 8 bytes and their texts: of a, b, a, c the text b is forgotten; c, d and e leave two."""
    vectors = TextVectors(Lengths(), mib=2 * (8 + sys.getsizeof("a")) / 2**20)
    for text in "abac":
        vectors.of([text])
    assert vectors.absent("abc") == ["b"]
    assert vectors.of(list("cde")).tolist() == [[1, 1]] * 3
    assert vectors.absent("cde") == ["c"]


def test_kept_vectors_are_those_of_the_model(tiny_model: Path) -> None:
    """Bit for bit those of one call."""
    reader = MeanPooling(str(tiny_model), 3)
    vectors = TextVectors(reader)
    for _ in range(2):
        np.testing.assert_array_equal(vectors.of(TEXTS), reader.encode(TEXTS))


@pytest.mark.usefixtures("cache")
def test_unrated_items_have_no_vector() -> None:
    """Blocks share one table, read once, with zero rows for items nobody rated."""
    retriever = TextEncoder()
    reader = retriever.reader = Lengths()
    retriever.begin(2, ITEMS)
    one, two = (
        retriever.item_table(
            Edges(np.zeros(len(items), np.int64), np.array(items), np.zeros(len(items))), 1
        )
        for items in ([1], [1, 2])
    )
    assert one.tolist() == [[0, 0], [12, 1], [0, 0]]
    assert two.tolist() == [[0, 0], [12, 1], [10, 1]]
    assert reader.calls == 1


@pytest.mark.usefixtures("cache")
def test_retrieved_features_of_a_tiny_model(tiny_model: Path) -> None:
    """A causal LM finds neighbours."""
    retriever = TextEncoder(neighbours=4, encoder=str(tiny_model))
    assert retrieved(make_log(0), retriever)["neighbour_count"].sum() > 0


@pytest.mark.real
def test_sequels_are_near() -> None:
    """all-MiniLM-L6-v2 puts "Star Wars" nearer to "Empire Strikes Back" than to "Piano", by more than .2."""
    texts = ["Star Wars (1977)", "Empire Strikes Back, The (1980)", "Piano, The (1993)"]
    wars, empire, piano = TextEncoder().reader.encode(texts)
    assert wars @ empire > wars @ piano + 0.2


CATALOGUE = pl.DataFrame(
    {
        "item": range(6),
        "item_id": list("abcdef"),
        "title": ["Alien", "Aliens", "Casablanca", "Alien Three", "The Sea", "!"],
        "genres": ["Horror", "Horror", "Romance", None, "", ""],
    }
)


def test_text_similarity_equals_its_formula_row_by_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sum w (a - m) / (sum w + 1/2), w = cosine^2 over strictly earlier rows of the user, in blocks of any size."""
    rows, vectors = (
        make_log(0, rows=60, users=4, items=6),
        item_vectors(CATALOGUE, CATALOGUE),
    )
    cosine = (vectors @ vectors.T).toarray()
    assert np.allclose(np.diag(cosine), [1.0] * 6 + [0.0])
    for together in (2**22, 1):  # all at once, and one row at a time
        monkeypatch.setattr(own_text, "TOGETHER", together)
        table = text_similarity(WalkRows.from_log(rows), vectors)
        assert table["row_id"].to_list() == rows["row_id"].to_list()
        for row, found in zip(rows.to_dicts(), table.to_dicts(), strict=True):
            past = rows.filter(
                (pl.col("user") == row["user"]) & (pl.col("timestamp") < row["timestamp"])
            )
            w = cosine[row["item"], past["item"].to_numpy()] ** 2
            a = past["label"].to_numpy().astype(float)
            expected = (w @ (a - a.mean())) / (w.sum() + SHRINK) if len(past) else None
            assert found["text_weight"] == pytest.approx(w.sum(), abs=1e-6)
            assert found["text"] == (
                None if expected is None else pytest.approx(expected, abs=1e-6)
            )


def test_flipping_a_row_changes_text_similarity_of_later_rows_of_its_user_alone() -> None:
    rows, vectors = (
        make_log(0, rows=60, users=4, items=6),
        item_vectors(CATALOGUE, CATALOGUE),
    )
    at = 10
    before, after = (
        text_similarity(WalkRows.from_log(r), vectors)
        for r in (rows, flip(rows, pl.col("row_id") == at))
    )
    moved = (before["text"] - after["text"]).fill_null(0.0).to_numpy() != 0
    later = (rows["user"] == rows["user"][at]) & (rows["timestamp"] > rows["timestamp"][at])
    assert moved.any()
    assert not (moved & ~later.to_numpy()).any()


def test_a_new_item_is_similar_by_its_text() -> None:
    """A new item's text counts though the terms are the log's: "Alien Horror" is nearer to Alien than to Casablanca."""
    new = pl.DataFrame(
        {"item": [6], "item_id": ["new"], "title": ["Alien Horror"], "genres": [""]}
    )
    vectors = item_vectors(pl.concat([CATALOGUE, new]), CATALOGUE)
    near = (vectors[6] @ vectors.T).toarray()[0]
    assert near[0] > 0.3 > near[2]
