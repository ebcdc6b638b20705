"""Taste: the chance that a user likes an item by matrix factorisation, from strictly earlier rows alone.

Unusual: item vectors are refitted block by block, as retrievers are, but a user's vector is solved for every question
anew, from the user's own rows strictly before it (fold-in). So it knows users that no factorisation has seen, it is
never staler than the last second, and a request is answered by the very code that made the training evidence.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.data.splits import SPLITS, SplitInteractions
from project.errors import ConfigError
from project.retrieval.base import IntArray, Snapshot
from project.retrieval.cache import cached_folder
from project.retrieval.factorisation import Factorisation, Floats
from project.retrieval.neighbours import WalkRows
from project.retrieval.readable import tables_by_split
from project.retrieval.snapshots import Snapshots, block_cuts

NEWTON_STEPS = 3  # from zero, under a penalty: a fourth moves no logit by 1e-3
TOGETHER = 256  # user vectors solved at once, which bounds the memory that long histories take


@dataclass(frozen=True)
class Taste:
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
                raise ConfigError(
                    f"data.taste.{name} is {value}; expected 1 or more, or data.taste null for none."
                )
        for name, penalty in (("bias_penalty", self.bias_penalty), ("vector_penalty", self.vector_penalty)):
            if not 0 < penalty < math.inf:
                raise ConfigError(f"data.taste.{name} is {penalty}; expected a number above 0.")

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
        if (
            label.min() == label.max()
        ):  # nothing to tell apart yet: the log-odds of (likes + 1/2) / (rows + 1)
            likes = label.sum()
            return {"known": known + np.log((likes + 0.5) / (label.size - likes + 0.5)), "vectors": vectors}
        penalties = self.bias_penalty, self.vector_penalty
        found = Factorisation.fit(user, item, label, self.dim, *penalties, iterations=self.iterations)
        known += found.offset
        known[found.items] += found.item_bias[:-1]
        vectors[found.items, 1:] = found.item_vectors[:-1]
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
        asks = rows.query & (block > 0)
        order = np.argsort(rows.user, kind="stable")
        for index in np.split(order, np.flatnonzero(np.diff(rows.user[order])) + 1):
            own = index[rows.own[index]]
            for k in np.unique(block[index[asks[index]]]).tolist():
                asked = index[asks[index] & (block[index] == k)]
                earlier = np.searchsorted(rows.timestamp[own], rows.timestamp[asked], side="left")
                known, vectors = snapshots.fitted[k - 1]["known"], snapshots.fitted[k - 1]["vectors"]
                items, counts_of = rows.item[own], np.unique(earlier, return_inverse=True)
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


def taste_tables(
    split: SplitInteractions, taste: Taste, block_rows: int, cache_dir: Path
) -> dict[str, pl.DataFrame]:
    """row_id and taste (null before the first block) of every row with split <= S, for every split S; cached.

    Args:
        split: the log under its protocol.
        taste: what is factorised how.
        block_rows: refitted every so many rows, on the rows before.
        cache_dir: folder the tables and item vectors are kept in, under a hash of everything they depend on.
    """
    folder = taste_folder(split, taste, block_rows, cache_dir)
    return {name: pl.read_parquet(folder / f"{name}.parquet", glob=False) for name in SPLITS}


def taste_of_requests(
    rows: WalkRows, split: SplitInteractions, taste: Taste, block_rows: int, cache_dir: Path
) -> pl.Series:
    """Taste of the asking rows, read as split "test".

    Args:
        rows: requests and whose past they ask with, in time order.
        split: the log under its protocol.
        taste: as in `taste_tables`.
        block_rows: as in `taste_tables`.
        cache_dir: as in `taste_tables`.
    """
    stored = Snapshots.load(taste_folder(split, taste, block_rows, cache_dir) / "snapshots.npz")
    return _column(taste.chances(rows, stored))


def taste_folder(split: SplitInteractions, taste: Taste, block_rows: int, cache_dir: Path) -> Path:
    """Folder with train, valid and test.parquet and snapshots.npz; made where the cache does not have it."""
    content = {
        "files": split.interactions.files,
        "protocol": split.hash,
        "taste": asdict(taste),
        "block_rows": block_rows,
    }
    return cached_folder(cache_dir / "taste", content, partial(_write, split, taste, block_rows))


def _write(split: SplitInteractions, taste: Taste, block_rows: int, folder: Path) -> None:
    """Compute the tables of all splits; keep the item vectors of test, which is what requests read."""

    def make(readable: pl.DataFrame, name: str) -> pl.DataFrame:
        cuts = block_cuts(readable["timestamp"].to_numpy(), block_rows)
        snapshots = taste.fit(readable, split.interactions.items.height, cuts)
        if name == SPLITS[-1]:
            snapshots.save(folder / "snapshots.npz")
        chances = taste.chances(WalkRows.from_log(readable), snapshots)
        return readable.select("row_id", taste=_column(chances))

    for name, table in tables_by_split(split, make):
        table.write_parquet(folder / f"{name}.parquet")


def _column(chances: Floats) -> pl.Series:
    return pl.Series("taste", chances, dtype=pl.Float32, nan_to_null=True)
