"""What an exit plan did to a set of rows: its scores' worth, what it saved, and who else could have done that.

Unusual here: the adaptive score is judged against three rivals on the same rows, paired: full depth (the drop), the
honest rival (the shallowest static head within .002 of the best, chosen on `tune`), and the best static head that costs
no more. Every cost is token-layers of a request of one candidate, its stream included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import auc, head_metrics, probabilities
from project.exits.certificate import row_losses
from project.exits.cost import Stream, row_cost
from project.exits.plan import ExitPlan, Plans

Floats = NDArray[np.float64]


class PlannedRows:
    """Rows of a score table under a plan: where each leaves, with which logit, at which cost.

    Args:
        plan: The calibrated plan.
        scores: n labelled rows of a score table.
        features: (n, F) counting features of the same rows.
        stream: Whether a request's stream runs (cold) or is cached (warm).
        draws: Resamples of users behind every interval.
    """

    def __init__(
        self, plan: ExitPlan, scores: pl.DataFrame, features: Floats, stream: Stream, draws: int = 1000
    ) -> None:
        self._scores, self._features, self._draws = scores, features, draws
        outputs = plan.outputs(scores, features)
        layer, logit = plan.emitted(outputs)
        self.plan = plan
        self.labels, self.users = scores["label"].to_numpy(), scores["user"].to_numpy()
        self.calibrated: Floats = outputs.logits.double().numpy()
        self.layer: NDArray[np.int64] = layer.numpy()
        self.logit: Floats = logit.double().numpy()
        self._target, self._shared = (
            torch.from_numpy(scores[f"{x}_tokens"].to_numpy().copy()) for x in ("target", "stream")
        )
        self._stream = stream
        self._bootstrap = UserBootstrap(self.users, draws)

    def under(self, plan: ExitPlan) -> PlannedRows:
        """The same rows under another plan."""
        return PlannedRows(plan, self._scores, self._features, self._stream, self._draws)

    def cost(self, layer: NDArray[np.int64]) -> Floats:
        """Token-layers (n,) where each row leaves at `layer` (n,)."""
        spent = row_cost(torch.from_numpy(layer), self._target, self._shared, self._stream)
        return spent.double().numpy()

    def static_cost(self, layer: int) -> Floats:
        """Token-layers (n,) where every row leaves at one layer."""
        return self.cost(np.full(self.layer.shape, layer, dtype=np.int64))

    def exits(self) -> dict[int, dict[str, Any]]:
        """By layer: the calibrated head on all rows, the share that leaves there, and the AUC of those that do."""
        found = {}
        for column, layer in enumerate(self.plan.layers):
            gone = self.layer == layer
            metrics = head_metrics(self.calibrated[:, column], self.labels, self.users)
            found[layer] = {
                "calibrated": {name: metrics[name] for name in ("auc", "log_loss", "brier", "ece")},
                "exit_share": float(gone.mean()),
                "auc_leaving": auc(self.logit[gone], self.labels[gone]),
            }
        return found

    def summary(self, rival: int) -> dict[str, Any]:
        """What a plan is worth on the rows.

        Args:
            rival: Layer of the honest rival, chosen on `tune`.
        """
        full, spent = self.plan.layers[-1], self.cost(self.layer)
        drop = self._bootstrap.difference_interval(self._head(full), self.logit, self.labels)
        saved = self._bootstrap.ratio_interval(self.static_cost(full), spent)
        return {
            "criterion": self.plan.criterion,
            **head_metrics(self.logit, self.labels, self.users),
            "auc_interval": self._bootstrap.auc_interval(self.logit, self.labels),
            "mean_depth": float(self.layer.mean()),
            "exit_shares": {str(k): float((self.layer == k).mean()) for k in self.plan.layers},
            "auc_drop": drop["value"],
            "auc_drop_interval": drop["interval"],
            "token_layer_speedup": saved["value"],
            "token_layer_speedup_interval": saved["interval"],
            "speedup_over_rival": self._bootstrap.ratio_interval(self.static_cost(rival), spent),
            "rival": self._against(rival),
            "equal_cost": self._against(self._static_of_cost(float(spent.sum()))),
        }

    def risk(self, name: str, unit: str) -> dict[str, Any]:
        """The certified risk on these rows: {`risk`, `value`, `interval`}; a report, not a guarantee.

        Args:
            name: A risk of project.exits.certificate that score requests have; auc_gap is of the pooled rows here.
            unit: Of the certificate; of users the risk is a mean over users, each counting once.
        """
        full = self._head(self.plan.layers[-1])
        if name == "auc_gap":
            return {"risk": name, **self._bootstrap.difference_interval(full, self.logit, self.labels)}
        losses = row_losses(name, probabilities(self.logit), probabilities(full), self.labels)
        _, user, rows = np.unique(self.users, return_inverse=True, return_counts=True)
        weights = np.ones_like(losses) if unit == "rows" else 1 / rows[user]
        return {"risk": name, **self._bootstrap.ratio_interval(losses * weights, weights)}

    def _head(self, layer: int) -> Floats:
        return self.calibrated[:, self.plan.layers.index(layer)]

    def _static_of_cost(self, budget: float) -> int:
        """The deepest static head that costs no more; the shallowest where all cost more."""
        within = [k for k in self.plan.layers if self.static_cost(k).sum() <= budget]
        return within[-1] if within else self.plan.layers[0]

    def _against(self, layer: int) -> dict[str, Any]:
        """Adaptive minus a static head, in AUC, paired."""
        gain = self._bootstrap.difference_interval(self.logit, self._head(layer), self.labels)
        return {
            "layer": layer,
            "auc": auc(self._head(layer), self.labels),
            "auc_gain": gain["value"],
            "auc_gain_interval": gain["interval"],
        }


def adaptive_summary(
    plans: Plans, rows: PlannedRows, promise: tuple[str, str] | None = None
) -> dict[str, Any]:
    """The `adaptive` part of a result file.

    Args:
        plans: Of the run.
        rows: Labelled rows under `plans.plan`.
        promise: Name and unit of the certified risk, to be measured on them.
    """

    def measured(rows: PlannedRows) -> dict[str, Any]:
        return rows.summary(plans.rival) | ({} if promise is None else {"risk": rows.risk(*promise)})

    without = rows.under(plans.without).summary(plans.rival_without)
    certified = None if plans.certified is None else measured(rows.under(plans.certified))
    return measured(rows) | {"without_exit_0": without, "certified": certified}
