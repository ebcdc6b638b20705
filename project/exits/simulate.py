"""What a policy would have scored and cost: curves of AUC against cost from cached scores of every head.

Unusual here: every policy and control is reduced to "row i leaves at head e_i", so one function judges them
all, on any rows; a simulation cannot favour one by how it is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from project.errors import DataError
from project.evaluation.metrics import auc
from project.exits.cost import Stream, mean_depth, row_cost
from project.exits.outputs import HeadOutputs
from project.exits.policies import FixedDepth, Oracle, RandomExit

ORACLE_TOLERANCES = (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 1.0)
RANDOM_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
RIVAL_TOLERANCE = 0.002


class Leaves(Protocol):
    """A policy or a control."""

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """Index of the head at which each row leaves, (n,) int64."""
        ...


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """n rows with what it takes to judge a policy on them.

    Attributes:
        outputs: Calibrated outputs of all K heads.
        labels: (n,) 0 or 1.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        stream: Whether the stream is paid for ("cold").
    """

    outputs: HeadOutputs
    labels: ArrayLike
    target_tokens: Tensor
    stream_tokens: Tensor
    stream: Stream = "cold"

    def scores(self, exits: Tensor) -> Tensor:
        """(n,) the calibrated logit each row leaves with."""
        return self.outputs.logits.gather(1, exits[:, None]).squeeze(1)

    def depth(self, exits: Tensor) -> Tensor:
        """(n,) the layer each row leaves at."""
        return torch.tensor(self.outputs.layers, device=exits.device)[exits]

    def token_layers(self, exits: Tensor) -> Tensor:
        """(n,) what each row costs as a request of its own."""
        return row_cost(self.depth(exits), self.target_tokens, self.stream_tokens, self.stream)


def point(rows: ScoredRows, exits: Tensor) -> dict[str, Any]:
    """One point of a curve.

    Args:
        rows: The n rows.
        exits: (n,) index of the head at which each leaves.

    Returns:
        `cost` (token-layers relative to full depth), `mean_depth`, `auc` and `auc_drop` from full depth, the
        last two None where a class is missing.
    """
    last = torch.full_like(exits, rows.outputs.heads - 1)
    whole = float(rows.token_layers(last).sum())
    labels = np.asarray(rows.labels)
    best, value = (auc(rows.scores(e).cpu().numpy(), labels) for e in (last, exits))
    return {
        "cost": float(rows.token_layers(exits).sum()) / whole if whole else 1.0,
        "mean_depth": mean_depth(rows.depth(exits)),
        "auc": value,
        "auc_drop": None if best is None or value is None else best - value,
    }


def curve(rows: ScoredRows, policies: Iterable[Leaves]) -> list[dict[str, Any]]:
    """Points of policies or controls, in their order."""
    return [point(rows, policy.exits(rows.outputs)) for policy in policies]


def control_curves(
    outputs: HeadOutputs,
    labels: ArrayLike,
    target_tokens: Tensor,
    stream_tokens: Tensor,
    stream: Stream = "cold",
    only: str | None = None,
) -> list[dict[str, Any]]:
    """Curves of the controls every policy is held against.

    Args:
        outputs: Calibrated outputs of n rows.
        labels: (n,) 0 or 1.
        target_tokens: (n,) tokens of a row's own.
        stream_tokens: (n,) tokens of its stream.
        stream: Whether the stream is paid for ("cold").
        only: Name of the one control wanted; None: all.

    Returns:
        {`name`, `pareto`} of `fixed_depth` (one point per head, shallow first, each with its `layer`), `random`
        (from nobody to everybody by lot) and `oracle` (from strict to lax).
    """
    rows = ScoredRows(outputs, labels, target_tokens, stream_tokens, stream)
    controls: dict[str, list[Leaves]] = {
        "fixed_depth": [FixedDepth(k) for k in range(outputs.heads)],
        "random": [RandomExit(share) for share in RANDOM_SHARES],
        "oracle": [Oracle(tolerance) for tolerance in ORACLE_TOLERANCES],
    }
    found = {name: curve(rows, policies) for name, policies in controls.items() if only in (None, name)}
    for layer, static in zip(outputs.layers, found.get("fixed_depth", []), strict=False):
        static["layer"] = layer
    return [{"name": name, "pareto": points} for name, points in found.items()]


def cost_matched_auc(curve: Sequence[dict[str, Any]], cost: float) -> float | None:
    """AUC of a curve at this cost, linear between its points and flat outside; None where one is undefined.

    Between two static depths it is what sending a share of requests to either would score, about.
    """
    known = sorted((p["cost"], p["auc"]) for p in curve if p["auc"] is not None)
    if not known or len(known) < len(curve):
        return None
    costs, values = zip(*known, strict=True)
    return float(np.interp(cost, costs, values))


def rival_depth(scores: Tensor, labels: ArrayLike, tolerance: float = RIVAL_TOLERANCE) -> int:
    """Index of the honest rival: the shallowest static head whose AUC is near the best head's.

    Args:
        scores: (n, K) logits of every head.
        labels: (n,) 0 or 1.
        tolerance: Largest AUC below the best.

    Raises:
        DataError: One class.
    """
    values = [auc(column.cpu().numpy(), np.asarray(labels)) for column in scores.unbind(dim=1)]
    known = [value for value in values if value is not None]
    if not known:
        raise DataError(
            f"the best static depth needs labels of both classes, found one class in {scores.shape[0]} rows; use "
            "more validation data or another data.protocol.label"
        )
    # 1e-12: a head that is exactly `tolerance` below stays in, whatever the last bits say
    return next(k for k, value in enumerate(known) if value >= max(known) - tolerance - 1e-12)
