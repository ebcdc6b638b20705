"""Policies: at which head does each row leave? A criterion with thresholds, and the controls it must beat.

Unusual here: the rule that an engine calls at one exit (`Policy.leaves`) is the one that a simulation on
cached logits calls (`Policy.exits`), so a simulated policy cannot differ from the one that is served.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from project.errors import ConfigError
from project.exits.criteria import Criterion, HeadOutputs


def leave(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Index of the head at which each row leaves: the first whose confidence reaches the threshold.

    Args:
        confidence: (n, K).
        thresholds: (K,); +inf: nobody leaves there. The last head takes everyone, whatever its threshold.

    Returns:
        (n,) int64 in 0..K-1.
    """
    leaves = confidence >= thresholds.to(confidence)
    leaves[:, -1] = True
    return leaves.to(torch.int8).argmax(dim=1)  # argmax returns the first of equals


class Policy:
    """A criterion and one threshold per head.

    Args:
        criterion: Fitted criterion.
        thresholds: (K,), +inf: nobody leaves there; -inf: everybody does. The last one is -inf.
        layers: (K,) layer of each head.

    Raises:
        ConfigError: Not one threshold per head, a NaN, or a last one that is not -inf.
    """

    def __init__(self, criterion: Criterion, thresholds: Tensor, layers: Sequence[int]) -> None:
        if thresholds.shape != (len(layers),) or thresholds.isnan().any() or thresholds[-1] != -torch.inf:
            raise ConfigError(
                f"a policy for exits at layers {tuple(layers)} needs one threshold each, the last -inf, found "
                f"{thresholds.tolist()}; run the command calibrate"
            )
        self.criterion = criterion
        self.thresholds = thresholds
        self.layers = tuple(layers)

    def leaves(self, outputs: HeadOutputs) -> Tensor:
        """Which rows leave at the last head shown; what an engine calls at an exit.

        Args:
            outputs: The n rows that are still running, heads 0..k.

        Returns:
            (n,) bool.
        """
        head = outputs.heads - 1
        if outputs.layers != self.layers[: outputs.heads]:
            raise ConfigError(
                f"the policy was made for exits at layers {self.layers}, found {outputs.layers}"
            )
        if outputs.heads == len(self.layers):
            return torch.ones_like(outputs.logits[:, -1], dtype=torch.bool)
        confidence = self.criterion.confidence(outputs)
        here_or_later = torch.stack([confidence, torch.full_like(confidence, torch.inf)], dim=1)
        return leave(here_or_later, torch.stack([self.thresholds[head], self.thresholds[-1]])) == 0

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """Index of the head at which each of n rows leaves, (n,) int64; all K heads shown."""
        running = torch.arange(outputs.logits.shape[0], device=outputs.logits.device)
        exits = torch.full_like(running, len(self.layers) - 1)
        for head in range(len(self.layers)):
            gone = self.leaves(outputs.rows(running).until(head))
            exits[running[gone]] = head
            running = running[~gone]
        return exits


class FixedDepth:
    """Control: everyone leaves at one head, that is a static shallow model.

    Args:
        index: Index of the head.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """(n,) all `index`."""
        if not 0 <= self.index < outputs.heads:
            raise ConfigError(f"fixed depth at head {self.index}, but the heads are 0..{outputs.heads - 1}")
        return torch.full_like(outputs.logits[:, 0], self.index, dtype=torch.int64)


class RandomExit:
    """Control: rows leave by lot, knowing nothing.

    Args:
        shares: Probability to leave at a head that a row reaches: one for all heads but the last, or K - 1.
        seed: Seed of the lots.
    """

    def __init__(self, shares: float | Sequence[float], seed: int = 0) -> None:
        given = [shares] if isinstance(shares, int | float) else list(shares)
        if not given or not all(0 <= share <= 1 for share in given):
            raise ConfigError(f"random exit: shares must be in [0, 1], found {shares}")
        self.shares = given
        self.seed = seed

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """(n,) int64."""
        early = outputs.heads - 1
        if len(self.shares) not in (1, early):
            raise ConfigError(f"random exit: {len(self.shares)} shares for {early} heads before the last")
        shares = torch.tensor(self.shares * (early if len(self.shares) == 1 else 1), dtype=torch.float64)
        lots = torch.rand(
            (outputs.logits.shape[0], outputs.heads),
            generator=torch.Generator().manual_seed(self.seed),
            dtype=torch.float64,
        )
        # leaving where the lot is below the share; the last share is out of every lot's reach but taken anyway
        table = -lots
        thresholds = torch.cat([-shares, torch.tensor([-torch.inf], dtype=torch.float64)])
        table[table == 0] = -torch.finfo(torch.float64).tiny  # a share of 0 must never win
        return leave(table, thresholds).to(outputs.logits.device)


class Oracle:
    """Control: leaves at the first head whose probability is near the last head's; no policy can know that.

    It knows no labels: an upper bound for predicting drift, not for being right.

    Args:
        tolerance: Largest |p_k - p_last|.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """(n,) int64."""
        probabilities = outputs.probabilities
        drift = (probabilities - probabilities[:, -1:]).abs()
        return leave(-drift, drift.new_full((outputs.heads,), -self.tolerance))
