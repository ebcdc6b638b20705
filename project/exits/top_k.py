"""Exits for ranking requests: a candidate leaves when it can no longer reach the list of the best k.

Order within a request is all that counts, so margins are quantiles of how much candidates still move against each
other. No labels are needed: the full model's list is the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from project.exits.criteria import HeadOutputs


class TopK:
    """At every head, candidates further below the k-th best than the head's margin leave.

    `margins` are (K,) in calibrated logits, at least 0; +inf: nobody leaves there. The last head's is not used.
    """

    def __init__(self, k: int, margins: Tensor) -> None:
        self.k, self.margins = k, margins

    def stays(self, request: Tensor, scores: Tensor, head: int) -> Tensor:
        """Which of m running candidates stay after this head, (m,) bool; at least k of each request do.

        `request` (m,) are their request ids, `scores` (m,) their calibrated logits at this head. An engine calls this
        at an exit.
        """
        table, (row, _) = _padded(request, scores)
        if table.shape[1] <= self.k or not scores.numel():
            return torch.ones_like(scores, dtype=torch.bool)
        worst = table.topk(self.k, dim=1).values[:, -1]
        return scores >= worst[row] - self.margins[head].to(scores)

    def exits(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """Index of the head after which each of n candidates leaves, (n,) int64; in no order of requests."""
        running = torch.arange(outputs.logits.shape[0], device=outputs.logits.device)
        exits = torch.full_like(running, outputs.heads - 1)
        for head in range(outputs.heads - 1):
            stays = self.stays(request[running], outputs.logits[running, head], head)
            exits[running[~stays]] = head
            running = running[stays]
        return exits


def fit_margins(request: Tensor, outputs: HeadOutputs, level: float) -> Tensor:
    """Margins (K,): the quantile `level` of how far the n candidates of tune move until the last head.

    A level above 1 is so many times the largest move.
    """
    # (n, K) how far each head is from the last
    deviation = outputs.logits - outputs.logits[:, -1:]
    _, code = torch.unique(request, return_inverse=True)
    # (requests,) candidates of each
    counts = torch.bincount(code).to(deviation)
    # (requests, K); a shift of all candidates of a request changes no list, so it is taken out
    sums = deviation.new_zeros(counts.numel(), outputs.heads).index_add_(0, code, deviation)
    moves = (deviation - (sums / counts[:, None])[code]).abs().sort(dim=0).values
    # torch.quantile refuses more than 2^24 elements
    return moves[round(min(level, 1.0) * (moves.shape[0] - 1))] * max(level, 1.0)


def overlap_at_k(request: Tensor, scores: Tensor, full: Tensor, k: int) -> Tensor:
    """Share of the full model's best k that are among the best k by `scores`, per request, (r,), by ascending id.

    All are (n,). A score of -inf is out of the list; a request of fewer candidates is divided by their number.
    """
    both = _listed(request, scores, k) & _listed(request, full, k)  # (n,)
    _, code, counts = torch.unique(request, return_inverse=True, return_counts=True)
    hits = torch.zeros(counts.numel(), dtype=torch.float64, device=code.device)
    share: Tensor = hits.index_add_(0, code, both.double()) / counts.clamp(max=k)
    return share


def _listed(request: Tensor, scores: Tensor, k: int) -> Tensor:
    """(n,) bool, the best k of each request; ties go to the candidate that comes first."""
    # (requests, most candidates); -inf where a request has no more
    table, place = _padded(request, scores)
    # stable: of equal scores the earlier candidate stays ahead
    ordered = table.sort(dim=1, descending=True, stable=True)
    listed = torch.zeros_like(table, dtype=torch.bool)
    listed.scatter_(1, ordered.indices[:, :k], ordered.values[:, :k] > -torch.inf)
    return listed[place]


def _padded(request: Tensor, scores: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores as (requests, most candidates), -inf where there is none, and each candidate's (row, column)."""
    _, row, counts = torch.unique(request, return_inverse=True, return_counts=True)
    # candidates by request, in the order in which they came
    order = row.argsort(stable=True)
    # the place of each among those of its request
    within = (
        torch.arange(row.numel(), device=row.device)
        - (counts.cumsum(0) - counts)[row[order]]
    )
    column = torch.empty_like(row)
    column[order] = within
    table = scores.new_full(
        (counts.numel(), int(counts.max()) if counts.numel() else 0), -torch.inf
    )
    table[row, column] = scores
    return table, (row, column)
