"""Retrievers whose item vectors are encodings of what the items table says of an item: a text encoder, an LLM.

Unusual: texts do not change, so every block has one and the same table, computed once and kept on disk under a hash
of the texts and of the encoder's weights; a block leaves out the items that nobody had rated before it.
"""

from abc import abstractmethod
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import polars as pl

from project.data.sources import SOURCES, default_cache
from project.errors import ConfigError
from project.retrieval.base import Edges, FloatArray, IntArray
from project.retrieval.cache import cached_folder
from project.retrieval.encoder import MeanPooling
from project.retrieval.vectors import VectorRetriever


class ItemTextRetriever(VectorRetriever):
    """Similar users by sums of encoded item texts.

    All encodings share a direction, along which a sum says how much a user likes rather than dislikes. It stays in:
    taking it out made the neighbours' vote worse on the validation of ML-100K.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        dislike_weight: Weight of a disliked item in a user's vector; a liked one has weight 1.
        similar_every: List what similar users liked after every so many rows of a user; 0 is never.
        similar_users: How many similar users such a list is made from, of the latest max_raters users.
        similar_items: Most items on such a list.
        alike_items: Evidence also holds the user's own answers on so many earlier items, those whose vectors are most
            like the candidate's; 0 leaves it out.
        template: Text of an item, fields are columns of the items table, such as {title}; null: the title and
            everything else that is known of the item, separated by commas.
        max_tokens: A text is cut after so many tokens.
        reader: Makes vectors of texts.
    """

    @abstractmethod  # what YAML can name says which reader
    def __init__(
        self,
        neighbours: int,
        max_raters: int,
        dislike_weight: float,
        similar_every: int,
        similar_users: int,
        similar_items: int,
        alike_items: int,
        template: str | None,
        max_tokens: int,
        reader: MeanPooling,
    ) -> None:
        lists = similar_every, similar_users, similar_items
        super().__init__(neighbours, max_raters, dislike_weight, *lists, alike_items)
        self.template = template
        self.max_tokens = max_tokens
        self.reader = reader

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and the vectors of other items."""
        super().begin(num_users, items)
        self._encoded: FloatArray | None = None

    def item_table(self, edges: Edges, block: int) -> FloatArray:
        """Vectors of the items rated before the block, shape (items, d), zero for the others."""
        if self._encoded is None:
            self._encoded = encode_once(self.reader, item_texts(self._items, self.template), default_cache())
        seen = np.unique(edges.item)
        table = np.zeros_like(self._encoded)
        table[seen] = self._encoded[seen]
        return table

    def encode_history(self, item: IntArray, label: IntArray) -> FloatArray:
        """What a system without item vectors does at every request: encode the user's history as one text.

        Args:
            item: Codes of the rated items, oldest first, shape (rows,).
            label: 0 or 1, shape (rows,).

        Returns:
            Shape (d,), of length 1, in the space of item vectors.
        """
        vector: FloatArray = self.reader.encode([history_text(self._items["title"], item, label)])[0]
        return vector

    def settings(self) -> dict[str, Any]:
        """As for every retriever, and the checksum of a model that is a folder: its path says little."""
        model = self.reader.model
        return super().settings() | ({} if model in SOURCES else {"weights": self.reader.weights})


def item_texts(items: pl.DataFrame, template: str | None) -> list[str]:
    """One text an item.

    Args:
        items: The items table.
        template: See `ItemTextRetriever`.

    Raises:
        ConfigError: The template is malformed, or names a field that the items table does not have.
    """
    fields = [name for name in items.columns if name not in ("item", "item_id")]
    rows = items.select(fields).to_dicts()
    if template is None:
        return [", ".join(value for value in row.values() if value) for row in rows]
    at = f"data.retriever.init_args.template is {template!r}"
    try:
        named = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ConfigError(f"{at}, which is not a template: {error}.") from error
    unknown = sorted(named - set(fields))
    if unknown or not named:
        found = f"names {', '.join('{' + name + '}' for name in unknown)}" if unknown else "names no field"
        raise ConfigError(f"{at}, which {found}. Fields of the items table here: {', '.join(fields)}.")
    return [template.format(**row) for row in rows]


def history_text(titles: pl.Series, item: IntArray, label: IntArray) -> str:
    """A history in words, the latest first: where a text is cut, the oldest goes.

    Args:
        titles: By item code.
        item: Codes of the rated items, oldest first, shape (rows,); codes beyond the titles are left out.
        label: 0 or 1, shape (rows,).
    """
    parts = []
    for answer, name in ((1, "liked"), (0, "disliked")):
        codes = item[(label == answer) & (item < len(titles))][::-1]
        if codes.size:
            parts.append(f"{name}: {'; '.join(titles.gather(codes).to_list())}.")
    return " ".join(parts)


def encode_once(encoder: MeanPooling, texts: list[str], cache_dir: Path) -> FloatArray:
    """Vectors of texts, shape (texts, d); from the cache, if the same encoder has read the same texts before.

    Args:
        encoder: Who reads them.
        texts: In the order of the vectors.
        cache_dir: Folder of the cache.
    """
    content = {
        "texts": texts,
        "weights": encoder.weights,
        "num_layers": encoder.num_layers,
        "max_tokens": encoder.max_tokens,
        "pooling": "mean, length 1",
    }

    def write(folder: Path) -> None:
        np.save(folder / "vectors.npy", encoder.encode(texts))

    vectors: FloatArray = np.load(cached_folder(cache_dir / "embeddings", content, write) / "vectors.npy")
    return vectors
