"""Answers requests as of now, in time that does not grow with the log: what a walk knows at its end, kept up to date.

`FeatureIndex` observes the log once and then every event as it comes. A request costs its candidates' raters, at most
max_raters of each, and the user's own rows. Features are made by the code that made those of training: `past.Past` and
`walk.Answers`, the retriever, fold-in and text similarity. What is fitted stays as it is: vectors of items, those of
the factorisation and the terms of texts are those of the last block.
"""

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import polars as pl
from scipy.sparse import vstack

from project.arrays import F64, I64
from project.cache import Recent
from project.data.protocol import SplitInteractions
from project.errors import ConfigError, DataError
from project.features import Retrieved
from project.retrieval.base import Retriever
from project.retrieval.own_text import (
    term_texts,
    text_and_weight,
    text_encoder,
    with_any_other,
)
from project.retrieval.past import Past, WalkRows
from project.retrieval.walk import Answers, Snapshots, as_stored

TEXTS_MIB = 16  # of vectors of texts; one of 100 characters takes 3 KB
ROOM = 1024  # users more than the log has, before room is made for twice as many


def can_be_indexed(retriever: Retriever) -> bool:
    """Whether it forgets what it observes of a user, which a request that brings its own history needs."""
    kind = type(retriever)
    return kind.observe is Retriever.observe or kind.forget is not Retriever.forget


Row = TypeVar("Row", bound=tuple[Any, ...])


def in_time(history: Sequence[Row]) -> list[Row]:
    """Rows of item, label, seconds and what else, in order of time, then item."""
    return sorted(history, key=lambda row: (row[2], row[0]))


