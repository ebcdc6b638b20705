"""Biased logistic matrix factorisation: who likes what, from the ids of user and item alone.

It knows no time: `project.retrieval.taste` fits it on the rows before each block and folds users in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Factorisation:
    """P(like) = sigmoid(offset + b_u + b_i + p_u . q_i) (Koren, Bell and Volinsky 2009, equation 5, logistic loss).

    Attributes:
        users: (users,) codes seen in fitting, ascending.
        items: (items,) likewise.
        offset: Log-odds of a like.
        user_bias: (users,).
        item_bias: (items,).
        user_vectors: (users, dim).
        item_vectors: (items, dim).
    """

    users: Ints
    items: Ints
    offset: float
    user_bias: Floats
    item_bias: Floats
    user_vectors: Floats
    item_vectors: Floats

    @classmethod
    def fit(
        cls,
        user: ArrayLike,
        item: ArrayLike,
        label: ArrayLike,
        dim: int = 8,
        bias_penalty: float = 2.0,
        vector_penalty: float = 7.0,
        iterations: int = 60,
        seed: int = 0,
    ) -> Factorisation:
        """Minimise log loss, summed over rows, plus half of each penalty times the squared norm, by L-BFGS.

        Args:
            user: (n,) codes.
            item: (n,) codes.
            label: (n,) 0 or 1, both present.
            dim: Length of a vector.
            bias_penalty: Penalty of biases.
            vector_penalty: Penalty of vectors.
            iterations: Most steps.
            seed: Seed of the first vectors, drawn for the seen users and items only.
        """
        users, row_user = np.unique(np.asarray(user, dtype=np.int64), return_inverse=True)
        items, row_item = np.unique(np.asarray(item, dtype=np.int64), return_inverse=True)
        problem = _Problem(row_user, row_item, np.asarray(label, dtype=np.float64), dim)
        values = problem.solve((bias_penalty, vector_penalty), iterations, seed)
        return cls(users, items, problem.offset, *problem.parts(values))


class _Problem:
    """Loss and gradient of one flat array of parameters."""

    def __init__(self, user: NDArray[np.intp], item: NDArray[np.intp], label: Floats, dim: int) -> None:
        self.user, self.item, self.label, self.dim = user, item, label, dim
        self.num_users, self.num_items = int(user.max()) + 1, int(item.max()) + 1
        self.offset = float(np.log(label.mean()) - np.log(1.0 - label.mean()))
        sizes = (self.num_users, self.num_items, self.num_users * dim, self.num_items * dim)
        self._ends = np.cumsum(sizes)

    def parts(self, values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Views: biases of users and items, vectors of users and items."""
        user_bias, item_bias, user_vectors, item_vectors = np.split(values, self._ends[:-1])
        return (
            user_bias,
            item_bias,
            user_vectors.reshape(-1, self.dim),
            item_vectors.reshape(-1, self.dim),
        )

    def solve(self, penalties: tuple[float, float], iterations: int, seed: int) -> Floats:
        """Parameters after at most `iterations` steps from small random vectors and biases 0."""
        from scipy.optimize import minimize  # no type information published

        biases = self.num_users + self.num_items
        first = np.zeros(self._ends[-1])
        first[biases:] = 0.1 * np.random.default_rng(seed).standard_normal(first.size - biases)
        penalty = np.full(first.size, penalties[1])
        penalty[:biases] = penalties[0]
        found = minimize(
            self._loss, first, args=(penalty,), jac=True, method="L-BFGS-B", options={"maxiter": iterations}
        )
        return np.asarray(found.x, dtype=np.float64)

    def _loss(self, values: Floats, penalty: Floats) -> tuple[float, Floats]:
        from scipy.sparse import csr_array

        user_bias, item_bias, user_vectors, item_vectors = self.parts(values)
        dot = np.einsum("nd,nd->n", user_vectors[self.user], item_vectors[self.item])
        logit = self.offset + user_bias[self.user] + item_bias[self.item] + dot
        residual = 0.5 * (1.0 + np.tanh(0.5 * logit)) - self.label
        loss = np.logaddexp(0.0, logit).sum() - logit @ self.label + 0.5 * (penalty * values) @ values
        pairs = csr_array((residual, (self.user, self.item)), shape=(self.num_users, self.num_items))
        gradient = [
            np.bincount(self.user, residual),
            np.bincount(self.item, residual),
            (pairs @ item_vectors).ravel(),
            (pairs.T @ user_vectors).ravel(),
        ]
        return float(loss), np.concatenate(gradient) + penalty * values
