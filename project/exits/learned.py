"""The criterion that learns how far a row's probability will still move: ridge regression at every head.

Unusual here: squares and products of a dozen features do what a small network or gradient boosting do on a
few thousand rows (rank correlation with the true drift within .01 on the world of tests/exits/conftest.py),
in closed form, in milliseconds and without a seed. What cannot be known yet (later heads) and what says
nothing (constants) gets scale zero, so features need no mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.criteria import Criterion
from project.exits.outputs import HeadOutputs

SMALLEST_DRIFT = 1e-3  # probabilities are clipped at .001: smaller changes are not told apart
LARGEST = 4.0  # standardised features are clipped here: squares of outliers would rule
DERIVED = 4


class Learned(Criterion):
    """Minus the predicted drift |p_last - p_k|, from the heads so far and the evidence.

    Features of head k: its logits and all earlier ones, |logit_k|, p_k (1 - p_k), log of the last and of the
    largest change of probability, the evidence numbers; standardised.

    Args:
        ridge: Penalty on the squared weights of the standardised basis, in rows: 100 counts as much as a
            hundred rows that say no feature matters.
    """

    learns = True
    _fitted = ("center", "scale", "weight", "intercept")

    def __init__(self, ridge: float = 100.0) -> None:
        if not 0 < ridge < math.inf:
            raise ConfigError(f"learned: ridge is {ridge}, expected a penalty above 0")
        self.ridge = ridge

    def fit(self, outputs: HeadOutputs) -> None:
        """Fit every head but the last."""
        n, heads = outputs.logits.shape
        if n < 2 or heads < 2:
            raise DataError(
                f"learned needs rows and heads of the fold tune to learn from, found {n} rows and {heads} heads; "
                "use more validation data or a criterion that does not learn"
            )
        width = outputs.evidence.shape[1] + DERIVED + heads
        probabilities = outputs.probabilities.double()
        drift = (probabilities[:, :-1] - probabilities[:, -1:]).abs()
        fitted = [
            self._fit_head(_features(outputs.until(k), width).double(), drift[:, k]) for k in range(heads - 1)
        ]
        self._center, self._scale, self._weight, self._intercept = map(torch.stack, zip(*fitted, strict=True))

    def safety(self, outputs: HeadOutputs) -> Tensor:
        """(n,), about [-1, 0]: a prediction may be off by being negative. Asked of all heads but the last."""
        center, scale, weight, offset = (
            self._tensor(key)[outputs.heads - 1].to(outputs.logits) for key in self._fitted
        )
        return -(_basis(_features(outputs, center.numel()), center, scale) @ weight + offset)

    def _fit_head(self, features: Tensor, drift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        center, scale = features.mean(dim=0), inverse_spread(features)
        basis = _basis(features, center, scale)
        mean, basis_scale = basis.mean(dim=0), inverse_spread(basis)
        design = (basis - mean) * basis_scale
        penalty = self.ridge * torch.eye(design.shape[1], dtype=design.dtype, device=design.device)
        weight = (
            torch.linalg.solve(design.T @ design + penalty, design.T @ (drift - drift.mean())) * basis_scale
        )
        return center, scale, weight, drift.mean() - mean @ weight


def _features(outputs: HeadOutputs, width: int) -> Tensor:
    """(n, width): evidence, derived numbers, logits so far; zeros up to F + DERIVED + K, so that heads stack."""
    probabilities = outputs.probabilities
    now = probabilities[:, -1]
    changes = probabilities.diff(dim=1).abs() if outputs.heads > 1 else torch.zeros_like(probabilities)
    derived = [
        outputs.logits[:, -1].abs(),
        now * (1 - now),
        (changes[:, -1] + SMALLEST_DRIFT).log(),
        (changes.amax(dim=1) + SMALLEST_DRIFT).log(),
    ]
    known = torch.cat([outputs.evidence, torch.stack(derived, dim=1), outputs.logits], dim=1)
    return torch.nn.functional.pad(known, (0, width - known.shape[1]))


def _basis(features: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """Standardised features and all their products of two, (n, width (width + 3) / 2)."""
    x = ((features - center) * scale).clamp(-LARGEST, LARGEST)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, x[:, first] * x[:, second]], dim=1)


def inverse_spread(values: Tensor) -> Tensor:
    """1 / standard deviation of each column, 0 for a constant one."""
    spread = values.std(dim=0)
    varies = spread > 1e-6 * (1 + values.mean(dim=0).abs())
    return torch.where(varies, 1 / torch.where(varies, spread, 1.0), 0.0)
