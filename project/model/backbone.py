"""Runs the decoder of a Hugging Face causal LM in stages of layers over packed segments.

Layers are transformers' own modules, called through `__call__` (FSDP hooks stay alive), but the loop over them is ours,
so a run can stop at any layer and go on later.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from project.data.download import quiet_loading
from project.data.prompt import FIRST_ITEM_ID, NUMBERS, read_number_ids
from project.errors import ConfigError
from project.layout import Layout
from project.model.attention import SEGMENTS

FAMILIES = ("llama", "smollm3", "qwen2", "qwen3", "mistral")
# "dynamic" and "longrope" turn by the longest position of the batch: logits would depend on
# what is packed
ROTARY = ("default", "linear", "llama3", "yarn")
SUPPORTED = (
    "Llama/SmolLM2, SmolLM3, Qwen2, Qwen3 and Mistral, every layer with full attention"
)
_AUTO: Any = AutoModelForCausalLM  # its constructors are not typed
FIRST_KNOT = -4.0  # numbers beyond the first and the last are clamped to these
LAST_KNOT = 4.0
KNOTS = 9  # one at every whole number


@dataclass(frozen=True)
class State:
    """What flows from stage to stage."""

    hidden: Tensor  # (B, T, H) hidden states, before any final norm
    layout: Layout  # structure of the (B, T) tokens
    # cosines and sines of the rotary embedding, each (B, T, head dim)
    position_embeddings: tuple[Tensor, Tensor]


class NumberEmbedding(nn.Embedding):
    """Vectors of ids: rows of a table for words, lines between knots for numbers, which are ids below zero.

    Every kind of number has KNOTS trained vectors, one at some values each; a number's vector lies on the line between
    the two nearest, and a token of several numbers is the sum of their vectors, a generalised additive model's input.
    CoLLM (arXiv 2310.19488) puts trained vectors of users and items into an LLM's input; these are of counted numbers.
    """

    def __init__(self, words: nn.Embedding, answers: tuple[int, int] | None = None) -> None:
        """With ratings where `answers` are the words no and yes: they start on the line through these vectors."""
        super().__init__(
            words.num_embeddings,
            words.embedding_dim,
            padding_idx=words.padding_idx,
            # the model's own table: fine-tuning and freezing go on as without numbers
            _weight=words.weight,  # shared
            _freeze=not words.weight.requires_grad,
        )
        weight = words.weight.detach()
        # at first a random point and a random direction a kind, as large as words'
        # (kinds, 1, H) each
        point, direction = (
            weight.new_empty(len(NUMBERS), 1, words.embedding_dim).normal_() * weight.std()
            for _ in range(2)
        )
        at = torch.linspace(FIRST_KNOT, LAST_KNOT, KNOTS).to(weight)
        knots = point + direction * at[:, None] / 2
        if answers is not None:
            # a rating one deviation below the mean starts as no, one above as yes
            no, yes = weight[list(answers)]
            rating = (yes + no + (yes - no) * at[:, None]) / 2
            knots = torch.cat([knots, rating[None]])
        # (kinds, KNOTS, H)
        self.numbers = nn.Parameter(knots)

    @property
    def lowest_id(self) -> int:
        """The lowest id of a token that it has a vector of."""
        return FIRST_ITEM_ID + 1

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (..., H) of token ids (...)."""
        # (..., kinds) whether a number of the kind is there, and its value
        shown, values = read_number_ids(ids, len(self.numbers))
        # where the value lies between the knots, 0 to KNOTS - 1
        place = (values.clamp(FIRST_KNOT, LAST_KNOT) - FIRST_KNOT) * (
            (KNOTS - 1) / (LAST_KNOT - FIRST_KNOT)
        )
        knots = torch.arange(KNOTS, device=ids.device)
        # (..., kinds, KNOTS): 1 at the value's own knot, linear to 0 at the next
        shares = (1 - (place[..., None] - knots).abs()).clamp(min=0) * shown[..., None]
        # (..., H) one product for all kinds and knots
        numbers = shares.flatten(-2).to(self.numbers.dtype) @ self.numbers.flatten(0, 1)
        # ids of numbers read row 0 here, which the last line leaves out
        words = super().forward(ids.clamp(min=0))
        return torch.where((ids < 0)[..., None], numbers.to(words.dtype), words)


