"""The criterion that asks what depth similar rows needed (RAEE, Huang et al. 2024, where this takes a database).

Unusual here: the database is the tune rows' own scores, a few thousand short vectors, so the look-up is one
small distance matrix. Fitted state is as large as the fold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.criteria import Criterion
from project.exits.learned import inverse_spread
from project.exits.outputs import HeadOutputs

CHUNK = 1024  # rows whose distances are held at once


class NeighbourDepth(Criterion):
    """Minus the mean depth that the nearest tune rows still needed from this head on.

    A tune row needed depth up to the first head from which on |p_k - p_last| stayed within the tolerance.
    Nearness is Euclidean in logits so far and evidence, each standardised.

    Args:
        neighbours: Number of nearest rows that are averaged; all rows where there are fewer.
        tolerance: Drift of a probability that counts as none.
    """

    learns = True
    _fitted = ("logits", "evidence", "needed", "layers", "scale")

    def __init__(self, neighbours: int = 32, tolerance: float = 0.02) -> None:
        if neighbours < 1 or not 0 <= tolerance <= 1:
            raise ConfigError(
                f"neighbour_depth: neighbours is {neighbours} (expected at least 1), tolerance is {tolerance} "
                "(expected a drift in [0, 1])"
            )
        self.neighbours, self.tolerance = neighbours, tolerance

    def fit(self, outputs: HeadOutputs) -> None:
        """Remember every row, and the layer it needed."""
        if outputs.logits.shape[0] < 2:
            raise DataError("neighbour_depth needs rows in the fold tune to compare with, found fewer than 2")
        self._layers = torch.tensor(outputs.layers, device=outputs.logits.device)
        self._needed = self._layers[needed_head(outputs, self.tolerance)]
        self._logits, self._evidence = outputs.logits.clone(), outputs.evidence.clone()
        self._scale = inverse_spread(torch.cat([outputs.evidence, outputs.logits], dim=1))

    def safety(self, outputs: HeadOutputs) -> Tensor:
        """(n,) minus the mean number of layers still needed, at most 0."""
        known, evidence, needed, layers, scale = (self._tensor(key) for key in self._fitted)
        heads = outputs.heads
        scale = scale[: evidence.shape[1] + heads].to(outputs.logits)
        seen = torch.cat([evidence, known[:, :heads]], dim=1).to(outputs.logits) * scale
        asked = torch.cat([outputs.evidence, outputs.logits], dim=1) * scale
        still = (needed - layers[heads - 1]).clamp(min=0).to(outputs.logits)
        count = min(self.neighbours, seen.shape[0])
        parts = [
            still[_distance(chunk, seen).topk(count, dim=1, largest=False).indices].mean(dim=1)
            for chunk in torch.split(asked, CHUNK)
        ]
        return -torch.cat(parts)


def _distance(asked: Tensor, seen: Tensor) -> Tensor:
    # not by matrix product, whose rounding depends on how many rows are asked about
    return torch.cdist(asked, seen, compute_mode="donot_use_mm_for_euclid_dist")


def needed_head(outputs: HeadOutputs, tolerance: float) -> Tensor:
    """Index of the first head from which on every |p_k - p_last| is within the tolerance, (n,) int64."""
    probabilities = outputs.probabilities
    far = (probabilities - probabilities[:, -1:]).abs() > tolerance
    place = torch.arange(1, outputs.heads + 1, device=far.device)
    return (far * place).amax(dim=1)  # one behind the last head that is far
