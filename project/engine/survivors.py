"""Who is still running, and where their tokens stand in the one flat row that the trunk sees.

Unusual here: all of this is counted on the host, in numpy, from one transfer an exit (which candidates left); the
device is only told which tokens to keep. The row holds the streams of all live requests, then all live candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from project.data.ragged import IntArray, offsets_of, within

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Row:
    """Places in a row of T tokens.

    Attributes:
        requests: (r,) live requests, ascending.
        stream: (r,) stream tokens of each that run; cached ones do not.
        candidates: (m,) live candidates, ascending, so request by request.
        own: (m,) tokens of each candidate.
        owner: (m,) which of the r requests each belongs to.
    """

    requests: IntArray
    stream: IntArray
    candidates: IntArray
    own: IntArray
    owner: IntArray

    @classmethod
    def of(cls, requests: IntArray, stream: IntArray, candidates: IntArray, own: IntArray) -> Row:
        """The candidates named, and their requests.

        Args:
            requests: (m,) request of each candidate, not decreasing.
            stream: (R,) stream tokens of every request of the batch.
            candidates: (m,).
            own: (m,) tokens of each candidate.
        """
        live, owner = np.unique(requests, return_inverse=True)
        return cls(live, stream[live], candidates, own, owner.astype(np.int64))

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.stream.sum() + self.own.sum())

    @property
    def streams(self) -> IntArray:
        """(r + 1,) where each stream starts; the last entry is where candidates begin."""
        return offsets_of(self.stream)

    @property
    def starts(self) -> IntArray:
        """(m + 1,) where each candidate starts; the last entry is T."""
        return offsets_of(self.own) + int(self.stream.sum())

    @property
    def slots(self) -> IntArray:
        """(m,) where each candidate's answer slot stands: at its last token."""
        return self.starts[1:] - 1

    def members(self) -> list[tuple[int, int]]:
        """Per live request, the range of its candidates among the m."""
        return list(pairwise(offsets_of(np.bincount(self.owner, minlength=len(self.requests))).tolist()))

    def tokens_of(self) -> IntArray:
        """(r,) tokens of each live request, its stream's included."""
        own = np.bincount(self.owner, weights=self.own, minlength=len(self.requests))
        return self.stream + own.astype(np.int64)

    def keep(self, stays: Bools) -> Row:
        """The row of the candidates that stay, (m,) bool; a request without one is gone, stream and all."""
        live, owner = np.unique(self.owner[stays], return_inverse=True)
        return Row(
            self.requests[live],
            self.stream[live],
            self.candidates[stays],
            self.own[stays],
            owner.astype(np.int64),
        )

    def index(self, stays: Bools, streams: bool = True) -> IntArray:
        """Where the tokens of `keep(stays)` stand in this row; without the streams' tokens if not `streams`."""
        live = np.unique(self.owner[stays]) if streams else np.zeros(0, dtype=np.int64)
        first = np.concatenate([self.streams[live], self.starts[:-1][stays]])
        length = np.concatenate([self.stream[live], self.own[stays]])
        return np.repeat(first, length) + within(length)
