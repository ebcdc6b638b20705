"""Holds the positions of a batch's tokens, and the one rule for which token sees which.

A row holds sequences (users), a sequence holds segments in time order. Shapes: (B, T), B packed rows of T tokens.

    visible(q, k) = sequence[q] == sequence[k] and (
        (context[k] and group[k] < group[q]) or (segment[k] == segment[q] and index[k] <= index[q]))

Attention builds no T x T mask. `plan_blocks` cuts each row into short runs of queries and lists, for each run, the key
ranges that its queries see, with the rule's mask of them.
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

# Measured with heads of SmolLM2-135M's shape on one CPU core, forward and backward: 64 to
# 256 take equally long, 512 takes 20 % longer. The largest of equals, because every block
# costs a kernel call.
BLOCK_TOKENS = 256
# Invisible keys up to this many are masked, not cut out: a single range is a view, several
# ranges are copied.
MERGED_GAP = 32


class Tokens(NamedTuple):
    """What the rule reads of some tokens: five arrays of one shape, numpy or torch."""

    index: Any
    sequence: Any
    segment: Any
    group: Any
    context: Any

    def at(self, *key: Any) -> Tokens:
        """The same indexing applied to all five arrays."""
        return Tokens(*(array[key] for array in self))


def visible(q: Tokens, k: Tokens) -> Any:
    """Whether query token `q` may read key token `k`: booleans of the shape to which both broadcast."""
    # strictly earlier groups: rows of one second never see each other
    earlier = k.context & (k.group < q.group)
    # the token's own segment up to itself, as in any causal model
    own = (k.segment == q.segment) & (k.index <= q.index)
    return (k.sequence == q.sequence) & (earlier | own)


@dataclass(frozen=True)
class Block:
    """One run of queries of one row of the batch and all keys that any of them sees."""

    row: int
    queries: tuple[int, int]  # half-open range of token indices in the row
    # half-open ranges of token indices in the row, ascending, disjoint
    keys: list[tuple[int, int]]
    # bool (queries, keys), True where the query sees the key; keys in the order of the
    # ranges
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """Structure of a packed batch; every tensor is (B, T), integer but for `context`."""

    # id of the token's sequence inside its row; -1 is padding, which sees only itself
    sequence: Tensor
    segment: Tensor  # id of the token's segment, unique inside its row
    group: Tensor  # time group inside the sequence; the instruction is group 0
    # bool, True where tokens of later groups of the sequence may see this token
    context: Tensor
    position: Tensor  # position for rotary embeddings
    # plan of attention; padding belongs to no block
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
        index = torch.arange(self.sequence.shape[1], device=self.sequence.device).expand_as(
            self.sequence
        )
        # (B, T)
        padding = self.sequence < 0
        segment = torch.where(padding, -1 - index, self.segment)
        return Tokens(index, self.sequence, segment, self.group, self.context & ~padding)

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with every tensor, masks included, on `device`."""
        # tensors of tokens, then the blocks' masks
        moved = {
            name: value.to(device) for name, value in vars(self).items() if name != "blocks"
        }
        return Layout(
            **moved,
            blocks=[replace(block, mask=block.mask.to(device)) for block in self.blocks],
        )


def plan_blocks(layout: Layout, block_tokens: int = BLOCK_TOKENS) -> list[Block]:
    """Cut every row into runs of at most `block_tokens` queries of one sequence, each with the keys it sees.

    Any layout is planned right. The usual one (context segments in group order, then candidates) is cheap: a run of the
    history reads from the start of its sequence to its own end, a run of candidates reads the history and itself.
    """
    # int32 halves the time of the comparisons that make up the masks
    batch = Tokens(
        *(
            (x if x.dtype == torch.bool else x.to(torch.int32)).numpy()
            for x in layout.tokens()
        )
    )
    blocks = []
    for row in range(batch.sequence.shape[0]):
        tokens = batch.at(row)
        for start, stop in _runs(tokens.sequence, block_tokens):
            keys = _key_ranges(tokens, start, stop)
            # (queries, 1) against (1, keys): the rule broadcasts to (queries, keys)
            queries = tokens.at(slice(start, stop), None)
            parts = [visible(queries, tokens.at(None, slice(*span))) for span in keys]
            mask = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            blocks.append(Block(row, (start, stop), keys, torch.from_numpy(mask)))
    return blocks


def _runs(sequence: NDArray[Any], block_tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of one sequence, cut evenly so that no short rest is left; padding is skipped."""
    # where another sequence begins
    cuts = np.flatnonzero(np.diff(sequence)) + 1
    for first, last in pairwise([0, *cuts.tolist(), len(sequence)]):
        if first == last or sequence[first] < 0:
            continue
        # rounded up
        count = -(-(last - first) // block_tokens)
        edges = np.linspace(first, last, count + 1).round().astype(int).tolist()
        yield from pairwise(edges)


def _key_ranges(tokens: Tokens, start: int, stop: int) -> list[tuple[int, int]]:
    """Ranges holding every key that some query of [start, stop) sees: earlier context and own segments."""
    # (T,) tokens of the queries' segments up to the last query
    own = np.isin(tokens.segment, np.unique(tokens.segment[start:stop])) & (
        tokens.index < stop
    )
    # (T,) what the query of the latest group sees
    earlier = tokens.context & (tokens.group < tokens.group[start:stop].max())
    # indices of the keys, ascending
    seen = np.flatnonzero((tokens.sequence == tokens.sequence[start]) & (own | earlier))
    # a new range where the gap is too long to be masked
    cuts = np.flatnonzero(np.diff(seen) > MERGED_GAP + 1)
    firsts = seen[np.concatenate(([0], cuts + 1))].tolist()
    lasts = seen[np.concatenate((cuts, [len(seen) - 1]))].tolist()
    return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]
