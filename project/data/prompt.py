"""The prompt: template, numbers as tokens, segments of text; and how each becomes token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain
from string import Formatter

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from project.arrays import F64, I8, I64
from project.data.ragged import Ragged, append, join
from project.errors import ConfigError
from project.features import FEATURES, Retrieved, feature_matrix


@dataclass
class Prompt:
    """The wording of prompts.

    Args:
        instruction: Stands once before every history. Never evicted.
        segment: Template of one interaction or candidate. Null: title, the columns of the items whose texts are short,
            and numbers of everything that is counted. Fields are columns of the items table (title and attributes) and
            retrieved features: item_percent, user_percent, vote_percent (shares of likes), mf_percent (chance of a
            like, see data.mf), item_similarity_percent (the user's own answers on similar items, see item_neighbours
            of data.retriever), the same as learned tokens instead of text, one token each, in log-odds, shrunk where
            rows are few, as item_number, user_number, vote_number (weighted by similarity), mf_number,
            item_similarity_number, text_number (own answers on items of similar text), and the logarithm of a count as
            item_count_number; several of these in one token as {item_number+mf_number}. {title:.40} is at most 40
            characters of a title, or of an attribute. {item_text} is title and attributes in one token: a learned
            projection of a frozen embedding of the text, by the backbone's first layers.
        answers: What follows a segment for a disliked and a liked item. Each must be a single token of the tokenizer.
            With a leading space heads start from all spellings that are one, without it from this token alone.
        similar: Template of a list of what similar users liked, with the field {titles} (joined by "; "); null where
            prompts have none. How often there is one is set by data.retriever.init_args.similar_every.
    """

    instruction: str = (
        "Will this user like each? Liked in percent: by all, by similar users.\n"
    )
    segment: str | None = None
    answers: list[str] = field(default_factory=lambda: [" no", " yes"])
    similar: str | None = None


# Numbers: token ids below zero, one byte a number, 0 where it is not shown

NUMBERS = {
    "item_number": ("item_log_odds", 0.0),
    "user_number": ("user_log_odds", 0.0),
    "vote_number": ("weighted_vote_log_odds", 0.0),
    "mf_number": ("mf_log_odds", 0.0),
    "item_similarity_number": ("item_similarity_log_odds", 0.0),
    "item_count_number": ("item_rows", 3.0),  # log(1 + count) of 19 rows
    "text_number": ("text_log_odds", 0.0),
}
"""Prompt field -> feature, and what is taken off so that usual values lie around 0.

The order is part of every trained model; 64 bits have seven bytes beside the sign.
"""
STEPS_A_UNIT = 20  # a number is rounded to .05
SPAN = 6  # and to values from -6 to 6
STEPS = 2 * SPAN * STEPS_A_UNIT + 1
BYTE = 256  # 0: not shown; 1 to STEPS: the step
LOWEST_ID: int = -sum(STEPS * BYTE**kind for kind in range(len(NUMBERS)))
# a rating in a history has ids from LOWEST_ID - STEPS to LOWEST_ID - 1
FIRST_ITEM_ID = LOWEST_ID - STEPS - 1  # of the item with code 0; that of code k is k lower
ITEM_TEXT = "item_text"


def fields_together(name: str) -> list[str] | None:
    """The numbers that a field such as item_number+mf_number shows in one token; None where it is another field."""
    fields = name.split("+")
    return (
        fields
        if NUMBERS.keys() >= set(fields) and len(set(fields)) == len(fields)
        else None
    )


RATING_SCALE = "rating_scale.json"  # file in a bundle


@dataclass(frozen=True)
class RatingScale:
    """Mean and deviation of train's ratings: a history shows standardised ratings."""

    mean: float
    deviation: float

    def ids(self, ratings: F64) -> I64:
        """(n,) ids of tokens that show ratings (n,)."""
        return LOWEST_ID - 1 - _steps((ratings - self.mean) / self.deviation)


def number_ids(features: F64, fields: Sequence[str]) -> I64:
    """(n,) ids, `LOWEST_ID` to -1, of tokens that show the fields of `NUMBERS`; features are at even odds."""
    ids = np.zeros(len(features), dtype=np.int64)
    for name in fields:
        feature, zero = NUMBERS[name]
        step = _steps(features[:, FEATURES.index(feature)] - zero)
        ids -= (1 + step) * BYTE ** list(NUMBERS).index(name)
    return ids


def _steps(values: F64) -> I64:
    steps: I64 = np.rint((values.clip(-SPAN, SPAN) + SPAN) * STEPS_A_UNIT).astype(np.int64)
    return steps


def read_number_ids(ids: Tensor, kinds: int = len(NUMBERS)) -> tuple[Tensor, Tensor]:
    """The inverse of `number_ids` for ids (...): two (..., kinds), whether a number is shown, and its value.

    One kind more than `NUMBERS` is a rating of a history, which `RatingScale.ids` wrote.
    Ids of words and items show no number; values are float32, arbitrary where there is none.
    """
    shifts = 8 * torch.arange(len(NUMBERS), device=ids.device)
    digits = (torch.where(ids < LOWEST_ID, 0, -ids).clamp(min=0)[..., None] >> shifts) & (
        BYTE - 1
    )
    if kinds > len(NUMBERS):
        is_rating = (ids < LOWEST_ID) & (ids > FIRST_ITEM_ID)
        rating = torch.where(is_rating, LOWEST_ID - ids, 0)  # 1 to STEPS
        digits = torch.cat([digits, rating[..., None]], dim=-1)
    return digits > 0, (digits - 1).float() / STEPS_A_UNIT - SPAN


# Retrieved features as text

UNKNOWN = "?"  # what the prompt says where nothing has been counted yet


def _percent(values: F64) -> list[str]:
    """Always two digits, 00 to 99: whatever is known is equally long."""
    return [
        UNKNOWN if v != v else f"{min(int(100 * v + 0.5), 99):02d}" for v in values.tolist()
    ]


RETRIEVED_FIELDS = {
    "item_percent": "item_rate",
    "user_percent": "user_rate",
    "vote_percent": "vote",
    "mf_percent": "mf",
    "item_similarity_percent": "item_similarity",
}
"""Prompt field -> column of the retrieved features that it shows in percent."""


# Templates

_AT_MOST = re.compile(r"\.[1-9]\d{0,5}")  # a format that shortens
_NO_NAME = re.compile(r"\d*|.*[.\[\]].*")  # what Python would not look up as one word


def field_names(template: str) -> list[str]:
    """Fields of a template in order; of one that is malformed none, since `PromptEncoder` will say so."""
    try:
        return [name for _, name, *_ in Formatter().parse(template) if name is not None]
    except ValueError:
        return []


def shows_numbers(segment: str | None) -> bool:
    """Whether a template of segments shows numbers, which are learned tokens; the default one (None) does."""
    return segment is None or any(fields_together(name) for name in field_names(segment))


def shows_items(segment: str | None) -> bool:
    """Whether a template of segments shows an item's text in one token."""
    return ITEM_TEXT in field_names(segment or "")


def field_showing(prompt: Prompt, column: str) -> str | None:
    """A field of the segment, in braces, that shows this column of the retrieved features; None where none does."""
    fields = {name for name, shown in RETRIEVED_FIELDS.items() if shown == column}
    fields.add(f"{column}_number")
    named = field_names(prompt.segment or "")
    return next(("{" + name + "}" for name in named if fields & set(name.split("+"))), None)


