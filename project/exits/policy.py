"""Policies: the head at which each row leaves, by a criterion with thresholds.

An engine calls `Policy.leaves` at one exit, a simulation calls `Policy.exits` on cached logits; both use `leave`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from project.errors import ConfigError
from project.exits.criteria import Criterion, HeadOutputs


def leave(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Index (n,) of the first head whose confidence (n, K) reaches its threshold (K,); the last head takes everyone."""
    leaves = confidence >= thresholds.to(confidence)
    # the last head is never asked
    leaves[:, -1] = True
    return leaves.to(torch.int8).argmax(dim=1)  # argmax returns the first of equals


class Policy:
    """A fitted criterion and a threshold per head: +inf where nobody leaves, -inf, as at the last, where all do."""

    def __init__(
        self, criterion: Criterion, thresholds: Tensor, layers: Sequence[int]
    ) -> None:
        if (
            thresholds.shape != (len(layers),)
            or thresholds.isnan().any()
            or thresholds[-1] != -torch.inf
        ):
            raise ConfigError(
                f"a policy for exits at layers {tuple(layers)} needs one threshold each, the last -inf, found "
                f"{thresholds.tolist()}; run the command calibrate"
            )
        self.criterion, self.thresholds, self.layers = criterion, thresholds, tuple(layers)

    def leaves(self, outputs: HeadOutputs) -> Tensor:
        """Which of n running rows leave at the last head shown, (n,) bool."""
        if outputs.layers != self.layers[: outputs.heads]:
            raise ConfigError(
                f"the policy was made for exits at layers {self.layers}, found {outputs.layers}"
            )
        if outputs.heads == len(self.layers):
            return torch.ones_like(outputs.logits[:, -1], dtype=torch.bool)
        confidence = self.criterion.confidence(outputs)
        # as a table of two heads, this one and one that takes everyone, so that `leave` decides
        here_or_later = torch.stack(
            [confidence, torch.full_like(confidence, torch.inf)], dim=1
        )
        # stacked, not indexed by a list: an engine's thresholds are on the device, and this
        # needs no host sync
        limits = torch.stack([self.thresholds[outputs.heads - 1], self.thresholds[-1]])
        return leave(here_or_later, limits) == 0

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """Index of the head at which each of n rows leaves, (n,) int64; `outputs` has all K heads."""
        # (m,) positions of the rows that still run; shrinks at every head
        running = torch.arange(outputs.logits.shape[0], device=outputs.logits.device)
        # (n,)
        exits = torch.full_like(running, len(self.layers) - 1)
        for head in range(len(self.layers)):
            # (m,) only what an engine knows here: running rows, heads so far
            gone = self.leaves(outputs.rows(running).until(head))
            exits[running[gone]] = head
            running = running[~gone]
        return exits
