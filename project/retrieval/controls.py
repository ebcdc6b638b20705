"""Defines retrievers to compare with: none (rates only), the user's own rows on similar items."""

from array import array
from typing import Any

import numpy as np
import polars as pl
from scipy.sparse import csr_array

from project.arrays import F32
from project.retrieval.base import (
    NO_NEIGHBOURS,
    Edges,
    Neighbours,
    Raters,
    Retriever,
    Snapshot,
    top,
)


class NoRetriever(Retriever):
    """No neighbours: only the item's and the user's rates are left, which shows what neighbours add."""

    def __init__(self) -> None:
        super().__init__()

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Nothing to forget."""

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """No row."""
        return NO_NEIGHBOURS


class ItemKNN(Retriever):
    """The user's own earlier rows on the items most similar to the candidate; the answers are the user's own.

    Similarity is the cosine of two items' liked-by columns before the block (Sarwar et al. 2001); items that nobody
    liked together are not neighbours.

    Args:
        neighbours: Most neighbours a candidate gets (N).
    """

    def __init__(self, neighbours: int = 30) -> None:
        super().__init__(neighbours)

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts."""
        # one more item, which stands for any other
        self._shape = (num_users, items.height + 1)
        # by user: rows, oldest first, and their items
        self._own = dict[int, tuple["array[int]", "array[int]"]]()
        self._likes: Any = (
            # sparse matrix (users, items) of likes before the block; None before the first
            None
        )

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Keep the liked (user, item) pairs before the block, each once, shape (pairs,) each."""
        liked = edges.label == 1
        # a user who liked an item twice liked it once
        pairs = np.unique(np.stack([edges.user[liked], edges.item[liked]]), axis=1)
        return {"user": pairs[0], "item": pairs[1]}

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """Compare items by this block's likes from now on."""
        pairs = snapshot["user"], snapshot["item"]
        # (items + 1,) how many users liked each item
        likes = np.bincount(snapshot["item"], minlength=self._shape[1])
        self._likes = csr_array((np.ones(pairs[0].size), pairs), shape=self._shape)
        # the transpose, whose rows are cheap to read: users who liked an item
        self._liked_by = self._likes.T.tocsr()  # (items, users)
        self._norms = np.sqrt(np.maximum(likes, 1))  # (items,)
        # filled when an item is asked for, since most items never are
        self._cosines: dict[int, F32] = {}  # by item that was asked for, with all items

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """The user's rows on the most similar items; equal similarity: the later row first."""
        if self._likes is None or user not in self._own:
            return NO_NEIGHBOURS
        if item not in self._cosines:
            # (items + 1,) how many users liked both the candidate and each item
            together = (self._liked_by[[item]] @ self._likes).toarray()[0]
            self._cosines[item] = (together / (self._norms * self._norms[item])).astype(
                np.float32
            )
        rows, items = self._own[user]
        # (rows of the user,) cosines of the candidate with their items
        similarity = self._cosines[item][np.array(items)]
        best = top(similarity, self.neighbours)
        best = best[similarity[best] > 0]
        return Neighbours(np.array(rows)[best], similarity[best])

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """Remember one row of a user."""
        rows, items = self._own.setdefault(user, (array("q"), array("q")))
        rows.append(row)
        items.append(item)

    def forget(self, user: int) -> None:
        """Drop a user's rows."""
        self._own.pop(user, None)
