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

from project.data.prompt import (
    LOWEST_ID,
    NUMBERS,
    RETRIEVED_FIELDS,
    SPAN,
    STEPS_A_UNIT,
    Prompt,
    PromptEncoder,
    field_showing,
    fields_together,
    number_features,
    number_ids,
    read_number_ids,
    readable,
)
from project.errors import ConfigError
from project.features import FEATURES, feature_matrix

ITEMS = pl.DataFrame({"item": [0, 1], "item_id": ["a", "b"], "title": ["Alien", "Brazil"]})


def retrieved(n: int = 2) -> pl.DataFrame:
    """Random rows; the first has item_rate .75 of 20 rows, the last has no retrieved features at all."""
    rng = np.random.default_rng(0)
    answers = [rng.integers(0, 2, k).tolist() for k in [*rng.integers(0, 6, n - 1).tolist(), 0]]
    rates = {name: rng.random(n) for name in ("item_rate", "user_rate", "mf", "item_similarity")}
    counts = {name: rng.integers(1, 60, n) for name in ("item_count", "user_count", "item_similarity_weight")}
    rates["item_rate"][0], counts["item_count"][0] = 0.75, 20
    lists = {
        "neighbour_count": list(map(len, answers)),
        "vote": [sum(a) / len(a) if a else None for a in answers],
        "answers": pl.Series(answers, dtype=pl.List(pl.Int8)),
        "similarities": pl.Series([rng.random(len(a)).tolist() for a in answers], dtype=pl.List(pl.Float32)),
    }
    known = pl.when(pl.col("row_id") < n - 1)
    table = pl.DataFrame({"row_id": np.arange(n), **rates, **counts, **lists})
    return table.with_columns(known.then(pl.col(*rates)), known.then(pl.col(*counts)).otherwise(0))


def ids_of(table: pl.DataFrame, fields: list[str]) -> np.ndarray:
    return number_ids(number_features(table), fields)


def test_golden() -> None:
    """15 of 20 and five more at even odds: log(17.5 / 7.5) = .847, rounded .85, the 137th of .05 from -6 on.

    The count is three bytes further: log(1 + 20) - 3 = .045, rounded .05, the 121st.
    """
    assert math.isclose(math.log(17.5 / 7.5), 0.8473, abs_tol=1e-4)
    assert math.isclose(math.log(21) - 3, 0.0445, abs_tol=1e-4)
    assert ids_of(retrieved(), ["item_number"])[0] == -138
    assert ids_of(retrieved(), ["item_count_number"])[0] == -122 * 256**5
    assert ids_of(retrieved(), ["item_count_number", "item_number"])[0] == -138 - 122 * 256**5


def test_nothing_known_is_even_odds() -> None:
    """A row without retrieved features reads as 0 in every rate, and as no rows in every count."""
    told, values = read_number_ids(torch.tensor(ids_of(retrieved(), list(NUMBERS))[-1:]))
    assert told.all()
    assert values[0].tolist() == [-3.0 if "count" in field else 0.0 for field in NUMBERS]


@pytest.mark.parametrize("fields", [*([field] for field in NUMBERS), [*NUMBERS], [*NUMBERS][::-2]])
def test_ids_say_fields_and_values(fields: list[str]) -> None:
    """Read back, an id is its fields and their counting features, to half a step, within the span; nothing else."""
    table = retrieved(300)
    features, ids = feature_matrix(table, 0.5), ids_of(table, fields)
    assert np.iinfo(np.int64).min < LOWEST_ID <= ids.min() <= ids.max() < 0
    told, values = read_number_ids(torch.from_numpy(ids))
    for kind, (field, (feature, zero)) in enumerate(NUMBERS.items()):
        assert told[:, kind].all() if field in fields else not told[:, kind].any()
        if field in fields:
            expected = (features[:, FEATURES.index(feature)] - zero).clip(-SPAN, SPAN)
            np.testing.assert_allclose(values[:, kind].numpy(), expected, atol=0.5 / STEPS_A_UNIT + 1e-5)


def test_words_tell_no_number() -> None:
    told, _ = read_number_ids(torch.tensor([[0, 1], [255, 49151]]))
    assert told.shape == (2, 2, len(NUMBERS))
    assert not told.any()


def test_a_row_that_stands_twice() -> None:
    """Rows of one row_id, as history and candidate or outside the logs, keep their own numbers."""
    table = retrieved(20)
    same = table.with_columns(row_id=pl.lit(-1, pl.Int64))
    assert (ids_of(table, list(NUMBERS)) == ids_of(same, list(NUMBERS))).all()


def test_segments_hold_one_token_a_field() -> None:
    prompt = Prompt(segment="{title} {mf_number}{item_number+user_number}:")
    encoder = PromptEncoder(Letters(), prompt, ITEMS)
    table = retrieved()
    mf, rates = (ids_of(table, fields) for fields in (["mf_number"], ["item_number", "user_number"]))
    found = encoder.encode(np.array([0, 1]), table, np.array([1, -1], dtype=np.int8)).tokens
    assert found[0].tolist() == [*map(ord, "Alien "), mf[0], rates[0], *map(ord, ": yes")]
    assert found[1].tolist() == [*map(ord, "Brazil "), mf[1], rates[1], ord(":")]


@pytest.mark.parametrize("name", ["item_number+year", "item_number+item_number", "item_number+"])
def test_what_cannot_be_one_token(name: str) -> None:
    assert fields_together(name) is None
    with pytest.raises(ConfigError, match=r"which is unknown\..*each once"):
        PromptEncoder(Letters(), Prompt(segment="{title}{" + name + "}:"), ITEMS)


@pytest.mark.parametrize("column", ["mf", "item_similarity"])
def test_which_field_tells_a_column(column: str) -> None:
    fields = [name for name, (told, _) in RETRIEVED_FIELDS.items() if told == column]
    for field in [*fields, f"{column}_number"]:
        assert field_showing(Prompt(segment="{title}{" + field + "}:"), column) == "{" + field + "}"
    both = "{item_number+" + column + "_number}"
    assert field_showing(Prompt(segment="{title}" + both + ":"), column) == both
    assert field_showing(Prompt(segment="{title}{item_number}:"), column) is None


def test_back_to_text() -> None:
    class Decoder(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            pass

        def decode(self, token_ids: Any, *_: Any, **__: Any) -> str:
            return "".join(map(chr, token_ids))

    fields = (["item_number"], ["item_count_number", "item_number"])
    numbers = [ids_of(retrieved(), some)[0] for some in fields]
    ids = torch.tensor([*map(ord, "Alien"), *numbers, *map(ord, ": yes")])
    assert readable(ids, Decoder()) == "Alien[item +0.85][item +0.85 item_count +0.05]: yes"
