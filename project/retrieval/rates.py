"""As-of rates of context and users' attributes: how those answered that have a value, alone and with an item.

A rate is of the rows of one value, of one value and one item, or of one value and one attribute of items (those of few
distinct values). Rows are strictly earlier and of splits up to the row's own, as everywhere. A rate is kept as
log-odds, shrunk to train's share of likes.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.arrays import F64, I64
from project.data.context import (
    CONTEXT,
    USER,
    as_given,
    bin_edges,
    brought,
    code_of,
    fitting,
    said,
    values_of,
    with_users,
)
from project.data.protocol import SPLITS, SplitInteractions, answered, known_at
from project.features import RATE, log_odds
from project.request import RankRequest

Key = NDArray[np.uint64]
FEW = 200  # distinct values of an attribute of items that rates are made with
ITEM = "item"
NOTHING = np.zeros(2)  # likes and rows of a key without events


class Tally:
    """Likes and rows of keys over time: how many lie strictly before a second."""

    def __init__(self, key: Key, time: F64, likes: F64, rows: F64) -> None:
        self._keys = np.unique(key)
        self._times = np.unique(time)
        # (m,) distinct, ascending by key, then time
        self._places, of = np.unique(self._place(key, time), return_inverse=True)
        # (m + 1,) sums of the first
        self._likes = np.cumsum(np.append(0.0, np.bincount(of, likes)))
        self._rows = np.cumsum(np.append(0.0, np.bincount(of, rows)))

    def _place(self, key: Key, time: F64) -> I64:
        seconds = self._times.size + 1
        found: I64 = np.searchsorted(self._keys, key) * np.int64(seconds)
        return found + np.searchsorted(self._times, time)

    def before(self, key: Key, time: F64) -> tuple[F64, F64]:
        """Likes and rows (n,) of the keys (n,) strictly before the seconds (n,)."""
        at = np.minimum(np.searchsorted(self._keys, key), self._keys.size - 1)
        known = self._keys[at] == key
        stop = np.searchsorted(self._places, self._place(key, time))
        start = np.searchsorted(self._places, self._place(key, np.full_like(time, -np.inf)))
        likes = np.where(known, self._likes[stop] - self._likes[start], 0.0)
        return likes, np.where(known, self._rows[stop] - self._rows[start], 0.0)


class ContextRates:
    """Context, users' attributes and their as-of rates, of a log's rows and of requests."""

    def __init__(
        self, split: SplitInteractions, serving_values: Mapping[str, Any] | None = None
    ) -> None:
        log = split.interactions
        self._rows = split.rows
        self._latest = split.latest
        self._users = log.users
        self.columns = log.columns
        # of requests that do not say otherwise
        self._defaults = brought(serving_values or {}, CONTEXT, log.columns)
        train = split.rows.filter(role="target", split="train")
        self.base = float(train["label"].mean() or 0.5)  # type: ignore[arg-type]
        # 1. numbers are counted by bins of train's values
        values = with_users(train, log.users, log.columns)
        self._edges = {
            name: bin_edges(values[name].to_numpy())
            for name, kind in log.columns.items()
            if kind == "number"
        }
        # 2. attributes of items that rates are made with, by item code; NaN where an item has none
        self._attributes = dict[str, F64]()
        for name in log.items.columns:
            texts = log.items[name]
            if name not in ("item", "item_id", "title") and 1 < texts.n_unique() <= FEW:
                self._attributes[name] = _codes(texts)
        self._items = log.items
        # by rate and key, likes and rows of the events that came after the log
        self._events = dict[tuple[str, int], F64]()
        # by user_id, attributes that came after the log
        self._put = dict[str, dict[str, float]]()
        self._texts = dict(log.texts)  # of a category's value, by its code

    def of_log(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Values and rates of readable rows of the log, in their order."""
        table = with_users(rows, self._users, self.columns)
        item = rows["item"].to_numpy()
        time = rows["timestamp"].to_numpy()
        seconds = known_at(rows)
        likes, counted = _counts(rows)
        rates = {}
        for name, key in self._keys(table.to_dict(), item, self._items).items():
            tally = Tally(key, seconds, likes, counted)
            rates[name] = self._rate(key, *tally.before(key, time))
        return table.hstack(pl.DataFrame(rates, schema=dict.fromkeys(rates, pl.Float32)))

    @cached_property
    def _user_codes(self) -> dict[str, int]:
        return dict(self._users.select("user_id", "user").iter_rows())

    def attributes(self, user_id: str | None) -> dict[str, float]:
        """What is known of a user, by column: what was put, then what the log has."""
        code = self._user_codes.get(user_id or "")
        known = dict[str, float]()
        if code is not None:
            names = [name for name in self.columns if name.startswith(USER)]
            known = {name: self._users[name][code] for name in names}
        known |= self._put.get(user_id or "", {})
        return {name: value for name, value in known.items() if value is not None}

    def put_user(self, user_id: str, attributes: Mapping[str, Any]) -> None:
        """Have requests and later events read these attributes of a user."""
        found = self._put[user_id] = fitting(attributes, USER, self.columns)
        for name, code in found.items():
            if self.columns[name] == "category":
                self._texts[code] = said(name, attributes[name.removeprefix(USER)])

    def forget_user(self, user_id: str) -> None:
        """Have nobody read attributes of a user any more. What the user's rows were counted as stays."""
        self._put.pop(user_id, None)
        self._user_codes.pop(user_id, None)

    def shown(self, user_id: str) -> dict[str, Any]:
        """What is known of a user, by name, as a request says it."""
        return as_given(self.attributes(user_id), USER, self._texts)

    def values(self, request: RankRequest) -> dict[str, F64]:
        """(n,) values of a request's candidates by column, what is known of the user included."""
        known = self._defaults | self.attributes(request.user_id)
        return values_of(request, self.columns, known)

    def of_event(self, user_id: str, context: Mapping[str, Any]) -> dict[str, F64]:
        """(1,) values of an event by column. What it does not say is unknown, as in a row of the log."""
        known = self.attributes(user_id) | fitting(context, CONTEXT, self.columns)
        return {name: np.array([known.get(name, np.nan)]) for name in self.columns}

    def observe(
        self, values: Mapping[str, F64], item: I64, label: int, items: pl.DataFrame
    ) -> None:
        """Count an event of these values (1,) and item (1,): requests after the log read it from now on."""
        for name, key in self._keys(values, item, items).items():
            counts = self._events.setdefault((name, int(key[0])), np.zeros(2))
            counts += (label, 1)

    def of_requests(
        self,
        values: Mapping[str, F64],
        item: I64,
        time: F64,
        items: pl.DataFrame,
    ) -> dict[str, F64]:
        """Values and rates of n candidates: `values` (n,) by column, NaN where unknown.

        `time` are the seconds at which they are asked; `items` is the items table, with what requests bring.
        """
        given = {
            name: values.get(name, np.full(item.size, np.nan)) for name in self.columns
        }
        # after the log its sums are enough; events came then
        late = time.min(initial=np.inf) > self._latest
        tallies = self._sums if late else self._tallies(known_at(self._rows))
        keys = self._keys(given, item, items)
        rates = {}
        for name, key in keys.items():
            likes, rows = tallies[name].before(key, time)
            if late and self._events:
                came = [self._events.get((name, k), NOTHING) for k in key.tolist()]
                more = np.stack(came, axis=1)
                likes += more[0]
                rows += more[1]
            rates[name] = self._rate(key, likes, rows)
        return given | rates

    @cached_property
    def _sums(self) -> dict[str, Tally]:
        return self._tallies(np.full(self._rows.height, -np.inf))

    def _tallies(self, seconds: F64) -> dict[str, Tally]:
        """By rate the counts of the log, whose rows (n,) are known at these seconds."""
        counts = _counts(self._rows)
        log = with_users(self._rows, self._users, self.columns)
        keys = self._keys(log.to_dict(), self._rows["item"].to_numpy(), self._items)
        return {name: Tally(key, seconds, *counts) for name, key in keys.items()}

    def _keys(
        self, values: Mapping[str, pl.Series | F64], item: I64, items: pl.DataFrame
    ) -> dict[str, Key]:
        """By rate the key (n,) of each row: 0 where a value is missing."""
        # 1. what a value is counted with: nothing, the item, an attribute of it
        parts = {"": np.zeros(item.size), f"*{ITEM}": item.astype(np.float64)}
        new = item - self._items.height  # place among the items that requests bring, from 0
        for name, codes in self._attributes.items():
            part = codes[np.minimum(item, len(codes) - 1)]
            if (new >= 0).any():
                part[new >= 0] = _codes(items[name][self._items.height :])[new[new >= 0]]
            parts["*" + name] = part
        # 2. the values, numbers by their bins
        found = {}
        for name, kind in self.columns.items():
            value = np.asarray(values[name], np.float64)
            if kind == "number":
                bins = np.searchsorted(self._edges[name], value, side="right")
                value = np.where(np.isnan(value), np.nan, bins)
            for with_part, part in parts.items():
                hashes = pl.DataFrame([value, part]).hash_rows().to_numpy()
                missing = np.isnan(value) | np.isnan(part)
                found[f"{RATE}{name}{with_part}"] = np.where(
                    missing, np.uint64(0), hashes | np.uint64(1)
                )
        return found

    def _rate(self, key: Key, likes: F64, rows: F64) -> F64:
        known = key != 0
        odds = log_odds(np.where(known, likes, 0.0), np.where(known, rows, 0.0), self.base)
        return odds.astype(np.float32).astype(np.float64)  # as tables keep them


def _counts(rows: pl.DataFrame) -> tuple[F64, F64]:
    """(n,) likes and rows that each row adds: sampled negatives add none."""
    counted = answered(rows).to_numpy().astype(np.float64)
    return rows["label"].to_numpy() * counted, counted


def _codes(texts: pl.Series) -> F64:
    codes = {text: code_of(text) for text in texts.unique() if text}
    found = texts.replace_strict(codes, default=None, return_dtype=pl.Float64)
    return found.to_numpy().astype(np.float64)


def with_context(
    split: SplitInteractions, tables: dict[str, pl.DataFrame], once: bool
) -> dict[str, pl.DataFrame]:
    """Retrieved features tables by split with the columns of `ContextRates`; `once`: no row reads a later split."""
    if not split.interactions.columns:
        return tables
    rates = ContextRates(split)
    order = split.rows["split"].to_physical()
    whole = rates.of_log(split.rows) if once else None
    found = {}
    for k, name in enumerate(SPLITS):
        readable = order <= k
        columns = (
            rates.of_log(split.rows.filter(readable))
            if whole is None
            else whole.filter(readable)
        )
        found[name] = tables[name].hstack(columns)
    return found
