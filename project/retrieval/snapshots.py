"""Time blocks and what a retriever fitted for each: cuts and a dictionary of arrays per block, in one npz.

Blocks are shares of the log, so a retriever is fitted as often on a log of any length. Cuts depend on how many rows
the log has and when they are, and on no label.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.progress import Progress

from project.retrieval.base import Edges, Retriever, Snapshot


@dataclass(frozen=True)
class Snapshots:
    """Block k >= 1 holds the rows with cuts[k-1] <= timestamp < cuts[k]; block 0 has no past and no snapshot.

    Attributes:
        cuts: first timestamps of blocks 1, 2, ..., ascending, shape (blocks - 1,).
        fitted: what the retriever returned for blocks 1, 2, ...
    """

    cuts: NDArray[np.float64]
    fitted: list[Snapshot]

    def save(self, path: Path) -> None:
        """Write to one npz file."""
        arrays: dict[str, Any] = {"cuts": self.cuts}
        for block, snapshot in enumerate(self.fitted, 1):
            arrays |= {f"{block}/{name}": array for name, array in snapshot.items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Snapshots":
        """Read what `save` wrote."""
        with np.load(path) as stored:
            cuts = stored["cuts"]
            fitted: list[dict[str, NDArray[Any]]] = [{} for _ in cuts]
            for key in stored.files:
                block, _, name = key.partition("/")
                if name:
                    fitted[int(block) - 1][name] = stored[key]
        return cls(cuts, [*fitted])


def block_cuts(timestamp: NDArray[np.float64], refits: int) -> NDArray[np.float64]:
    """First timestamps of blocks 1, 2, ...: those at positions k * rows / refits, rounded down, k = 1 .. refits - 1.

    Args:
        timestamp: seconds, ascending, of all rows of the log, shape (rows,).
        refits: blocks of the log, as far as rows of one timestamp, which stay together, allow.
    """
    if not timestamp.size:
        return np.empty(0)
    cuts = np.unique(timestamp[np.arange(1, refits) * timestamp.size // refits])
    return cuts[cuts > timestamp[0]]


def fit_snapshots(
    rows: pl.DataFrame, retriever: Retriever, num_users: int, items: pl.DataFrame, cuts: NDArray[np.float64]
) -> Snapshots:
    """Fit a retriever block after block, each on all rows strictly before it.

    Args:
        rows: the readable rows in time order, columns user, item, timestamp, label.
        retriever: who is fitted.
        num_users: user codes of the log.
        items: the log's item table (`Interactions.items`).
        cuts: first timestamps of blocks 1, 2, ...
    """
    retriever.begin(num_users, items)
    user, item, label = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
    ends = np.searchsorted(rows["timestamp"].to_numpy(), cuts, side="left").tolist()
    fitted = []
    description = f"{type(retriever).__name__} snapshots"
    with Progress(transient=True) as progress:
        for block, end in enumerate(progress.track(ends, description=description), 1):
            fitted.append(retriever.fit(Edges(user[:end], item[:end], label[:end]), block))
    return Snapshots(cuts, fitted)