class FeatureIndex:
    """Retrieved features of candidates as of now, from the log and the events observed since.

    Users and items are codes; codes that the log does not have are new ones. Time never goes back. `snapshots` is what
    the retriever fitted, which itself is left alone, `chances` what the factorisation gives rows, see
    `RetrievedFeatures.index`. One thread at a time.
    """

    def __init__(
        self,
        split: SplitInteractions,
        retriever: Retriever,
        snapshots: Snapshots,
        chances: Mapping[str, Callable[[WalkRows], F64]],
    ) -> None:
        if not can_be_indexed(retriever):
            raise ConfigError(
                f"data.retriever is {type(retriever).__name__}, which has observe and no forget(user): an index "
                "cannot drop the past that a request brought. Write a forget that undoes observe for a user."
            )
        self._retriever = copy(retriever)
        self._chances = chances
        # what the retriever knows; a code beyond it is any other item
        self._items = split.interactions.items
        self.guest = split.interactions.users.height  # stands for whoever has no past here
        # 1. what was fitted
        self._snapshots = snapshots
        self._encode = text_encoder(self._items)
        self._texts = with_any_other(self._encode(term_texts(self._items)))
        # by text, vectors (1, terms) of items that requests brought
        self._recent = Recent[Any](TEXTS_MIB)
        self._new_texts = self._texts[:0]  # of items that events brought
        self._catalogue = self._items  # of the latest request
        # of the items in it that the log does not have
        self._further_texts = self._new_texts
        # 2. the log
        self._rows = WalkRows.from_log(split.rows, query=False)
        self._size = self._rows.row_id.size
        # the retriever's codes of users that the log does not have
        self._codes: dict[int, int] = {}
        # by code of the user: positions of their rows
        self._own = defaultdict[int, "array[int]"](lambda: array("q"))
        self._past = Past(retriever.max_raters)
        for row in self._as_known():
            self._keep(row)
        # seconds, of what was observed
        self.latest = float(self._rows.known.max(initial=-np.inf))
        self._begin(self.guest + 1 + ROOM)

    def observe(
        self,
        user: int,
        item: int,
        label: int,
        timestamp: float,
        rating: float = np.nan,
        catalogue: pl.DataFrame | None = None,
    ) -> None:
        """Take in an event, which requests at a later time read; its rating is NaN where it has none.

        `catalogue` is the items table of `item` where events bring items: its new rows are kept.
        """
        if label not in (0, 1) or not self.latest <= timestamp < np.inf:
            raise DataError(
                f"an event has label {label} and time {timestamp}; expected 0 or 1, and a time not before that of the "
                f"latest event, {self.latest}"
            )
        self._new_texts = self._texts_after(catalogue)
        # 1. a new user gets a code; the retriever room for twice as many when there is none left
        if user >= self.guest and user not in self._codes:
            self._codes[user] = self.guest + 1 + len(self._codes)
            if self._codes[user] >= self._room:
                self._begin(2 * self._room)
        # 2. the row is appended and enters the past at once: requests at a later time read it
        code = self._code(user)
        self._move_to(timestamp)
        event = (item, label, timestamp, rating)
        self._append(code, code, [event], rater=True, own=True)
        self._keep(self._size - 1)
        self._tell(self._size - 1)
        self.latest = timestamp

    def remove(self, user: int, places: Sequence[int]) -> None:
        """Undo `observe` of rows, by their places in the user's past; what was fitted on them stays."""
        code = self._code(user)
        rows = self._rows
        own = np.array(self._own[code])
        gone = own[list(places)]
        # 1. nobody reads the rows
        rows.rater[gone] = False
        rows.own[gone] = False
        # 2. what was observed of their items is made again from the others
        left = np.array(self._as_known())
        left = left[rows.rater[left] & np.isin(rows.item[left], rows.item[gone])]
        for item in np.unique(rows.item[gone]).tolist():
            self._past.take_item(item, rows, left[rows.item[left] == item])
        # 3. and of the user
        own = own[rows.own[own]]
        self._past.take_user(code, rows, own)
        self._retriever.forget(code)
        self._own[code] = array("q", own.tolist())
        for row in self._own[code]:
            self._tell(row)

    def counts(self, item: int) -> tuple[int, int]:
        """Likes and rows of an item."""
        return self._past.rates(item, self.guest)[:2]

    def retrieved(
        self,
        user: int,
        items: Sequence[int] | I64,
        history: Sequence[tuple[int, int, float, float]] | None = None,
        catalogue: pl.DataFrame | None = None,
        time: float | None = None,
    ) -> Retrieved:
        """Retrieved features of a history's rows, in order of time, then item, and of candidates, in their order.

        Args:
            user: Whose past they are answered from, and whose ratings are not neighbours.
            items: The candidates.
            history: Items, labels, seconds and ratings (NaN for none) that are the user's past instead of what was
                observed. It is read as if it came now, in its own order of time: each row reads the rows of earlier
                seconds, and all of the log.
            catalogue: Items table of `items` and `history` where the request brings items.
            time: Seconds, later than all events, where there is no history; None is just after them.
        """
        # 0. who asks, and when
        brought = in_time([] if history is None else history)
        times = [row[2] for row in brought]
        now = max([self.latest, *times]) + 1 if time is None else time
        if not now > self.latest:
            raise DataError(
                f"a request has time {now}; expected one after the latest event, {self.latest}. Requests of the past "
                "are answered by a walk, `RetrievedFeatures.of_requests`."
            )
        # with a history of its own a request is answered from that, as a guest's, but still as this person
        person = self._code(user)
        code = person if history is None else self.guest
        first = self._size
        try:
            # 1. rows of the request: the history in time order, then candidates
            self._move_to(now)
            # seconds of the history, squeezed between the latest event and now, in their order
            distinct, rank = np.unique(times, return_inverse=True)
            seconds = self.latest + (now - self.latest) * (rank + 1) / (distinct.size + 1)
            past = [
                (item, label, at, rating)
                for (item, label, _, rating), at in zip(
                    brought, seconds.tolist(), strict=True
                )
            ]
            rows = self._append(code, person, past, query=True, own=True)
            queries = self._append(
                code, person, [(item, -1, now, np.nan) for item in items], query=True
            )
            # 2. neighbours and rates: the rows of each second, which enter the user's past
            # then, and candidates
            answers = Answers(self._rows, self._retriever, self._items.height)
            for _, second in groupby(rows.tolist(), lambda row: self._rows.timestamp[row]):
                together = list(second)
                answers.answer(self._past, np.array(together))
                for row in together:
                    self._keep(row)
                    self._tell(row)
            answers.answer(self._past, queries)
            # 3. factorisation and text similarity, which read the user's own rows alone
            own = np.array(self._own[code])
            own_columns = self._own_columns(np.concatenate([own, queries]), catalogue)
            found = answers.retrieved()
            return replace(found, columns=found.columns | own_columns)
        finally:
            # nothing of the request stays: rows are cut off, the guest is forgotten
            self._size = first
            self._own.pop(self.guest, None)
            self._past.forget(self.guest)
            self._retriever.forget(self.guest)

    def text_products(self, items: I64, catalogue: pl.DataFrame) -> F64:
        """(catalogue,) summed cosines of every text of a catalogue, which begins with the log's, with `items` (n,)."""
        new = self._texts_after(catalogue)
        there = items[items < self._items.height]
        added = items[items >= self._items.height] - self._items.height
        wanted = self._texts[there].sum(axis=0) + new[added].sum(axis=0)  # (1, terms)
        vector = np.asarray(wanted).ravel()
        return np.concatenate([(self._texts @ vector)[:-1], new @ vector])

    def _code(self, user: int) -> int:
        return user if user < self.guest else self._codes.get(user, self.guest)

    def _begin(self, room: int) -> None:
        """Have the retriever observe everything, with room for so many users."""
        self._room = room  # users that the retriever has room for
        self._block = 0  # it answers from
        self._retriever.begin(room, self._items)
        # in block 0: users' pasts alone; vectors come with the block below
        for row in self._as_known():
            if self._rows.own[row]:
                self._tell(row)
        self._move_to(self.latest)

    def _as_known(self) -> list[int]:
        """Positions of all rows in the order in which their answers came to be known."""
        order: list[int] = np.argsort(
            self._rows.known[: self._size], kind="stable"
        ).tolist()
        return order

    def _move_to(self, time: float) -> None:
        """Answer from what was fitted before the block of a second; never from an earlier block than before."""
        block = int(np.searchsorted(self._snapshots.cuts, time, side="right"))
        if block > self._block:
            self._block = block
            self._retriever.start_block(self._snapshots.fitted[block - 1], block)

    def _append(
        self,
        code: int,
        person: int,
        events: Sequence[tuple[int, int, float, float]],
        query: bool = False,
        rater: bool = False,
        own: bool = False,
    ) -> I64:
        """Positions of new rows at the end, of items, labels, seconds and ratings; nobody reads their ids."""
        start = self._size
        stop = start + len(events)
        # room for twice as many rows; what `resize` repeats is overwritten before it is read
        if stop > self._rows.row_id.size:
            self._rows = WalkRows(
                **{name: np.resize(of, 2 * stop) for name, of in vars(self._rows).items()}
            )
        # columns of the events
        item, label, time, rating = zip(*events, strict=True) if events else ((),) * 4
        values = (-1, code, person, item, time, time, label, rating, query, rater, own)
        for of, new in zip(vars(self._rows).values(), values, strict=True):
            of[start:stop] = new
        self._size = stop
        return np.arange(start, stop)

    def _keep(self, row: int) -> None:
        """Make a row part of the past: of its item's raters, of rates, and of its user's own rows."""
        self._past.observe(self._rows, row)
        if self._rows.own[row]:
            self._own[int(self._rows.user[row])].append(row)

    def _tell(self, row: int) -> None:
        """Have the retriever observe a row."""
        rows = self._rows
        known = min(int(rows.item[row]), self._items.height)
        self._retriever.observe(row, int(rows.user[row]), known, int(rows.label[row]))

    def _own_columns(self, at: I64, catalogue: pl.DataFrame | None) -> dict[str, F64]:
        """Factorisation, text and text_weight of the queries among a user's rows at these positions."""
        # the user's past, then the queries: `chances` and `text_and_weight` walk them alone
        rows = self._rows.at(at)
        found = dict[str, F64]()
        texts = self._texts
        # (rows,) the row of `texts` of each
        place = np.minimum(rows.item, self._items.height)
        for name, chances in self._chances.items():
            found[name] = as_stored(chances(replace(rows, item=place)))
        # items that the log does not have: their vectors follow those of the rows
        new = self._texts_after(catalogue)
        added = rows.item - self._items.height
        if added.max(initial=-1) >= 0 and new.shape[0]:
            texts = vstack([texts[place], new], format="csr")
            there = (added >= 0) & (added < new.shape[0])
            place = np.where(there, at.size + added, np.arange(at.size))
        text, weight = text_and_weight(replace(rows, item=place), texts)
        return found | {"text": as_stored(text), "text_weight": as_stored(weight)}

    def _texts_after(self, catalogue: pl.DataFrame | None) -> Any:
        """Text vectors of the items that the log does not have: those kept, and the further ones of a catalogue."""
        if catalogue is None:
            return self._new_texts
        if catalogue is not self._catalogue:  # the requests of a file share one
            new = term_texts(catalogue[self._items.height + self._new_texts.shape[0] :])
            further = self._recent.of_texts(
                new, self._rows_of, lambda row: row.data.nbytes + row.indices.nbytes
            )
            self._catalogue = catalogue
            self._further_texts = vstack([self._new_texts, *further], format="csr")
        return self._further_texts

    def _rows_of(self, texts: list[str]) -> list[Any]:
        vectors = self._encode(texts)
        return [vectors[k : k + 1] for k in range(len(texts))]
