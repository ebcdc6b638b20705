"""What a budget chooses on the tune fold: per-head calibration, every criterion's path, the best one's step."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from project.artefacts import exit_layers_of
from project.errors import DataError
from project.exits.calibration import fit_calibration
from project.exits.criteria import Criterion, out_of_fold_safety, safety_table
from project.exits.outputs import HeadOutputs
from project.exits.path import BudgetNotKept, Path, Step, drop_bounds, pick_budget, threshold_path
from project.exits.plan import ExitPlan, Floats, raw_outputs
from project.exits.policies import Policy
from project.exits.settings import ExitSettings
from project.exits.simulate import rival_depth


@dataclass(frozen=True, eq=False)
class Curve:
    """One criterion, fitted on tune, with its path and the step that the budget chose."""

    criterion: Criterion
    path: Path
    step: int

    @property
    def chosen(self) -> Step:
        """The budget's step."""
        return self.path[self.step]


class TuneFold:
    """The tune fold under one prior: calibrated outputs and every criterion's curve.

    Args:
        scores: n rows of the fold tune.
        features: (n, F) counting features of the same rows.
        settings: Budget and criteria.
        prior: Whether exit 0 is a head.
        by_depth: Every candidate costs its layer, whatever its tokens.
        criterion: The one criterion that is considered; None: those of the settings. One that cannot keep the budget is
            no curve.
        shown: For comparison only: where nobody keeps the budget, everyone's fastest step.

    Raises:
        BudgetNotKept: Nobody keeps the budget.
    """

    def __init__(
        self,
        scores: pl.DataFrame,
        features: Floats,
        settings: ExitSettings,
        prior: bool,
        by_depth: bool = False,
        criterion: Criterion | None = None,
        shown: bool = False,
    ) -> None:
        self.settings, self.prior = settings, prior
        self.labels, self.users = scores["label"].to_numpy(), scores["user"].to_numpy()
        self.tokens = _tokens(scores, by_depth)
        # 1. calibrate every head
        raw = raw_outputs(scores, features, exit_layers_of(scores), prior)
        self.calibration = fit_calibration(raw.logits, self.labels, raw.layers, prior)
        self.outputs = HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.evidence)
        self.rival = self.outputs.layers[rival_depth(self.outputs.logits, self.labels)]
        # 2. every criterion's path, and the step that keeps the budget
        criteria = settings.criteria() if criterion is None else [criterion]
        self.curves = self._curves([deepcopy(criterion) for criterion in criteria], shown)
        # 3. the best of them, or the one that is given
        forced = criterion is not None or settings.criterion is not None
        self.best = self.curves[0] if forced else max(self.curves, key=self._worth)

    def plan(self, step: int) -> ExitPlan:
        """The best criterion at one step of its path."""
        thresholds = self.best.path[step].thresholds
        policy = Policy(self.best.criterion, thresholds, self.outputs.layers)
        return ExitPlan(self.calibration, policy, self.prior)

    def _curves(self, criteria: list[Criterion], shown: bool) -> list[Curve]:
        paths = [self._path(criterion) for criterion in criteria]
        kept, reason = list[Curve](), None
        for criterion, (path, bounds) in zip(criteria, paths, strict=True):
            try:
                step = pick_budget(path, self.settings.max_auc_drop, self.settings.max_cost, bounds)
            except BudgetNotKept as error:
                reason = error
            else:
                kept.append(Curve(criterion, path, step))
        if reason is None or kept:
            return kept
        if not shown:
            raise reason
        return [Curve(c, path, len(path) - 1) for c, (path, _) in zip(criteria, paths, strict=True)]

    def _path(self, criterion: Criterion) -> tuple[Path, list[float] | None]:
        """Fits the criterion; its path; and an upper bound of each step's drop where the budget asks for one."""
        fresh = deepcopy(criterion)
        criterion.fit(self.outputs)
        # rows that a criterion learned from look surer to it than others will
        safety = (
            out_of_fold_safety(lambda: deepcopy(fresh), self.outputs, self.users)
            if criterion.learns
            else safety_table(criterion, self.outputs)
        )
        about = safety, self.outputs.logits, self.labels
        path = threshold_path(*about, self.outputs.layers, *self.tokens, stream=self.settings.stream)
        doubt = self.settings.budget_doubt
        if doubt == 0.5 or self.settings.max_auc_drop is None:
            return path, None
        return path, drop_bounds(path, *about, self.users, doubt)

    def _worth(self, curve: Curve) -> tuple[float, float]:
        """Cheaper is better where an AUC drop is the budget, a higher AUC where the cost is."""
        point = curve.chosen
        return (point.auc, -point.cost) if self.settings.max_auc_drop is None else (-point.cost, point.auc)


def budget_plan(
    scores: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    by_depth: bool = False,
    criterion: Criterion | None = None,
) -> ExitPlan:
    """The plan that a budget chooses on the tune fold; nothing is certified, and no other fold is read.

    Args:
        scores: Score table of validation, with its folds.
        features: (n, F) counting features of the same rows.
        settings: Budget, criteria, prior, and whether the stream is paid for.
        by_depth: Pay for the mean layer at which candidates leave instead of token-layers.
        criterion: The criterion to use; None: the settings'.

    Raises:
        DataError: No row of the fold tune, or what calibration refuses.
        ConfigError: A budget that no step keeps.
    """
    check_folds(scores, ("tune",))
    chosen = (scores["fold"] == "tune").fill_null(False).to_numpy()
    prior = settings.prior == "counting"
    tune = TuneFold(scores.filter(chosen), features[chosen], settings, prior, by_depth, criterion)
    return tune.plan(tune.best.step)


def check_folds(scores: pl.DataFrame, folds: tuple[str, ...]) -> None:
    """Raise `DataError` where a user stands in two folds of validation, or one of `folds` has no rows."""
    owners = scores.drop_nulls("fold").group_by("user").agg(pl.col("fold").n_unique())
    shared = owners.filter(pl.col("fold") > 1)
    if len(shared):
        raise DataError(
            f"{len(shared)} users of validation stand in more than one fold (user code {shared['user'][0]}); expected "
            "each in one: what chose the checkpoint must not calibrate or certify. Run `validate` again."
        )
    counts = {f: int((scores["fold"] == f).sum()) for f in folds}
    empty = [f for f, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"the fold {empty[0]} of validation has no rows; expected users in every fold. "
            "Use more validation data, or raise its share in data.protocol.fold_shares."
        )


def _tokens(scores: pl.DataFrame, by_depth: bool) -> tuple[Tensor, Tensor]:
    """Target and stream tokens; by depth, one and none."""
    if by_depth:
        return torch.ones(len(scores), dtype=torch.int64), torch.zeros(len(scores), dtype=torch.int64)
    own, shared = (torch.from_numpy(scores[f"{x}_tokens"].to_numpy().copy()) for x in ("target", "stream"))
    return own, shared
