"""Matrix factorisation: the chance that a user likes an item, from strictly earlier rows alone.

`Factorisation` knows no time and no row but those it is given. `MatrixFactorisation` fits it block by block on the
rows before, as retrievers are, but solves a user's vector for every question anew, from the user's own rows strictly
before it (fold-in). So it knows users that no factorisation has seen, it is never staler than the last second, and a
request is answered by the very code that made the training retrieved features.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from project.data.protocol import SPLITS, SplitInteractions
from project.errors import ConfigError
from project.retrieval.base import IntArray, Snapshot
from project.retrieval.walk import (
    Snapshots,
    WalkRows,
    block_cuts,
    cached_folder,
    questions_by_user,
    tables_by_split,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NEWTON_STEPS = 3  # from zero, under a penalty: a fourth moves no logit by 1e-3
TOGETHER = 256  # user vectors solved at once, which bounds the memory that long histories take


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


@dataclass(frozen=True)
class MatrixFactorisation:
    """Matrix factorisation whose user vectors are folded in from the user's own earlier rows.

    Args:
        dim: Length of a vector.
        bias_penalty: Penalty of biases, of users and items.
        vector_penalty: Penalty of vectors.
        iterations: Most steps of a block's fit.
    """

    dim: int = 8
    bias_penalty: float = 1.0
    vector_penalty: float = 5.0
    iterations: int = 60

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        for name, value in (("dim", self.dim), ("iterations", self.iterations)):
            if value < 1:
                raise ConfigError(f"data.mf.{name} is {value}; expected 1 or more, or data.mf null for none.")
        for name, penalty in (("bias_penalty", self.bias_penalty), ("vector_penalty", self.vector_penalty)):
            if not 0 < penalty < math.inf:
                raise ConfigError(f"data.mf.{name} is {penalty}; expected a number above 0.")

    def fit(self, rows: pl.DataFrame, num_items: int, cuts: Floats) -> Snapshots:
        """Factorise block after block, each time all rows strictly before it.

        Args:
            rows: the readable rows in time order, columns user, item, timestamp, label.
            num_items: item codes of the log.
            cuts: first timestamps of blocks 1, 2, ...
        """
        user, item, label = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
        ends = np.searchsorted(rows["timestamp"].to_numpy(), cuts, side="left").tolist()
        return Snapshots(cuts, [self._fit(user[:n], item[:n], label[:n], num_items) for n in ends])

    def _fit(self, user: IntArray, item: IntArray, label: IntArray, num_items: int) -> Snapshot:
        """`known` (items + 1,): logit without the user; `vectors` (items + 1, 1 + dim): each with a 1 before it."""
        known, vectors = np.zeros(num_items + 1), np.zeros((num_items + 1, 1 + self.dim))
        vectors[:, 0] = 1.0
        if np.unique(label).size < 2:  # nothing to tell apart yet: the log-odds of (likes + 1/2) / (rows + 1)
            likes = label.sum()
            return {"known": known + np.log((likes + 0.5) / (label.size - likes + 0.5)), "vectors": vectors}
        penalties = self.bias_penalty, self.vector_penalty
        found = Factorisation.fit(user, item, label, self.dim, *penalties, iterations=self.iterations)
        known += found.offset
        known[found.items] += found.item_bias
        vectors[found.items, 1:] = found.item_vectors
        return {"known": known, "vectors": vectors}

    def chances(self, rows: WalkRows, snapshots: Snapshots) -> Floats:
        """P(like) of every asking row, NaN before the first cut.

        Args:
            rows: the rows, in time order.
            snapshots: from `fit`.

        Returns:
            Shape (asking rows,), in the order of `rows`.
        """
        logits = np.full(rows.row_id.size, np.nan)
        block = np.searchsorted(snapshots.cuts, rows.timestamp, side="right")
        for asks, own, earlier in questions_by_user(rows):
            for k in np.unique(block[asks][block[asks] > 0]).tolist():
                inside = block[asks] == k
                asked = asks[inside]
                known, vectors = snapshots.fitted[k - 1]["known"], snapshots.fitted[k - 1]["vectors"]
                items, counts_of = rows.item[own], np.unique(earlier[inside], return_inverse=True)
                users = self._fold_in(known[items], vectors[items], rows.label[own], counts_of[0])
                dot = np.einsum("nd,nd->n", vectors[rows.item[asked]], users[counts_of[1]])
                logits[asked] = known[rows.item[asked]] + dot
        chances: Floats = 1.0 / (1.0 + np.exp(-logits[rows.query]))
        return chances

    def _fold_in(self, known: Floats, vectors: Floats, label: NDArray[np.int8], counts: IntArray) -> Floats:
        """A user's vector after each number of rows: penalised logistic regression by Newton's method.

        Args:
            known: (n,) logits of the user's rows without the user.
            vectors: (n, 1 + dim).
            label: (n,) 0 or 1.
            counts: (k,) ascending; vector j reads the first counts[j] rows.

        Returns:
            (k, 1 + dim), the bias first.
        """
        penalty = np.array([self.bias_penalty] + [self.vector_penalty] * self.dim)
        users = np.zeros((counts.size, penalty.size))
        for start in range(0, counts.size, TOGETHER):
            part = slice(start, start + TOGETHER)
            n, found = int(counts[part][-1]), users[part]
            x, read = vectors[:n], np.arange(n) < counts[part, None]
            squares = (x[:, :, None] * x[:, None, :]).reshape(n, penalty.size**2)
            for _ in range(NEWTON_STEPS):
                chance = 1.0 / (1.0 + np.exp(-(known[:n] + found @ x.T)))
                gradient = (read * (label[:n] - chance)) @ x - penalty * found
                curvature = ((read * chance * (1.0 - chance)) @ squares).reshape(-1, *2 * penalty.shape)
                found += np.linalg.solve(curvature + np.diag(penalty), gradient[:, :, None])[:, :, 0]
        return users


def mf_tables(
    split: SplitInteractions, mf: MatrixFactorisation, refits: int, cache_dir: Path
) -> dict[str, pl.DataFrame]:
    """row_id and factorisation (null before the first block) of every row with split <= S, for every split S; cached.

    Args:
        split: the log under its protocol.
        mf: what is factorised how.
        refits: as in `retrieved_tables`.
        cache_dir: folder the tables and item vectors are kept in, under a hash of everything they depend on.
    """
    folder = mf_folder(split, mf, refits, cache_dir)
    return {name: pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in SPLITS}


def mf_of_requests(
    rows: WalkRows, split: SplitInteractions, mf: MatrixFactorisation, refits: int, cache_dir: Path
) -> pl.Series:
    """Factorisation of the asking rows, read as split "test".

    Args:
        rows: requests and whose past they ask with, in time order.
        split: the log under its protocol.
        mf: as in `mf_tables`.
        refits: as in `mf_tables`.
        cache_dir: as in `mf_tables`.
    """
    stored = Snapshots.load(mf_folder(split, mf, refits, cache_dir) / "snapshots.npz")
    return _column(mf.chances(rows, stored))


def mf_folder(split: SplitInteractions, mf: MatrixFactorisation, refits: int, cache_dir: Path) -> Path:
    """Folder with train, valid and test.parquet and snapshots.npz; made where the cache does not have it."""
    content = {
        "files": split.interactions.files,
        "protocol": split.hash,
        "mf": asdict(mf),
        "refits": refits,
    }
    return cached_folder(cache_dir / "mf", content, partial(_write, split, mf, refits))


def _write(split: SplitInteractions, mf: MatrixFactorisation, refits: int, folder: Path) -> None:
    """Compute the tables of all splits; keep the item vectors of test, which is what requests read."""
    cuts = block_cuts(split.rows["timestamp"].to_numpy(), refits)  # of the whole log, for every split

    def make(readable: pl.DataFrame, name: str) -> pl.DataFrame:
        snapshots = mf.fit(readable, split.interactions.items.height, cuts)
        if name == SPLITS[-1]:
            snapshots.save(folder / "snapshots.npz")
        chances = mf.chances(WalkRows.from_log(readable), snapshots)
        return readable.select("row_id", mf=_column(chances))

    for name, table in tables_by_split(split, make):
        table.write_parquet(folder / f"{name}.parquet")


def _column(chances: Floats) -> pl.Series:
    return pl.Series("mf", chances, dtype=pl.Float32, nan_to_null=True)
