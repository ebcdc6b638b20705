"""The decoder of a Hugging Face causal LM, run in stages of layers over packed segments.

Unusual: layers are transformers' own modules, called through `__call__` (FSDP hooks stay alive), but the loop
over them is ours, so a run can stop at any layer and go on later. The final norm is kept only for the exit
heads to copy, the LM head's weights only for their first direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from project.data.download import quiet_loading
from project.data.prompt import LOWEST_ID, NUMBERS, read_number_ids
from project.errors import ConfigError
from project.layout import Layout
from project.model.attention import SEGMENTS

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
# "dynamic" and "longrope" turn by the longest position of the batch: logits would depend on what is packed
ROTARY = ("default", "linear", "llama3", "yarn")
_AUTO: Any = AutoModelForCausalLM  # its constructors are not typed
SUPPORTED = "Llama/SmolLM2, Qwen2, Qwen3 and Mistral, every layer with full attention"
FIRST_KNOT, LAST_KNOT = -4.0, 4.0  # numbers beyond are those
KNOTS = 9  # one at every whole number


@dataclass(frozen=True)
class State:
    """What flows from stage to stage.

    An engine that keeps a user's keys and values adds them here, a pair a layer, and hands them to the
    attention function as one more keyword argument of the layers; one that compacts to the survivors indexes
    hidden and position_embeddings and plans a smaller layout.

    Attributes:
        hidden: (B, T, H) hidden states, before any final norm.
        layout: Structure of the (B, T) tokens.
        position_embeddings: Cosines and sines of the rotary embedding, each (B, T, head dim).
    """

    hidden: Tensor
    layout: Layout
    position_embeddings: tuple[Tensor, Tensor]


class NumberEmbedding(nn.Embedding):
    """Vectors of ids: rows of a table for words, lines between knots for numbers, which are ids below zero.

    Every kind of retrieved features has a few trained vectors, one at some values each, and a number's vector lies on
    the line between the two nearest: 0.70 and 0.75 mean nearly the same from the first step on, and what a value
    means is learned from all values around it. A token of several numbers is the sum of their vectors, a generalised
    additive model's input. CoLLM (arXiv 2310.19488) puts collaborative information into an LLM's input like this;
    here it is numbers that are counted, not trained vectors of users and items.

    Args:
        words: The LM's token embeddings, whose weights are shared.

    Attributes:
        numbers: (len(NUMBERS), KNOTS, H). At first a random point and a random direction a kind, as large as words'.
    """

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__(
            words.num_embeddings,
            words.embedding_dim,
            padding_idx=words.padding_idx,
            _weight=words.weight,
            _freeze=not words.weight.requires_grad,
        )
        weight = words.weight.detach()
        point, direction = (
            torch.randn(len(NUMBERS), 1, words.embedding_dim, dtype=weight.dtype, device=weight.device)
            * weight.std()
            for _ in range(2)
        )
        at = torch.linspace(FIRST_KNOT, LAST_KNOT, KNOTS, dtype=weight.dtype, device=weight.device)
        self.numbers = nn.Parameter(point + direction * at[:, None] / 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors.

        Args:
            ids: (...) token ids.

        Returns:
            (..., H).
        """
        told, values = read_number_ids(ids)
        place = (values.clamp(FIRST_KNOT, LAST_KNOT) - FIRST_KNOT) * ((KNOTS - 1) / (LAST_KNOT - FIRST_KNOT))
        knots = torch.arange(KNOTS, device=ids.device)
        shares = (1 - (place[..., None] - knots).abs()).clamp(min=0) * told[..., None]
        numbers = shares.flatten(-2).to(self.numbers.dtype) @ self.numbers.flatten(0, 1)
        words = super().forward(ids.clamp(min=0))
        return torch.where((ids < 0)[..., None], numbers.to(words.dtype), words)