class ItemEmbedding(NumberEmbedding):
    """Vectors of items, too, whose ids are below those of numbers: projections of frozen vectors of their texts.

    The projection is trained. Frozen vectors are standardised by mean and deviation of the catalogue that the model was
    trained with, so that more items change nothing. `know` gives them; they are not part of a checkpoint.
    """

    items: Tensor  # (n, H) frozen
    moments: Tensor  # (2, H) mean and deviation

    def __init__(self, words: nn.Embedding, answers: tuple[int, int] | None = None) -> None:
        super().__init__(words, answers)
        weight, width = words.weight.detach(), words.embedding_dim
        self.register_buffer("items", weight.new_zeros(0, width), persistent=False)
        self.register_buffer(
            "moments", torch.tensor([[0.0], [1.0]]).to(weight).repeat(1, width)
        )
        # at first the standardised vector as large as a word's, and a random point for all;
        # the first H rows multiply a vector of length about 1, so that a step of AdamW
        # moves items not much farther than it moves words
        start = torch.eye(width).to(weight) * width**0.5
        point = weight.new_empty(1, width).normal_()
        self.projection = nn.Parameter(torch.cat([start, point]) * weight.std())

    @property
    def lowest_id(self) -> int:
        """That of the last item."""
        return super().lowest_id - len(self.items)

    def know(self, vectors: Tensor) -> None:
        """Take frozen vectors (n, H) of all items, in the order of their codes."""
        self.items = vectors.to(self.moments)

    def standardise(self) -> None:
        """From now on by the mean and deviation of the items that are known."""
        self.moments.copy_(
            torch.stack([self.items.mean(0), self.items.std(0, correction=0)])
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (..., H) of token ids (...)."""
        vectors = super().forward(ids)
        is_item = ids <= FIRST_ITEM_ID
        mean, deviation = self.moments
        # (m, H) standardised vectors of the m tokens that show an item
        frozen = (self.items[FIRST_ITEM_ID - ids[is_item]] - mean) / deviation.clamp(
            min=1e-6
        )
        found = (
            frozen / self.embedding_dim**0.5 @ self.projection[:-1] + self.projection[-1]
        )
        # not in place: vectors have a gradient
        return vectors.index_put((is_item,), found.to(vectors.dtype))


class Backbone(nn.Module):
    """Token embeddings and the first decoder layers of a causal LM of a supported family ("segments" attention)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config  # with `num_hidden_layers` layers
        self.embed_tokens = model.model.embed_tokens
        self.layers = model.model.layers
        self.rotary_emb = model.model.rotary_emb
        # for heads to copy; frozen: nothing reads it in the forward pass, and DDP waits for
        # every trainable parameter
        self.final_norm = model.model.norm.requires_grad_(False)
        # in a list, so that it is neither trained nor saved nor moved: it has a row for
        # every token of the vocabulary
        self._lm_head: list[Tensor] = [model.lm_head.weight]
        # from_pretrained leaves its modules in eval mode, and Lightning keeps the mode it
        # finds
        self.train()

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, num_layers: int | None = None
    ) -> Backbone:
        """Backbone with random weights; None keeps all layers of the configuration."""
        return cls(
            _AUTO.from_config(_cut(config, num_layers), attn_implementation=SEGMENTS)
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, num_layers: int | None = None) -> Backbone:
        """Backbone of a folder or a name on Hugging Face's hub, float32; layers beyond `num_layers` are not loaded."""
        cut = usable_config(name, num_layers)
        with quiet_loading():
            model, info = _AUTO.from_pretrained(
                name,
                config=cut,
                dtype=torch.float32,
                attn_implementation=SEGMENTS,
                output_loading_info=True,
            )
        # transformers would fill them with random numbers and a warning
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
        return range(
            getattr(self.embed_tokens, "lowest_id", 0), self.embed_tokens.weight.shape[0]
        )

    def answer_direction(self, yes_ids: Sequence[int], no_ids: Sequence[int]) -> Tensor:
        """Mean of the LM head's rows for yes minus their mean for no, (H,) float32, detached.

        Its product with a normed hidden state is the mean LM logit of yes minus that of no.
        """
        # (vocabulary, H)
        rows = self._lm_head[0].detach()
        return rows[list(yes_ids)].float().mean(0) - rows[list(no_ids)].float().mean(0)

    def release_lm_head(self) -> None:
        """Drop the LM head's weights; `answer_direction` cannot be called after this."""
        self._lm_head.clear()

    def learn(self, items: bool, answers: tuple[int, int] | None = None) -> None:
        """Embed ids below zero, too, for which the LM has no vectors: numbers in prompts.

        With `answers`, the words no and yes, ratings as well. With `items` ids of items, as soon as `embed_tokens.know`
        has their vectors.
        """
        kind = ItemEmbedding if items else NumberEmbedding
        self.embed_tokens = kind(self.embed_tokens, answers)

    def embed(self, tokens: Tensor, layout: Layout) -> State:
        """State of token ids (B, T) before the first layer; the layout is on their device, its blocks planned."""
        hidden = self.embed_tokens(tokens)
        return State(hidden, layout, self.rotary_emb(hidden, position_ids=layout.position))

    def run(self, state: State, start: int, stop: int) -> State:
        """Apply layers start, ..., stop - 1, counted from 0, to the state after `start` layers."""
        hidden = state.hidden
        for index in range(start, stop):
            # position and layout are the same for all layers
            hidden = self.layers[index](
                hidden,
                position_embeddings=state.position_embeddings,
                layout=state.layout,
            )
        return replace(state, hidden=hidden)


