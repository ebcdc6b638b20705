"""An offset and a slope for a floor's logits, so that its log loss says what it knows and not how sure it sounds.

Unusual here: they are fitted on validation's fold `select`, of every floor alike; never on `tune`, where the best floor
is chosen, nor on `certify` or test. Peers stop training on `select`, so theirs may be a little too steep. Slopes are
kept above zero, so no AUC changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from project.evaluation.metrics import brier, ece, log_loss, probabilities
from project.exits.calibration import fit_calibration

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FloorCalibration:
    """slope * logit + offset (Platt 1999).

    Attributes:
        slope: At least .001.
        offset: Added last.
    """

    slope: float
    offset: float

    @classmethod
    def fit(cls, logits: Floats, labels: NDArray[Any]) -> FloorCalibration | None:
        """Maximum likelihood; None where a class is missing, so that nothing can be fitted.

        Args:
            logits: (n,) of the targets of `select`. Where all are equal the slope is 1: only the offset can be known.
            labels: (n,) 0 or 1.
        """
        share = float(np.mean(labels)) if len(labels) else 0.0
        if not 0 < share < 1:
            return None
        if np.ptp(logits) == 0:
            return cls(1.0, float(np.log(share) - np.log(1 - share) - logits[0]))
        found = fit_calibration(torch.from_numpy(logits)[:, None], labels, (0,), prior=False)
        slope, _, offset = found.values[0].tolist()
        return cls(slope, offset)

    def apply(self, logits: Floats) -> Floats:
        """Calibrated logits (n,)."""
        return self.slope * logits + self.offset

    def judged(self, logits: Floats, labels: ArrayLike) -> dict[str, Any]:
        """The `calibrated` part of a floor's row: `log_loss`, `brier`, `ece` after it, `slope` and `offset`.

        Args:
            logits: (n,) before calibration.
            labels: (n,) 0 or 1.
        """
        chance = probabilities(self.apply(logits))
        metrics = {
            "log_loss": log_loss(chance, labels),
            "brier": brier(chance, labels),
            "ece": ece(chance, labels),
        }
        return metrics | {"slope": self.slope, "offset": self.offset}
