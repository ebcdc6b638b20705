"""Ragged integer arrays: many token lists in one flat array and its offsets, so that a batch is made by slicing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from project.arrays import I64


@dataclass(frozen=True)
class Ragged:
    """`n` integer lists: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: I64  # (total,) all lists one after the other
    offsets: I64  # (n + 1,) where each list starts; the last entry is `total`

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """Build from Python lists."""
        lengths = np.fromiter(map(len, lists), np.int64)
        flat = np.fromiter(chain.from_iterable(lists), np.int64)
        return cls(flat, offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> I64:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> I64:
        """(n,) length of each list."""
        return np.diff(self.offsets)

    def take(self, index: I64) -> Ragged:
        """Lists `index[0], index[1], ...`, repeats allowed."""
        starts = self.offsets[index]
        # not of all lists, since a batch takes few
        lengths = self.offsets[index + 1] - starts
        return Ragged(
            self.values[np.repeat(starts, lengths) + within(lengths)], offsets_of(lengths)
        )


def offsets_of(lengths: I64) -> I64:
    """(n + 1,) exclusive running sum of `lengths` with the total at the end."""
    return np.append(0, np.cumsum(lengths))


def within(lengths: I64) -> I64:
    """(total,) index of each element inside its own list: lengths 2, 3 give 0 1 0 1 2."""
    total = int(lengths.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(offsets_of(lengths)[:-1], lengths)


def join(parts: Sequence[Ragged]) -> Ragged:
    """List i of the result is part 0's list i, then part 1's list i, and so on."""
    offsets = offsets_of(np.sum([part.lengths for part in parts], axis=0))
    values = np.empty(int(offsets[-1]), dtype=np.int64)
    start = offsets[:-1].copy()
    for part in parts:
        values[np.repeat(start, part.lengths) + within(part.lengths)] = part.values
        start += part.lengths
    return Ragged(values, offsets)


def append(*parts: Ragged) -> Ragged:
    """All lists of all parts, one after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), offsets_of(lengths))
