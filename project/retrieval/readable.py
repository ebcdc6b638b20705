"""Which rows a split may read, and a table for every split made from them.

Unusual: a row of split S reads rows of splits up to S, so there is a table per split. Where no row has a later split's
row in its past (a split by time), the three coincide and one is computed.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.data.splits import SPLITS, SplitInteractions
from project.retrieval.base import IntArray


def tables_by_split(
    split: SplitInteractions, make: Callable[[pl.DataFrame, str], pl.DataFrame], own_second: bool = False
) -> Iterator[tuple[str, pl.DataFrame]]:
    """(name, table) of test, valid and train, in this order; a table is made again only where it differs.

    Args:
        split: the log under its protocol.
        make: from the readable rows and the split's name to a table with their row_id.
        own_second: the table also tells what happened in a row's own second, see `reads_all_earlier`.
    """
    code = split.rows["split"].cast(pl.String).replace_strict({name: k for k, name in enumerate(SPLITS)})
    monotone = reads_all_earlier(split.rows["timestamp"].to_numpy(), code.to_numpy(), own_second)
    table = pl.DataFrame()
    for k, name in reversed(list(enumerate(SPLITS))):
        readable = split.rows.filter(code <= k)
        if k == len(SPLITS) - 1 or not monotone:
            table = make(readable, name)
        else:
            table = table.filter(pl.col("row_id").is_in(readable["row_id"].implode()))
        yield name, table


def reads_all_earlier(timestamp: NDArray[np.float64], split: IntArray, own_second: bool = False) -> bool:
    """Whether no row has a row of a later split strictly before it: then all splits' tables coincide.

    Args:
        timestamp: seconds, ascending, shape (rows,).
        split: 0 train, 1 valid, 2 test, shape (rows,).
        own_second: a row's own second counts too, as lists of what similar users liked read it.
    """
    latest_before = np.concatenate([[0], np.maximum.accumulate(split)])
    side: Literal["left", "right"] = "right" if own_second else "left"
    return bool(np.all(latest_before[np.searchsorted(timestamp, timestamp, side=side)] <= split))


def own_earlier_rows(user: IntArray, timestamp: NDArray[np.float64]) -> tuple[IntArray, IntArray, IntArray]:
    """The user's own strictly earlier rows, of every row: `order[start[k]:stop[k]]` for row k, oldest first.

    Args:
        user: user codes of rows in time order, shape (rows,).
        timestamp: seconds, ascending, shape (rows,); rows of one second do not see each other.

    Returns:
        `order`, positions of rows grouped by user, and `start` and `stop`, where a row's past lies in it; (rows,) each.
    """
    order = np.argsort(user, kind="stable")
    by_user, by_time = user[order], timestamp[order]
    new_user = np.diff(by_user, prepend=-1) != 0
    new_second = new_user | (np.diff(by_time, prepend=-np.inf) != 0)
    position = np.arange(order.size)
    start, stop = np.empty_like(order), np.empty_like(order)
    start[order] = np.maximum.accumulate(np.where(new_user, position, 0))
    stop[order] = np.maximum.accumulate(np.where(new_second, position, 0))
    return order, start, stop
