"""What similar users liked: a list of items for a user's stream, after every M of the user's rows.

Unusual: a list is dated just after the row that completed M more rows. It reads that row's second, its answer
included, so it is for the prompts of later rows and never a feature of the row it is stored with. In return it is
final at that moment: a request needs no list of its own, and a longer history only appends to the prompt.
"""

from itertools import islice

import numpy as np
import polars as pl

from project.retrieval.base import IntArray, Retriever


class SimilarLikes:
    """Who likes what and who rated what so far, and the lists made from it.

    A list holds the items that the most similar users like by their latest rating, without those the user has
    rated, by the sum of the similarities; equal sums: the lower item code first.

    Args:
        retriever: Who compares users; its similar_every is above 0.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._lists: dict[int, list[int]] = {}  # by position of the row
        self._likes: dict[int, dict[int, None]] = {}  # by person, the one with the latest row last
        self._rated: dict[int, list[int]] = {}  # by user, an item as often as it was rated
        self._group: dict[int, tuple[int, int, int]] = {}  # by user: rows before, person, latest position

    def read(self, person: int, item: int, label: int) -> None:
        """Take in a row that others may read."""
        liked = self._likes.pop(person, {})
        liked.pop(item, None)
        if label == 1:
            liked[item] = None
        self._likes[person] = liked

    def own(self, row: int, user: int, person: int, item: int, asked: bool) -> None:
        """Take in a row of a user's own past; `row` is its position, `asked` whether evidence of it is wanted."""
        rated = self._rated.setdefault(user, [])
        if asked:
            before = self._group[user][0] if user in self._group else len(rated)
            self._group[user] = (before, person, row)
        rated.append(item)

    def end_group(self) -> None:
        """All rows of a second were taken in: make the lists that are due."""
        every = self._retriever.similar_every
        for user, (before, person, row) in self._group.items():
            if len(self._rated[user]) // every > before // every:
                found = self._list(user, person)
                if found:
                    self._lists[row] = found
        self._group.clear()

    def column(self, rows: IntArray) -> pl.Series:
        """Lists of the rows at these positions, List(Int32); null where there is none."""
        return pl.Series([self._lists.get(row) for row in rows.tolist()], dtype=pl.List(pl.Int32))

    def _list(self, user: int, person: int) -> list[int]:
        latest_first = (other for other, liked in reversed(self._likes.items()) if liked and other != person)
        others = list(islice(latest_first, self._retriever.max_raters))[::-1]
        similar = self._retriever.most_similar(user, np.array(others, np.int64))
        liked = [np.fromiter(self._likes[other], np.int64) for other in similar.user.tolist()]
        if not liked:
            return []
        items, place = np.unique(np.concatenate(liked), return_inverse=True)
        weight = np.repeat(similar.similarity.astype(np.float64), [part.size for part in liked])
        score = np.bincount(place, weight)
        score[np.isin(items, self._rated[user])] = 0
        best = np.argsort(-score, kind="stable")[: self._retriever.similar_items]
        found: list[int] = items[best[score[best] > 0]].tolist()
        return found
