"""Numbers in prompts: evidence that is not worded, but stands in a segment as one token of its own.

Unusual here: the id of such a token is below zero. It says which evidence and how much of it, in log-odds, so whoever
handles token ids (packing, stream cache, engine) need not know that there are numbers; the one who turns ids into
vectors is `project.model.numbers`. Log-odds are shrunk to even odds where rows are few, so nothing is fitted for them.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from project.counting import FEATURES, counting_features
from project.data.ragged import IntArray

NUMBERS = {
    "item_number": "item_log_odds",
    "user_number": "user_log_odds",
    "vote_number": "weighted_vote_log_odds",
    "taste_number": "taste_log_odds",
    "alike_number": "alike_log_odds",
}
"""Prompt field -> counting feature. The order is part of every trained model: a new one goes to the end."""

EVEN = 0.5
STEPS_A_UNIT = 20  # a number is rounded to .05
SPAN = 6  # and to log-odds from -6 to 6
STEPS = 2 * SPAN * STEPS_A_UNIT + 1
LOWEST_ID = -len(NUMBERS) * STEPS


def number_ids(evidence: pl.DataFrame) -> dict[str, IntArray]:
    """Token ids of all numbers.

    Args:
        evidence: n rows of an evidence table.

    Returns:
        Prompt field -> (n,) ids from `LOWEST_ID` to -1.
    """
    rows = evidence.with_columns(row_id=pl.int_range(pl.len(), dtype=pl.Int64))  # a row may stand twice
    features = counting_features(rows, EVEN)
    found = {}
    for kind, (field, feature) in enumerate(NUMBERS.items()):
        value = features[:, FEATURES.index(feature)].clip(-SPAN, SPAN)
        step = np.rint((value + SPAN) * STEPS_A_UNIT).astype(np.int64)
        found[field] = -1 - (kind * STEPS + step)
    return found


def read_number_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """What ids say, the inverse of `number_ids`.

    Args:
        ids: Of any shape; what is not below zero reads as the first number's lowest value.

    Returns:
        Two of the same shape: which of `NUMBERS`, and its log-odds (float32).
    """
    code = (-1 - ids).clamp(min=0)
    return code // STEPS, (code % STEPS).float() / STEPS_A_UNIT - SPAN


def readable(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    """Token ids as text, numbers as [taste +0.85].

    Args:
        ids: (T,) of a prompt.
        tokenizer: Knows the words.
    """
    names, pieces, words = list(NUMBERS), list[str](), list[int]()
    for token in ids:
        if token >= 0:
            words.append(int(token))
            continue
        kind, value = read_number_ids(token)
        name = names[int(kind)].removesuffix("_number")
        pieces += [str(tokenizer.decode(words)), f"[{name} {value:+.2f}]"]
        words = []
    return "".join([*pieces, str(tokenizer.decode(words))])
