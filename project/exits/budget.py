"""What a budget chooses on the tune fold: per-head calibration, every criterion's path, the best one's step."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.artefacts import exit_layers_of
from project.errors import ConfigError, DataError
from project.exits.calibration import fit_calibration
from project.exits.criteria import Criterion, out_of_fold_safety, safety_table
from project.exits.outputs import HeadOutputs
from project.exits.path import Path, Step, bound_margins, budget_steps, threshold_path, user_influences
from project.exits.plan import ExitPlan, Floats, raw_outputs
from project.exits.policies import Policy
from project.exits.search import Ints
from project.exits.settings import ExitSettings
from project.exits.simulate import rival_depth

DRAWS = 1000  # resamples of users behind the correction


@dataclass(frozen=True, eq=False)
class Curve:
    """One criterion, fitted on tune.

    Attributes:
        criterion: Fitted.
        path: S steps.
        step: The one that the budget chose.
        influences: (S, U) of the users, see `user_influences`.
    """

    criterion: Criterion
    path: Path
    step: int
    influences: Floats

    @property
    def drops(self) -> Floats:
        """(S,) AUC drops by labels, as tune tells them."""
        return np.array([step.auc_drop for step in self.path])

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
        ConfigError: Nobody keeps the budget.
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
        self._forced = criterion is not None or settings.criterion is not None
        criteria = settings.criteria() if criterion is None else [criterion]
        self._paths = 1 if self._forced else len(criteria)
        curves = [self._curve(deepcopy(criterion)) for criterion in criteria]
        decide = curves[: self._paths]
        self.curves = [curve for curve in curves if curve.step >= 0]
        if all(curve.step < 0 for curve in decide):
            if not shown:
                raise self._not_kept(decide)
            self.curves = [replace(curve, step=len(curve.path) - 1) for curve in curves]
        # 3. the best of them, or the one that is given
        self.best = self.curves[0] if self._forced else max(self.curves, key=self._worth)

    def plan(self, step: int) -> ExitPlan:
        """The best criterion at one step of its path."""
        thresholds = self.best.path[step].thresholds
        policy = Policy(self.best.criterion, thresholds, self.outputs.layers)
        return ExitPlan(self.calibration, policy, self.prior)

    def corrected(self) -> dict[str, Any]:
        """AUC drop of the budget's policy, corrected for having been chosen on the users who tell it.

        Where users are drawn anew and the choice among the same paths is made again, the chosen policy is told to lose
        less than it does on the users at hand. That difference is taken off what tune tells.

        Returns:
            `auc_drop_corrected`, and `auc_drop_corrected_interval`, the basic bootstrap's 95 %.
        """
        users, told = self.best.influences.shape[1], float(self.best.drops[self.best.step])
        times = np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), size=DRAWS)
        cost, loss, error = (np.full((len(self.curves), DRAWS), np.inf) for _ in range(3))
        for row, curve in enumerate([self.best] if self._forced else self.curves):
            drops = curve.drops + times @ curve.influences.T
            step = self._steps(curve, drops)
            kept = step >= 0
            at = np.arange(DRAWS)[kept], step[kept]
            cost[row, kept] = np.array([s.cost for s in curve.path])[step[kept]]
            loss[row, kept] = drops[at]
            error[row, kept] = drops[at] - curve.drops[step[kept]]
        first, second = (loss, cost) if self.settings.max_auc_drop is None else (cost, loss)
        best = np.lexsort((second, first), axis=0)[0]
        errors = error[best, np.arange(DRAWS)]
        errors = errors[np.isfinite(errors)]
        low, high = np.quantile(errors, [0.025, 0.975])
        return {
            "auc_drop_corrected": told - float(errors.mean()),
            "auc_drop_corrected_interval": [told - float(high), told - float(low)],
        }

    def _steps(self, curve: Curve, drops: Floats) -> Ints:
        """(D,) the budget's step by each row of drops (D, S); -1 where none keeps it."""
        # each of the paths that compete for the choice is walked at its share of alpha (Bonferroni)
        margins = bound_margins(curve.influences, self.settings.alpha / self._paths)
        return budget_steps(curve.path, drops + margins, self.settings.max_auc_drop, self.settings.max_cost)

    def _curve(self, criterion: Criterion) -> Curve:
        """Fits the criterion; its path and the budget's step, -1 where none keeps it."""
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
        curve = Curve(criterion, path, 0, user_influences(path, *about, self.users))
        return replace(curve, step=int(self._steps(curve, curve.drops[None])[0]))

    def _not_kept(self, curves: list[Curve]) -> ConfigError:
        fastest = min((curve.path[-1] for curve in curves), key=lambda step: step.cost)
        return ConfigError(
            f"no exit policy keeps exits.max_cost {self.settings.max_cost} and exits.max_auc_drop "
            f"{self.settings.max_auc_drop}: the fastest costs {fastest.cost:.3f} of full depth and drops "
            f"{fastest.auc_drop:.4f} of AUC; raise one of them"
        )

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
