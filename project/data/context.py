"""Context of a row and attributes of its user: columns of a log as numbers, described, and as a request brings them.

A column is known by its name with a prefix, `context.device` or `user.age`, and has a kind: number or category. A
category's value is the code of its text, a number that depends on nothing else, so every log and request has the same.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import polars as pl

from project.arrays import F64, I64
from project.data.tables import finite_numbers, numbers, plain_text
from project.errors import ConfigError, DataError
from project.metrics import auc
from project.request import Item, RankRequest, check_names, text_of

CONTEXT = "context."
USER = "user."
MAX_CHARACTERS = 1000  # of a value
EXACT = 2**53  # integers up to it are doubles
BINS = 16  # of a number, where it is counted by value
TELLS_ALONE = 0.95  # AUC above which a column is probably known only afterwards


def code_of(text: str) -> float:
    """52 bits of the text's SHA-256, which a double holds exactly."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 12)


def texts_of(values: pl.Series, file: str, column: str) -> pl.Series:
    """A column as text without blanks around it; null where it is empty or NaN."""
    text = plain_text(values, file, column).str.strip_chars()
    return text.set(text.str.to_lowercase().is_in(["", "nan"]).fill_null(True), None)


def coded_table(
    table: pl.DataFrame, prefix: str, kinds: Mapping[str, str], file: str
) -> tuple[pl.DataFrame, dict[str, str], dict[float, str]]:
    """Columns of texts under their names with a prefix, as Float64, the kind of each, and the text of each code.

    A column is a number if all its values are and `kinds` does not say otherwise, else a category.
    """
    found = {}
    columns = []
    texts = dict[float, str]()
    for name in table.columns:
        values = table[name]
        column = prefix + name
        is_number = numbers(values, file, name).null_count() == values.null_count()
        found[column] = kinds.get(name, "number" if is_number else "category")
        if found[column] == "number":
            coded = finite_numbers(values, file, name, optional=True)
        else:
            codes = {text: code_of(text) for text in values.drop_nulls().unique()}
            coded = values.replace_strict(codes, return_dtype=pl.Float64)
            texts |= {code: text for text, code in codes.items()}
        columns.append(coded.alias(column))
    return pl.DataFrame(columns), found, texts


def check_kinds(kinds: Mapping[str, str], names: list[str]) -> None:
    """Raise `ConfigError` where a kind is none, or is that of no column."""
    for name, kind in kinds.items():
        if name not in names or kind not in ("number", "category"):
            raise ConfigError(
                f"data.logs.init_args.kinds has {name}: {kind}; expected number or category for one of "
                f"{', '.join(names) or '(no column: list some under context)'}."
            )


# What a manifest and a warning say of columns


def groups_of(values: F64, kind: str) -> I64:
    """(n,) from 0: rows of one value are one group, numbers by bins; -1 where it is missing."""
    known = ~np.isnan(values)
    if kind == "number":
        group = np.searchsorted(bin_edges(values), values, side="right")
    else:
        group = np.unique(values, return_inverse=True)[1]
    return np.where(known, group, -1)


def bin_edges(values: F64) -> F64:
    """Inner edges of bins that hold about as many of these values each; few distinct values have a bin each."""
    known = values[~np.isnan(values)]
    distinct = np.unique(known)
    if distinct.size <= 2 * BINS:
        return distinct[1:]
    return np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1]))


def with_users(
    rows: pl.DataFrame, users: pl.DataFrame, columns: Mapping[str, str]
) -> pl.DataFrame:
    """Of each row the columns' values, the user's included, in the order of `rows`."""
    return pl.DataFrame(
        [
            users[name].gather(rows["user"]) if name.startswith(USER) else rows[name]
            for name in columns
        ]
    )


