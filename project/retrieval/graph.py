"""The bipartite graph of likes before a block, as the normalised adjacency that LightGCN propagates over.

Unusual: a CSR tensor instead of PyTorch Geometric's edge list, six times faster on a CPU at ML-100K's size.
Items come first in the node order, so an item's first embedding does not depend on how many users there are.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from project.retrieval.base import Edges


@dataclass(frozen=True)
class LikeGraph:
    """Liked (user, item) pairs, each once, and their adjacency.

    Attributes:
        item: shape (pairs,), node of the item, 0..num_items-1.
        user: shape (pairs,), node of the user, num_items..num_items+num_users-1.
        seen_items: nodes of the items with at least one like.
        adjacency: CSR, shape (nodes, nodes), 1 / sqrt(degree * degree), both directions.
    """

    item: Tensor
    user: Tensor
    seen_items: Tensor
    adjacency: Tensor


def like_graph(edges: Edges, num_users: int, num_items: int) -> LikeGraph:
    """Build the graph of liked rows (He et al. 2020, equation 3: symmetric normalisation).

    Args:
        edges: ratings strictly before the block.
        num_users: users of the log, seen so far or not.
        num_items: items of the log, seen so far or not.
    """
    liked = edges.label == 1
    rows = np.stack([edges.item[liked], edges.user[liked] + num_items])
    pairs = torch.from_numpy(np.unique(rows, axis=1))
    item, user = pairs
    nodes = num_users + num_items
    ends = torch.cat([pairs, pairs.flip(0)], dim=1)
    degree = torch.bincount(ends[0], minlength=nodes).float()
    weights = (degree[ends[0]] * degree[ends[1]]).rsqrt()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        coo = torch.sparse_coo_tensor(ends, weights, (nodes, nodes), check_invariants=False)
        adjacency = coo.to_sparse_csr()
    return LikeGraph(
        item=item, user=user, seen_items=torch.from_numpy(np.unique(rows[0])), adjacency=adjacency
    )
