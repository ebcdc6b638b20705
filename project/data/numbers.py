"""Numbers in prompts: evidence that is not worded, but stands in a segment as a token of its own.

Unusual here: the id of such a token is below zero. It says which evidence and how much of it, so whoever handles token
ids (packing, stream cache, engine) need not know that there are numbers; the one who turns ids into vectors is
`project.model.trunk`. One token can tell several numbers: a byte of its id is one number's, and the id of all is the
sum of theirs. Rates are log-odds shrunk to even odds where rows are few, so nothing is fitted for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from project.counting import FEATURES, Floats, counting_features
from project.data.ragged import IntArray


class Number(NamedTuple):
    """What a prompt field tells: a counting feature less a constant, so that usual values lie around 0."""

    feature: str
    zero: float = 0.0


FEW_ROWS = 3.0  # log(1 + count) of 19 rows
NUMBERS = {
    "item_number": Number("item_log_odds"),
    "user_number": Number("user_log_odds"),
    "vote_number": Number("weighted_vote_log_odds"),
    "taste_number": Number("taste_log_odds"),
    "alike_number": Number("alike_log_odds"),
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
    """Fields that a template's field tells in one token, such as item_number+taste_number; None where it tells others.

    Args:
        name: Without braces.
    """
    fields = name.split(TOGETHER)
    return fields if NUMBERS.keys() >= set(fields) and len(set(fields)) == len(fields) else None


def number_features(evidence: pl.DataFrame) -> Floats:
    """Counting features behind numbers, once for all tokens of a row.

    Args:
        evidence: n rows of an evidence table.

    Returns:
        (n, len(FEATURES)).
    """
    rows = evidence.with_columns(row_id=pl.int_range(pl.len(), dtype=pl.Int64))  # a row may stand twice
    return counting_features(rows, EVEN)


def number_ids(features: Floats, fields: Sequence[str]) -> IntArray:
    """Ids of tokens that tell some numbers of each row.

    Args:
        features: (n, len(FEATURES)) of `number_features`.
        fields: Of `NUMBERS`, each once.

    Returns:
        (n,) from `LOWEST_ID` to -1.
    """
    ids = np.zeros(len(features), dtype=np.int64)
    for field in fields:
        feature, zero = NUMBERS[field]
        value = (features[:, FEATURES.index(feature)] - zero).clip(-SPAN, SPAN)
        step = np.rint((value + SPAN) * STEPS_A_UNIT).astype(np.int64)
        ids -= (1 + step) * BYTE ** list(NUMBERS).index(field)
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
    """Token ids as text, numbers as [item +0.85 taste -0.10].

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
