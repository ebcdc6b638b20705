"""The user's strictly earlier rows, for the network that attends to them (DIN).

Unusual here: rows of the same second do not see each other, and a row reads rows of splits up to its own, as the
evidence does; context rows are read too.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.floors.slow import readable_rows

Ints = NDArray[np.int64]

NO_ROW = -1
"""Item and answer of a place where the user has no earlier row."""


def earlier_rows(rows: pl.DataFrame, split: str, last: int) -> tuple[Ints, Ints]:
    """Items and answers of the last rows before each target of a split.

    Args:
        rows: Rows of a split, in time order.
        split: Whose targets are asked for; rows of later splits are not read.
        last: Places for earlier rows; of one second the later in the log's order come last.

    Returns:
        Item codes and labels, each (targets, last), oldest first; NO_ROW in the first places where there are fewer.
    """
    readable, earlier = readable_rows(rows, split)
    user, item, label = (readable[name].to_numpy().astype(np.int64) for name in ("user", "item", "label"))
    order = np.argsort(user, kind="stable")
    first = np.searchsorted(user[order], user)  # where the user's rows begin in `order`
    targets = ((readable["split"] == split) & (readable["role"] == "target")).to_numpy()
    first, end = first[targets], (first + earlier)[targets]
    place = end[:, None] - last + np.arange(last)
    there = place >= first[:, None]
    found = order[np.where(there, place, 0)]
    return np.where(there, item[found], NO_ROW), np.where(there, label[found], NO_ROW)
