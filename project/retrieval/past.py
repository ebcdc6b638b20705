"""Holds rows in time order, and what has been observed of them: what any answer may read.

Three flags say what a row may do. A log row is answered (`query`), becomes a rating that others may read (`rater`) and
enters its user's own past (`own`); a request's history is answered and own, its candidates are only answered. So a
request is answered by the code that made the training features and changes nobody else's. Labels are read only from
rows that are `rater` or `own`, once their time has passed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import polars as pl

from project.arrays import F64, I8, I64, Bool
from project.data.protocol import answered, known_at
from project.retrieval.base import Raters, Retriever
from project.retrieval.compiled import put_last

SIMILAR_ITEMS = 5  # of a list of what similar users liked, at most
NO_ROOM = np.empty((2, 0), np.int64)
NO_RATERS = Raters(*NO_ROOM)


@dataclass(frozen=True)
class WalkRows:
    """Rows in time order; all arrays have shape (rows,).

    A person's own ratings are never their neighbours. `person` differs from `user` where a request brings its own
    history for a user of the log.
    """

    row_id: I64  # id of the row in the retrieved features table
    user: I64  # whose past (vector, rate) the row is answered with and adds to
    person: I64  # whose rating it is
    item: I64  # item code; the number of items stands for any item the log does not have
    timestamp: F64  # seconds; rows of one timestamp never see each other
    known: F64  # seconds, not before `timestamp`: later rows may read the label
    label: I8  # 0, 1, or -1 for unknown
    rating: F64  # NaN where the row has none
    query: Bool  # retrieved features are requested
    rater: Bool  # becomes a rating that others may read
    own: Bool  # enters the past of its user

    @classmethod
    def from_log(cls, rows: pl.DataFrame, query: bool = True) -> "WalkRows":
        """Rows of a log, by time and user, with every flag (or all but `query`); sampled negatives are not read."""
        user = rows["user"].to_numpy().astype(np.int64)
        read = answered(rows).to_numpy()
        return cls(
            row_id=rows["row_id"].to_numpy().astype(np.int64),
            user=user,
            person=user,
            item=rows["item"].to_numpy().astype(np.int64),
            timestamp=rows["timestamp"].to_numpy().astype(np.float64),
            known=known_at(rows),
            label=rows["label"].to_numpy().astype(np.int8),
            rating=rows["rating"].to_numpy().astype(np.float64),
            query=np.full(rows.height, query),
            rater=read,
            own=read,
        )

    def at(self, rows: I64) -> "WalkRows":
        """The rows at these positions, in this order."""
        return WalkRows(**{name: values[rows] for name, values in vars(self).items()})


def queries_by_user(rows: WalkRows) -> Iterator[tuple[I64, I64, I64]]:
    """For each user with rows to answer: their positions `queries` (n,), the past `own` (m,), and `earlier` (n,).

    Row queries[j] may read own[: earlier[j]], the user's rows known strictly before it, oldest first.
    """
    # stable: each user's rows stay in order of time
    order = np.argsort(rows.user, kind="stable")
    # positions of each user's rows, oldest first
    of_user = np.split(order, np.flatnonzero(np.diff(rows.user[order])) + 1)
    for index in of_user:
        own = index[rows.own[index]]
        own = own[np.argsort(rows.known[own], kind="stable")]
        queries = index[rows.query[index]]
        if queries.size:
            yield (
                queries,
                own,
                np.searchsorted(rows.known[own], rows.timestamp[queries], side="left"),
            )


class Past:
    """What has been observed: each item's latest raters in time order, likes and rows that rates are made of."""

    def __init__(self, max_raters: int) -> None:
        self._max_raters = max_raters
        # by item, rows and persons of its raters, (2, room), oldest first
        self._raters: dict[int, I64] = {}
        self._size: dict[int, int] = {}  # by item, how many columns of these are filled
        self._items: dict[int, list[int]] = {}  # by item, likes and rows
        self._users: dict[int, list[int]] = {}  # by user, likes and rows

    def raters(self, item: int, person: int) -> Raters:
        """Raters of an item without `person`, oldest first, the latest row of each, at most max_raters."""
        if item not in self._raters:
            return NO_RATERS
        # views: no copy where the person has not rated the item
        rows, persons = self._raters[item][:, : self._size[item]]
        # at most one position, since a person's latest row replaces the one before
        own = np.flatnonzero(persons == person)
        if own.size:
            return Raters(np.delete(rows, own), np.delete(persons, own))
        return Raters(rows[-self._max_raters :], persons[-self._max_raters :])

    def rates(self, item: int, user: int) -> tuple[int, int, int, int]:
        """Likes and rows of the item, likes and rows of the user."""
        return (*self._items.get(item, (0, 0)), *self._users.get(user, (0, 0)))

    def observe(self, rows: WalkRows, row: int) -> None:
        """Take in a row whose time has passed."""
        label = int(rows.label[row])
        if rows.rater[row]:
            item = int(rows.item[row])
            size = self._size.get(item, 0)
            # room grows by doubling, up to one more than max_raters
            raters = self._raters.get(item, NO_ROOM)
            # one more than max_raters, since a person's own row is not shown to them
            if size == raters.shape[1] <= self._max_raters:
                more = np.empty(
                    (2, min(max(size, 4), self._max_raters + 1 - size)), np.int64
                )
                raters = self._raters[item] = np.concatenate([raters, more], axis=1)
            self._size[item] = put_last(raters, size, row, int(rows.person[row]))
            _count(self._items, item, label)
        if rows.own[row]:
            _count(self._users, int(rows.user[row]), label)

    def take_item(self, item: int, rows: WalkRows, at: I64) -> None:
        """Take an item's rows to be those at these positions, in time order, as if no other had been observed."""
        # the latest row of each person, of these the latest that there is room for
        _, from_end = np.unique(rows.person[at][::-1], return_index=True)
        latest = at[np.sort(at.size - 1 - from_end)[-(self._max_raters + 1) :]]
        self._raters[item] = np.stack([latest, rows.person[latest]])
        self._size[item] = latest.size
        self._items[item] = [int(rows.label[at].sum()), at.size]

    def take_user(self, user: int, rows: WalkRows, at: I64) -> None:
        """Take a user's rows to be those at these positions."""
        self._users[user] = [int(rows.label[at].sum()), at.size]

    def forget(self, user: int) -> None:
        """Drop the rate of a user."""
        self._users.pop(user, None)


