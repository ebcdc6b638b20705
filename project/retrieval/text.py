"""Defines the retriever whose item vectors encode an item's text, by a sentence encoder or a causal LM.

A text becomes the mean of a transformer's last hidden states over its tokens, scaled to length 1 (Reimers and Gurevych
2019, arXiv 1908.10084). Vectors are kept on disk under a hash of the texts and of the model's weights; the model is
read only where they are absent. Every block has the same table, without the items that nobody had rated before it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import Progress
from transformers import AutoConfig, AutoModel, AutoTokenizer

from project.arrays import F32
from project.cache import Recent, cached_folder, default_cache
from project.data.download import SOURCES, quiet_loading, resolve_model
from project.errors import ConfigError
from project.retrieval.base import Edges
from project.retrieval.lightgcn import VectorRetriever
from project.run import sha256_of

BATCH_TEXTS = 64
# as all-MiniLM-L6-v2's own configuration cuts; titles and attributes are shorter
MAX_TOKENS = 256
IDS = ("item", "item_id")  # columns of the items table that are no text
_AUTO: Any = AutoModel  # its constructors are not typed
_TOKENIZER: Any = AutoTokenizer


@dataclass(eq=False)
class MeanPooling:
    """A transformer that gives a text the mean of its last hidden states, special tokens included, at length 1.

    `model` is a key of project.data.download.SOURCES, a Hugging Face folder, or a name on its hub. A text is cut after
    `max_tokens`, or where the model's positions end; `num_layers` uses only the first so many layers. It runs on a GPU
    where there is one.
    """

    model: str
    max_tokens: int
    num_layers: int | None = None

    @cached_property
    def weights(self) -> str:
        """Identifies the model's weights: checksum of a known source or of a folder's files, else the hub's name."""
        if self.model in SOURCES:
            return SOURCES[self.model].sha256
        folder = Path(resolve_model(self.model)).expanduser()
        if not folder.is_dir():
            return self.model
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def encode(self, texts: Sequence[str]) -> F32:
        """Vectors of length 1, shape (texts, hidden size), in the order given; zero for a text without a token."""
        config, tokenizer = self._tokenizer
        longest = min(self.max_tokens, config.max_position_embeddings)
        ids = list[list[int]]()
        if texts:
            cut = tokenizer(list(texts), truncation=True, max_length=longest)
            ids = cut["input_ids"]
        model = self._loaded
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        # texts of similar length are run together
        order = sorted(
            (k for k, tokens in enumerate(ids) if tokens), key=lambda k: len(ids[k])
        )
        batches = [
            order[start : start + BATCH_TEXTS]
            for start in range(0, len(order), BATCH_TEXTS)
        ]
        with (
            Progress(transient=True, disable=len(batches) < 2) as progress,
            torch.inference_mode(),
        ):
            for rows in progress.track(batches, description=f"{self.model} reads texts"):
                tokens = [torch.tensor(ids[k]) for k in rows]
                lengths = torch.tensor([len(part) for part in tokens])
                padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(
                    model.device
                )
                # (texts, tokens)
                mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(model.device)
                hidden = model(
                    input_ids=padded, attention_mask=mask.long()
                ).last_hidden_state
                # padding counts neither in the sum nor in the number of tokens
                mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
                vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors

    @cached_property
    def _tokenizer(self) -> tuple[Any, Any]:
        """The model's configuration, and its tokenizer."""
        name = resolve_model(self.model)
        try:
            return AutoConfig.from_pretrained(name), _TOKENIZER.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"data.retriever.init_args.encoder is {self.model!r}, which cannot be read as a Hugging Face model "
                f"with a tokenizer: {error}"
            ) from error

    @cached_property
    def _loaded(self) -> Any:
        """The model, float32."""
        config = deepcopy(self._tokenizer[0])
        if self.num_layers is not None:
            config.num_hidden_layers = min(self.num_layers, config.num_hidden_layers)
        config.use_cache = False
        with quiet_loading():
            model, info = _AUTO.from_pretrained(
                resolve_model(self.model),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
            )
        # not read here
        missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
        if missing:
            raise ConfigError(
                f"data.retriever.init_args.encoder is {self.model!r}, whose files lack {len(missing)} weights, among "
                f"them {missing[:3]}; expected a complete model. Fetch or save it again."
            )
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


