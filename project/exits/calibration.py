"""Per-head affine calibration on the fold tune: scores of all heads on one scale, as pooled AUC needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from project.arrays import F64
from project.errors import DataError

MINIMUM_SLOPE = 1e-3
# per row, on slopes of standardised logits: bounds them where a head separates the classes
RIDGE = 1e-9
ITERATIONS = 100


@dataclass(frozen=True, eq=False)
class Calibration:
    """score_k = a_k logit_k + b_k logit_0 + c_k.

    `layers` are the K heads', `values` (K, 3) are a, b, c; b is 0 without exit 0, and at exit 0.
    """

    layers: tuple[int, ...]
    values: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """Raw logits (n, j) of the first j <= K heads -> calibrated logits (n, j), of the same type."""
        slope, exit_0, offset = self.values[: logits.shape[1]].to(logits).unbind(dim=1)
        return logits * slope + logits[:, :1] * exit_0 + offset

    def as_dict(self) -> dict[str, dict[str, float]]:
        """By layer, for result files: {"2": {"logit": a, "exit_0": b, "offset": c}}."""
        rows: list[list[float]] = self.values.tolist()
        return {
            str(layer): {"logit": a, "exit_0": b, "offset": c}
            for layer, (a, b, c) in zip(self.layers, rows, strict=True)
        }


def fit_calibration(
    logits: Tensor, labels: ArrayLike, layers: Sequence[int], exit_0: bool
) -> Calibration:
    """Maximum likelihood per head on raw logits (n, K) and labels (n,), with slopes a_k >= .001.

    Where `exit_0`, column 0 is exit 0 and enters every deeper head, which improves shallow heads. Without it,
    no head's own AUC changes.
    """
    values = logits.detach().double().cpu().numpy()
    positive = np.asarray(labels, dtype=np.float64)
    # 1. refuse what has no calibration
    if np.unique(positive).size < 2:
        raise DataError(
            f"calibration needs both classes in the fold tune, found {positive.size} rows, {int(positive.sum())} "
            "positive; use more validation data, another data.protocol.label, or "
            "raise the second number of data.protocol.fold_shares"
        )
    bad = ~np.isfinite(values)  # (n, K)
    constant = np.ptp(values, axis=0) == 0  # (K,)
    if bad.any():
        head = int(bad.any(axis=0).argmax())
        raise DataError(
            f"{int(bad[:, head].sum())} of {positive.size} logits of the exit at layer {layers[head]} are NaN or "
            "infinite: the model diverged; train again with a lower model.optim.learning_rate"
        )
    if constant.any():
        raise DataError(
            f"the exit at layer {layers[int(constant.argmax())]} gives every row of the fold tune the same logit; "
            "remove it from model.exit_layers, or set exits.exit_0: false if it is exit 0"
        )
    if len(layers) > 1 and (values == values[:, :1]).all():
        raise DataError(
            f"the exits at layers {tuple(layers)} are all equal on the fold tune: the heads were not trained, or all "
            "read one layer"
        )
    # 2. slopes and offset of each head, by Newton's method on standardised logits
    rows = []
    for head in range(values.shape[1]):
        with_exit_0 = exit_0 and head > 0
        # (n, 2) or (n, 1): the head's own logit first
        features = values[:, [head, 0]] if with_exit_0 else values[:, [head]]
        mean = features.mean(axis=0)
        scale = features.std(axis=0)
        # the offset's column is last, and bears no penalty
        design = np.column_stack([(features - mean) / scale, np.ones(positive.size)])
        found = _newton(design, positive, np.zeros(positive.size))
        # the likelihood is concave: where the free optimum breaks the bound on the slope,
        # the bounded one lies on it
        bound = MINIMUM_SLOPE * scale[0]
        if found[0] < bound:
            found = np.r_[bound, _newton(design[:, 1:], positive, bound * design[:, 0])]
        # back from standardised logits to logits as they are
        slopes = found[:-1] / scale
        rows.append(
            [slopes[0], slopes[1] if with_exit_0 else 0.0, found[-1] - slopes @ mean]
        )
    return Calibration(tuple(layers), torch.tensor(rows, dtype=torch.float64))


def _newton(design: F64, positive: F64, offset: F64) -> F64:
    """Weights w that minimise the log loss of sigmoid(design @ w + offset), ridge on all but the last."""
    ridge = RIDGE * np.r_[np.ones(design.shape[1] - 1), 0.0]

    def loss(weights: F64) -> float:
        score = design @ weights + offset
        return float(
            (np.logaddexp(0, score) - positive * score).mean() + ridge @ weights**2 / 2
        )

    weights: F64 = np.zeros(design.shape[1])
    for _ in range(ITERATIONS):
        # (n,) at the weights so far
        chance = 1 / (1 + np.exp(-np.clip(design @ weights + offset, -500, 500)))
        gradient = design.T @ (chance - positive) / positive.size + ridge * weights
        curvature = (design.T * (chance * (1 - chance))) @ design / positive.size + np.diag(
            ridge + 1e-12
        )
        step = np.linalg.solve(curvature, gradient)
        # a full Newton step may overshoot: it is halved until the loss is smaller
        size = 1.0
        before = loss(weights)
        while loss(weights - size * step) > before and size > 1e-6:
            size /= 2
        weights = weights - size * step
        # the loss still to gain is half of this; or rounding allows no smaller loss
        if gradient @ step < 1e-20 or size <= 1e-6:
            break
    return weights
