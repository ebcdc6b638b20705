"""The contract of readers: what any reader returned is checked once, before anything is made of it.

Unusual here: readers of this project have checked their files already and said more (the user's own names of columns).
A reader of your own may leave all of it to this, and `source_file` and `source_row` empty.
"""

from dataclasses import replace

import polars as pl

from project.data.columns import finite_number, ids, plain_text, refuse, seconds
from project.data.readers import GIVEN_SPLITS, RAW_SCHEMA, RawLogs, refuse_unknown_items
from project.errors import DataError

_INTERACTIONS, _ITEMS = "the reader's interactions", "the reader's items"
_FIX = "Mend read() of the class that data.logs names."


def checked(raw: RawLogs) -> RawLogs:
    """The logs with the types of `RAW_SCHEMA`.

    Args:
        raw: What a reader returned.

    Raises:
        DataError: A table or column is missing, an id is empty, a value is not finite or not allowed, an item stands
            twice in the items, or an interaction's item does not stand there.
    """
    tables = [raw.interactions, raw.items] if isinstance(raw, RawLogs) else []
    if not tables or not all(isinstance(table, pl.DataFrame) for table in tables):
        found = ", ".join(type(table).__name__ for table in tables) or type(raw).__name__
        raise DataError(
            f"data.logs: read() returned {found}; expected RawLogs of two polars DataFrames. {_FIX}"
        )
    typed = replace(raw, interactions=_interactions(raw.interactions), items=_items(raw.items))
    refuse_unknown_items(typed, _ITEMS)
    return typed


def _interactions(table: pl.DataFrame) -> pl.DataFrame:
    _has(table, tuple(RAW_SCHEMA), _INTERACTIONS, " A column that the log does not have is null.")
    split = plain_text(table["split"], _INTERACTIONS)
    table = table.select(
        ids(table["user_id"], _INTERACTIONS, "user_id"),
        ids(table["item_id"], _INTERACTIONS, "item_id"),
        seconds(finite_number(table["timestamp"], _INTERACTIONS, "timestamp"), _INTERACTIONS, "timestamp"),
        *(finite_number(table[name], _INTERACTIONS, name, optional=True) for name in ("rating", "label")),
        split,
        plain_text(table["source_file"], _INTERACTIONS).fill_null(_INTERACTIONS),
        finite_number(table["source_row"], _INTERACTIONS, "source_row", optional=True).fill_null(
            pl.int_range(1, pl.len() + 1)
        ),
    )
    refuse(table["label"], [0, 1], _INTERACTIONS, "label")
    refuse(split, GIVEN_SPLITS, _INTERACTIONS, "split")
    return table.cast(RAW_SCHEMA)  # type: ignore[arg-type]


def _items(table: pl.DataFrame) -> pl.DataFrame:
    _has(table, ("item_id", "title"), _ITEMS)
    if "item" in table.columns:
        raise DataError(
            f"{_ITEMS}: the attribute name item is used by the project. Give it another one. {_FIX}"
        )
    table = table.with_columns(ids(table["item_id"], _ITEMS, "item_id"))
    table = table.with_columns(plain_text(values, _ITEMS) for values in table).fill_null("")
    table = table.with_columns(
        title=pl.when(pl.col("title").str.strip_chars() == "").then("item_id").otherwise("title")
    )
    twice = table.filter(pl.col("item_id").is_duplicated())
    if not twice.is_empty():
        raise DataError(
            f"{_ITEMS}: item {twice['item_id'][0]!r} stands there more than once ({twice['item_id'].n_unique():,} such "
            f"items); expected one row an item. {_FIX}"
        )
    return table


def _has(table: pl.DataFrame, needed: tuple[str, ...], name: str, note: str = "") -> None:
    missing = [column for column in needed if column not in table.columns]
    if missing or table.is_empty():
        found = f"no column {', '.join(missing)}" if missing else "no rows"
        raise DataError(f"{name}: {found}; there are the columns {', '.join(table.columns)}.{note} {_FIX}")
