"""The prompt: template, numbers as tokens, segments of text; and how each becomes token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from project.data.ragged import IntArray, Ragged, join, total_lengths
from project.errors import ConfigError
from project.features import FEATURES, Floats, feature_matrix


class Number(NamedTuple):
    """What a prompt field tells: a feature less a constant, so that usual values lie around 0."""

    feature: str
    zero: float = 0.0


FEW_ROWS = 3.0  # log(1 + count) of 19 rows
NUMBERS = {
    "item_number": Number("item_log_odds"),
    "user_number": Number("user_log_odds"),
    "vote_number": Number("weighted_vote_log_odds"),
    "mf_number": Number("mf_log_odds"),
    "item_similarity_number": Number("item_similarity_log_odds"),
    "item_count_number": Number("item_rows", FEW_ROWS),
    "text_number": Number("text_log_odds"),
}
"""Prompt field -> number. The order is part of every trained model; there are bytes for seven."""

EVEN = 0.5
STEPS_A_UNIT = 20  # a number is rounded to .05
SPAN = 6  # and to values from -6 to 6
STEPS = 2 * SPAN * STEPS_A_UNIT + 1
BYTE = 256  # 0: not told; 1 to STEPS: the step
LOWEST_ID = -sum(STEPS * BYTE**kind for kind in range(len(NUMBERS)))
TOGETHER = "+"


def fields_together(name: str) -> list[str] | None:
    """Fields that a template's field tells in one token, such as item_number+mf_number; None where it tells others.

    Args:
        name: Without braces.
    """
    fields = name.split(TOGETHER)
    return fields if NUMBERS.keys() >= set(fields) and len(set(fields)) == len(fields) else None


def number_features(retrieved: pl.DataFrame) -> Floats:
    """Counting features behind numbers, once for all tokens of a row.

    Args:
        retrieved: n rows of an retrieved features table.

    Returns:
        (n, len(FEATURES)).
    """
    rows = retrieved.with_columns(row_id=pl.int_range(pl.len(), dtype=pl.Int64))  # a row may stand twice
    return feature_matrix(rows, EVEN)


def number_ids(features: Floats, fields: Sequence[str]) -> IntArray:
    """Ids of tokens that tell some numbers of each row.

    Args:
        features: (n, len(FEATURES)) of `number_features`.
        fields: Of `NUMBERS`, each once.

    Returns:
        (n,) from `LOWEST_ID` to -1.
    """
    ids = np.zeros(len(features), dtype=np.int64)
    for name in fields:
        feature, zero = NUMBERS[name]
        value = (features[:, FEATURES.index(feature)] - zero).clip(-SPAN, SPAN)
        step = np.rint((value + SPAN) * STEPS_A_UNIT).astype(np.int64)
        ids -= (1 + step) * BYTE ** list(NUMBERS).index(name)
    return ids


def read_number_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ids say, the inverse of `number_ids`.

    Args:
        ids: (...); those of words tell no number.

    Returns:
        Two (..., len(NUMBERS)): whether a number is told, and its value (float32; arbitrary where it is not).
    """
    shifts = 8 * torch.arange(len(NUMBERS), device=ids.device)
    digits = ((-ids).clamp(min=0)[..., None] >> shifts) & (BYTE - 1)
    return digits > 0, (digits - 1).float() / STEPS_A_UNIT - SPAN


