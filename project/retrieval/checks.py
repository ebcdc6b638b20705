"""A retriever's answers are looked at before they become evidence: they name rows that it was handed, and no others.

Unusual: shapes are looked at question by question, rows of many questions at once, which costs a hundredth of finding
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from project.errors import ConfigError
from project.retrieval.base import FloatArray, IntArray, Neighbours, Retriever

if TYPE_CHECKING:
    from project.retrieval.neighbours import WalkRows


def check_shape(found: Neighbours, retriever: Retriever) -> None:
    """Refuse an answer that is not two arrays of one length, at most `neighbours`.

    Args:
        found: what `select` returned.
        retriever: who answered.

    Raises:
        ConfigError: It is something else.
    """
    wrong = _malformed(found, retriever.neighbours)
    if wrong:
        raise _refused(retriever, wrong)


def check_rows(
    asked: IntArray,
    count: NDArray[np.int32],
    row: IntArray,
    similarity: FloatArray,
    rows: WalkRows,
    retriever: Retriever,
) -> None:
    """Refuse answers that name a row that was not handed out: it may tell the future.

    Args:
        asked: positions of the rows that asked, shape (n,).
        count: how many rows each answer has, shape (n,).
        row: the answers' rows, in its first `count` places, shape (n, neighbours).
        similarity: likewise.
        rows: all rows of the walk.
        retriever: who answered.

    Raises:
        ConfigError: A row is neither an earlier rating of the item by somebody else nor of the user's own past, or a
            similarity is not finite.
    """
    used = np.arange(row.shape[1]) < count[:, None]
    asks = np.repeat(asked, count)
    if not np.isfinite(similarity[used]).all():
        raise _refused(retriever, "a similarity that is NaN or infinite")
    found = row[used]
    there = (found >= 0) & (found < rows.row_id.size)
    place = np.where(there, found, 0)
    own = rows.own[place] & (rows.user[place] == rows.user[asks])
    others = rows.rater[place] & (rows.item[place] == rows.item[asks])
    others &= rows.person[place] != rows.person[asks]
    handed = there & (rows.timestamp[place] < rows.timestamp[asks]) & (own | others)
    if not handed.all():
        first = int((~handed).argmax())
        raise ConfigError(
            f"{_select(retriever)} answered row {asks[first]} with row {found[first]}, neither one of the raters that "
            "it was handed nor an earlier row of the user that observe told it of, so it may tell the future. Expected "
            "values of raters.row; positions in it are not rows."
        )


def _select(retriever: Retriever) -> str:
    kind = type(retriever)
    return f"data.retriever is {kind.__module__}.{kind.__qualname__}: its select"


def _refused(retriever: Retriever, found: str) -> ConfigError:
    return ConfigError(
        f"{_select(retriever)} returned {found}; expected Neighbours(row, similarity): arrays of integers and finite "
        f"numbers, of one length, at most neighbours ({retriever.neighbours}). Return NO_NEIGHBOURS for none."
    )


def _malformed(found: object, most: int) -> str:
    """What is wrong with an answer, in words; empty where nothing is."""
    if not isinstance(found, Neighbours):
        return "None" if found is None else f"a {type(found).__name__}"
    row, similarity = found
    if not (isinstance(row, np.ndarray) and isinstance(similarity, np.ndarray)):
        return f"Neighbours of a {type(row).__name__} and a {type(similarity).__name__}"
    if row.ndim != 1 or row.shape != similarity.shape:
        return f"arrays of shapes {row.shape} and {similarity.shape}"
    if row.dtype.kind != "i" or similarity.dtype.kind not in "fi":
        return f"arrays of {row.dtype} and {similarity.dtype}"
    return f"{row.size} rows" if row.size > most else ""