class Backbone(nn.Module):
    """Token embeddings and the first decoder layers of a causal LM.

    Attributes:
        config: The LM's configuration, with `num_hidden_layers` layers.
        layers: The decoder layers.
        final_norm: The LM's final norm, frozen; heads deep-copy it.
        gradient_checkpointing: Recompute each layer's activations in the backward pass.

    Args:
        model: A causal LM of a supported family, made with the "segments" attention.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens = model.model.embed_tokens
        self.layers = model.model.layers
        self.rotary_emb = model.model.rotary_emb
        # frozen: nothing reads it in the forward pass, and DDP waits for every trainable parameter
        self.final_norm = model.model.norm.requires_grad_(False)
        # in a list, so that it is neither trained nor saved nor moved: a vocabulary's worth of weights
        self._lm_head: list[Tensor] = [model.lm_head.weight]
        self.gradient_checkpointing = False
        self.train()  # from_pretrained leaves its modules in eval mode, and Lightning keeps the mode it finds

    @classmethod
    def from_config(cls, config: PretrainedConfig, num_layers: int | None = None) -> Backbone:
        """Backbone with random weights.

        Args:
            config: Configuration of a supported family.
            num_layers: Use only the first so many layers.

        Raises:
            ConfigError: If the family is not supported or has fewer layers.
        """
        config = _cut(config, num_layers)
        return cls(_AUTO.from_config(config, attn_implementation=SEGMENTS))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, num_layers: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Backbone:
        """Backbone with the weights of a saved model; layers beyond `num_layers` are not loaded.

        Args:
            name: Folder of a Hugging Face model or a name on its hub.
            num_layers: Use only the first so many layers.
            dtype: Type of the weights.

        Raises:
            ConfigError: If there is no such model, its family is not supported, it has fewer layers, or its
                files lack weights.
        """
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.backbone is {str(name)!r}, which cannot be read as a Hugging Face model: {error}"
            ) from error
        cut = _cut(config, num_layers)
        with quiet_loading():
            model, info = _AUTO.from_pretrained(
                name, config=cut, dtype=dtype, attn_implementation=SEGMENTS, output_loading_info=True
            )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ConfigError(
                f"model.backbone is {str(name)!r}, whose files lack {len(missing)} weights, among them "
                f"{missing[:3]}; expected a complete causal LM. Fetch or save it again."
            )
        return cls(model)

    @property
    def vocabulary(self) -> range:
        """Token ids that it knows."""
        words = self.embed_tokens
        first = LOWEST_ID if isinstance(words, NumberEmbedding) else 0
        return range(first, words.weight.shape[0])

    def answer_direction(self, yes_ids: Sequence[int], no_ids: Sequence[int]) -> Tensor:
        """Mean of the LM head's rows for yes minus their mean for no.

        Its product with a normed hidden state is the mean LM logit of yes minus that of no.

        Args:
            yes_ids: Token ids that mean yes.
            no_ids: Token ids that mean no.

        Returns:
            (H,) float32, detached.
        """
        rows = self._lm_head[0].detach()
        return rows[list(yes_ids)].float().mean(0) - rows[list(no_ids)].float().mean(0)

    def learn_numbers(self) -> None:
        """Embed ids below zero, too: numbers in prompts, which the LM does not know yet."""
        self.embed_tokens = NumberEmbedding(self.embed_tokens)

    def release_lm_head(self) -> None:
        """Let go of the LM head's weights; `answer_direction` cannot be called after this."""
        self._lm_head.clear()

    def embed(self, tokens: Tensor, layout: Layout) -> State:
        """State before the first layer.

        Args:
            tokens: (B, T) token ids; below zero, numbers, after `learn_numbers` alone.
            layout: Their structure, on the same device, with its blocks planned.
        """
        hidden = self.embed_tokens(tokens)
        return State(hidden, layout, self.rotary_emb(hidden, position_ids=layout.position))

    def run(self, state: State, start: int, stop: int) -> State:
        """Apply layers start, ..., stop - 1, counted from 0: then exit layer `stop` can be read.

        Args:
            state: State after `start` layers.
            start: Layers that have already run.
            stop: Layers that will have run.
        """
        hidden = state.hidden
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers[start:stop]:
            step = partial(layer, position_embeddings=state.position_embeddings, layout=state.layout)
            hidden = checkpoint(step, hidden, use_reentrant=False) if recompute else step(hidden)
        return replace(state, hidden=hidden)


def _cut(config: PretrainedConfig, num_layers: int | None) -> PretrainedConfig:
    """A checked copy of the configuration with only the first `num_layers` layers."""
    _check_supported(config)
    available = config.num_hidden_layers
    config = deepcopy(config)
    if num_layers is None:
        return config
    if num_layers > available:
        raise ConfigError(
            f"model.exit_layers ends at {num_layers}, but the backbone has {available} layers; expected at most "
            f"{available}."
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    return config


def _check_supported(config: PretrainedConfig) -> None:
    """Refuse what the segments' attention or positions would compute wrongly."""
    found = None
    types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    capping = [
        key for key in ("attn_logit_softcapping", "final_logit_softcapping") if getattr(config, key, None)
    ]
    if config.model_type not in FAMILIES:
        found = f"its model_type is {config.model_type!r}"
    elif getattr(config, "sliding_window", None) is not None:
        found = f"it has sliding_window = {config.sliding_window}"
    elif types:
        found = f"it has layers of type {', '.join(sorted(types))}"
    elif "rope_type" not in rope:
        found = f"its rotary parameters differ by layer ({', '.join(sorted(rope))})"
    elif rope["rope_type"] not in ROTARY:
        found = f"its rotary type is {rope['rope_type']!r}, not one of {', '.join(ROTARY)}"
    elif capping:
        found = f"it caps its logits ({', '.join(capping)})"
    if found:
        raise ConfigError(
            f"model.backbone is a {config.model_type!r} model that cannot be used: {found}. Supported are "
            f"{SUPPORTED} (model_type {', '.join(FAMILIES)}). Choose such a model."
        )