def readable(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Token ids as text, numbers as [item +0.85 factorisation -0.10].

    Args:
        ids: (T,) of a prompt.
        tokenizer: Knows the words.
    """
    names = [name.removesuffix("_number") for name in NUMBERS]
    pieces, words = list[str](), list[int]()
    for token in ids:
        if token >= 0:
            words.append(int(token))
            continue
        told, values = (found.tolist() for found in read_number_ids(token))
        said = [
            f"{name} {value:+.2f}" for name, value, known in zip(names, values, told, strict=True) if known
        ]
        pieces += [str(tokenizer.decode(words)), f"[{' '.join(said)}]"]
        words = []
    return "".join([*pieces, str(tokenizer.decode(words))])


_AT_MOST = re.compile(r"\.[1-9]\d{0,5}")  # a format that shortens
_NO_NAME = re.compile(r"\d*|.*[.\[\]].*")  # what Python would not look up as one word


class _Field(NamedTuple):
    """A field of a template, as {name!conversion:spec}."""

    name: str
    spec: str = ""
    conversion: str | None = None

    def __str__(self) -> str:
        conversion = f"!{self.conversion}" if self.conversion else ""
        return "{" + self.name + conversion + (f":{self.spec}" if self.spec else "") + "}"


def tells_numbers(segment: str | None) -> bool:
    """Whether a template of segments has a field that is a learned token (see `project.data.prompt`); None: it has."""
    return segment is None or any(fields_together(name) for name in field_names(segment))


def field_names(template: str) -> list[str]:
    """Fields of a template in order; of one that is malformed none, since `PromptEncoder` will say so."""
    try:
        return [field.name for _, field in _parsed(template, "template") if field is not None]
    except ConfigError:
        return []


def default_segment(columns: Sequence[str], numbers: Sequence[str]) -> str:
    """A template of segments: item columns, then all numbers in one token.

    Args:
        columns: Columns of the items table; those that a template cannot name are left out.
        numbers: Of `project.data.prompt.NUMBERS`.
    """
    named = [name for name in columns if not _NO_NAME.fullmatch(name)]
    return ", ".join(f"{{{name}}}" for name in named) + f"{{{'+'.join(numbers)}}}"


def check_similar(template: str) -> None:
    """Raise `ConfigError` for a template of similar users' lists that has not the one field {titles}."""
    fields = [field.name for _, field in _parsed(template, "data.prompt.similar") if field is not None]
    if fields != ["titles"]:
        raise ConfigError(
            f"data.prompt.similar is {template!r}: expected a template with the one field {{titles}}, for example "
            '"Similar users liked: {titles}\\n", or null for prompts without such lists.'
        )


def split_template(
    template: str, item_fields: Sequence[str], retrieved_fields: Iterable[str]
) -> list[tuple[str, str]]:
    """The pieces of a template of segments.

    Args:
        template: The wording, with fields in braces.
        item_fields: Columns of the items table that it may name.
        retrieved_fields: Retrieved features that it may tell as text.

    Returns:
        ("static", text with item fields), ("retrieved", name) and ("number", name) pieces; no two static ones in a row.

    Raises:
        ConfigError: If it is malformed, empty, or has a field that nobody knows, that two know, or in a format.
    """
    worded = list(retrieved_fields)
    own = [name for name in item_fields if not _NO_NAME.fullmatch(name)]
    parts: list[tuple[str, str]] = []

    def add_static(text: str) -> None:
        if parts and parts[-1][0] == "static":
            parts[-1] = ("static", parts[-1][1] + text)
        elif text:
            parts.append(("static", text))

    for literal, part in _parsed(template, "data.prompt.segment"):
        add_static(literal.replace("{", "{{").replace("}", "}}"))
        if part is None:
            continue
        name = part.name
        if name not in [*own, *worded] and not fields_together(name):
            raise ConfigError(
                f"data.prompt.segment names the field {{{name}}}, which nobody knows. Item fields here: "
                f"{', '.join(own)}; retrieved features fields: {', '.join([*worded, *NUMBERS])}; several "
                "numbers in one token, each once, as {item_number+mf_number}."
            )
        _check_field(part, name in own, name in worded or name in NUMBERS)
        if name in own:
            add_static(str(part))
        else:
            parts.append(("retrieved" if name in worded else "number", name))
    if not parts:
        raise ConfigError(
            "data.prompt.segment is empty: a segment needs at least one token before its answer."
        )
    return parts


def _check_field(field: _Field, own: bool, retrieved: bool) -> None:
    """Refuse a field that is both the items' own and retrieved features, and formats that are not for it."""
    if own and retrieved:
        raise ConfigError(
            f"data.prompt.segment names the field {{{field.name}}}, which is a retrieved feature and also a column "
            "of your items. Give the column another name, for example data.logs.init_args.item_columns: "
            f"{{my_{field.name}: {field.name}}}."
        )
    if field.conversion or (field.spec and not (own and _AT_MOST.fullmatch(field.spec))):
        expected = f"{{{field.name}}}"
        expected += f", or {{{field.name}:.40}} for at most 40 characters of it" if own else " alone"
        raise ConfigError(f"data.prompt.segment has the field {field}; expected {expected}.")


def _parsed(template: str, key: str) -> list[tuple[str, _Field | None]]:
    """(text, field behind it) pairs."""
    try:
        return [
            (literal, None if name is None else _Field(name, spec or "", conversion))
            for literal, name, spec, conversion in Formatter().parse(template)
        ]
    except ValueError as error:
        raise ConfigError(f"{key} {template!r} is not a template: {error}.") from error


UNKNOWN = "?"  # what the prompt says where nothing has been counted yet


class Tokenizer(Protocol):
    """The one call that is needed of a Hugging Face tokenizer."""

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., split_special_tokens: bool = ...
    ) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass
class Prompt:
    """The wording of prompts.

    Args:
        instruction: Stands once before every history. Never evicted, the same for everybody.
        segment: Template of one interaction or candidate. Null: title, the columns of the items whose texts are short,
            and numbers of everything that is counted. Fields are columns of the items table (title and
            attributes) and retrieved features: item_percent, user_percent, vote_percent (shares of likes), mf_percent
            (chance of a like, see data.mf), item_similarity_percent (the user's own answers on items alike, see
            item_neighbours of data.retriever), the same as learned tokens instead of text, one token each, in log-
            odds, shrunk where rows are few, as item_number, user_number, vote_number (weighted by similarity),
            mf_number, item_similarity_number, text_number (own answers on items of similar text), and the logarithm
            of a count as item_count_number; several of these in one token as {item_number+mf_number}; likes,
            neighbours (of the similar users), item_count, user_count (rounded down to 1, 2, 5, 10, 20, 50, ...).
            {title:.40} is at most 40 characters of a title, or of an attribute.
        answers: What follows a segment for a disliked and a liked item. Each must be a single token of the
            tokenizer.
        similar: Template of a list of what similar users liked, with the field {titles} (joined by "; "); null where
            prompts have none. How often there is one, and how long, says data.retriever.init_args: similar_every,
            similar_users, similar_items.
    """

    instruction: str = "Will this user like each? Liked in percent: by all, by similar users.\n"
    segment: str | None = None
    answers: list[str] = field(default_factory=lambda: [" no", " yes"])
    similar: str | None = None


def _percent(values: pl.Series) -> list[str]:
    """Always two digits, 00 to 99: whatever is known is equally long."""
    return [UNKNOWN if v is None else f"{min(int(100 * v + 0.5), 99):02d}" for v in values.to_list()]


def _round_down(values: pl.Series) -> list[str]:
    """0, 1, 2, 5, 10, 20, 50, ...: counts as few distinct texts."""
    steps = np.array([0, *(m * 10**e for e in range(8) for m in (1, 2, 5))])
    return [str(steps[i]) for i in np.searchsorted(steps, values.to_numpy(), side="right") - 1]


def _plain(values: pl.Series) -> list[str]:
    return [str(v) for v in values.to_list()]


RETRIEVED_FIELDS: dict[str, tuple[str, Callable[[pl.Series], list[str]]]] = {
    "item_percent": ("item_rate", _percent),
    "user_percent": ("user_rate", _percent),
    "vote_percent": ("vote", _percent),
    "mf_percent": ("mf", _percent),
    "item_similarity_percent": ("item_similarity", _percent),
    "item_count": ("item_count", _round_down),
    "user_count": ("user_count", _round_down),
    "neighbours": ("neighbour_count", _plain),
    "likes": ("likes", _plain),
}


def field_telling(prompt: Prompt, column: str) -> str | None:
    """A field of the segment, in braces, that tells this column of the retrieved features; None where none does."""
    fields = [name for name, (told, _) in RETRIEVED_FIELDS.items() if told == column]
    named = {part: name for name in field_names(prompt.segment or "") for part in name.split(TOGETHER)}
    return next(("{" + named[field] + "}" for field in [*fields, f"{column}_number"] if field in named), None)


SHORT = 12  # median tokens of a column that a prompt shows without being asked to
ALWAYS_COUNTED = ("item_number", "user_number", "vote_number", "text_number")


def with_segment(
    prompt: Prompt, tokenizer: Tokenizer, items: pl.DataFrame, numbers: Sequence[str] = ()
) -> Prompt:
    """The prompt with a segment: its own, or where it has none the title, short item columns and numbers.

    Args:
        prompt: The wording.
        tokenizer: Measures columns.
        items: The items table.
        numbers: Of `NUMBERS`, those that this run has beside `ALWAYS_COUNTED`.
    """
    if prompt.segment is not None:
        return prompt

    def is_short(name: str) -> bool:
        texts = items[name].filter(items[name] != "").unique(maintain_order=True).head(1000)
        tokens = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return bool(tokens) and float(np.median(tokens)) <= SHORT

    shown = [
        name
        for name in items.columns
        if name == "title"
        or (name not in ("item", "item_id", *RETRIEVED_FIELDS, *NUMBERS) and is_short(name))
    ]
    return replace(prompt, segment=default_segment(shown, [*ALWAYS_COUNTED, *numbers]))


def item_columns(prompt: Prompt, items: pl.DataFrame) -> tuple[list[str], list[str]]:
    """Columns of the items that the segment shows, and those that it does not."""
    fields = field_names(prompt.segment or "")
    columns = [name for name in items.columns if name not in ("item", "item_id")]
    return [name for name in columns if name in fields], [name for name in columns if name not in fields]