def item_columns(prompt: Prompt, items: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Columns of the items that the segment shows, and those that it does not."""
    fields = field_names(prompt.segment or "")
    columns = items.drop("item", "item_id").columns
    fields += columns if ITEM_TEXT in fields else []
    return [name for name in columns if name in fields], [
        name for name in columns if name not in fields
    ]


def split_template(template: str, item_fields: Sequence[str]) -> list[tuple[str, str]]:
    """The pieces of a template of segments; no two static ones follow each other.

    A piece is ("static", template of item fields), ("retrieved", field as text), ("number", field of numbers) or
    ("item", ITEM_TEXT).
    """
    own = [name for name in item_fields if not _NO_NAME.fullmatch(name)]
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.prompt.segment {template!r} is not a template: {error}."
        ) from error
    if not parsed:
        raise ConfigError(
            "data.prompt.segment is empty: a segment needs a token before its answer."
        )
    parts: list[tuple[str, str]] = []
    for text, name, spec, conversion in parsed:
        static = text.replace("{", "{{").replace("}", "}}")
        if name is not None:
            written = f"{{{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
            _check_field(name, written, own)
            static += written if name in own else ""
        if static and parts and parts[-1][0] == "static":
            parts[-1] = ("static", parts[-1][1] + static)
        elif static:
            parts.append(("static", static))
        if name is not None and name not in own:
            kinds = {ITEM_TEXT: "item"} | dict.fromkeys(RETRIEVED_FIELDS, "retrieved")
            parts.append((kinds.get(name, "number"), name))
    return parts


def _check_field(name: str, written: str, own: list[str]) -> None:
    """Refuse a field that is unknown, both an item column and a retrieved feature, or has a format it cannot have."""
    ours = [*RETRIEVED_FIELDS, ITEM_TEXT]
    if name not in [*own, *ours] and not fields_together(name):
        raise ConfigError(
            f"data.prompt.segment names the field {{{name}}}, which is unknown. Item fields here: "
            f"{', '.join(own)}, and {ITEM_TEXT} (all of them in one token); retrieved features: "
            f"{', '.join([*RETRIEVED_FIELDS, *NUMBERS])}; several numbers in one token, each once, as "
            "{item_number+mf_number}."
        )
    if name in own and name in [*ours, *NUMBERS]:
        raise ConfigError(
            f"data.prompt.segment names the field {{{name}}}, which is a retrieved feature and also a column "
            "of your items. Give the column another name (TableLogs: data.logs.init_args.item_columns: "
            f"{{my_{name}: {name}}})."
        )
    spec = written.removeprefix("{" + name).removesuffix("}")
    if spec and not (name in own and _AT_MOST.fullmatch(spec.removeprefix(":"))):
        cut = (
            f", or {{{name}:.40}} for at most 40 characters of it"
            if name in own
            else " alone"
        )
        raise ConfigError(
            f"data.prompt.segment has the field {written}; expected {{{name}}}{cut}."
        )


SHORT = 12  # median tokens of a column that the default segment shows


def with_segment(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    items: pl.DataFrame,
    numbers: Sequence[str] = (),
) -> Prompt:
    """The prompt with a segment: its own, or where it has none the title, short item columns, and in one token numbers.

    `numbers` are those of `NUMBERS` that this run has beside the ones that are always counted. Context is for exit 0
    alone: no exit was better with it in prompts, too (results/columns.json).
    """
    if prompt.segment is not None:
        return prompt

    def is_short(name: str) -> bool:
        texts = items[name].filter(items[name] != "").unique(maintain_order=True).head(1000)
        tokens = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return bool(tokens) and float(np.median(tokens)) <= SHORT

    taken = ("item", "item_id", *RETRIEVED_FIELDS, *NUMBERS, ITEM_TEXT)
    named = [
        name for name in items.columns if name not in taken and not _NO_NAME.fullmatch(name)
    ]
    texts = ", ".join(f"{{{name}}}" for name in named if name == "title" or is_short(name))
    counted = "+".join(
        ["item_number", "user_number", "vote_number", "text_number", *numbers]
    )
    return replace(prompt, segment=f"{texts}{{{counted}}}")


# Segments


@dataclass(frozen=True)
class Segments:
    """Token ids of n segments."""

    tokens: Ragged  # n lists, the answer included where it is known
    slots: I64  # (n,) index of the answer slot inside each segment


class PromptEncoder:
    """Turns items (codes of `Interactions.items`), retrieved features and answers into segments."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        items: pl.DataFrame,
        scale: RatingScale | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        # None: histories show labels alone
        self._scale = scale
        segment = with_segment(prompt, tokenizer, items).segment
        assert segment is not None
        self._parts = split_template(segment, items.drop("item", "item_id").columns)
        if len(prompt.answers) != 2 or not all(a.strip() for a in prompt.answers):
            raise ConfigError(
                f"data.prompt.answers is {prompt.answers!r}: expected two texts, for dislike and like, "
                'for example [" no", " yes"].'
            )
        self.similar = prompt.similar
        if self.similar is not None and field_names(self.similar) != ["titles"]:
            raise ConfigError(
                f"data.prompt.similar is {self.similar!r}: expected a template with the one field {{titles}}, for "
                'example "Similar users liked: {titles}\\n", or null for prompts without such lists.'
            )
        self._titles: list[str] = items["title"].to_list()
        # of a tokenizer's control tokens, the author of the wording may mean one; a title
        # never does
        self._control = {
            token.content: i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        instruction, no, yes = (
            tokenizer.encode(text, add_special_tokens=False) if text else []
            for text in (prompt.instruction, *prompt.answers)
        )
        self.instruction: I64 = np.array(instruction, np.int64)  # token ids
        # index 0, 1: the answers; index 2 (label -1): unknown, no answer tokens
        self._answers = Ragged.of([no, yes, []])
        self._static = self._static_of(items)

    def _static_of(self, items: pl.DataFrame) -> dict[int, Ragged]:
        """By part, token ids of each item's own texts, and of the control tokens between them."""
        rows = items.to_dicts()
        control = re.compile(
            "(" + ("|".join(map(re.escape, self._control)) or "(?!)") + ")"
        )

        def ids(pieces: list[str], row: dict[str, str]) -> list[int]:
            lists = (
                [self._control[piece]]
                if piece in self._control
                else self._ids(piece.format(**row))
                for piece in pieces
            )
            return [*chain.from_iterable(lists)]

        found = dict[int, Ragged]()
        for i, (kind, text) in enumerate(self._parts):
            if kind == "static":
                pieces = control.split(text)
                found[i] = Ragged.of([ids(pieces, row) for row in rows])
        return found

    def with_items(self, new: pl.DataFrame) -> PromptEncoder:
        """This one with further items, whose codes follow; itself where there are none."""
        if new.is_empty():
            return self
        found, static = copy(self), self._static_of(new)
        found._static = {i: append(lists, static[i]) for i, lists in self._static.items()}
        found._titles = [*self._titles, *new["title"]]
        return found

    def _ids(self, text: str) -> list[int]:
        """Of a text that holds what items bring: no control tokens."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return list(self._tokenizer.encode(text, **options)) if text else []

    def _encode_values(self, texts: list[str]) -> Ragged:
        """Token ids of texts, each distinct one tokenised once."""
        distinct, codes = np.unique(np.array(texts, dtype=str), return_inverse=True)
        return Ragged.of([self._ids(t) for t in distinct.tolist()]).take(
            codes.astype(np.int64)
        )

    def encode(
        self,
        item: I64,
        retrieved: pl.DataFrame | Retrieved,
        label: I8,
        rating: F64 | None = None,
    ) -> Segments:
        """Segments of items (n,), their n rows of the retrieved features, and answers (n,): 0, 1, or -1 for none.

        An answer with a rating, which is no NaN, is shown as that number.
        """
        found = Retrieved.of(retrieved)
        features = (
            feature_matrix(found, 0.5)
            if any(kind == "number" for kind, _ in self._parts)
            else None
        )
        parts = []
        one_each = np.arange(len(item) + 1)
        for i, (kind, name) in enumerate(self._parts):
            if kind == "static":
                parts.append(self._static[i].take(item))
            elif kind == "item":
                parts.append(Ragged(FIRST_ITEM_ID - item, one_each))
            elif features is not None and kind == "number":
                parts.append(Ragged(number_ids(features, name.split("+")), one_each))
            else:
                # a column may be absent: item_similarity is there with retrievers that
                # compare items
                shares = found.column(RETRIEVED_FIELDS[name])
                parts.append(self._encode_values(_percent(shares)))
        answer = np.where(label < 0, 2, label).astype(np.int64)
        answers = self._answers
        if self._scale is not None and rating is not None:
            rated = np.flatnonzero(np.isfinite(rating) & (label >= 0))
            answer[rated] = len(answers) + np.arange(len(rated))
            ids = self._scale.ids(rating[rated])
            answers = append(answers, Ragged(ids, np.arange(len(rated) + 1)))
        answers = answers.take(answer)
        segments = join([*parts, answers])
        return Segments(segments, segments.lengths - answers.lengths - 1)

    def least_lengths(self) -> I64:
        """(items,) fewest tokens of an item's prompt alone: instruction, segment (one a retrieved feature), answer."""
        fixed = len(self._parts) - len(self._static) + int(self._answers.lengths.max())
        lengths: I64 = np.full(len(self._titles), fixed + len(self.instruction))
        return sum((part.lengths for part in self._static.values()), start=lengths)

    def encode_similar(self, lists: Sequence[Sequence[int]]) -> Ragged:
        """Token ids of n lists of item codes that similar users liked, the most liked first."""
        assert self.similar is not None
        titles = ("; ".join(self._titles[item] for item in items) for items in lists)
        return self._encode_values([self.similar.format(titles=t) for t in titles])
