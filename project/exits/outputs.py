"""What the heads said about each row, the only thing an exit criterion may read.

Unusual here: `until(k)` cuts the later heads off, so a criterion that is asked at head k cannot read what the
trunk has not computed yet. Shapes: n rows, K heads (exits) in ascending order of layer, F evidence numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from project.evaluation.metrics import PROBABILITY_FLOOR


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Calibrated outputs of n rows at K heads.

    Attributes:
        layers: (K,) layer of each head, ascending; 0 is the prior, which runs before the trunk.
        logits: (n, K) calibrated logits, float32 or float64.
        evidence: (n, F) numbers known before the trunk runs (log counts, rates); F may be 0.
    """

    layers: tuple[int, ...]
    logits: Tensor
    evidence: Tensor

    def __post_init__(self) -> None:
        n, heads = self.logits.shape
        if len(self.layers) != heads:
            raise ValueError(f"{len(self.layers)} layers, but logits of shape {(n, heads)}")
        if self.evidence.ndim != 2 or self.evidence.shape[0] != n:
            raise ValueError(f"{n} rows of logits, but evidence of shape {tuple(self.evidence.shape)}")
        if any(a >= b for a, b in zip(self.layers, self.layers[1:], strict=False)):
            raise ValueError(f"layers must ascend, found {self.layers}")

    @classmethod
    def of(cls, layers: Sequence[int], logits: Tensor, evidence: Tensor | None = None) -> HeadOutputs:
        """The evidence in the type of the logits; None is F = 0. Arguments as the attributes."""
        known = logits.new_zeros(logits.shape[0], 0) if evidence is None else evidence.to(logits)
        return cls(tuple(layers), logits, known)

    @property
    def heads(self) -> int:
        """K, the number of heads that have spoken."""
        return len(self.layers)

    @property
    def probabilities(self) -> Tensor:
        """(n, K) probabilities as emitted: sigmoid, clipped to [.001, .999]."""
        return torch.sigmoid(self.logits).clamp(PROBABILITY_FLOOR, 1.0 - PROBABILITY_FLOOR)

    def until(self, k: int) -> HeadOutputs:
        """Heads 0..k only: what is known when the rows stand at head k."""
        if not 0 <= k < self.heads:
            raise ValueError(f"head {k} of {self.heads}")
        end = k + 1
        return HeadOutputs(self.layers[:end], self.logits[:, :end], self.evidence)

    def rows(self, index: Tensor) -> HeadOutputs:
        """The rows of `index`: (m,) positions or a mask (n,)."""
        return HeadOutputs(self.layers, self.logits[index], self.evidence[index])
