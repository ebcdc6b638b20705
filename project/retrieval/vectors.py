"""Retrievers that compare users by a vector made of their past items: LightGCN, and text encoders alike.

Unusual: user vectors are not learned. They are sums over strictly earlier items, so a user first seen a
minute ago has neighbours, and within a block every vector comes from that block's one item table: separately
fitted tables live in unaligned spaces and are never compared.
"""

from abc import abstractmethod

import numpy as np
import polars as pl

from project.errors import ConfigError
from project.retrieval.base import (
    NO_NEIGHBOURS,
    NO_SIMILAR_USERS,
    NOTHING_ALIKE,
    Alike,
    Edges,
    FloatArray,
    IntArray,
    Neighbours,
    OwnRows,
    Raters,
    Retriever,
    SimilarUsers,
    Snapshot,
    top,
)


class VectorRetriever(Retriever):
    """Cosine neighbours of running user vectors, v_u = sum over own earlier j of s_j * e_j / sqrt(degree_j).

    s_j is 1 for a liked and `dislike_weight` for a disliked item, e_j the block's item vector, degree_j how
    many rows before the block liked j (at least 1): LightGCN's own propagation to a user (He et al. 2020,
    equation 3) without the user's degree, which cosine does not see.

    Args:
        neighbours: Most neighbours a candidate gets (N).
        max_raters: Only the latest so many raters of a candidate are considered (R), which bounds the cost.
        dislike_weight: Weight of a disliked item in a user's vector; a liked one has weight 1.
        similar_every: List what similar users liked after every so many rows of a user; 0 is never. The list
            reaches prompts through data.prompt.similar.
        similar_users: How many similar users such a list is made from, of the latest max_raters users.
        similar_items: Most items on such a list.
        alike_items: Evidence also holds the user's own answers on so many earlier items, those whose vectors are most
            like the candidate's (alike, in three ways, of prompts, and a feature of counting); 0 leaves it out.
    """

    def __init__(
        self,
        neighbours: int = 30,
        max_raters: int = 2000,
        dislike_weight: float = -0.5,
        similar_every: int = 0,
        similar_users: int = 10,
        similar_items: int = 5,
        alike_items: int = 0,
    ) -> None:
        super().__init__(neighbours, max_raters)
        for name, value, least in (
            ("similar_every", similar_every, 0),
            ("similar_users", similar_users, 1),
            ("similar_items", similar_items, 1),
            ("alike_items", alike_items, 0),
        ):
            if value < least:
                raise ConfigError(
                    f"data.retriever.init_args.{name} is {value}, expected {least} or more. To have no lists of what "
                    "similar users liked, set similar_every to 0; to leave out the user's own items, alike_items."
                )
        self.dislike_weight = dislike_weight
        self.similar_every = similar_every
        self.similar_users = similar_users
        self.similar_items = similar_items
        self.alike_items = alike_items

    @abstractmethod
    def item_table(self, edges: Edges, block: int) -> FloatArray:
        """Item vectors, shape (items, d), from ratings before the block; zero rows for items without one."""

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and vectors."""
        self._num_users, self._items = num_users, items
        self._weighted: FloatArray | None = None
        self._past_users: list[int] = []
        self._past_items: list[int] = []
        self._past_weights: list[float] = []
        self._own: dict[int, OwnRows] = {}  # for `alike`

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Fit this block's item table; stored as `weighted`, e_j / sqrt(degree_j), shape (items, d)."""
        degree = np.bincount(edges.item[edges.label == 1], minlength=self._items.height)
        table = self.item_table(edges, block)
        return {"weighted": (table / np.sqrt(np.maximum(degree, 1))[:, None]).astype(np.float32)}

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """Recompute every user's vector from this block's item table."""
        unknown_item = np.zeros((1, snapshot["weighted"].shape[1]), np.float32)
        self._weighted = np.concatenate([snapshot["weighted"], unknown_item])
        self._directions = self._weighted * inverse_norms(self._weighted)[:, None]
        users = np.array(self._past_users, np.int64)
        items = np.array(self._past_items, np.int64)
        weights = np.array(self._past_weights, np.float32)
        self._vectors = np.zeros((self._num_users, self._weighted.shape[1]), np.float32)
        # in order of time, as observe adds: a vector does not depend on where a block starts
        np.add.at(self._vectors, users, weights[:, None] * self._weighted[items])
        self._inverse = inverse_norms(self._vectors)

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """The raters whose vectors have the largest cosine with the user's; zero vectors never match."""
        if self._weighted is None:
            return NO_NEIGHBOURS
        return self.nearest(self._vectors[user], self._inverse[user], raters)

    def history_vector(self, item: IntArray, label: IntArray) -> FloatArray:
        """The vector, shape (d,), that a user with this past would have in this block; not called in block 0.

        Args:
            item: codes of the rated items, shape (rows,).
            label: 0 or 1, shape (rows,).
        """
        assert self._weighted is not None
        weights = np.where(label == 1, np.float32(1), np.float32(self.dislike_weight))
        vector: FloatArray = weights @ self._weighted[item]
        return vector

    def nearest(self, vector: FloatArray, inverse_norm: FloatArray, raters: Raters) -> Neighbours:
        """What `select` picks for a vector of this block, shape (d,), and its `inverse_norms`, a scalar."""
        if raters.user.size == 0 or inverse_norm == 0:
            return NO_NEIGHBOURS
        inverse = self._inverse[raters.user]
        cosine = (self._vectors[raters.user] @ vector) * (inverse * inverse_norm)
        nearest = top(np.where(inverse > 0, cosine, -np.inf), self.neighbours)
        nearest = nearest[inverse[nearest] > 0]
        return Neighbours(raters.row[nearest], cosine[nearest])

    def most_similar(self, user: int, others: IntArray) -> SimilarUsers:
        """Those with the largest positive cosine with the user's vector; equal cosines: the later rating first."""
        if self._weighted is None or others.size == 0 or self._inverse[user] == 0:
            return NO_SIMILAR_USERS
        # not a matrix product: its last bits may change with the number of rows, and with them the order of ties
        products = np.asarray((self._vectors[others] * self._vectors[user]).sum(-1))
        cosine = products * (self._inverse[others] * self._inverse[user])
        nearest = top(cosine, self.similar_users)
        nearest = nearest[cosine[nearest] > 0]
        return SimilarUsers(others[nearest], cosine[nearest])

    def alike(self, user: int, item: int) -> Alike:
        """Answers weighted by the cosine of their items' vectors with the candidate's, if it is one of the largest."""
        own = self._own.get(user)
        if self._weighted is None or own is None:
            return NOTHING_ALIKE
        # not a matrix product, as in most_similar
        _, answers, cosine = own.nearest((self._directions[own.items] * self._directions[item]).sum(-1))
        weights = np.maximum(cosine, 0).astype(np.float64)
        return Alike(float(weights @ answers.astype(np.float64)), float(weights.sum()))

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """Add one rated item to its user's vector."""
        if self.alike_items:
            if user not in self._own:
                self._own[user] = OwnRows(self.alike_items)
            self._own[user].add(row, item, label)
        weight = 1.0 if label == 1 else self.dislike_weight
        self._past_users.append(user)
        self._past_items.append(item)
        self._past_weights.append(weight)
        if self._weighted is not None:
            vector = self._vectors[user]
            vector += np.float32(weight) * self._weighted[item]
            self._inverse[user] = inverse_norms(vector)


def inverse_norms(vectors: FloatArray) -> FloatArray:
    """One over the Euclidean norm along the last axis, 0 where the vector is zero."""
    norms = np.sqrt(np.asarray((vectors * vectors).sum(-1)))
    inverse: FloatArray = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    return inverse
