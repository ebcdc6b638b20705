"""LightGCN item vectors, fitted per time block on the likes before it (He et al. 2020, arXiv 2002.02126).

Unusual: only the item half of the fit is used (user vectors are running sums, see vectors.py), and the random
numbers of a block come from (seed, block) alone, so nothing later in the log can change an earlier block's
table.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.errors import ConfigError
from project.retrieval.base import Edges, FloatArray
from project.retrieval.graph import LikeGraph, like_graph
from project.retrieval.vectors import VectorRetriever

with warnings.catch_warnings():
    # torch_geometric 2.8 scripts classes at import, which torch 2.13 deprecates
    warnings.filterwarnings("ignore", message="`torch.jit.*", category=DeprecationWarning)
    from torch_geometric.nn import LightGCN as LightGCNModel


class LightGCN(VectorRetriever):
    """Similar users by layer-averaged LightGCN item embeddings, trained with BPR, warm-started each block.

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
        dim: Size of an embedding.
        layers: Propagation steps over the graph.
        epochs: Passes over the likes before a block, for each block; training goes on from the block before.
        batch_size: Likes in one BPR step.
        learning_rate: Adam's step size.
        regularisation: Weight of the squared norm of the embeddings in a step.
        seed: Seed of first embeddings, order and negatives.
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
        dim: int = 64,
        layers: int = 3,
        epochs: int = 10,
        batch_size: int = 4096,
        learning_rate: float = 0.01,
        regularisation: float = 0.01,
        seed: int = 0,
    ) -> None:
        lists = similar_every, similar_users, similar_items
        super().__init__(neighbours, max_raters, dislike_weight, *lists, alike_items)
        for name, value, fine, expected in (
            ("dim", dim, dim >= 1, "1 or more"),
            ("layers", layers, layers >= 0, "0 or more"),
            ("epochs", epochs, epochs >= 0, "0 or more (0: vectors stay as they are drawn)"),
            ("batch_size", batch_size, batch_size >= 1, "1 or more"),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "a number above 0"),
            ("regularisation", regularisation, 0 <= regularisation < math.inf, "0 or more"),
        ):
            if not fine:
                raise ConfigError(f"data.retriever.init_args.{name} is {value}; expected {expected}.")
        self.dim = dim
        self.layers = layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.regularisation = regularisation
        self.seed = seed

    def begin(self, num_users: int, items: pl.DataFrame) -> None:
        """Forget all users' pasts and the embeddings fitted so far."""
        super().begin(num_users, items)
        self._model: LightGCNModel | None = None

    def item_table(self, edges: Edges, block: int) -> FloatArray:
        """Train on from the block before; return the layer-averaged item embeddings, shape (items, dim)."""
        num_items = self._items.height
        table = torch.zeros(num_items, self.dim)
        graph = like_graph(edges, self._num_users, num_items)
        if graph.item.numel():
            model = self._model = self._model or self._first_model(self._num_users + num_items)
            with one_thread():
                self._train(model, graph, block)
            with torch.no_grad():
                table[graph.seen_items] = model.get_embedding(graph.adjacency)[graph.seen_items]
        return table.numpy()

    def _first_model(self, nodes: int) -> LightGCNModel:
        # the paper's normal start: the scale of PyG's Xavier depends on how many users the log will have
        with torch.random.fork_rng(devices=[]):
            model = LightGCNModel(nodes, self.dim, self.layers, normalize=False)
            torch.manual_seed(self.seed)
            torch.nn.init.normal_(model.embedding.weight, std=0.1)
        return model

    def _train(self, model: LightGCNModel, graph: LikeGraph, block: int) -> None:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + block)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        likes = graph.item.numel()
        for _ in range(self.epochs):
            order = torch.randperm(likes, generator=generator)
            drawn = torch.randint(graph.seen_items.numel(), (likes,), generator=generator)
            for start in range(0, likes, self.batch_size):
                batch = slice(start, start + self.batch_size)
                optimizer.zero_grad()
                loss = self._loss(model, graph, order[batch], graph.seen_items[drawn[batch]])
                torch.autograd.backward(loss)
                optimizer.step()

    def _loss(self, model: LightGCNModel, graph: LikeGraph, batch: Tensor, negative: Tensor) -> Tensor:
        user, item = graph.user[batch], graph.item[batch]
        vectors = model.get_embedding(graph.adjacency)
        loss: Tensor = model.recommendation_loss(
            (vectors[user] * vectors[item]).sum(-1),
            (vectors[user] * vectors[negative]).sum(-1),
            node_id=torch.from_numpy(np.unique(torch.cat([user, item, negative]).numpy())),
            lambda_reg=self.regularisation,
        )
        return loss


@contextmanager
def one_thread() -> Iterator[None]:
    """A step takes milliseconds: sharing it gains little on a free machine and costs x10 on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
