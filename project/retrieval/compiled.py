"""Loops that run for every row of a log, compiled by numba when they are first called and kept on disk."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from project.arrays import F32, F64, I64

F = TypeVar("F", bound=Callable[..., Any])
NJIT: Any = njit  # it is typed in some versions
# sums of `compiled` may be added in any order, as vector instructions do
compiled: Callable[[F], F] = NJIT(cache=True, fastmath={"reassoc", "contract", "nsz"})
in_order: Callable[[F], F] = NJIT(cache=True)


@compiled
def inverse_norms(vectors: F32) -> F32:
    """One over the Euclidean norm of vectors (n, d), 0 where the vector is zero."""
    inverse = np.zeros(len(vectors), np.float32)
    for k in range(len(vectors)):
        square = np.float32(0)
        for value in vectors[k]:
            square += value * value
        if square > 0:
            inverse[k] = 1 / np.sqrt(square)
    return inverse


@compiled
def nearest(
    vectors: F32,
    inverse: F32,
    vector: F32,
    norm: Any,
    among: I64,
    count: int,
) -> tuple[I64, F32]:
    """Positions in `among` of at most `count` rows of largest cosine with a vector (d,), largest first, and cosines.

    `among` (n,) names rows of `vectors`. Of equal cosines the later position comes first. `inverse` are inverse norms
    of `vectors`, `norm` is that of `vector`. Zero vectors are left out.
    """
    best = np.empty(count, np.int64)  # positions, of which the first `size` are filled
    cosines = np.empty(count, np.float32)
    size = 0
    # of the best; read from them for every row, it costs half as much again
    least = np.float32(-np.inf)
    for place in range(among.size - 1, -1, -1):
        row = among[place]
        if inverse[row] == 0 or norm == 0:
            continue
        # 1. the cosine
        product = np.float32(0)
        for k in range(vector.size):
            product += vectors[row, k] * vector[k]
        cosine = product * (inverse[row] * norm)
        if cosine <= least:
            continue
        # 2. its place among the best: smaller ones move down
        size = min(size + 1, count)
        at = size - 1
        while at > 0 and cosines[at - 1] < cosine:
            best[at] = best[at - 1]
            cosines[at] = cosines[at - 1]
            at -= 1
        best[at] = place
        cosines[at] = cosine
        if size == count:
            least = cosines[size - 1]
    return best[:size], cosines[:size]


@compiled
def own_votes(vectors: F32, inverse: F32, candidates: I64, past: I64, count: int) -> F64:
    """(n, 2) cosines of each candidate with the `count` nearest items of a past, summed: of liked items, and of all.

    Candidates (n,) are rows of `vectors`, `past` (m,) is twice an item and one for a like, oldest first. A cosine below
    0 counts as 0.
    """
    # the lowest bit says like
    items = past >> 1
    found = np.zeros((candidates.size, 2))
    for k in range(candidates.size):
        item = candidates[k]
        places, cosines = nearest(
            vectors, inverse, vectors[item], inverse[item], items, count
        )
        for j in range(places.size):
            weight = max(cosines[j], np.float32(0))
            found[k, 0] += weight * (past[places[j]] & 1)
            found[k, 1] += weight
    return found


@compiled
def put_last(raters: I64, size: int, row: int, person: int) -> int:
    """Put a row and its person behind the first `size` columns of `raters`, (2, room); returns how many there are then.

    The person's row before leaves, or else, where there is no room, the oldest.
    """
    place = 0
    # 1. the column that leaves: the person's own, else a free one, else the oldest
    while place < size and raters[1, place] != person:
        place += 1
    if place == size < raters.shape[1]:
        size += 1
    elif place == size:
        place = 0
    # 2. all behind it move one to the left
    for k in range(place, size - 1):
        raters[0, k] = raters[0, k + 1]
        raters[1, k] = raters[1, k + 1]
    # 3. the new row is the latest
    raters[0, size - 1] = row
    raters[1, size - 1] = person
    return size


@in_order
def propagated(starts: I64, columns: I64, weights: F32, vectors: F32) -> F32:
    """Weighted sums of neighbours' vectors (items + users, d) in a graph of users and items, both directions at once.

    The edges are a matrix (users, items) in CSR with sorted columns. Users pass in order, so that only the items'
    vectors, which are fewer, are read out of order; each sum is added in the order of a CSR product's.
    """
    # items first, then users, as in `vectors`
    found = np.zeros(vectors.shape, np.float32)
    # how many items there are
    items = len(vectors) - (starts.size - 1)
    for user in range(starts.size - 1):
        node = items + user
        for place in range(starts[user], starts[user + 1]):
            item = columns[place]
            weight = weights[place]
            for k in range(vectors.shape[1]):
                found[node, k] += weight * vectors[item, k]
                found[item, k] += weight * vectors[node, k]
    return found
