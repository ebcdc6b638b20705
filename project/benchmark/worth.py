"""What a side's scores are worth, from a run's score tables: AUC on all test rows, drops and gains with intervals.

Unusual here: nothing is scored. Candidates do not see each other, so a row scores in a request what it scored in the
test; and plans for other workloads are made on `tune`, as calibration makes the run's own.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from project.bootstrap import UserBootstrap
from project.callbacks.exit_calibration import Plans, features_of
from project.exits.budget import budget_plan
from project.exits.cost import Stream
from project.exits.criteria import Criterion
from project.exits.outputs import HeadOutputs
from project.exits.plan import ExitPlan, Floats
from project.exits.policies import Policy
from project.exits.settings import ExitSettings
from project.metrics import auc

if TYPE_CHECKING:
    from project.data.datamodule import InteractionData
    from project.model.module import ExitRecommender

Worth = dict[str, Any]

INT8 = "test-int8"  # the score table that `test --int8 true` writes


class RunWorth:
    """Plans and AUCs of one run.

    Args:
        model: The run, with exit 0.
        data: Evidence of its rows.
        folder: Its score tables; what is missing there is unknown here.
        plans: Its exit plans.
        settings: Its budget.
    """

    def __init__(
        self,
        model: ExitRecommender,
        data: InteractionData,
        folder: Path,
        plans: Plans,
        settings: ExitSettings,
    ) -> None:
        self.plans, self.rival = plans, plans.rival
        self._settings = {f.name: getattr(settings, f.name) for f in fields(ExitSettings)}
        self._tables: dict[str, tuple[pl.DataFrame, Floats]] = {}
        self._known: dict[object, Worth] = {}
        self._made: dict[object, ExitPlan] = {}
        for name in ("valid", "test", INT8):
            path = folder / "scores" / f"{name}.parquet"
            if path.is_file():
                scores = pl.read_parquet(path)
                if name == "valid":
                    scores = scores.filter(pl.col("fold") == "tune")
                self._tables[name] = scores, features_of(model, data, scores)
        if "test" in self._tables:
            self._bootstrap = UserBootstrap(self._tables["test"][0]["user"].to_numpy())

    def static(self, layer: int, table: str = "test") -> Worth:
        """Of one calibrated head: auc and auc_drop with its interval.

        Args:
            layer: Its layer.
            table: Which scores: test, or those of int8 weights; the drop is from full depth of test.
        """
        if not {"test", table} <= self._tables.keys():
            return {}
        logits, labels = self._calibrated(table)
        return self._drop(logits[:, self.plans.plan.layers.index(layer)], labels)

    def int8(self, plan: ExitPlan) -> Worth:
        """Of a plan with int8 weights; the drop is from full depth in floating point."""
        if not {"test", INT8} <= self._tables.keys():
            return {}
        _, labels = self._calibrated(INT8)
        _, emitted = plan.emitted(plan.outputs(*self._tables[INT8]))
        return self._drop(emitted.double().numpy(), labels)

    def _calibrated(self, table: str) -> tuple[Floats, Any]:
        scores, features = self._tables[table]
        logits = self.plans.plan.outputs(scores, features).logits.double().numpy()
        return logits, scores["label"].to_numpy()

    def _drop(self, mine: Floats, labels: Any) -> Worth:
        full = self._calibrated("test")[0][:, -1]
        drop = self._bootstrap.difference_interval(full, mine, labels)
        return {"auc": auc(mine, labels), "auc_drop": drop["value"], "auc_drop_interval": drop["interval"]}

    def adaptive(self, plan: ExitPlan) -> Worth:
        """Of a plan: auc, auc_drop, and its gain over the honest rival, with intervals."""
        if "test" not in self._tables:
            return {}
        key = plan.criterion, plan.prior, tuple(plan.policy.thresholds.tolist())
        if key not in self._known:
            self._known[key] = self._judged(plan)
        return self._known[key]

    def _judged(self, plan: ExitPlan) -> Worth:
        rival = self.rival if plan.prior else self.plans.rival_without
        outputs = plan.outputs(*self._tables["test"])
        emitted = plan.emitted(outputs)[1].double().numpy()
        calibrated = outputs.logits.double().numpy()
        labels = self._tables["test"][0]["label"].to_numpy()
        drop, gain = (
            self._bootstrap.difference_interval(*pair, labels)
            for pair in (
                (calibrated[:, -1], emitted),
                (emitted, calibrated[:, plan.layers.index(rival)]),
            )
        )
        return {
            "auc": auc(emitted, labels),
            "auc_drop": drop["value"],
            "auc_drop_interval": drop["interval"],
            "auc_gain_over_rival": {"layer": rival, **gain},
        }

    def budget(
        self,
        stream: Stream,
        asked: tuple[pl.DataFrame, Floats] | None = None,
        by_depth: bool = False,
        criterion: Criterion | None = None,
    ) -> ExitPlan | None:
        """The plan that the run's budget chooses on `tune` at another price; None without validation's scores.

        Args:
            stream: Whether the stream's tokens are paid for.
            asked: Scores and counting features of the candidates of real requests, which are the price.
            by_depth: The price is mean candidate depth.
            criterion: The only one that is tried.
        """
        if "valid" not in self._tables:
            return None
        who = None if asked is None else (len(asked[0]), asked[0]["request_id"].n_unique())
        key = stream, who, by_depth, type(criterion)
        if key not in self._made:
            settings = ExitSettings(**{**self._settings, "stream": stream, "mode": "budget"})
            scores, features = asked if asked is not None else (None, None)
            self._made[key] = budget_plan(
                *self._tables["valid"], settings, scores, features, by_depth=by_depth, criterion=criterion
            )
        return self._made[key]

    def pushed(self, plan: ExitPlan, share: float) -> ExitPlan | None:
        """The plan with thresholds at which this share of the tune rows that reach an exit leave there."""
        if "valid" not in self._tables:
            return None
        outputs = plan.outputs(*self._tables["valid"])
        thresholds, running = list[float](), torch.arange(outputs.logits.shape[0])
        for head in range(outputs.heads - 1):
            safety = plan.policy.criterion.safety(_shown(outputs, running, head))
            known = safety[safety.isfinite()]
            limit = float(known.quantile(1 - share)) if len(known) else torch.inf
            thresholds.append(limit)
            running = running[safety < limit]
        values = torch.tensor([*thresholds, -torch.inf], dtype=torch.float64)
        return replace(plan, policy=Policy(plan.policy.criterion, values, plan.layers))


def _shown(outputs: HeadOutputs, rows: torch.Tensor, head: int) -> HeadOutputs:
    return outputs.rows(rows).until(head)
