"""The engine's attention: candidates read a shared history and themselves, never each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from project.data.ragged import IntArray, offsets_of, within
from project.engine.requests import StreamTokens
from project.layout import Tokens, visible
from project.model.backbone import Backbone


class RotaryTable:
    """Cosines and sines of positions 0, 1, ..., as the backbone makes them.

    Args:
        backbone: Its rotary embedding, device and type.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._pair: tuple[Tensor, Tensor] | None = None

    def at(self, position: IntArray) -> tuple[Tensor, Tensor]:
        """Those of T positions, (1, T, head dim) each.

        Args:
            position: (T,) at least one, from 0.
        """
        weight = self._backbone.embed_tokens.weight
        farthest = int(position.max())
        if self._pair is None or self._pair[0].shape[0] <= farthest:
            every = torch.arange(2 * (farthest + 1), device=weight.device)
            cos, sin = self._backbone.rotary_emb(weight, position_ids=every[None])
            self._pair = cos[0], sin[0]
        place = torch.from_numpy(position).to(weight.device, non_blocking=True)
        cos, sin = (x.index_select(0, place)[None] for x in self._pair)
        return cos, sin


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


BLOCK = 256  # stream queries in one call: masks stay small, and keys behind the block are not read

Span = tuple[int, int]


class Keys(Protocol):
    """Keys and values of a stream that are kept between requests."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep (1, heads, F, dim) each of tokens that run the layer; returns all tokens' (1, heads, P + F, dim)."""
        ...

    def ahead(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same of tokens that stand in front of the layer, and may or may not run it."""
        ...


@dataclass(frozen=True, eq=False)
class StreamBlock:
    """Queries of a stream and the keys in front of them.

    Attributes:
        queries: Range among the tokens that run.
        keys: Number of leading keys of the stream that some of them see.
        mask: (queries, keys), added to the scores.
    """

    queries: Span
    keys: int
    mask: Tensor


def stream_blocks(
    stream: StreamTokens, first: int, stop: int, device: torch.device, dtype: torch.dtype
) -> list[StreamBlock]:
    """The visibility rule among the tokens of a stream, for queries [first, stop).

    Args:
        stream: S tokens.
        first: Tokens before this have their keys in a cache and ask nothing.
        stop: End of the queries.
        device: Of the masks.
        dtype: Of the masks.
    """
    index = np.arange(len(stream))
    tokens = Tokens(
        index, np.zeros_like(index), stream.segment, stream.group, np.ones(len(stream), dtype=bool)
    )
    count = -(-(stop - first) // BLOCK)
    edges = np.linspace(first, stop, count + 1).round().astype(int).tolist() if count else [first]
    blocks = []
    for a, b in pairwise(edges):
        seen = visible(tokens.at(slice(a, b), None), tokens.at(None, slice(0, b)))
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).to(device, dtype)
        blocks.append(StreamBlock((a - first, b - first), b, mask))
    return blocks


class Structure:
    """A row of tokens as attention needs it; stands where the backbone expects a layout.

    Args:
        row: Who stands where.
        device: Where the tokens are.
        blocks: Per live request, its stream's blocks.
        keys: Per live request, its cached keys and values; None: the stream runs whole.

    Attributes:
        slots: (m,) where the candidates' answer slots stand.
    """

    def __init__(
        self,
        row: Row,
        device: torch.device,
        blocks: Sequence[list[StreamBlock]],
        keys: Sequence[Keys | None],
    ) -> None:
        self._device, self._blocks, self._keys = device, blocks, keys
        edges, starts, own = row.streams.tolist(), row.starts, row.own
        self._streams: list[Span] = list(pairwise(edges))
        self._members = row.members()
        self._candidates: list[Span] = [(int(starts[c]), int(starts[d])) for c, d in self._members]
        self._first = edges[-1]
        self.slots = self._on_device(row.slots)
        self._widest = int(own.max())
        self._even = bool((own == self._widest).all())
        if not self._even:
            padded = np.minimum(
                starts[:-1, None] - self._first + np.arange(self._widest), starts[-1] - self._first - 1
            )
            places = np.repeat(np.arange(len(own)) * self._widest, own) + within(own)
            self._padded, self._places = self._on_device(padded.ravel()), self._on_device(places)
            self._beyond = self._on_device(np.arange(self._widest) >= own[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of all tokens of the row.

        Args:
            layer: Index of the layer, for cached keys.
            query: (1, heads, T, dim), rotary embedding applied.
            key: (1, key-value heads, T, dim), rotary embedding applied.
            value: (1, key-value heads, T, dim).
            scale: Factor on the dot products.

        Returns:
            (1, T, heads, dim).
        """
        _, heads, tokens, dim = query.shape
        out = query.new_empty(tokens, heads, dim)
        pairs = self._stream_keys(layer, key, value, ahead=False)
        for (a, _), blocks, (k, v) in zip(self._streams, self._blocks, pairs, strict=True):
            for block in blocks:
                s, e = a + block.queries[0], a + block.queries[1]
                seen = k[:, :, : block.keys], v[:, :, : block.keys]
                out[s:e] = _masked(query[:, :, s:e], *seen, block.mask, scale)[0].transpose(0, 1)
        shared, weight = _shared(query, self._candidates, pairs, scale)
        own, lse = self._own(query, key, value, scale)
        share = torch.sigmoid(weight - lse).to(out.dtype)[..., None]
        torch.lerp(own, shared, share, out=out[self._first :])
        return out[None]

    def attend_answers(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the answer slots alone, the last tokens of their candidates: they see all of them.

        Args:
            layer: Index of the layer, for cached keys.
            query: (m, heads, dim) of the slots, rotary embedding applied.
            key: (1, key-value heads, T, dim) of all tokens, rotary embedding applied.
            value: (1, key-value heads, T, dim) of all tokens.
            scale: Factor on the dot products.

        Returns:
            (m, heads, dim).
        """
        pairs = self._stream_keys(layer, key, value, ahead=True)
        shared, weight = _shared(query.transpose(0, 1)[None], self._members, pairs, scale)
        k, v = self._apart(key), self._apart(value)
        grouped = query.reshape(len(query), k.shape[2], -1, query.shape[-1])
        scores = (grouped @ k.permute(0, 2, 3, 1)).float() * scale
        if not self._even:
            scores = scores.masked_fill(self._beyond, -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        own = ((scores - lse).exp().to(v.dtype) @ v.transpose(1, 2)).flatten(1, 2)
        share = torch.sigmoid(weight - lse.flatten(1)).to(own.dtype)[..., None]
        return torch.lerp(own, shared, share)

    def _stream_keys(
        self, layer: int, key: Tensor, value: Tensor, ahead: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Per request, keys and values of its whole stream."""
        pairs = []
        for (a, b), cached in zip(self._streams, self._keys, strict=True):
            pair = key[:, :, a:b], value[:, :, a:b]
            if cached is not None:
                pair = cached.ahead(layer, *pair) if ahead else cached.append(layer, *pair)
            pairs.append(pair)
        return pairs

    def _own(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What candidates see of themselves, (tokens, heads, dim), and its log-sum-exp, (tokens, heads).

        Padding stands behind a candidate's tokens, so causality hides it.
        """
        q, k, v = (self._apart(x).transpose(1, 2) for x in (query, key, value))
        out, lse = (x.transpose(1, 2).flatten(0, 1) for x in attend_with_lse(q, k, v, scale, causal=True))
        if self._even:
            return out, lse
        return out.index_select(0, self._places), lse.index_select(0, self._places)

    def _apart(self, x: Tensor) -> Tensor:
        """Candidates of (1, heads, T, dim) one by one, (m, longest, heads, dim), padded."""
        own = x[0].transpose(0, 1)[self._first :]
        if not self._even:
            own = own.index_select(0, self._padded)
        return own.reshape(-1, self._widest, *own.shape[1:])

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _shared(
    query: Tensor, spans: Sequence[Span], pairs: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """What the queries of each span see of their request's stream, (queries, heads, dim), and its log-sum-exp."""
    found = [_unmasked(query[:, :, c:d], k, v, scale) for (c, d), (k, v) in zip(spans, pairs, strict=True)]
    outs, weights = ([x[0].transpose(0, 1) for x in part] for part in zip(*found, strict=True))
    return _joined(outs), _joined(weights)


def _unmasked(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend_with_lse` where every query sees every key: query heads of one key head are more rows of one product."""
    heads, queries, dim = query.shape[1:]
    rows = query.reshape(1, key.shape[1], -1, dim)
    out, lse = attend_with_lse(rows, key, value, scale, causal=False)
    return out.reshape(1, heads, queries, dim), lse.reshape(1, heads, queries)


def attend_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and the log-sum-exp of its scores.

    The kernels behind torch's scaled_dot_product_attention, asked directly: the public function drops the second.

    Args:
        query: (B, heads, Q, dim).
        key: (B, key-value heads, K, dim).
        value: (B, key-value heads, K, dim).
        scale: Factor on the dot products.
        causal: Query i sees keys up to i.

    Returns:
        (B, heads, Q, dim) and (B, heads, Q) float32; zeros and minus infinity where there is no key.
    """
    if key.shape[2] == 0:
        return torch.zeros_like(query), torch.full_like(query[..., 0], -torch.inf, dtype=torch.float32)
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
        return found[0], found[1]
    key, value = _repeated(query, key), _repeated(query, value)
    if query.device.type == "cuda":
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        return found[0], found[1][..., : query.shape[2]]
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu":  # with a mask, CUDA has no fused kernel for grouped queries
        key, value, grouped = _repeated(query, key), _repeated(query, value), False
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _repeated(query: Tensor, key: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1) if groups > 1 else key


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
