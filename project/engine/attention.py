"""Computes the engine's attention: candidates read a shared stream and themselves, never each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from project.arrays import I64, Bool
from project.data.ragged import offsets_of, within
from project.engine.cache import CachedStream
from project.engine.requests import StreamTokens
from project.layout import Tokens, visible
from project.model.attention import one_per_query_head

Span = tuple[int, int]
# stream queries in one call: masks stay small, and keys behind the block are not read
BLOCK = 256


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device, without waiting for it."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Row:
    """What stands in a row of T tokens: the streams of r requests, without cached tokens, then their m candidates."""

    requests: I64  # (r,) requests that have candidates here, ascending
    stream: I64  # (r,) stream tokens of each
    own: I64  # (m,) tokens of each candidate
    owner: I64  # (m,) which of the r requests each candidate belongs to, not decreasing

    @classmethod
    def of(cls, requests: I64, stream: I64, own: I64) -> Row:
        """Row of m candidates from their requests (m,), tokens (m,), and the stream tokens of all R requests."""
        live, owner = np.unique(requests, return_inverse=True)
        return cls(live, stream[live], own, owner)

    def keep(self, stays: Bool) -> Row:
        """The row of the candidates that stay, (m,) bool; a request without one is dropped with its stream."""
        kept = Row.of(self.owner[stays], self.stream, self.own[stays])
        return replace(kept, requests=self.requests[kept.requests])

    def index(self, stays: Bool, streams: bool) -> I64:
        """Where the tokens of `keep(stays)` stand in this row, with or without those of streams."""
        first = self.starts[:-1][stays]
        length = self.own[stays]
        if streams:
            live = np.unique(self.owner[stays])
            first = np.concatenate([self.streams[live], first])
            length = np.concatenate([self.stream[live], length])
        return np.repeat(first, length) + within(length)

    @property
    def streams(self) -> I64:
        """(r + 1,) where each stream starts; the last entry is where candidates begin."""
        return offsets_of(self.stream)

    @property
    def starts(self) -> I64:
        """(m + 1,) where each candidate starts; the last entry is T."""
        return offsets_of(self.own) + int(self.stream.sum())

    def stream_tokens(self) -> list[tuple[int, int]]:
        """Per request, which it is and how many of its stream tokens run here."""
        return list(zip(self.requests.tolist(), self.stream.tolist(), strict=True))

    def members(self) -> list[Span]:
        """Per request, the range of its candidates among the m."""
        return list(
            pairwise(
                offsets_of(np.bincount(self.owner, minlength=len(self.requests))).tolist()
            )
        )


class StreamBlock(NamedTuple):
    """A run of a stream's queries and the keys in front of them."""

    queries: Span  # range among the tokens that run
    keys: int  # number of leading keys of the stream that some of them see
    mask: Tensor  # (queries, keys), added to the scores


