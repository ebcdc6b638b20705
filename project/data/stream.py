"""A user's rows as one token stream, and the windows of it that a model reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from project.arrays import F64, I8, I64, Bool
from project.data.prompt import PromptEncoder
from project.data.protocol import answered, until_known
from project.data.ragged import Ragged, append, offsets_of

# a window may pass `context_tokens` by this share for the rows that share its last
# timestamp
ROOM = 0.25
TOGETHER = 2**17  # rows that become tokens at once


@dataclass(frozen=True)
class Window:
    """One packed sequence: positions [start, stop) as context only, then [first, last) to be scored.

    The two ranges touch (`stop == first`) except where many rows share one timestamp: those do not see each other, so
    a window that scores some of them leaves the others out.
    """

    start: int
    stop: int
    first: int
    last: int

    @property
    def positions(self) -> I64:
        """Stream positions of all segments, in order."""
        return np.concatenate(
            [np.arange(self.start, self.stop), np.arange(self.first, self.last)]
        )


def time_groups(timestamps: F64) -> I64:
    """(g + 1,) stream positions where the timestamp changes, with 0 and n at the ends."""
    change = np.flatnonzero(np.diff(timestamps)) + 1
    return np.concatenate([[0], change, [len(timestamps)]])


def context_starts(lengths: I64, groups: I64, context_tokens: int) -> I64:
    """(g + 1,) where the context of each time group starts: that of group j is [result[j], groups[j]).

    After a group has been appended and the stream holds more than `context_tokens`, the oldest segments are dropped
    until at most half of that is left. The last entry is that of a request later than all rows. `lengths` (n,) are
    tokens of each segment, `groups` (g + 1,) the positions of `time_groups`.
    """
    offsets = offsets_of(lengths)
    starts = np.zeros(len(groups), dtype=np.int64)
    start = 0
    for j, stop in enumerate(groups[1:]):
        starts[j] = start
        if offsets[stop] - offsets[start] > context_tokens:
            start = int(
                np.searchsorted(offsets[: stop + 1], offsets[stop] - context_tokens // 2)
            )
    starts[-1] = start
    return starts


def evaluation_windows(
    lengths: I64, groups: I64, target: Bool, context_tokens: int, context: Bool
) -> Iterator[Window]:
    """Windows in which every target of a stream is scored exactly once; lengths and groups as in `context_starts`.

    A position (n,) that is no `context` for later rows fills no window.
    """
    # 1. time groups with the same context start share a window
    offsets = offsets_of(lengths)
    seen = np.where(context, lengths, 0)
    seen_offsets = offsets_of(seen)
    starts = context_starts(seen, groups, context_tokens)[:-1]
    room = int(context_tokens * (1 + ROOM))
    edges = (np.flatnonzero(np.diff(starts)) + 1).tolist()
    for group, after in zip([0, *edges], [*edges, len(starts)], strict=True):
        start = int(starts[group])  # of the context
        first = int(groups[group])  # of what is scored
        wanted = np.flatnonzero(target[first : groups[after]])
        end = first + int(wanted[-1]) + 1 if len(wanted) else first
        # 2. the last group may be too large for it (many rows with one timestamp): its rows
        # do not see each other, so what has no room goes to further windows with the same
        # context
        stop = first
        while first < end:
            spent = seen_offsets[stop] - seen_offsets[start]
            last = (
                int(np.searchsorted(offsets, offsets[first] + room - spent, side="right"))
                - 1
            )
            last = min(end, max(last, first + 1))
            if target[first:last].any():
                yield Window(start, stop, first, last)
            stop = min(last, int(groups[after - 1]))
            first = last


def training_windows(
    lengths: I64, context_tokens: int, first_cut: int
) -> list[tuple[int, int]]:
    """(start, stop) positions that cut a stream back to back into windows of at most `context_tokens`.

    The first window has `first_cut` tokens, drawn anew each epoch so that cuts fall elsewhere. A longer single segment
    stands alone.
    """
    offsets = offsets_of(lengths)
    windows = []
    start = 0
    capacity = max(1, first_cut)
    while start < len(lengths):
        stop = int(np.searchsorted(offsets, offsets[start] + capacity, side="right")) - 1
        if stop > start or capacity == context_tokens:
            stop = max(stop, start + 1)
            windows.append((start, stop))
            start = stop
        capacity = context_tokens
    return windows


@dataclass(frozen=True)
class Streams:
    """Streams of s users (or requests) over n segments, one after the other."""

    offsets: I64  # (s + 1,) where each stream starts
    # (n,) row of the log, or index of the candidate; -1 for a list of what similar users
    # liked
    row_id: I64
    timestamp: F64  # (n,) seconds, not decreasing inside a stream
    label: I8  # (n,) 0, 1, or -1 where unknown
    target: Bool  # (n,) whether a head is to score the segment
    context: Bool  # (n,) whether later segments may see it
    tokens: Ragged  # n + s token lists; the last ones are each stream's instruction
    slots: I64  # (n,) index of the token in each segment that heads read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def instructions(self) -> I64:
        """(s,) indices of the instructions in `tokens`."""
        return len(self.row_id) + np.arange(len(self))

    def evaluation(self, context_tokens: int) -> list[tuple[int, Window]]:
        """(stream, window) pairs in which every target is scored exactly once."""
        lengths = self.tokens.lengths
        windows = list[tuple[int, Window]]()
        for stream in range(len(self)):
            rows = slice(self.offsets[stream], self.offsets[stream + 1])
            target = self.target[rows]
            if target.any():
                groups = time_groups(self.timestamp[rows])
                cut = evaluation_windows(
                    lengths[rows], groups, target, context_tokens, self.context[rows]
                )
                windows.extend((stream, window) for window in cut)
        return windows

    def training(
        self, context_tokens: int, rng: np.random.Generator
    ) -> list[tuple[int, Window]]:
        """(stream, window) pairs of one epoch: cut back to back, the first cut at random; those with a target."""
        lengths = self.tokens.lengths
        windows = list[tuple[int, Window]]()
        first_cuts = rng.integers(1, context_tokens + 1, size=len(self))
        for stream in range(len(self)):
            rows = slice(self.offsets[stream], self.offsets[stream + 1])
            target = self.target[rows]
            for start, stop in training_windows(
                lengths[rows], context_tokens, int(first_cuts[stream])
            ):
                if target[start:stop].any():
                    windows.append((stream, Window(start, start, start, stop)))
        return windows


def build_streams(
    rows: pl.DataFrame, retrieved: pl.DataFrame, split: str, encoder: PromptEncoder
) -> Streams:
    """Streams that hold the rows of all splits up to `split`, with the targets of `split` (its retrieved features)."""
    # `place` is a row's place in the table of its features, which has rows of splits up to
    # `split` alone: the join cuts the others off
    place_of = retrieved.select("row_id").with_row_index("place")
    joined = rows.join(
        place_of, on="row_id", how="inner", maintain_order="left", validate="1:1"
    )
    joined = joined.sort("user", "row_id")
    if "known_at" in joined.columns:
        joined = until_known(joined)
    target = ((joined["split"] == split) & (joined["role"] == "target")).to_numpy()
    return streams_of(joined, target, answered(joined).to_numpy(), encoder, retrieved)


def streams_of(
    joined: pl.DataFrame,
    target: Bool,
    context: Bool,
    encoder: PromptEncoder,
    retrieved: pl.DataFrame | None = None,
) -> Streams:
    """Streams of a table with user, item, row_id, timestamp, label, rating and features, sorted by user, then time.

    Where there is a table `retrieved`, features are those of its row `place` instead. Where the wording has a template
    for what similar users liked, lists of it (`similar_after`, retrieved features too) become segments of their own.
    """
    # 1. tokens, some rows together, since features take ten times the memory of tokens
    label = joined["label"].to_numpy().astype(np.int8)  # (n,)
    segments = []
    similar = []  # lists of item codes or null, a series each slice
    for start in range(0, max(1, joined.height), TOGETHER):
        rows = joined[start : start + TOGETHER]
        features = rows if retrieved is None else retrieved[rows["place"]]
        item = rows["item"].to_numpy().astype(np.int64)
        answer = label[start : start + TOGETHER]
        rating = rows["rating"].to_numpy().astype(np.float64)
        segments.append(encoder.encode(item, features, answer, rating))
        if encoder.similar is not None:
            similar.append(features["similar_after"])
    # 2. a stream each user, with an instruction each
    starts = np.flatnonzero(np.diff(joined["user"].to_numpy())) + 1
    offsets = np.concatenate([[0], starts, [joined.height]])
    users = len(offsets) - 1
    ends = len(encoder.instruction) * np.arange(users + 1)
    instructions = Ragged(np.tile(encoder.instruction, users), ends)
    streams = Streams(
        offsets=offsets,
        row_id=joined["row_id"].to_numpy(),
        timestamp=joined["timestamp"].to_numpy(),
        label=label,
        target=target,
        context=context,
        tokens=append(*(some.tokens for some in segments), instructions),
        slots=np.concatenate([some.slots for some in segments]),
    )
    # 3. lists of what similar users liked
    return _with_similar(streams, pl.concat(similar), encoder) if similar else streams


def _with_similar(streams: Streams, lists: pl.Series, encoder: PromptEncoder) -> Streams:
    """The streams with lists (n,) of item codes or null, at most one a time group, each after the group of its row."""
    rows = np.flatnonzero(lists.is_not_null().to_numpy())  # (m,) that a list is stored with
    if not len(rows):
        return streams
    # 1. where time groups end, so that each list goes before the next one
    new_group = np.diff(streams.timestamp, append=np.inf) != 0
    new_group[streams.offsets[1:] - 1] = True
    ends = np.flatnonzero(new_group) + 1
    at = ends[np.searchsorted(ends, rows, side="right")]  # (m,) the segment after each list
    # 2. insert
    tokens = encoder.encode_similar(lists.gather(rows).to_list())
    order = np.insert(
        np.arange(len(new_group)), at, len(streams.tokens) + np.arange(len(at))
    )
    return Streams(
        offsets=streams.offsets + np.searchsorted(at, streams.offsets, side="right"),
        row_id=np.insert(streams.row_id, at, -1),
        # the next double. A row of just that time would not see the list, of whichever code
        # path: no leak, no skew
        timestamp=np.insert(
            streams.timestamp, at, np.nextafter(streams.timestamp[rows], np.inf)
        ),
        label=np.insert(streams.label, at, -1),
        target=np.insert(streams.target, at, False),
        context=np.insert(streams.context, at, True),
        tokens=append(streams.tokens, tokens).take(np.append(order, streams.instructions)),
        slots=np.insert(streams.slots, at, tokens.lengths - 1),
    )
