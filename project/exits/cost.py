"""Token-layers: the one currency of cost. One token that runs through one layer costs one.

Unusual here: the stream (a request's shared history) is part of the price. It runs as deep as the request's
deepest candidate, so exits by candidate save less than their mean depth says; only where the stream's keys
and values are cached is a candidate's own depth the whole cost. Mean depth is never a speed-up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_tokens(target_tokens: Tensor, stream_tokens: Tensor, prefix_cached: bool = False) -> Tensor:
    """Tokens that run per layer in a request of one candidate, (n,): with the history where it is not cached.

    Args:
        target_tokens: (n,) tokens of the candidate and its question.
        stream_tokens: (n,) tokens of the shared history.
        prefix_cached: The history's keys and values are read from a cache.
    """
    return target_tokens if prefix_cached else target_tokens + stream_tokens


def row_cost(
    layer: Tensor, target_tokens: Tensor, stream_tokens: Tensor, prefix_cached: bool = False
) -> Tensor:
    """Token-layers of requests of one candidate each, (n,).

    Args:
        layer: (n,) layer at which the candidate leaves.
        target_tokens: (n,).
        stream_tokens: (n,).
        prefix_cached: False: layer * (target + stream); true: layer * target.
    """
    return layer * row_tokens(target_tokens, stream_tokens, prefix_cached)


def request_cost(
    request: Tensor, layer: Tensor, target_tokens: Tensor, stream_tokens: Tensor, prefix_cached: bool = False
) -> Tensor:
    """Token-layers of requests of several candidates, (r,), in ascending order of request id.

    Args:
        request: (n,) request id of each candidate.
        layer: (n,) layer at which each candidate leaves.
        target_tokens: (n,) each candidate's own tokens.
        stream_tokens: (n,) tokens of the stream, the same number for all candidates of a request.
        prefix_cached: False: sum of layer * target, plus (deepest layer) * stream; true: the sum alone.
    """
    ids, code = torch.unique(request, return_inverse=True)
    own = torch.zeros(ids.numel(), dtype=target_tokens.dtype, device=layer.device)
    own = own.scatter_add(0, code, (layer * target_tokens).to(own))
    if prefix_cached:
        return own
    deepest, shared = (
        torch.zeros_like(own).scatter_reduce(0, code, values.to(own), "amax")
        for values in (layer, stream_tokens)
    )
    return own + deepest * shared


def mean_depth(layer: Tensor) -> float:
    """Mean layer at which candidates leave: to be reported, never called a speed-up; 0 without rows."""
    return float(layer.double().mean()) if layer.numel() else 0.0
