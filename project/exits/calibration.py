"""Per-head affine calibration on `tune`: scores of different heads that share a scale, as pooled AUC needs.

Unusual here: slopes are kept above zero, so without a exit 0 no head's own AUC changes; with a exit 0 (exit 0)
its logit enters every head, score_k = a_k logit_k + b_k logit_0 + c_k, which is what makes shallow heads good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from project.errors import DataError

Floats = NDArray[np.float64]

MINIMUM_SLOPE = 1e-3
RIDGE = 1e-9
"""Per row, on the slopes of standardised logits: bounds them where a head separates the classes."""
ITERATIONS = 100


@dataclass(frozen=True, eq=False)
class Calibration:
    """score_k = a_k logit_k + b_k logit_0 + c_k.

    Attributes:
        layers: (K,) layer of each head.
        values: (K, 3) float64 columns a, b, c; b is 0 without a exit 0 and at exit 0 itself.
    """

    layers: tuple[int, ...]
    values: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """Raw logits (n, j) of the first j <= K heads -> calibrated logits (n, j), of the same type."""
        if logits.ndim != 2 or logits.shape[1] > len(self.layers):
            raise ValueError(f"calibrated for {len(self.layers)} heads, found logits {tuple(logits.shape)}")
        slope, exit_0, offset = self.values[: logits.shape[1]].to(logits).unbind(dim=1)
        return logits * slope + logits[:, :1] * exit_0 + offset

    def as_dict(self) -> dict[str, dict[str, float]]:
        """By layer, for result files: {"2": {"logit": a, "exit_0": b, "offset": c}}."""
        names = ("logit", "exit_0", "offset")
        rows: list[list[float]] = self.values.tolist()
        return {str(k): dict(zip(names, row, strict=True)) for k, row in zip(self.layers, rows, strict=True)}


def fit_calibration(logits: Tensor, labels: ArrayLike, layers: Sequence[int], exit_0: bool) -> Calibration:
    """Maximum likelihood per head, with slopes a_k >= .001.

    Args:
        logits: (n, K) raw logits of the rows of `tune`; column 0 is the exit 0 where there is one.
        labels: (n,) 0 or 1.
        layers: (K,) layer of each head, for messages.
        exit_0: Column 0 is exit 0 and enters every deeper head.

    Raises:
        DataError: NaN or infinite logits, one class, heads that are all equal, a constant head.
    """
    values = logits.detach().double().cpu().numpy()
    positive = np.asarray(labels, dtype=np.float64)
    _check(values, positive, layers)
    rows = []
    for head in range(values.shape[1]):
        with_exit_0 = exit_0 and head > 0
        features = values[:, [head, 0]] if with_exit_0 else values[:, [head]]
        a, *rest = _logistic(features, positive)
        rows.append([a, rest[0] if with_exit_0 else 0.0, rest[-1]])
    return Calibration(tuple(layers), torch.tensor(rows, dtype=torch.float64))


def _check(values: Floats, positive: Floats, layers: Sequence[int]) -> None:
    if values.shape != (positive.size, len(layers)):
        raise ValueError(f"logits {values.shape}, {positive.size} labels, {len(layers)} layers")
    bad = ~np.isfinite(values)
    if bad.any():
        head = int(bad.any(axis=0).argmax())
        raise DataError(
            f"{int(bad[:, head].sum())} of {positive.size} logits of the exit at layer {layers[head]} are NaN or "
            "infinite: the model diverged; train again with a lower model.optim.learning_rate"
        )
    if np.unique(positive).size < 2:
        raise DataError(
            f"calibration needs both classes in the fold tune, found {positive.size} rows, "
            f"{int(positive.sum())} positive; use more validation data or another data.protocol.label"
        )
    constant = np.ptp(values, axis=0) == 0
    if constant.any():
        raise DataError(
            f"the exit at layer {layers[int(constant.argmax())]} gives every row of the fold tune the same logit: "
            "it ranks nothing; remove it from model.exit_layers, or set exit 0: none if it is exit 0"
        )
    if len(layers) > 1 and (values == values[:, :1]).all():
        raise DataError(
            f"the exits at layers {tuple(layers)} are all equal on the fold tune: there is nothing to choose "
            "from; the heads were not trained, or all read one layer"
        )


def _logistic(features: Floats, positive: Floats) -> list[float]:
    """Slopes (first one bounded below) and offset by Newton's method on standardised features.

    The likelihood is concave: where the free optimum breaks the bound, the bounded one lies on it.
    """
    mean, scale = features.mean(axis=0), features.std(axis=0)
    design = np.column_stack([(features - mean) / scale, np.ones(positive.size)])
    found = _newton(design, positive, np.zeros(positive.size))
    bound = MINIMUM_SLOPE * scale[0]
    if found[0] < bound:
        found = np.r_[bound, _newton(design[:, 1:], positive, bound * design[:, 0])]
    slopes = found[:-1] / scale
    return [*slopes.tolist(), float(found[-1] - slopes @ mean)]


def _newton(design: Floats, positive: Floats, offset: Floats) -> Floats:
    """Minimise over w of the log loss of sigmoid(design @ w + offset), ridge on all but the last weight."""
    ridge = RIDGE * np.r_[np.ones(design.shape[1] - 1), 0.0]

    def loss(weights: Floats) -> float:
        score = design @ weights + offset
        return float((np.logaddexp(0, score) - positive * score).mean() + ridge @ weights**2 / 2)

    weights = np.zeros(design.shape[1])
    for _ in range(ITERATIONS):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights + offset, -500, 500)))
        gradient = design.T @ (chance - positive) / positive.size + ridge * weights
        curvature: NDArray[Any] = (design.T * (chance * (1 - chance))) @ design / positive.size
        curvature += np.diag(ridge + 1e-12)
        step = np.linalg.solve(curvature, gradient)
        size, before = 1.0, loss(weights)
        while loss(weights - size * step) > before and size > 1e-6:
            size /= 2
        weights = weights - size * step
        # the loss still to gain is half of this; or rounding leaves no way down
        if gradient @ step < 1e-20 or size <= 1e-6:
            break
    return weights
