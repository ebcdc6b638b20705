"""Lists of the best k of N candidates: margins that say who can no longer reach a list, and what they promise.

`Lists` is what the checkpoint keeps. The engine's decision, the simulation on cached scores and the server's audits
let candidates leave by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.arrays import F64, I8
from project.exits.certificate import (
    OverlapPromise,
    certify_losses,
    not_tested,
    user_means,
)
from project.exits.cost import request_cost
from project.exits.criteria import HeadOutputs
from project.exits.top_k import TopK, fit_margins, overlap_at_k
from project.results import ListQuality, ListRow, ListRows
from project.run import Checkpoint

LENGTHS = (1, 5, 10, 20, 50)  # lists that margins are fitted for
CANDIDATES = 64  # of a request that they are fitted on
OVERLAP = 0.97  # least mean overlap with full depth's list on tune
EPSILON = 0.05  # promised: the largest loss of overlap, as a mean over users
# from slowest to fastest: twice the largest move loses nobody of a list, less than 1 are quantiles
LEVELS = (
    2.0, 1.75, 1.5, 1.25, 1.0,
    0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ScoredRequests:
    """r requests with n candidates in all, scored at every head."""

    request: Tensor  # (n,) number of each candidate's request, 0..r-1
    user: NDArray[Any]  # (r,) each request's user
    outputs: HeadOutputs  # calibrated, of the n candidates
    target_tokens: Tensor  # (n,) the candidate's own tokens
    stream_tokens: Tensor  # (n,) its history's tokens
    label: I8  # (n,) -1 where unknown

    def costs(self, exits: Tensor, prefix_cached: bool) -> Tensor:
        """Token-layers of each request, (r,), whose candidates leave at these heads (n,)."""
        layer = torch.tensor(self.outputs.layers)[exits]
        return request_cost(
            self.request, layer, self.target_tokens, self.stream_tokens, prefix_cached
        )

    def overlaps(self, keys: Tensor, k: int) -> F64:
        """Share of full depth's best k that are among the best k by keys (n,), of each request: (r,)."""
        full = self.outputs.logits[:, -1]
        found: F64 = overlap_at_k(self.request, keys, full, k).numpy()
        return found

    def quality(self, keys: Tensor, k: int) -> ListQuality:
        """Of the best k by keys (n,): mean overlap with full depth's, and by labels NDCG@k and the share of hits.

        A request with a liked candidate asks where that one stands among the others, whose labels are unknown.
        Precision@k is the share of hits over k.
        """
        gains = list[float]()
        for place in np.flatnonzero(self.label == 1).tolist():
            same = self.request == self.request[place]
            ahead = (same & (keys > keys[place])).sum() + (same & (keys == keys[place]))[
                :place
            ].sum()
            gains.append(float(1 / torch.log2(2.0 + ahead)) if ahead < k else 0.0)
        return {
            "overlap": float(self.overlaps(keys, k).mean()),
            "ndcg": float(np.mean(gains)) if gains else None,
            "hits": float(np.mean(np.array(gains) > 0)) if gains else None,
        }


def list_keys(outputs: HeadOutputs, exits: Tensor) -> Tensor:
    """(n,) what lists are sorted by, descending: candidates that stay longer come first, then those of higher logit."""
    left_with = outputs.logits.gather(1, exits[:, None]).squeeze(1).double()
    # further than any two logits are apart
    reach = 1.0 + float(outputs.logits.max() - outputs.logits.min())
    return left_with + reach * exits


def no_lists(error: str | None = None) -> ListRows:
    """The document of no lists, and why there are none."""
    return {"requests": 0, "lengths": [], "error": error}


