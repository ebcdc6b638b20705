"""Numbers are ids below zero that say what counting counted, to a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers import PreTrainedTokenizerBase
from world import Letters

from project.counting import FEATURES, counting_features
from project.data.numbers import LOWEST_ID, NUMBERS, SPAN, STEPS_A_UNIT, number_ids, read_number_ids, readable
from project.data.prompts import EVIDENCE_FIELDS, Prompt, PromptEncoder, field_telling, tells_numbers
from project.data.ragged import Ragged

ITEMS = pl.DataFrame({"item": [0, 1], "item_id": ["a", "b"], "title": ["Alien", "Brazil"]})


def evidence(n: int = 2, seed: int = 0) -> pl.DataFrame:
    """Random rows; the first has item_rate .75 of 20 rows, the last has no evidence at all."""
    rng = np.random.default_rng(seed)
    neighbours = [int(k) for k in rng.integers(0, 6, n)]
    neighbours[-1] = 0
    answers = [rng.integers(0, 2, k).tolist() for k in neighbours]
    none = [False] * (n - 1) + [True]
    table = pl.DataFrame(
        {
            "row_id": np.arange(n),
            "item_rate": rng.random(n),
            "item_count": rng.integers(1, 60, n),
            "user_rate": rng.random(n),
            "user_count": rng.integers(1, 9, n),
            "neighbour_count": neighbours,
            "vote": [sum(a) / len(a) if a else None for a in answers],
            "answers": pl.Series(answers, dtype=pl.List(pl.Int8)),
            "similarities": pl.Series(
                [rng.random(k).tolist() for k in neighbours], dtype=pl.List(pl.Float32)
            ),
            "taste": rng.random(n),
            "alike": rng.random(n),
            "alike_weight": rng.random(n) * 5,
        }
    )
    rates = ("item_rate", "user_rate", "taste", "alike")
    counts = ("item_count", "user_count", "alike_weight")
    table = table.with_columns(
        *(pl.when(pl.Series(none)).then(None).otherwise(pl.col(c)).alias(c) for c in rates),
        *(pl.when(pl.Series(none)).then(0).otherwise(pl.col(c)).alias(c) for c in counts),
    )
    first = pl.col("row_id") == 0
    return table.with_columns(
        item_rate=pl.when(first).then(0.75).otherwise("item_rate"),
        item_count=pl.when(first).then(20).otherwise("item_count"),
    )


def test_golden() -> None:
    """15 of 20 and five more at even odds: log(17.5 / 7.5) = .847, rounded .85, the 137th of .05 from -6 on."""
    assert math.isclose(math.log(17.5 / 7.5), 0.8473, abs_tol=1e-4)
    assert number_ids(evidence())["item_number"][0] == -1 - 137


def test_nothing_known_is_even_odds() -> None:
    """A row without evidence reads as 0 in every number."""
    for field, ids in number_ids(evidence()).items():
        assert read_number_ids(torch.tensor(ids[-1:]))[1].item() == 0.0, field


def test_ids_say_kind_and_value() -> None:
    """Read back, an id is its field and the counting feature, to half a step, within the span."""
    table = evidence(300)
    features = counting_features(table, 0.5)
    for kind, (field, ids) in enumerate(number_ids(table).items()):
        assert ids.min() >= LOWEST_ID
        assert ids.max() < 0
        kinds, values = read_number_ids(torch.from_numpy(ids))
        assert kinds.unique().tolist() == [kind] == [list(NUMBERS).index(field)]
        expected = features[:, FEATURES.index(NUMBERS[field])].clip(-SPAN, SPAN)
        np.testing.assert_allclose(values.numpy(), expected, atol=0.5 / STEPS_A_UNIT + 1e-5)


def test_a_row_that_stands_twice() -> None:
    """Rows of one row_id, as history and candidate or outside the logs, keep their own numbers."""
    table = evidence(20)
    alone, same = number_ids(table), number_ids(table.with_columns(row_id=pl.lit(-1, pl.Int64)))
    assert all((alone[field] == same[field]).all() for field in NUMBERS)


def test_segments_hold_one_token_a_number() -> None:
    """Text is tokenised, a number is one id; where evidence is not told, it says what "?" says."""
    encoder = PromptEncoder(Letters(), Prompt(segment="{title} {taste_number}{item_number}:"), ITEMS)
    table = evidence()
    ids, label = number_ids(table), np.array([1, -1], dtype=np.int8)
    found = encoder.encode(np.array([0, 1]), table, label, np.array([True, False])).tokens
    told = [*map(ord, "Alien "), ids["taste_number"][0], ids["item_number"][0], *map(ord, ": yes")]
    assert found[0].tolist() == told
    assert found[1].tolist() == [*map(ord, "Brazil ??:")]
    everywhere = encoder.encode(np.array([0, 1]), table, label).tokens
    assert isinstance(everywhere, Ragged)
    assert everywhere[1].tolist()[-3:-1] == [ids["taste_number"][1], ids["item_number"][1]]


@pytest.mark.parametrize("column", ["taste", "alike"])
def test_which_field_tells_a_column(column: str) -> None:
    """Text in tenths or percent and the number all need what is behind them."""
    fields = [name for name, (told, _) in EVIDENCE_FIELDS.items() if told == column]
    for field in [*fields, f"{column}_number"]:
        assert field_telling(Prompt(segment="{title}{" + field + "}:"), column) == "{" + field + "}"
    assert field_telling(Prompt(segment="{title}{item_number}:"), column) is None


def test_back_to_text() -> None:
    """Words are decoded, a number says its kind and value."""

    class Decoder(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            pass

        def decode(self, token_ids: Any, *_: Any, **__: Any) -> str:
            return "".join(map(chr, token_ids))

    item, taste = (number_ids(evidence())[f"{name}_number"][0] for name in ("item", "taste"))
    value = float(read_number_ids(torch.tensor(taste))[1])
    ids = torch.tensor([*map(ord, "Alien"), item, taste, *map(ord, ": yes")])
    assert readable(ids, Decoder()) == f"Alien[item +0.85][taste {value:+.2f}]: yes"


def test_who_tells_numbers() -> None:
    """Only a template with such a field makes a model learn tokens for them."""
    assert tells_numbers("{title}{vote_number}:")
    assert not tells_numbers("{title} all{item_percent}:")
