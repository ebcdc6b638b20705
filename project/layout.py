"""Where every token of a batch stands, and the one rule that says which token sees which.

A row holds sequences (users), a sequence holds segments in time order. Shapes: (B, T), B packed rows of T
tokens.

    visible(q, k) = sequence[q] == sequence[k] and (
        (context[k] and group[k] < group[q]) or (segment[k] == segment[q] and index[k] <= index[q]))

Unusual: attention never builds a T x T mask. `plan_blocks` cuts each row into short runs of queries and
lists, for each, only the key ranges that some query of the run sees, with the rule restricted to them.
`Layout.dense_mask` writes the rule out in full and serves tests and small inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Measured with heads of SmolLM2-135M's shape on one CPU core, forward and backward: 64 to 256 are level, 512 is
# 20 % slower; the larger of equals, because every block costs a kernel call.
BLOCK_TOKENS = 256
# A hole this short is masked out rather than cut out: a single range is a view, several are copied together.
MERGED_GAP = 32

Bools = NDArray[np.bool_]


class Tokens(NamedTuple):
    """What the rule needs to know of some tokens: five arrays of one shape, numpy or torch."""

    index: Any
    sequence: Any
    segment: Any
    group: Any
    context: Any

    def at(self, *key: Any) -> Tokens:
        """The same indexing applied to all five arrays."""
        return Tokens(*(array[key] for array in self))


def visible(q: Tokens, k: Tokens) -> Any:
    """The one visibility rule: may query token `q` read key token `k`?

    Args:
        q: Query tokens, of any shape.
        k: Key tokens, of a shape that broadcasts with the queries'.

    Returns:
        Booleans of the broadcast shape, numpy or torch as the inputs.
    """
    earlier = k.context & (k.group < q.group)
    own = (k.segment == q.segment) & (k.index <= q.index)
    return (k.sequence == q.sequence) & (earlier | own)


@dataclass(frozen=True)
class Block:
    """One run of queries of one row and all keys that any of them sees.

    Attributes:
        row: Row of the batch.
        queries: Half-open range of token indices in the row.
        keys: Half-open ranges of token indices in the row, ascending, disjoint.
        mask: Bool (queries, keys), True where the query sees the key; keys in the order of the ranges.
    """

    row: int
    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """Structure of a packed batch; every tensor is (B, T).

    Attributes:
        sequence: Integer id of the token's sequence inside its row; -1 is padding, which sees only itself.
        segment: Integer id of the token's segment, unique inside its row.
        group: Integer time group inside the sequence; the instruction is group 0.
        context: Bool, True where tokens of later groups of the sequence may see this token.
        position: Integer position for rotary embeddings.
        blocks: Plan for structured attention. Padding belongs to no block.
    """

    sequence: Tensor
    segment: Tensor
    group: Tensor
    context: Tensor
    position: Tensor
    blocks: list[Block] = field(default_factory=list)

    @classmethod
    def build(
        cls,
        sequence: Tensor,
        segment: Tensor,
        group: Tensor,
        context: Tensor,
        position: Tensor,
        block_tokens: int = BLOCK_TOKENS,
    ) -> Layout:
        """Layout with its blocks planned; the five tensors are (B, T) and on the CPU."""
        bare = cls(sequence, segment, group, context, position)
        return replace(bare, blocks=plan_blocks(bare, block_tokens))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        rows, length = self.sequence.shape
        return rows, length

    def tokens(self) -> Tokens:
        """All tokens as the rule reads them, torch, (B, T): each padding token is a segment of its own."""
        index = torch.arange(self.sequence.shape[1], device=self.sequence.device).expand_as(self.sequence)
        padding = self.sequence < 0
        segment = torch.where(padding, -1 - index, self.segment)
        return Tokens(index, self.sequence, segment, self.group, self.context & ~padding)

    def dense_mask(self) -> Tensor:
        """The rule written out: bool (B, queries T, keys T). Costs B * T * T; the blocks do not."""
        tokens = self.tokens()
        mask: Tensor = visible(tokens.at(slice(None), slice(None), None), tokens.at(slice(None), None))
        return mask

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The same layout with every tensor, masks included, on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """The same layout in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, move: Any) -> Layout:
        return Layout(
            sequence=move(self.sequence),
            segment=move(self.segment),
            group=move(self.group),
            context=move(self.context),
            position=move(self.position),
            blocks=[replace(block, mask=move(block.mask)) for block in self.blocks],
        )


def plan_blocks(layout: Layout, block_tokens: int = BLOCK_TOKENS) -> list[Block]:
    """Cut every row into runs of at most `block_tokens` queries of one sequence, each with the keys it sees.

    Any layout is planned right. The usual one (context segments in group order, then candidates) is cheap:
    a run of the stream reads from the start of its sequence to its own end, a run of candidates reads the
    stream and itself.

    Args:
        layout: Layout on the CPU; its own `blocks` are ignored.
        block_tokens: Most queries in a block. Smaller blocks skip more invisible keys and cost more calls.

    Returns:
        Blocks in order of row and query; together they hold every token that is not padding exactly once.
    """
    # int32 halves the time of the comparisons that make up the masks
    batch = Tokens(*(_compact(array) for array in layout.tokens()))
    blocks = []
    for row in range(batch.sequence.shape[0]):
        tokens = batch.at(row)
        for start, stop in _runs(tokens.sequence, block_tokens):
            keys = _key_ranges(tokens, start, stop)
            queries = tokens.at(slice(start, stop), None)
            parts = [visible(queries, tokens.at(None, slice(*span))) for span in keys]
            mask = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            blocks.append(Block(row, (start, stop), keys, torch.from_numpy(mask)))
    return blocks


def _compact(array: Tensor) -> NDArray[Any]:
    values: NDArray[Any] = (array if array.dtype == torch.bool else array.to(torch.int32)).numpy()
    return values


def _runs(sequence: NDArray[Any], block_tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of one sequence, cut evenly so that no short rest is left; padding is skipped."""
    cuts = np.flatnonzero(np.diff(sequence)) + 1
    for first, last in pairwise([0, *cuts.tolist(), len(sequence)]):
        if first == last or sequence[first] < 0:
            continue
        count = -(-(last - first) // block_tokens)
        edges = np.linspace(first, last, count + 1).round().astype(int).tolist()
        yield from pairwise(edges)


def _key_ranges(tokens: Tokens, start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges holding every key that some query of [start, stop) sees: earlier context and own segments."""
    own: Bools = np.isin(tokens.segment, np.unique(tokens.segment[start:stop])) & (tokens.index < stop)
    earlier: Bools = tokens.context & (tokens.group < tokens.group[start:stop].max())
    seen = np.flatnonzero((tokens.sequence == tokens.sequence[start]) & (own | earlier))
    cuts = np.flatnonzero(np.diff(seen) > MERGED_GAP + 1)
    firsts = seen[np.concatenate(([0], cuts + 1))]
    lasts = seen[np.concatenate((cuts, [len(seen) - 1]))]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]
