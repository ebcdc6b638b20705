"""Windows: which part of a user's stream is read together.

A stream is a user's readable rows in time order. In training it is cut back to back, the first cut at random. In
evaluation and serving a stream grows until it holds more than `context_tokens`, then drops its oldest half; the rule
looks only at rows strictly earlier than the row being scored, so validation, test and a served request see the same
context. All indices here are positions in the user's stream, lengths are tokens (the instruction is not counted).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from project.data.ragged import IntArray, offsets_of

ROOM = 0.25  # a window may pass `context_tokens` by this share for the rows that share its last timestamp


@dataclass(frozen=True)
class Window:
    """What one packed sequence holds: positions [start, stop) as context only, then [first, last) to be scored.

    The two ranges touch (`stop == first`) except where many rows share one timestamp: those do not see each other,
    so a window that scores some of them leaves the others out.
    """

    start: int
    stop: int
    first: int
    last: int

    @property
    def positions(self) -> IntArray:
        """Stream positions of all segments, in order."""
        return np.concatenate([np.arange(self.start, self.stop), np.arange(self.first, self.last)])


def time_groups(timestamps: npt.NDArray[np.float64]) -> IntArray:
    """(g + 1,) stream positions where the timestamp changes, with 0 and n at the ends."""
    change = np.flatnonzero(np.diff(timestamps)) + 1
    return np.concatenate([[0], change, [len(timestamps)]]).astype(np.int64)


def context_starts(lengths: IntArray, groups: IntArray, context_tokens: int) -> IntArray:
    """Where the context of each time group starts.

    After a group has been appended and the stream holds more than `context_tokens`, the oldest segments are dropped
    until at most half of that is left.

    Args:
        lengths: (n,) tokens of each segment of the stream.
        groups: (g + 1,) positions where time groups start, see `time_groups`.
        context_tokens: Capacity of the window in tokens.

    Returns:
        (g + 1,) the context of group j is [result[j], groups[j]); the last entry is that of a request later than
        all rows.
    """
    offsets = offsets_of(lengths)
    starts = np.zeros(len(groups), dtype=np.int64)
    start = 0
    for j in range(len(groups) - 1):
        starts[j] = start
        stop = groups[j + 1]
        if offsets[stop] - offsets[start] > context_tokens:
            start = int(np.searchsorted(offsets[: stop + 1], offsets[stop] - context_tokens // 2))
    starts[-1] = start
    return starts


def evaluation_windows(
    lengths: IntArray,
    groups: IntArray,
    target: npt.NDArray[np.bool_],
    context_tokens: int,
    context: npt.NDArray[np.bool_] | None = None,
) -> Iterator[Window]:
    """Windows in which every target of the stream is scored exactly once.

    Groups with the same context start share a window. The last one may be too large for it (many rows with one
    timestamp): its rows do not see each other, so what has no room goes to further windows with the same context.

    Args:
        lengths: (n,) tokens of each segment.
        groups: (g + 1,) positions where time groups start.
        target: (n,) whether a position is to be scored.
        context_tokens: Capacity of the window in tokens.
        context: (n,) whether later rows may see a position: what may not be seen fills no window. None: all may.
    """
    offsets = offsets_of(lengths)
    seen = lengths if context is None else np.where(context, lengths, 0)
    seen_offsets = offsets_of(seen)
    starts = context_starts(seen, groups, context_tokens)[:-1]
    room = int(context_tokens * (1 + ROOM))
    edges = (np.flatnonzero(np.diff(starts)) + 1).tolist()
    for group, after in zip([0, *edges], [*edges, len(starts)], strict=True):
        start, first = int(starts[group]), int(groups[group])
        wanted = np.flatnonzero(target[first : groups[after]])
        if not len(wanted):
            continue
        end = first + int(wanted[-1]) + 1
        stop = first  # where the context of the rows from `first` on ends
        while first < end:
            spent = seen_offsets[stop] - seen_offsets[start]
            last = int(np.searchsorted(offsets, offsets[first] + room - spent, side="right")) - 1
            last = min(end, max(last, first + 1))
            if target[first:last].any():
                yield Window(start, stop, first, last)
            first, stop = last, min(last, int(groups[after - 1]))


def training_windows(lengths: IntArray, context_tokens: int, first_cut: int) -> list[tuple[int, int]]:
    """Cut a stream back to back into windows of at most `context_tokens`.

    Args:
        lengths: (n,) tokens of each segment.
        context_tokens: Capacity of a window in tokens; a longer single segment stands alone.
        first_cut: Tokens of the first window, drawn anew each epoch so that cuts fall elsewhere.

    Returns:
        (start, stop) positions; together they are the whole stream, each position once.
    """
    offsets = offsets_of(lengths)
    windows = []
    start, capacity = 0, max(1, first_cut)
    while start < len(lengths):
        stop = int(np.searchsorted(offsets, offsets[start] + capacity, side="right")) - 1
        if stop > start or capacity == context_tokens:
            stop = max(stop, start + 1)
            windows.append((start, stop))
            start = stop
        capacity = context_tokens
    return windows
