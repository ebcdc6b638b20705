"""Texts become vectors: the mean of a transformer's last hidden states over a text's tokens, scaled to length 1.

Unusual: one class serves sentence encoders, whose recipe this is (Reimers and Gurevych 2019, arXiv 1908.10084), and
causal LMs. It is read from disk only when the first text comes: who finds vectors in a cache needs no model.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from project.artefacts import sha256_of
from project.data.sources import SOURCES, resolve_model
from project.errors import ConfigError
from project.quiet import quiet_loading
from project.retrieval.base import FloatArray

BATCH_TEXTS = 64
_AUTO: Any = AutoModel  # its constructors are not typed
_TOKENIZER: Any = AutoTokenizer


class MeanPooling:
    """A transformer that gives a text the mean of its last hidden states, special tokens included, at length 1.

    On a GPU where there is one.

    Args:
        model: A key of project.data.sources.SOURCES, a Hugging Face folder, or a name on its hub.
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
