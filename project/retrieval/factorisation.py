"""Computes how well a user likes an item by matrix factorisation, from strictly earlier rows alone.

Labels are factorised and, where the log has several ratings, these beside them: a rating's place among all earlier
ones, from 0 to 1, tells more than its label.

`Factorisation` fits users and items together. `MatrixFactorisation` fits one block by block on the rows before, but
solves a user's vector for every request anew, from the user's own rows strictly before it (fold-in). So it
has vectors of users that no factorisation has seen, and training features and requests come from the same code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from project.arrays import F64, I64
from project.errors import ConfigError
from project.retrieval.base import Edges, Snapshot
from project.retrieval.past import WalkRows, queries_by_user
from project.retrieval.walk import Snapshots, fit_blocks

BIAS_PENALTY = 1.0  # of biases, of users and items
VECTOR_PENALTY = 5.0
ITERATIONS = 60  # most steps of a block's fit
NEWTON_STEPS = 3  # from zero, under a penalty: a fourth moves no logit by 1e-3
# user vectors solved at once, which bounds the memory that long histories take
TOGETHER = 256


@dataclass(frozen=True)
class Factorisation:
    """Answer = sigmoid(offset + b_u + b_i + p_u . q_i) (Koren, Bell and Volinsky 2009, equation 5, logistic loss)."""

    users: I64  # (users,) codes seen in fitting, ascending
    items: I64  # (items,) likewise
    offset: float  # log-odds of the mean answer
    user_bias: F64  # (users,)
    item_bias: F64  # (items,)
    user_vectors: F64  # (users, dim)
    item_vectors: F64  # (items, dim)

    @classmethod
    def fit(
        cls,
        user: ArrayLike,
        item: ArrayLike,
        answer: ArrayLike,
        dim: int,
    ) -> Factorisation:
        """Minimise log loss, summed over rows, plus half of each penalty times the squared norm, by L-BFGS.

        User and item codes and answers from 0 to 1 have shape (n,); not all are 0 and not all 1. First vectors are
        small random numbers.
        """
        from scipy.optimize import minimize
        from scipy.sparse import csr_array

        # 1. codes without gaps, and the log-odds of the mean answer
        users, row_user = np.unique(np.asarray(user, dtype=np.int64), return_inverse=True)
        items, row_item = np.unique(np.asarray(item, dtype=np.int64), return_inverse=True)
        answer = np.asarray(answer, dtype=np.float64)
        offset = float(np.log(answer.mean()) - np.log(1.0 - answer.mean()))
        # 2. one flat array of parameters: biases of users and items, vectors of users and
        # items
        shapes = (users.size,), (items.size,), (users.size, dim), (items.size, dim)
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        biases = int(ends[1])
        first = np.zeros(ends[-1])  # biases start at 0
        first[biases:] = 0.1 * np.random.default_rng(0).standard_normal(first.size - biases)
        penalty = np.full(ends[-1], VECTOR_PENALTY)  # of each parameter
        penalty[:biases] = BIAS_PENALTY

        # the flat array's four parts, as views of their shapes
        def parts(values: F64) -> list[F64]:
            split = np.split(values, ends[:-1])
            return [part.reshape(shape) for part, shape in zip(split, shapes, strict=True)]

        # 3. the loss and its gradient
        def loss(values: F64) -> tuple[float, F64]:
            user_bias, item_bias, user_vectors, item_vectors = parts(values)
            # (n,) p_u . q_i of each row
            dot = np.einsum("nd,nd->n", user_vectors[row_user], item_vectors[row_item])
            logit = offset + user_bias[row_user] + item_bias[row_item] + dot
            # (n,) chance minus answer: the loss's slope in the logit; tanh does not overflow
            residual = 0.5 * (1.0 + np.tanh(0.5 * logit)) - answer
            total = (
                np.logaddexp(0.0, logit).sum()
                - logit @ answer
                + 0.5 * (penalty * values) @ values
            )
            # sums over a user's or an item's rows are products with this matrix (users, items)
            pairs = csr_array(
                (residual, (row_user, row_item)), shape=(users.size, items.size)
            )
            # in the order of the parameters
            gradient = [
                np.bincount(row_user, residual),
                np.bincount(row_item, residual),
                (pairs @ item_vectors).ravel(),
                (pairs.T @ user_vectors).ravel(),
            ]
            return float(total), np.concatenate(gradient) + penalty * values

        # 4. its minimum
        found = minimize(
            loss, first, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS}
        )
        return cls(users, items, offset, *parts(np.asarray(found.x, dtype=np.float64)))


@dataclass(frozen=True)
class MatrixFactorisation:
    """Matrix factorisation whose user vectors are folded in from the user's own earlier rows.

    Args:
        dim: Length of a vector.
    """

    dim: int = 8

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if self.dim < 1:
            raise ConfigError(
                f"data.mf.dim is {self.dim}; expected 1 or more, or data.mf null for none."
            )

    def fit(
        self, rows: pl.DataFrame, num_items: int, cuts: F64, ratings: bool = False
    ) -> Snapshots:
        """Factorise labels, or ratings, block after block, each time of all rows strictly before it.

        Rows are in time order, with columns user, item, timestamp, label and rating; cuts begin blocks 1, 2, ...
        """

        def fit(edges: Edges, _: int) -> Snapshot:
            rating = edges.rating if ratings else np.full(edges.label.size, np.nan)
            return self._fit(edges, num_items, rating)

        return fit_blocks(rows, cuts, fit, "factorisation")

    def _fit(self, edges: Edges, num_items: int, rating: F64) -> Snapshot:
        """`known` (items + 1,): logit without the user; `vectors` (items + 1, 1 + dim): each with a 1 before it.

        With them goes the scale by which rows became answers, see `scale_of`.
        """
        known = np.zeros(num_items + 1)
        vectors = np.zeros((num_items + 1, 1 + self.dim))
        vectors[:, 0] = 1.0
        scale = scale_of(edges.label, rating)
        answer = answers(edges.label, rating, scale)
        # one class only: the log-odds of (likes + 1/2) / (rows + 1)
        if np.unique(answer).size < 2:
            likes = answer.sum()
            known += np.log((likes + 0.5) / (answer.size - likes + 0.5))
            return {"known": known, "vectors": vectors, **scale}
        found = Factorisation.fit(edges.user, edges.item, answer, self.dim)
        known += found.offset
        # items without a row keep bias 0 and vector 0
        known[found.items] += found.item_bias
        vectors[found.items, 1:] = found.item_vectors
        return {"known": known, "vectors": vectors, **scale}

    def chances(self, rows: WalkRows, snapshots: Snapshots) -> F64:
        """Expected answer of every `query` row, in the order of `rows`; NaN before the first cut."""
        logits = np.full(rows.row_id.size, np.nan)  # (rows,)
        # which block's factors a row is answered with; 0 has none
        block = np.searchsorted(snapshots.cuts, rows.timestamp, side="right")  # (rows,)
        for queries, own, earlier in queries_by_user(rows):
            for k in np.unique(block[queries][block[queries] > 0]).tolist():
                # (items + 1,) and (items + 1, 1 + dim), see `_fit`
                fitted = snapshots.fitted[k - 1]
                known = fitted["known"]
                vectors = fitted["vectors"]
                # 1. the user's vector after each number of rows that a query of this block
                # reads
                inside = block[queries] == k
                counts, place = np.unique(earlier[inside], return_inverse=True)
                past = rows.item[own]
                answer = answers(rows.label[own], rows.rating[own], fitted)
                users = self._fold_in(known[past], vectors[past], answer, counts)
                # 2. the queries' logits
                items = rows.item[queries[inside]]
                dot = np.einsum("nd,nd->n", vectors[items], users[place])
                logits[queries[inside]] = known[items] + dot
        chances: F64 = 1.0 / (1.0 + np.exp(-logits[rows.query]))
        return chances

    def _fold_in(self, known: F64, vectors: F64, answer: F64, counts: I64) -> F64:
        """A user's vector after each number of rows: penalised logistic regression by Newton's method.

        Logits `known` (n,) without the user, `vectors` (n, 1 + dim) and answers (n,) are those of the user's rows.
        Vector j of the result (k, 1 + dim), the bias first, reads the first counts[j] rows; counts ascend.
        """
        penalty = np.array([BIAS_PENALTY] + [VECTOR_PENALTY] * self.dim)
        # Newton starts at 0, where a user without a row stays
        users = np.zeros((counts.size, penalty.size))
        for start in range(0, counts.size, TOGETHER):
            part = slice(start, start + TOGETHER)
            found = users[part]  # a view: the result changes
            n = int(counts[part][-1])  # rows that the last of them reads
            x = vectors[:n]
            # every vector reads a prefix of the same rows, so all are solved together
            read = np.arange(n) < counts[part, None]  # (part, n)
            # (n, (1 + dim)^2) outer products, weighted into every vector's curvature
            squares = (x[:, :, None] * x[:, None, :]).reshape(n, penalty.size**2)
            for _ in range(NEWTON_STEPS):
                # (part, n)
                chance = 1.0 / (1.0 + np.exp(-(known[:n] + found @ x.T)))
                # (part, 1 + dim)
                gradient = (read * (answer[:n] - chance)) @ x - penalty * found
                curvature = ((read * chance * (1.0 - chance)) @ squares).reshape(
                    -1, *2 * penalty.shape
                )
                found += np.linalg.solve(
                    curvature + np.diag(penalty), gradient[:, :, None]
                )[:, :, 0]
        return users


def scale_of(label: I64, rating: F64) -> Snapshot:
    """How rows become answers: distinct `ratings` (k,), ascending, with their `places` (k,); `of_label` (2,) for NaN.

    A rating's place is the share of all that is below it, and half of its equals. A label without a rating is the mean
    place of the ratings that have this label; where there are none it is itself.
    """
    given = np.isfinite(rating)
    ratings, count = np.unique(rating[given], return_counts=True)
    places = (np.cumsum(count) - count / 2) / max(count.sum(), 1)
    of_label = np.array([0.0, 1.0])
    for answer in (0, 1):
        rated = rating[given & (label == answer)]
        if rated.size:
            of_label[answer] = np.interp(rated, ratings, places).mean()
    return {"ratings": ratings, "places": places, "of_label": of_label}


def answers(label: NDArray[np.integer[Any]], rating: F64, scale: Snapshot) -> F64:
    """(n,) answers from 0 to 1 by a scale of `scale_of`; a rating that it lacks is between its neighbours'."""
    found: F64 = scale["of_label"][label]
    if scale["ratings"].size:
        place = np.interp(rating, scale["ratings"], scale["places"])
        found = np.where(np.isfinite(rating), place, found)
    return found