@dataclass(frozen=True, eq=False)
class Lists:
    """Who leaves where the best k are asked for. A length that was not fitted takes the margins of the next longer.

    `margins` has (K,) calibrated logits by length of list, ascending; none: no list is decided by margins. `document`
    is what results/calibrate.json has of them.
    """

    margins: dict[int, Tensor] = field(default_factory=dict)
    document: ListRows = field(default_factory=no_lists)

    @property
    def longest(self) -> int:
        """A longer list takes every candidate's score; 0 where nothing was fitted."""
        return max(self.margins, default=0)

    def length(self, asked: int, candidates: int) -> int:
        """Length of the list that margins decide; 0: every candidate's score is asked for, or none can leave."""
        return asked if asked <= self.longest and asked < candidates else 0

    def top_k(self, k: int) -> TopK:
        """Who leaves where the best k are asked for, at most the longest."""
        return TopK(k, next(m for length, m in self.margins.items() if length >= k))

    def state(self) -> Checkpoint:
        """For a checkpoint."""
        return {"margins": self.margins, "document": json.dumps(self.document)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Lists:
        """From what `state` gave."""
        margins = {int(k): found for k, found in state["margins"].items()}
        return cls(margins, json.loads(state["document"]))


def fit_lists(tune: ScoredRequests) -> Lists:
    """Margins for lists shorter than most requests of tune: the cheapest whose mean overlap there is at least OVERLAP.

    Histories count as cached.
    """
    full = torch.full_like(tune.request, tune.outputs.heads - 1)
    whole = float(tune.costs(full, True).sum())
    fitted = [fit_margins(tune.request, tune.outputs, level) for level in LEVELS]
    shortest = float(torch.bincount(tune.request).double().median())
    margins = dict[int, Tensor]()
    rows = list[ListRow]()
    for k in LENGTHS:
        if k >= shortest:
            break
        # without margins of enough overlap nobody leaves
        margins[k] = torch.full_like(fitted[0], torch.inf)
        row: ListRow = {
            "k": k,
            "level": None,
            "overlap": 1.0,
            "cost": 1.0,
            "certificate": None,
        }
        for level, candidate in zip(LEVELS, fitted, strict=True):
            exits = TopK(k, candidate).exits(tune.request, tune.outputs)
            cost = float(tune.costs(exits, True).sum()) / whole
            keys = list_keys(tune.outputs, exits)
            overlap = float(tune.overlaps(keys, k).mean())
            if cost < row["cost"] and overlap >= OVERLAP:
                row.update({"level": level, "overlap": overlap, "cost": cost})
                margins[k] = candidate
        rows.append(row)
    return Lists(margins, no_lists() | {"requests": len(tune.user), "lengths": rows})


def certify_lists(
    lists: Lists, users: int, delta: float, score: Callable[[], ScoredRequests]
) -> None:
    """Certify the loss of overlap on the fold certify, whose requests are of so many users, in the lists' document.

    `score` is called where the users are enough for any lists to pass. Delta is shared out among the lengths, so that
    all promises hold together.
    """
    promise = OverlapPromise(EPSILON, delta / max(len(lists.margins), 1))
    too_few = not_tested(users, promise)
    if too_few is not None:
        for row in lists.document["lengths"]:
            row["certificate"] = too_few
        return
    certify = score()
    for row in lists.document["lengths"]:
        k = row["k"]
        exits = lists.top_k(k).exits(certify.request, certify.outputs)
        keys = list_keys(certify.outputs, exits)
        losses = user_means(1.0 - certify.overlaps(keys, k), certify.user)
        row["certificate"] = certify_losses(losses, promise)


def lists_in_words(document: ListRows) -> list[str | None]:
    """Why there are none, or a sentence for each length of list, and what is promised of the first."""
    rows = document["lengths"]
    found = [document["error"]]
    found += [
        f"Best {row['k']} of {CANDIDATES}: {row['cost']:.3f} of full depth's token-layers at an overlap of "
        f"{row['overlap']:.3f} on tune."
        for row in rows
    ]
    return found + [row["certificate"]["words"] for row in rows[:1] if row["certificate"]]