def stream_blocks(
    stream: StreamTokens, first: int, device: torch.device, dtype: torch.dtype
) -> list[StreamBlock]:
    """The visibility rule among the tokens of a stream, for queries from `first` on; earlier keys are in a cache."""
    stop = len(stream)
    if first == stop:
        return []
    index = np.arange(stop)
    tokens = Tokens(
        index, np.zeros_like(index), stream.segment, stream.group, np.ones(stop, dtype=bool)
    )
    edges = (
        np.linspace(first, stop, -(-(stop - first) // BLOCK) + 1)
        .round()
        .astype(int)
        .tolist()
    )
    blocks = []
    for a, b in pairwise(edges):
        seen = visible(tokens.at(slice(a, b), None), tokens.at(None, slice(0, b)))
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).to(
            device, dtype
        )
        blocks.append(StreamBlock((a - first, b - first), b, mask))
    return blocks


class Structure:
    """A row of tokens as attention needs it; stands where the backbone expects a layout.

    Per request of the row it is given the blocks of the stream and its cached keys and values, None where the stream
    runs whole. `slots` (m,) is where the candidates' answer slots stand: at their last tokens.
    """

    def __init__(
        self,
        row: Row,
        device: torch.device,
        blocks: Sequence[list[StreamBlock]],
        cached: Sequence[CachedStream | None],
    ) -> None:
        starts = row.starts
        own = row.own
        # 1. By request: blocks of stream queries, cached streams, and ranges among tokens
        # and candidates.
        self._blocks = blocks
        self._cached = cached
        # its stream tokens
        self._streams: list[Span] = list(pairwise(row.streams.tolist()))
        self._members = row.members()  # its candidates among the m
        # their tokens
        self._candidates: list[Span] = [
            (int(starts[c]), int(starts[d])) for c, d in self._members
        ]
        # 2. By candidate.
        self._first = int(starts[0])  # where candidates begin
        self.slots = upload(starts[1:] - 1, device)  # (m,)
        self._longest = int(own.max())
        self._even = bool((own == self._longest).all())
        # 3. Candidates of other lengths are padded to the longest; a padded place repeats
        # some token.
        if not self._even:
            column = np.arange(self._longest)
            padded = np.minimum(
                starts[:-1, None] - self._first + column, starts[-1] - self._first - 1
            )
            places = np.repeat(np.arange(len(own)) * self._longest, own) + within(own)
            # (m * longest,) the token at each padded place
            self._padded = upload(padded.ravel(), device)
            # (tokens,) the padded place of each token
            self._places = upload(places, device)
            # (m, 1, 1, longest) padding
            self._beyond = upload(column >= own[:, None], device)[:, None, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attention of all tokens, (1, T, heads, dim).

        `query` is (1, heads, T, dim), `key` and `value` (1, key-value heads, T, dim), rotary embedding applied.
        """
        _, heads, tokens, dim = query.shape
        out = query.new_empty(tokens, heads, dim)
        # 1. Stream tokens, block by block, under the visibility rule.
        pairs = self._stream_keys(layer, key, value, runs=True)
        for (a, _), blocks, (k, v) in zip(self._streams, self._blocks, pairs, strict=True):
            # With a mask, CUDA has no fused kernel for grouped queries.
            if blocks and query.device.type != "cpu":
                k, v = one_per_query_head(k, heads), one_per_query_head(v, heads)
            for (first, stop), keys, mask in blocks:
                found = F.scaled_dot_product_attention(
                    query[:, :, a + first : a + stop],
                    k[:, :, :keys],
                    v[:, :, :keys],
                    attn_mask=mask,
                    scale=scale,
                    enable_gqa=k.shape[1] != heads,
                )
                out[a + first : a + stop] = found[0].transpose(0, 1)
        # 2. Candidates read their request's stream, all of it, in one product for all of
        # them.
        shared, weight = _shared(query, self._candidates, pairs, scale)
        # 3. Each reads itself. Padding stands behind a candidate's tokens, so causality
        # hides it.
        q = self._apart(query).transpose(1, 2)
        k = self._apart(key).transpose(1, 2)
        v = self._apart(value).transpose(1, 2)
        own, lse = (
            x.transpose(1, 2).flatten(0, 1)
            for x in attend_with_lse(q, k, v, scale, causal=True)
        )
        if not self._even:
            own = own.index_select(0, self._places)
            lse = lse.index_select(0, self._places)
        # 4. Both parts by their shares of the softmax.
        share = torch.sigmoid(weight - lse).to(out.dtype)[..., None]
        torch.lerp(own, shared, share, out=out[self._first :])
        return out[None]

    def attend_answers(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Attention of the answer slots alone, (m, heads, dim): each sees its whole candidate and stream.

        `query` is (m, heads, dim); `key` and `value` are of all tokens, as in `attend`.
        """
        # 1. The request's stream.
        pairs = self._stream_keys(layer, key, value, runs=False)
        shared, weight = _shared(query.transpose(0, 1)[None], self._members, pairs, scale)
        # 2. The candidate itself. The query heads of one key head are rows of one product.
        k = self._apart(key)  # (m, longest, key heads, dim)
        v = self._apart(value)
        grouped = query.reshape(len(query), k.shape[2], -1, query.shape[-1])
        # (m, key heads, queries, longest)
        scores = (grouped @ k.permute(0, 2, 3, 1)).float() * scale
        if not self._even:
            scores = scores.masked_fill(self._beyond, -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        own = ((scores - lse).exp().to(v.dtype) @ v.transpose(1, 2)).flatten(1, 2)
        # 3. Both parts by their shares of the softmax.
        share = torch.sigmoid(weight - lse.flatten(1)).to(own.dtype)[..., None]
        return torch.lerp(own, shared, share)

    def _stream_keys(
        self, layer: int, key: Tensor, value: Tensor, runs: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Per request, keys and values of its whole stream."""
        pairs = []
        for (a, b), cached in zip(self._streams, self._cached, strict=True):
            k, v = key[:, :, a:b], value[:, :, a:b]
            pairs.append((k, v) if cached is None else cached.keep(layer, k, v, runs))
        return pairs

    def _apart(self, x: Tensor) -> Tensor:
        """Candidates of (1, heads, T, dim) one by one, (m, longest, heads, dim), padded."""
        own = x[0].transpose(0, 1)[self._first :]
        if not self._even:
            own = own.index_select(0, self._padded)
        return own.reshape(-1, self._longest, *own.shape[1:])


def _shared(
    query: Tensor,
    spans: Sequence[Span],
    pairs: Sequence[tuple[Tensor, Tensor]],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What the queries of each span see of their request's stream, (queries, heads, dim), and its log-sum-exp.

    Every query sees every key, so the query heads of one key head are rows of one product.
    """
    heads, _, dim = query.shape[1:]
    outs = list[Tensor]()
    weights = list[Tensor]()
    for (a, b), (key, value) in zip(spans, pairs, strict=True):
        rows = query[:, :, a:b].reshape(1, key.shape[1], -1, dim)
        out, lse = attend_with_lse(rows, key, value, scale, causal=False)
        outs.append(out.reshape(heads, b - a, dim).transpose(0, 1))
        weights.append(lse.reshape(heads, b - a).transpose(0, 1))
    if len(spans) == 1:
        return outs[0], weights[0]
    return torch.cat(outs), torch.cat(weights)


def attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention without a mask, (B, heads, Q, dim), and the log-sum-exp of its scores, (B, heads, Q) float32.

    `query` is (B, heads, Q, dim), `key` and `value` (B, key-value heads, K, dim); without keys, zeros and minus
    infinity. These are the kernels of scaled_dot_product_attention, which itself drops the log-sum-exp.
    """
    if key.shape[2] == 0:
        return torch.zeros_like(query), torch.full_like(
            query[..., 0], -torch.inf, dtype=torch.float32
        )
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return found[0], found[1]
    key, value = (one_per_query_head(x, query.shape[1]) for x in (key, value))
    if query.device.type == "cuda":
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        return found[0], found[1][..., : query.shape[2]]
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(
            1
        )
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse
