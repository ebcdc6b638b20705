"""Token-layers, the unit of cost: one token that runs through one layer costs one.

A request's shared history runs as deep as its deepest candidate, so exits save less than the mean depth suggests.
Where the history's keys and values are cached, a candidate's own tokens are the whole cost.
"""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor


def row_tokens(scores: pl.DataFrame) -> Tensor:
    """Tokens (n,) that each row runs a layer as a request of its own: its segment's and the history's.

    A row that leaves at layer k costs k times as many token-layers.
    """
    return scores["target_tokens"].to_torch() + scores["stream_tokens"].to_torch()


def request_cost(
    request: Tensor,
    layer: Tensor,
    target_tokens: Tensor,
    stream_tokens: Tensor,
    prefix_cached: bool = False,
) -> Tensor:
    """Token-layers of requests of several candidates, (r,), in ascending order of request id.

    All arguments are (n,), one number a candidate; `stream_tokens` is equal for all candidates of a request. A request
    costs the sum of layer * target tokens, plus its deepest layer * stream tokens unless the prefix is cached.
    """
    ids, code = torch.unique(request, return_inverse=True)
    # 1. candidates' own tokens, each as deep as the candidate runs
    own = torch.zeros(ids.numel(), dtype=target_tokens.dtype, device=layer.device)
    own = own.scatter_add(0, code, (layer * target_tokens).to(own))
    if prefix_cached:
        return own
    # 2. the history's, as deep as the deepest candidate; `amax` of equal counts is the count
    deepest, shared = (
        torch.zeros_like(own).scatter_reduce(0, code, values.to(own), "amax")
        for values in (layer, stream_tokens)
    )
    return own + deepest * shared
