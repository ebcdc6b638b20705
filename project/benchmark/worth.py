"""What a side's scores are worth, from a run's score tables: AUC on all test rows, drops and gains with intervals.

Unusual here: nothing is scored. Candidates do not see each other, so a row scores in a request what it scored in the
test; and plans for other workloads are made on `tune`, as calibration makes the run's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from project.artefacts import table_about
from project.callbacks.exit_calibration import features_of
from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import auc
from project.exits.budget import budget_plan
from project.exits.cost import Stream
from project.exits.criteria import Criterion
from project.exits.outputs import HeadOutputs
from project.exits.plan import ExitPlan, Plans
from project.exits.policies import Policy
from project.exits.settings import ExitSettings
from project.model.heads import heads_digest

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

Worth = dict[str, Any]
ScoredTable = tuple[pl.DataFrame, Floats]


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
        self._tables: dict[str, ScoredTable] = {}
        self._known: dict[object, Worth] = {}
        self._made: dict[object, ExitPlan] = {}
        made = heads_digest(model.state_dict())
        for name in ("valid", "test"):
            path = folder / "scores" / f"{name}.parquet"
            if path.is_file() and table_about(path).get("heads", made) == made:  # not another checkpoint's
                scores = pl.read_parquet(path, glob=False)
                if name == "valid":
                    scores = scores.filter(pl.col("fold") == "tune")
                self._tables[name] = scores, features_of(model, data, scores)
        if "test" in self._tables:
            tested = self._tables["test"][0]
            self._labels, self._bootstrap = (
                tested["label"].to_numpy(),
                UserBootstrap(tested["user"].to_numpy()),
            )

    def static(self, layer: int) -> Worth:
        """Of one calibrated head, by its layer: auc and auc_drop with its interval."""
        plan = self.plans.plan

        def judge() -> Worth:
            logits = _calibrated(plan, self._tables["test"])
            return self._drop(plan, logits[:, plan.layers.index(layer)])

        return self._once(layer, judge)

    def adaptive(self, plan: ExitPlan) -> Worth:
        """Of a plan: auc, auc_drop, and its gain over the honest rival, with intervals."""
        return self._once(_key(plan), lambda: self._judged(plan))

    def _once(self, key: object, judge: Callable[[], Worth]) -> Worth:
        """What `judge` says, asked once whatever the number of workloads; nothing where scores are missing."""
        if "test" not in self._tables:
            return {}
        if key not in self._known:
            self._known[key] = judge()
        return self._known[key]

    def _drop(self, plan: ExitPlan, mine: Floats) -> Worth:
        """Of scores of all test rows: auc, and auc_drop from full depth as the plan calibrates it."""
        full, labels = _calibrated(plan, self._tables["test"])[:, -1], self._labels
        drop = self._bootstrap.difference_interval(full, mine, labels)
        return {"auc": auc(mine, labels), "auc_drop": drop["value"], "auc_drop_interval": drop["interval"]}

    def _judged(self, plan: ExitPlan) -> Worth:
        rival = self.rival if plan.prior else self.plans.rival_without
        emitted = _emitted(plan, self._tables["test"])
        theirs = _calibrated(plan, self._tables["test"])[:, plan.layers.index(rival)]
        gain = self._bootstrap.difference_interval(emitted, theirs, self._labels)
        return self._drop(plan, emitted) | {"auc_gain_over_rival": {"layer": rival, **gain}}

    def budget(
        self, stream: Stream, by_depth: bool = False, criterion: Criterion | None = None
    ) -> ExitPlan | None:
        """The plan that the run's budget chooses on `tune` at another price; None without validation's scores.

        Args:
            stream: Whether the stream's tokens are paid for.
            by_depth: The price is mean candidate depth.
            criterion: The only one that is tried.
        """
        if "valid" not in self._tables:
            return None
        key = stream, by_depth, type(criterion)
        if key not in self._made:
            settings = ExitSettings(**{**self._settings, "stream": stream, "mode": "budget"})
            self._made[key] = budget_plan(*self._tables["valid"], settings, by_depth, criterion)
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


def _key(plan: ExitPlan) -> object:
    return plan.criterion, plan.prior, tuple(plan.policy.thresholds.tolist())


def _calibrated(plan: ExitPlan, rows: ScoredTable) -> Floats:
    return plan.outputs(*rows).logits.double().numpy()


def _emitted(plan: ExitPlan, rows: ScoredTable) -> Floats:
    found: Floats = plan.emitted(plan.outputs(*rows))[1].double().numpy()
    return found