class TextVectors:
    """Vectors of texts, embedded once: those used last are kept in memory, at most `mib` MiB of them.

    A server asks which are `absent`, and embeds these a few at a time with `of`. One thread at a time.
    """

    def __init__(self, reader: MeanPooling, mib: float = 64) -> None:
        self._reader = reader
        # by text, vectors (d,); one of 576 numbers takes 2.4 KB
        self._recent = Recent[F32](mib)

    def absent(self, texts: Iterable[str]) -> list[str]:
        """The texts, each once, that `of` would embed."""
        return [text for text in dict.fromkeys(texts) if self._recent.look(text) is None]

    def of(self, texts: Sequence[str]) -> F32:
        """Vectors (texts, d) of one text or more, in their order, as `MeanPooling.encode` makes them."""
        # copies, because a view would hold the vectors of all texts that were embedded with
        # it
        rows = self._recent.of_texts(
            texts,
            lambda new: [vector.copy() for vector in self._reader.encode(new)],
            lambda row: row.nbytes,
        )
        return np.stack(rows)


class TextEncoder(VectorRetriever):
    """Similar users by what their items are about: sums of encoded item texts.

    All encodings share a direction, along which a sum measures how much a user likes rather than dislikes. It stays in:
    taking it out made the neighbours' vote worse on the validation of ML-100K.

    Args:
        encoder: all-minilm-l6-v2 or smollm2-135m-instruct (fetched from the package index), a folder, or a name on
            the Hugging Face hub: a sentence encoder, or a causal LM, whose last hidden states are averaged.
        **kwargs: Arguments of VectorRetriever.
    """

    def __init__(
        self,
        *,
        encoder: str = "all-minilm-l6-v2",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.encoder = encoder
        self.reader = MeanPooling(encoder, MAX_TOKENS)

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and the vectors of other items."""
        super().begin(num_users, items)
        self._encoded: F32 | None = None

    def item_table(self, edges: Edges, block: int) -> F32:
        """Vectors of the items rated before the block, shape (items, d), zero for the others."""
        if self._encoded is None:
            self._encoded = encode_once(
                self.reader, item_texts(self._items), default_cache()
            )
        seen = np.unique(edges.item)
        table = np.zeros_like(self._encoded)
        table[seen] = self._encoded[seen]
        return table

    def settings(self) -> dict[str, Any]:
        """As for every retriever, and the checksum of a model that is a folder: its path does not identify it."""
        model = self.reader.model
        return super().settings() | (
            {} if model in SOURCES else {"weights": self.reader.weights}
        )


def item_text(row: Mapping[str, Any]) -> str:
    """The text of a row of the items table: title and everything else that is known of it, separated by commas."""
    return ", ".join(row[name] for name in row if row[name] and name not in IDS)


def item_texts(items: pl.DataFrame) -> list[str]:
    """One text an item of the items table."""
    return [item_text(row) for row in items.to_dicts()]


def encode_once(encoder: MeanPooling, texts: list[str], cache_dir: Path) -> F32:
    """Vectors of texts, shape (texts, d); from the cache, if the same encoder has read the same texts before."""
    content = {
        "texts": texts,
        "weights": encoder.weights,
        "num_layers": encoder.num_layers,
        "max_tokens": encoder.max_tokens,
        "pooling": "mean, length 1",
    }

    def write(folder: Path) -> None:
        np.save(folder / "vectors.npy", encoder.encode(texts))

    vectors: F32 = np.load(
        cached_folder(cache_dir / "embeddings", content, write) / "vectors.npy"
    )
    return vectors