def describe(
    rows: pl.DataFrame, users: pl.DataFrame, columns: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """By column: kind, distinct values, share of rows without one, share of later targets' values new to train's."""
    values = with_users(rows, users, columns)
    found = {}
    for name, kind in columns.items():
        of = {
            split: values[name].filter(rows["split"] == split).drop_nulls()
            for split in ("train", "valid", "test")
        }
        seen = of["train"].unique().implode()
        found[name] = {
            "kind": kind,
            "distinct": values[name].drop_nulls().n_unique(),
            "missing": values[name].null_count() / max(1, rows.height),
            "unseen": {
                split: int((~of[split].is_in(seen)).sum()) / max(1, of[split].len())
                for split in ("valid", "test")
            },
        }
    return found


def telling_alone(
    targets: pl.DataFrame, users: pl.DataFrame, columns: Mapping[str, str]
) -> dict[str, float]:
    """Columns whose value alone tells train's labels, with the AUC: shares of likes on even rows score odd ones."""
    label = targets["label"].to_numpy().astype(np.float64)
    values = with_users(targets, users, columns)
    even = np.arange(len(label)) % 2 == 0
    base = label[even].mean()
    found = {}
    for name, kind in columns.items():
        group = 1 + groups_of(values[name].to_numpy(), kind)
        likes = np.bincount(group[even], label[even], group.max() + 1) + base
        share = likes / (np.bincount(group[even], minlength=likes.size) + 1)
        value = auc(share[group[~even]], label[~even])
        if value is not None and value > TELLS_ALONE:
            found[name] = value
    return found


# What a request brings


def brought(
    given: Mapping[str, Any], prefix: str, columns: Mapping[str, str]
) -> dict[str, float]:
    """Values of a request by column; `DataError` about an unknown name, a wrong type or a long text."""
    names = [name.removeprefix(prefix) for name in columns if name.startswith(prefix)]
    what = prefix.removesuffix(".")
    if not names and given:
        raise DataError(
            f"{what} is given, but the log of this run has no such columns; leave it out."
        )
    check_names(given, names, f"{what} has the unknown name")
    found = {}
    for name, value in given.items():
        if value is None:
            continue
        column = prefix + name
        text = said(f"{what}.{name}", value)
        if len(text) > MAX_CHARACTERS:
            raise DataError(
                f"{what}.{name} has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}."
            )
        if not text:
            continue
        if columns[column] == "category":
            found[column] = code_of(text)
            continue
        # a number of JSON as it is, a text by the rule that the log's own columns are read by
        if type(value) in (int, float) and abs(value) <= EXACT:
            found[column] = float(value)
        else:
            number = numbers(pl.Series([text]), what, name)[0]
            if number is None:
                raise DataError(f"{what}.{name} is {text[:40]!r}; expected a number.")
            found[column] = number
    return found


def said(name: str, value: Any) -> str:
    """The text of a value of a request."""
    # JSON may hold half of a pair of surrogates, which no encoding takes
    return text_of(name, value).strip().encode(errors="replace").decode()


def as_given(
    values: Mapping[str, Any], prefix: str, texts: Mapping[float, str]
) -> dict[str, Any]:
    """Values by column as a request brings them: names without prefix, numbers and texts (by code); none missing."""
    return {
        column.removeprefix(prefix): texts.get(value, value)
        for column, value in values.items()
        if column.startswith(prefix) and value is not None
    }


def fitting(
    given: Mapping[str, Any], prefix: str, columns: Mapping[str, str]
) -> dict[str, float]:
    """`brought` without values that the log has no such column for: what a store keeps may be of another run's."""
    found = dict[str, float]()
    for name, value in given.items():
        with suppress(DataError):
            found |= brought({name: value}, prefix, columns)
    return found


def values_of(
    request: RankRequest, columns: Mapping[str, str], known: Mapping[str, float]
) -> dict[str, F64]:
    """(n,) values of a request's candidates by column, NaN where unknown; `known` where it says nothing."""
    given = dict(known)
    given |= brought(request.context or {}, CONTEXT, columns)
    given |= brought(request.user or {}, USER, columns)
    n = len(request.candidates)
    values = {name: np.full(n, given.get(name, np.nan)) for name in columns}
    for k, item in enumerate(request.candidates):
        own = dict(item.context) if isinstance(item, Item) else {}
        for name, value in brought(own, CONTEXT, columns).items():
            values[name][k] = value
    return values
