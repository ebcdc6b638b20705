"""Says which items may be listed: by columns of the items table, and at most so many of one value."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from project.arrays import Bool
from project.request import check_names

IDS = ("item", "item_id")  # columns that are no attribute
SEPARATORS = r"[|,\s]+"  # of several values in one column


def passing(items: pl.DataFrame, wanted: Mapping[str, Any]) -> Bool:
    """(items,) which items pass every condition; `DataError` names an unknown column and those that are known.

    A condition is a list of texts, one of which the column has (whole, or between separators), or
    {"min": ..., "max": ...}, between which its number lies, where they are not None.
    """
    check_columns(items, wanted, "filter")
    conditions = [_condition(name, value) for name, value in wanted.items()]
    kept = items.select(pl.all_horizontal(pl.repeat(True, pl.len()), *conditions))
    return kept.to_series().to_numpy()


def check_columns(items: pl.DataFrame, names: Iterable[str], where: str) -> None:
    """Raise `DataError` about the first name that is no column of an items table, with those that are."""
    known = [name for name in items.columns if name not in IDS]
    check_names(names, known, f"{where}: unknown column")


def _condition(name: str, value: Any) -> pl.Expr:
    column = pl.col(name).fill_null("")
    # 1. a number between two; what is no number is not
    if isinstance(value, Mapping):
        number = column.str.strip_chars().cast(pl.Float64, strict=False)
        passes = number.is_finite().fill_null(False)
        if value.get("min") is not None:
            passes &= number >= value["min"]
        if value.get("max") is not None:
            passes &= number <= value["max"]
        return passes
    # 2. one of several texts: "|Action|Drama|" has "|Drama|", and "||" is an empty column
    bare = column.str.replace_all(SEPARATORS, "|").str.strip_chars("|")
    texts = [re.sub(SEPARATORS, "|", text).strip("|") for text in value]
    return pl.format("|{}|", bare).str.contains_any([f"|{text}|" for text in texts])


def spread(
    order: Iterable[int], items: pl.DataFrame, at_most: Mapping[str, int]
) -> list[int]:
    """The places of an order, but for those with a value of a column that so many places had before.

    Place k is row k of `items`. An empty value is no value.
    """
    values = {name: items[name].to_list() for name in at_most}
    counts = Counter[tuple[str, str]]()
    found = list[int]()
    for place in order:
        own = [(name, of[place]) for name, of in values.items() if of[place]]
        if all(counts[one] < at_most[one[0]] for one in own):
            found.append(place)
            counts.update(own)
    return found