@dataclass(frozen=True)
class Segments:
    """Token ids of n segments.

    Attributes:
        tokens: n ragged lists of token ids, the answer included where it is known.
        slots: (n,) index of the answer slot inside each segment.
    """

    tokens: Ragged
    slots: IntArray

    @property
    def lengths(self) -> IntArray:
        """(n,) tokens of each segment, answer included."""
        return self.tokens.lengths


class PromptEncoder:
    """Turns items, retrieved features and answers into segments.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: The wording; without a segment it gets that of `with_segment`.
        items: The items table (`Interactions.items`), one row an item code.

    Raises:
        ConfigError: If the template is malformed, names a field that nobody knows, or an answer has no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, items: pl.DataFrame) -> None:
        self._tokenizer = tokenizer
        item_fields = [c for c in items.columns if c not in ("item", "item_id")]
        segment = with_segment(prompt, tokenizer, items).segment
        assert segment is not None
        self._parts = split_template(segment, item_fields, RETRIEVED_FIELDS)
        if len(prompt.answers) != 2 or not all(a.strip() for a in prompt.answers):
            raise ConfigError(
                f"data.prompt.answers is {prompt.answers!r}: expected two texts, for dislike and like, "
                'for example [" no", " yes"].'
            )
        if prompt.similar is not None:
            check_similar(prompt.similar)
        self.similar: str | None = prompt.similar
        self._titles: list[str] = items["title"].to_list()
        # of a tokenizer's control tokens, the author of the wording may mean one here; a title never does
        instruction, *answers = (
            tokenizer.encode(text, add_special_tokens=False) if text else []
            for text in (prompt.instruction, *prompt.answers)
        )
        self.instruction: IntArray = np.array(instruction, dtype=np.int64)
        # index 0, 1: the answers; index 2 (label -1): unknown, no answer tokens
        self._answers = Ragged.of([*answers, []])
        columns = items.to_dict(as_series=False)
        self._static: dict[int, Ragged] = {}
        for i, (kind, text) in enumerate(self._parts):
            if kind == "static":
                rows = ({c: v[k] for c, v in columns.items()} for k in range(len(items)))
                self._static[i] = Ragged.of([self._ids(text.format(**row)) for row in rows])

    def _ids(self, text: str) -> list[int]:
        """Of a text that holds what items bring: no control tokens."""
        if not text:
            return []
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(self, item: IntArray, retrieved: pl.DataFrame, label: npt.NDArray[np.int8]) -> Segments:
        """Encode n segments.

        Args:
            item: (n,) item codes.
            retrieved: n rows of the retrieved features table, in the same order.
            label: (n,) 0, 1, or -1 where the answer is not known (a candidate).

        Returns:
            Segments of n rows.
        """
        if "likes" not in retrieved.columns:
            retrieved = retrieved.with_columns(likes=pl.col("answers").list.sum().fill_null(0))
        features = number_features(retrieved) if any(kind == "number" for kind, _ in self._parts) else None
        parts = []
        for i, (kind, name) in enumerate(self._parts):
            if kind == "static":
                parts.append(self._static[i].take(item))
            elif features is not None and kind == "number":
                parts.append(Ragged(number_ids(features, name.split(TOGETHER)), np.arange(len(item) + 1)))
            else:
                column, render = RETRIEVED_FIELDS[name]
                found = column in retrieved.columns  # alike is there with retrievers that compare items
                texts = render(retrieved[column]) if found else [UNKNOWN] * len(retrieved)
                parts.append(self._encode_values(texts))
        before = total_lengths(parts)
        answers = self._answers.take(np.where(label < 0, 2, label).astype(np.int64))
        return Segments(join([*parts, answers]), before - 1)

    def least_lengths(self) -> IntArray:
        """(items,) fewest tokens of an item's segment and its answer: one for each retrieved feature."""
        static = [part.lengths for part in self._static.values()]
        fixed = len(self._parts) - len(static) + int(self._answers.lengths.max())
        lengths: IntArray = np.sum([np.zeros(len(self._titles), dtype=np.int64), *static], axis=0) + fixed
        return lengths

    def encode_similar(self, lists: Sequence[Sequence[int]]) -> Ragged:
        """Token ids of lists of what similar users liked.

        Args:
            lists: n lists of item codes, the most liked first.

        Returns:
            n ragged lists.
        """
        assert self.similar is not None
        titles = ("; ".join(self._titles[item] for item in items) for items in lists)
        return self._encode_values([self.similar.format(titles=t) for t in titles])

    def _encode_values(self, texts: list[str]) -> Ragged:
        distinct, codes = np.unique(np.array(texts, dtype=object).astype(str), return_inverse=True)
        return Ragged.of([self._ids(t) for t in distinct.tolist()]).take(codes.astype(np.int64))
