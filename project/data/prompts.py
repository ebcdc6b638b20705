"""Prompts: one interaction or candidate becomes one segment of token ids.

A segment is `template + answer`. The template is split at its evidence fields; what stands between them (literal
text and item attributes) is tokenised once per item, an evidence value once per distinct value, and a segment is the
concatenation of those pieces. So a segment's ids are the same wherever it stands, and nothing is tokenised while
training. Evidence that is told as a number is one id below zero (project.data.numbers). The answer slot is the last
token before the answer: a head reads its prediction there.

Lists of what similar users liked are segments of their own, without an answer; each distinct list is tokenised once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import polars as pl

from project.data.numbers import NUMBERS, TOGETHER, number_features, number_ids
from project.data.ragged import IntArray, Ragged, join, total_lengths
from project.data.template import check_similar, default_segment, field_names, split_template
from project.errors import ConfigError

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
            attributes) and evidence: item_percent, user_percent, vote_percent (shares of likes), taste_percent (chance
            of a like, see data.taste), alike_percent (the user's own answers on items alike, see alike_items of
            data.retriever), the same as learned tokens instead of text, one token each, in log-odds, shrunk where rows
            are few, as item_number, user_number, vote_number (weighted by similarity), taste_number, alike_number,
            text_number (own answers on items of similar text), and the logarithm of a count as item_count_number;
            several of these in one token as {item_number+taste_number}; likes, neighbours (of the similar users),
            item_count, user_count (rounded down to 1, 2, 5, 10, 20, 50, ...). {title:.40} is at most 40 characters of a
            title, or of an attribute.
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


EVIDENCE_FIELDS: dict[str, tuple[str, Callable[[pl.Series], list[str]]]] = {
    "item_percent": ("item_rate", _percent),
    "user_percent": ("user_rate", _percent),
    "vote_percent": ("vote", _percent),
    "taste_percent": ("taste", _percent),
    "alike_percent": ("alike", _percent),
    "item_count": ("item_count", _round_down),
    "user_count": ("user_count", _round_down),
    "neighbours": ("neighbour_count", _plain),
    "likes": ("likes", _plain),
}


def field_telling(prompt: Prompt, column: str) -> str | None:
    """A field of the segment, in braces, that tells this column of the evidence; None where none does."""
    fields = [name for name, (told, _) in EVIDENCE_FIELDS.items() if told == column]
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
        if name == "title" or (name not in ("item", "item_id", *EVIDENCE_FIELDS, *NUMBERS) and is_short(name))
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
    """Turns items, evidence and answers into segments.

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
        self._parts = split_template(segment, item_fields, EVIDENCE_FIELDS)
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

    def encode(self, item: IntArray, evidence: pl.DataFrame, label: npt.NDArray[np.int8]) -> Segments:
        """Encode n segments.

        Args:
            item: (n,) item codes.
            evidence: n rows of the evidence table, in the same order.
            label: (n,) 0, 1, or -1 where the answer is not known (a candidate).

        Returns:
            Segments of n rows.
        """
        if "likes" not in evidence.columns:
            evidence = evidence.with_columns(likes=pl.col("answers").list.sum().fill_null(0))
        features = number_features(evidence) if any(kind == "number" for kind, _ in self._parts) else None
        parts = []
        for i, (kind, name) in enumerate(self._parts):
            if kind == "static":
                parts.append(self._static[i].take(item))
            elif features is not None and kind == "number":
                parts.append(Ragged(number_ids(features, name.split(TOGETHER)), np.arange(len(item) + 1)))
            else:
                column, render = EVIDENCE_FIELDS[name]
                found = column in evidence.columns  # alike is there with retrievers that compare items
                texts = render(evidence[column]) if found else [UNKNOWN] * len(evidence)
                parts.append(self._encode_values(texts))
        before = total_lengths(parts)
        answers = self._answers.take(np.where(label < 0, 2, label).astype(np.int64))
        return Segments(join([*parts, answers]), before - 1)

    def least_lengths(self) -> IntArray:
        """(items,) tokens of an item's segment and its answer, at the least: one for each field of evidence."""
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
