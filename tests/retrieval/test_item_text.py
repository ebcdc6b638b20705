"""Retrievers that read texts: what the texts are, that they are read once, unrated items, queries, keys of caches."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.errors import ConfigError
from project.retrieval import TextEncoder
from project.retrieval.base import Edges, FloatArray
from project.retrieval.text import MeanPooling, encode_once, history_text, item_texts

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
    """Encodes a text as (its length, 1) and counts how often it is asked."""

    weights = "lengths"
    asked = 0

    def __init__(self) -> None:
        super().__init__("unused", 64)

    def encode(self, texts: Sequence[str]) -> FloatArray:
        self.asked += 1
        return np.array([[len(text), 1] for text in texts], np.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path))
    return tmp_path


def reading(reader: MeanPooling) -> TextEncoder:
    retriever = TextEncoder()
    retriever.reader = reader
    return retriever


def test_texts_of_items() -> None:
    """Null: everything that is known, title first, ids left out; a template: just that."""
    assert item_texts(ITEMS, None) == ["Alien, 1979, Horror Sci-Fi", "Babe, Comedy", "Clue, 1985"]
    assert item_texts(ITEMS, "{title} ({year})") == ["Alien (1979)", "Babe ()", "Clue (1985)"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{titel}", r"names \{titel\}\. Fields of the items table here: title, year, genres"),
        ("{item_id} {title}", r"names \{item_id\}"),
        ("a film", "names no field"),
        ("{title", "is not a template"),
    ],
)
def test_templates_that_cannot_work(template: str, message: str) -> None:
    """A misspelt field, one that is no text, none, and a broken template, each with the YAML key."""
    with pytest.raises(ConfigError, match=r"data\.retriever\.init_args\.template is .*" + message):
        item_texts(ITEMS, template)


def test_text_of_a_history() -> None:
    """Liked, then disliked, the latest first; a code the table does not have is left out."""
    titles = ITEMS["title"]
    assert history_text(titles, np.array([0, 1, 2, 3]), np.array([1, 0, 1, 1])) == (
        "liked: Clue; Alien. disliked: Babe."
    )
    assert history_text(titles, np.array([1]), np.array([1])) == "liked: Babe."
    assert history_text(titles, np.empty(0, np.int64), np.empty(0, np.int64)) == ""


def test_texts_are_read_once(cache: Path) -> None:
    """The second call finds the vectors on disk, bit for bit; other texts are read."""
    reader, texts = Lengths(), ["a", "bcd"]
    first, second = (encode_once(reader, texts, cache) for _ in range(2))
    assert reader.asked == 1
    assert first.tolist() == second.tolist() == [[1, 1], [3, 1]]
    assert encode_once(reader, ["bcd", "a"], cache).tolist() == [[3, 1], [1, 1]]
    assert reader.asked == 2


@pytest.mark.parametrize("change", [{"weights": "others"}, {"num_layers": 2}, {"max_tokens": 8}])
def test_another_encoder_reads_again(cache: Path, change: dict[str, object]) -> None:
    """Vectors of other weights, depth or cut are never taken for these."""
    encode_once(Lengths(), ["a"], cache)
    other = Lengths()
    vars(other).update(change)
    encode_once(other, ["a"], cache)
    assert other.asked == 1


def test_unrated_items_have_no_vector() -> None:
    """Blocks share one table, read once for all of them, with zero rows for items nobody rated before."""
    reader = Lengths()
    retriever = reading(reader)
    retriever.begin(2, ITEMS)
    tables = [
        retriever.item_table(Edges(np.zeros(len(items), np.int64), np.array(items), np.zeros(len(items))), 1)
        for items in ([1], [1, 2])
    ]
    assert [table.tolist() for table in tables] == [
        [[0, 0], [12, 1], [0, 0]],
        [[0, 0], [12, 1], [10, 1]],
    ]
    assert reader.asked == 1


def test_a_query_is_its_text() -> None:
    """encode_history is the encoding of history_text: "liked: Alien." has 13 letters."""
    retriever = reading(Lengths())
    retriever.begin(2, ITEMS)
    assert retriever.encode_history(np.array([0]), np.array([1])).tolist() == [13, 1]


def test_the_retrieved_key_knows_the_weights(tmp_path: Path) -> None:
    """Retrain a model in its folder: path and arguments are equal, the settings are not. Known sources need no more."""
    folder = tmp_path / "model"
    folder.mkdir()
    settings = []
    for text in ("1", "2"):
        (folder / "model.safetensors").write_text(text)
        settings.append(TextEncoder(encoder=str(folder)).settings())
    assert settings[0]["init_args"] == settings[1]["init_args"]
    assert settings[0] != settings[1]
    assert set(TextEncoder().settings()) == {"class_path", "init_args"}


def test_retrieved_of_a_tiny_model(tiny_model: Path, log_of: Callable, retrieved_of: Callable) -> None:
    """A whole and a shortened model find neighbours, and a template that says nothing about items makes all users with a past alike."""
    rows, cuts = log_of(0), np.array([20.0, 45.0])
    for retriever in (
        TextEncoder(neighbours=4, encoder=str(tiny_model)),
        TextEncoder(neighbours=4, encoder=str(tiny_model), num_layers=2),
    ):
        assert retrieved_of(rows, retriever, cuts)["neighbour_count"].sum() > 0
    item_similarity = TextEncoder(
        neighbours=4, encoder=str(tiny_model), template="{title:.5}", dislike_weight=1.0
    )
    similarities = retrieved_of(rows, item_similarity, cuts)["similarities"].explode().drop_nulls()
    assert similarities.to_list() == pytest.approx([1.0] * len(similarities), abs=1e-5)


@pytest.mark.real
def test_sequels_are_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """all-MiniLM-L6-v2 puts "Star Wars" nearer to "Empire Strikes Back" than to "Piano", by more than .2."""
    monkeypatch.delenv("PROJECT_CACHE")
    texts = ["Star Wars (1977)", "Empire Strikes Back, The (1980)", "Piano, The (1993)"]
    wars, empire, piano = TextEncoder().reader.encode(texts)
    assert wars @ empire > wars @ piano + 0.2
