"""Retrievers to compare against: none (rates only), random raters, the user's own rows on similar items."""

import numpy as np
import polars as pl

from project.errors import ConfigError
from project.retrieval.base import (
    NO_NEIGHBOURS,
    Edges,
    FloatArray,
    IntArray,
    Neighbours,
    OwnRows,
    Raters,
    Retriever,
    Snapshot,
)


class NoRetriever(Retriever):
    """No neighbours: retrieved features is the item's and user's rates, so a comparison shows what neighbours add."""

    def __init__(self) -> None:
        super().__init__()

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Nothing to forget."""

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """No row."""
        return NO_NEIGHBOURS


class RandomRetriever(Retriever):
    """Random raters of the candidate: shows what similarity is worth.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        seed: Seed of the draw, which depends on seed, candidate and time alone.
    """

    def __init__(self, neighbours: int = 30, max_raters: int = 2000, seed: int = 0) -> None:
        super().__init__(neighbours, max_raters)
        if seed < 0:
            raise ConfigError(f"data.retriever.init_args.seed is {seed}; expected 0 or more.")
        self.seed = seed

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Nothing to forget."""

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """Draw raters without replacement; all are equally similar, 1, so that votes weighted by it are plain votes."""
        random = np.random.default_rng((self.seed, item, int(np.float64(timestamp).view(np.uint64))))
        count = min(self.neighbours, raters.row.size)
        chosen = random.choice(raters.row, count, replace=False)
        return Neighbours(chosen, np.ones(count, np.float32))


class ItemKNN(Retriever):
    """The user's own earlier rows on the items most similar to the candidate; the answers are the user's own.

    Similarity is the cosine of two items' liked-by columns in the graph before the block (Sarwar et al.
    2001); items nobody liked together are not neighbours.

    Args:
        neighbours: Most neighbours a candidate gets (N).
    """

    def __init__(self, neighbours: int = 30) -> None:
        super().__init__(neighbours)

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts."""
        self._num_users, self._num_items = num_users, items.height
        self._own: dict[int, OwnRows] = {}
        self._likes: Likes | None = None

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Keep who liked what before the block, each pair once, shape (pairs,) each."""
        liked = edges.label == 1
        pairs = np.unique(np.stack([edges.user[liked], edges.item[liked]]), axis=1)
        return {"user": pairs[0], "item": pairs[1]}

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """Compare items by this block's likes from now on."""
        self._likes = Likes(snapshot["user"], snapshot["item"], self._num_users, self._num_items + 1)

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """The user's rows on the most similar items; equal similarity: the later row first."""
        own = self._own.get(user)
        if self._likes is None or own is None:
            return NO_NEIGHBOURS
        rows, _, similarity = own.nearest(self._likes.cosines(item)[own.items])
        return Neighbours(rows[similarity > 0], similarity[similarity > 0])

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """Remember one row of a user."""
        if user not in self._own:
            self._own[user] = OwnRows(self.neighbours)
        self._own[user].add(row, item, label)


class Likes:
    """Who liked what, grouped both ways, and the items' cosines, computed once for each item asked about.

    Args:
        user: shape (pairs,), ascending.
        item: shape (pairs,); a pair occurs once.
        num_users: user codes.
        num_items: item codes.
    """

    def __init__(self, user: IntArray, item: IntArray, num_users: int, num_items: int) -> None:
        self._items_of = np.split(item, np.searchsorted(user, np.arange(1, num_users)))
        by_item = np.argsort(item, kind="stable")
        self._users_of = np.split(user[by_item], np.searchsorted(item[by_item], np.arange(1, num_items)))
        self._norms = np.sqrt(np.maximum(np.bincount(item, minlength=num_items), 1))
        self._known: dict[int, FloatArray] = {}

    def cosines(self, item: int) -> FloatArray:
        """Cosine of one item's liked-by column with every item's, shape (num_items,); 0 without likes."""
        if item not in self._known:
            liked_too = [self._items_of[user] for user in self._users_of[item].tolist()]
            together = np.bincount(
                np.concatenate([np.empty(0, np.int64), *liked_too]), minlength=self._norms.size
            )
            self._known[item] = (together / (self._norms * self._norms[item])).astype(np.float32)
        return self._known[item]
