"""Defines retrievers that compare users by vectors of their past items, and LightGCN, which learns item vectors."""

import warnings
from abc import abstractmethod
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from scipy.sparse import csr_array
from torch import Tensor

from project.arrays import F32, F64, I64
from project.retrieval.base import (
    NO_NEIGHBOURS,
    NO_SIMILAR_USERS,
    Edges,
    Neighbours,
    Raters,
    Retriever,
    SimilarUsers,
    Snapshot,
    top,
)
from project.retrieval.compiled import inverse_norms, nearest, own_votes, propagated

with warnings.catch_warnings():
    # torch_geometric 2.8 scripts classes at import, which torch 2.13 deprecates
    warnings.filterwarnings("ignore", message="`torch.jit.*", category=DeprecationWarning)
    from torch_geometric.nn import LightGCN as LightGCNModel


NOTHING: I64 = np.empty(0, np.int64)
SIMILAR_USERS = 10  # that a list of what similar users liked is made from
# a like's is 1. A dislike counts half, since a user who dislikes an item had chosen it, too
DISLIKE_WEIGHT = -0.5


class VectorRetriever(Retriever):
    """Cosine neighbours of running user vectors, v_u = sum over own earlier j of s_j * e_j / sqrt(degree_j).

    s_j is 1 for a liked and `DISLIKE_WEIGHT` for a disliked item, e_j the block's item vector, degree_j how many rows
    before the block liked j (at least 1): LightGCN's own propagation to a user (He et al. 2020, equation 3) without the
    user's degree, which cosine does not see. User vectors are not learned, so a user first seen a minute ago has
    neighbours. Tables of different blocks live in unaligned spaces and are never compared.

    Args:
        similar_every: List what similar users liked after every so many rows of a user; 0 is never. The list
            reaches prompts through data.prompt.similar.
        item_neighbours: Retrieved features also hold the user's own answers on so many earlier items, those whose
            vectors are most similar to the candidate's (`item_similarity`); 0 leaves them out.
        **kwargs: Arguments of Retriever.
    """

    def __init__(
        self,
        *,
        similar_every: int = 0,
        item_neighbours: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.similar_every = similar_every
        self.item_neighbours = item_neighbours
        self._require(0, "similar_every", "item_neighbours")

    @abstractmethod
    def item_table(self, edges: Edges, block: int) -> F32:
        """Item vectors, shape (items, d), from ratings before the block; zero rows for items without one."""

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and vectors."""
        self._num_users = num_users
        self._items = items
        # by user: twice the item, and one for a like
        self._past = defaultdict[int, "array[int]"](lambda: array("q"))
        # (items + 1, d) see `fit`; the last row is any other item; None in block 0
        self._weighted: F32 | None = None

    def fit(self, edges: Edges, block: int) -> Snapshot:
        """Fit this block's item table; stored as `weighted`, e_j / sqrt(degree_j), shape (items, d)."""
        # (items,) likes of each item
        degree = np.bincount(edges.item[edges.label == 1], minlength=self._items.height)
        table = self.item_table(edges, block)
        return {
            "weighted": (table / np.sqrt(np.maximum(degree, 1))[:, None]).astype(np.float32)
        }

    def start_block(self, snapshot: Snapshot, block: int) -> None:
        """Recompute every user's vector from this block's item table."""
        # 1. items
        unknown_item = np.zeros((1, snapshot["weighted"].shape[1]), np.float32)
        self._weighted = np.concatenate([snapshot["weighted"], unknown_item])
        self._item_inverse = inverse_norms(self._weighted)  # (items + 1,)
        # 2. users, whose pasts are rows of a sparse matrix (users, items + 1); each past is
        # in order of time, as
        #    `observe` adds, so that a vector does not depend on where a block starts
        own = [self._past.get(user, NOTHING) for user in range(self._num_users)]
        # (users + 1,) where each user's entries begin: CSR's row pointers
        ends = np.cumsum([0, *map(len, own)])
        past = np.concatenate([NOTHING, *own])
        # the lowest bit of an entry says like, the rest is the item
        weights = np.where(past & 1, np.float32(1), np.float32(DISLIKE_WEIGHT))
        pasts = csr_array(
            (weights, past >> 1, ends), shape=(self._num_users, self._weighted.shape[0])
        )
        self._vectors: F32 = pasts @ self._weighted  # (users, d)
        self._inverse = inverse_norms(self._vectors)  # (users,)

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        """The raters whose vectors have the largest cosine with the user's; zero vectors never match."""
        if self._weighted is None:
            return NO_NEIGHBOURS
        # zero vectors have inverse norm 0 and are left out by `nearest`
        places, cosines = nearest(
            self._vectors,
            self._inverse,
            self._vectors[user],
            self._inverse[user],
            raters.user,
            self.neighbours,
        )
        return Neighbours(raters.row[places], cosines)

    def most_similar(self, user: int, others: I64) -> SimilarUsers:
        """Those with the largest positive cosine with the user's vector; equal cosines: the later rating first."""
        if self._weighted is None or others.size == 0 or self._inverse[user] == 0:
            return NO_SIMILAR_USERS
        # not a matrix product: its last bits may change with the number of rows, and with
        # them the order of ties
        products = np.asarray(
            (self._vectors.take(others, axis=0) * self._vectors[user]).sum(-1)
        )
        cosine = products * (self._inverse[others] * self._inverse[user])
        nearest = top(cosine, SIMILAR_USERS)
        nearest = nearest[cosine[nearest] > 0]
        return SimilarUsers(others[nearest], cosine[nearest])

    def item_similarities(self, user: int, items: I64) -> F64:
        """Answers weighted by the cosine of their items' vectors with the candidate's, if it is one of the largest."""
        if self._weighted is None or user not in self._past:
            return np.zeros((items.size, 2))
        past = np.array(self._past[user])
        return own_votes(
            self._weighted, self._item_inverse, items, past, self.item_neighbours
        )

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        """Add one rated item to its user's vector."""
        self._past[user].append(2 * item + (label == 1))
        if self._weighted is not None:
            weight = 1.0 if label == 1 else DISLIKE_WEIGHT
            vector = self._vectors[user : user + 1]  # a view: the table changes
            vector += np.float32(weight) * self._weighted[item]
            self._inverse[user] = inverse_norms(vector)[0]

    def forget(self, user: int) -> None:
        """Drop a user's vector and answers."""
        self._past.pop(user, None)
        if self._weighted is not None:
            self._vectors[user] = 0
            self._inverse[user] = 0


class Propagation(torch.autograd.Function):
    """One step over the graph: vectors (nodes, d) to the weighted sums of their neighbours' vectors.

    Edges go both ways with one weight, so the backward step is the same. PyTorch's own transposes the CSR tensor at
    every call, which costs eight products.
    """

    @staticmethod
    def forward(ctx: Any, adjacency: csr_array, vectors: Tensor) -> Tensor:
        """Vectors of the neighbours, weighted."""
        # kept for the backward step
        ctx.adjacency = adjacency
        matrix = adjacency.indptr, adjacency.indices, adjacency.data
        return torch.from_numpy(propagated(*matrix, vectors.detach().contiguous().numpy()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """The gradient of the vectors; the adjacency has none."""
        return None, Propagation.forward(ctx, ctx.adjacency, gradients[0])


class GraphModel(LightGCNModel):  # type: ignore[misc]
    """PyTorch Geometric's, on edges in CSR."""

    def get_embedding(self, adjacency: csr_array) -> Tensor:
        """The layers' average, shape (nodes, d)."""
        vectors: Tensor = self.embedding.weight
        # a node of its own: gradients are added in the order of the library
        total = vectors.view_as(vectors)
        for _ in range(self.num_layers):
            vectors = Propagation.apply(adjacency, vectors)  # type: ignore[no-untyped-call]
            total = total + vectors
        # once, not for each layer: of a large graph the memory of every product costs more
        # than the product
        average: Tensor = total / (self.num_layers + 1)
        return average


class LikeGraph(NamedTuple):
    """Liked (user, item) pairs, each once; items come first in the order of nodes."""

    item: Tensor  # (pairs,) node of the item, 0..num_items-1
    user: Tensor  # (pairs,) node of the user, num_items..num_items+num_users-1
    seen_items: Tensor  # nodes of the items with at least one like
    adjacency: csr_array  # (users, items), 1 / sqrt(degree * degree)


def like_graph(edges: Edges, num_users: int, num_items: int) -> LikeGraph:
    """The graph of liked rows (He et al. 2020, equation 3: symmetric normalisation) among all users and items."""
    nodes = num_users + num_items
    liked = edges.label == 1
    # by item, then user: one number a pair, so that `unique` finds repeats in one array
    distinct = np.unique(edges.item[liked] * nodes + edges.user[liked] + num_items)
    item, user = torch.from_numpy(np.stack(np.divmod(distinct, nodes)))
    # (nodes,) likes of items and of users
    degree = torch.bincount(torch.cat([item, user]), minlength=nodes).float()
    weights = (degree[item] * degree[user]).rsqrt()
    ends = (user - num_items).numpy(), item.numpy()
    adjacency = csr_array((weights.numpy(), ends), shape=(num_users, num_items))
    return LikeGraph(item, user, torch.unique(item), adjacency)


# likes in one BPR step, and more where an epoch would have more than MOST_STEPS of them:
BATCH_LIKES = 4096
# each propagates over the whole graph, so a fit costs its likes, not their square
MOST_STEPS = 16
# Adam's: ten times the paper's, whose fit has 1,000 epochs, not ten a block
LEARNING_RATE = 0.01
REGULARISATION = 0.01  # weight of the squared norm of the embeddings in a step


class LightGCN(VectorRetriever):
    """Similar users by layer-averaged LightGCN item embeddings (He et al. 2020, arXiv 2002.02126), trained with BPR.

    It is fitted per block on the likes before it, and goes on from the block before. Only the item half of the fit is
    used. The random numbers of a block come from the block's number alone, so nothing later in the log can change them.

    Args:
        dim: Size of an embedding.
        layers: Propagation steps over the graph.
        epochs: Passes over the likes before a block, for each block; 0 leaves vectors as they are drawn.
        **kwargs: Arguments of VectorRetriever.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        layers: int = 3,
        epochs: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        self.layers = layers
        self.epochs = epochs
        self._require(0, "layers", "epochs")
        self._require(1, "dim")

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and the embeddings fitted so far."""
        super().begin(num_users, items)
        self._model: GraphModel | None = None

    def item_table(self, edges: Edges, block: int) -> F32:
        """Train on from the block before; return the layer-averaged item embeddings, shape (items, dim)."""
        num_items = self._items.height
        table = torch.zeros(num_items, self.dim)
        graph = like_graph(edges, self._num_users, num_items)
        if graph.item.numel():
            model = self._model = self._model or self._first_model(
                self._num_users + num_items
            )
            with one_thread():
                self._train(model, graph, block)
            with torch.no_grad():
                table[graph.seen_items] = model.get_embedding(graph.adjacency)[
                    graph.seen_items
                ]
        return table.numpy()

    def _first_model(self, nodes: int) -> GraphModel:
        # the paper's normal start: the scale of PyG's Xavier depends on how many users the
        # log will have
        with torch.random.fork_rng(devices=[]):
            model = GraphModel(nodes, self.dim, self.layers, normalize=False)
            torch.manual_seed(0)
            torch.nn.init.normal_(model.embedding.weight, std=0.1)
        return model

    def _train(self, model: GraphModel, graph: LikeGraph, block: int) -> None:
        generator = torch.Generator().manual_seed(block)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        likes = graph.item.numel()
        together = max(BATCH_LIKES, -(-likes // MOST_STEPS))
        for _ in range(self.epochs):
            # every like once an epoch, in another order
            order = torch.randperm(likes, generator=generator)
            # a negative is any item that somebody likes, drawn evenly
            drawn = torch.randint(graph.seen_items.numel(), (likes,), generator=generator)
            for start in range(0, likes, together):
                batch = slice(start, start + together)
                optimizer.zero_grad()
                loss = self._loss(
                    model, graph, order[batch], graph.seen_items[drawn[batch]]
                )
                torch.autograd.backward(loss)
                optimizer.step()

    def _loss(
        self, model: GraphModel, graph: LikeGraph, batch: Tensor, negative: Tensor
    ) -> Tensor:
        """BPR loss of the likes in a batch (n,), each against an item that was drawn as its negative (n,)."""
        user = graph.user[batch]
        item = graph.item[batch]
        # the whole graph is propagated at every step, then read at the batch's nodes
        vectors = model.get_embedding(graph.adjacency)
        liked = (vectors.index_select(0, user) * vectors.index_select(0, item)).sum(-1)
        drawn = (vectors.index_select(0, user) * vectors.index_select(0, negative)).sum(-1)
        # only embeddings that the batch reads are regularised
        nodes = torch.bincount(torch.cat([user, item, negative])).nonzero()[:, 0]
        loss: Tensor = model.recommendation_loss(
            liked, drawn, node_id=nodes, lambda_reg=REGULARISATION
        )
        return loss


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: a step takes milliseconds; more threads gain little and cost x10 on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