def _count(counts: dict[int, list[int]], code: int, label: int) -> None:
    of_code = counts.setdefault(code, [0, 0])
    of_code[0] += label
    of_code[1] += 1


class SimilarLikes:
    """Likes and ratings so far, and lists of what similar users liked, made every so many rows of a user.

    A list holds the items that the most similar users like by their latest rating, without those the user has rated, by
    the sum of the similarities; equal sums: the lower item code first.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._lists: dict[int, list[int]] = {}  # by position of the row
        # by person, liked items; who has the latest row is last
        self._likes: dict[int, dict[int, None]] = {}
        self._rated: dict[int, list[int]] = {}  # by user, an item as often as it was rated

    def observe(self, rows: WalkRows, group: list[int]) -> None:
        """Take in rows that came to be known in one second, and make the lists that are due after them."""
        # 1. likes and ratings
        # by user whose rows were labelled: how many rows they had until then
        before: dict[int, int] = {}
        latest: dict[int, int] = {}  # by user who was answered: their latest row
        for row in group:
            user = int(rows.user[row])
            item = int(rows.item[row])
            if rows.rater[row]:
                person = int(rows.person[row])
                # taken out and put back: the person with the latest row is last
                liked = self._likes.pop(person, {})
                # the latest rating of an item decides
                liked.pop(item, None)
                if rows.label[row] == 1:
                    liked[item] = None
                self._likes[person] = liked
            if rows.own[row]:
                rated = self._rated.setdefault(user, [])
                if rows.query[row]:
                    before.setdefault(user, len(rated))
                    latest[user] = row
                rated.append(item)
        # 2. a list after the last row of a user whose count has passed a multiple of
        # similar_every
        every = self._retriever.similar_every
        for user, row in latest.items():
            # also true where one second passes several multiples
            if len(self._rated[user]) // every > before[user] // every:
                items = self._list(user, int(rows.person[row]))
                if items:
                    self._lists[row] = items

    def column(self, rows: I64) -> pl.Series:
        """Lists of the rows at these positions, List(Int32); null where there is none."""
        return pl.Series(
            [self._lists.get(row) for row in rows.tolist()], dtype=pl.List(pl.Int32)
        )

    def _list(self, user: int, person: int) -> list[int]:
        # 1. similar users among the latest who like something
        # dictionaries keep the order in which users were put back
        latest_first = (
            other
            for other, liked in reversed(self._likes.items())
            if liked and other != person
        )
        # the latest rating last, as `most_similar` expects
        others = list(islice(latest_first, self._retriever.max_raters))[::-1]
        similar = self._retriever.most_similar(user, np.array(others, np.int64))
        liked = [
            np.fromiter(self._likes[other], np.int64) for other in similar.user.tolist()
        ]
        if not liked:
            return []
        # 2. what they like, by the sum of their similarities
        items, place = np.unique(np.concatenate(liked), return_inverse=True)
        weight = np.repeat(
            similar.similarity.astype(np.float64), [part.size for part in liked]
        )
        # a sum over the similar users who like the item
        score = np.bincount(place, weight)  # (items,)
        # what the user has rated is no news
        score[np.isin(items, self._rated[user])] = 0
        # stable: of equal sums the lower item code comes first
        best = np.argsort(-score, kind="stable")[:SIMILAR_ITEMS]
        found: list[int] = items[best[score[best] > 0]].tolist()
        return found