def usable_config(name: str | Path, num_layers: int | None) -> PretrainedConfig:
    """The configuration of a model, cut to `num_layers`; ConfigError where it cannot be a backbone."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.backbone is {str(name)!r}, which cannot be read as a Hugging Face model: {error}"
        ) from error
    return _cut(config, num_layers)


def _cut(config: PretrainedConfig, num_layers: int | None) -> PretrainedConfig:
    """A copy of the configuration with only the first `num_layers` layers.

    Refuses what the segments' attention or positions would compute wrongly.
    """
    text = config.get_text_config()  # of a model that sees images, too, the part that reads
    window = getattr(text, "sliding_window", None)
    types = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    rope = getattr(text, "rope_parameters", None) or {}
    capping = [
        k
        for k in ("attn_logit_softcapping", "final_logit_softcapping")
        if getattr(text, k, None)
    ]
    kind = rope.get("rope_type")
    needs = {
        f"sliding_window = {window}": window is not None,
        f"layers of type {', '.join(sorted(types))}": bool(types),
        "positions that are not rotary": not rope,
        f"rotary parameters that differ by layer ({', '.join(sorted(rope))})": bool(rope)
        and kind is None,
        f"rotary type {kind!r}, not one of {', '.join(ROTARY)}": kind
        not in (None, *ROTARY),
        f"capped logits ({', '.join(capping)})": bool(capping),
        f"decoder layers of {config.model_type!r}": config.model_type not in FAMILIES,
    }
    missing = [need for need, applies in needs.items() if applies]
    if missing:
        raise ConfigError(
            f"model.backbone is a {config.model_type!r} model, which needs what is missing here: "
            f"{'; '.join(missing)}. Supported are {SUPPORTED} (model_type {', '.join(FAMILIES)}). Choose such a model."
        )
    available = config.num_hidden_layers
    if num_layers is not None and num_layers > available:
        raise ConfigError(
            f"model.exit_layers ends at {num_layers}, but the backbone has {available} layers; expected at most "
            f"{available}."
        )
    # the caller's configuration stays whole
    config = deepcopy(config)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None) is not None:
            # some configurations name a type for every layer
            config.layer_types = config.layer_types[:num_layers]
    return config
