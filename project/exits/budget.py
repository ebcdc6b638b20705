"""What a budget chooses on the tune fold: per-head calibration, every criterion's path, the best one's step.

Unusual here: three prices for one choice. Requests of one candidate are the labelled rows themselves; real requests
bring candidates without labels, which are paid for while labelled rows are judged; and by depth every candidate costs
its layer, the price that the field optimises, kept for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.artefacts import exit_layers_of
from project.errors import DataError
from project.exits.calibration import fit_calibration
from project.exits.criteria import Criterion, FoldCriteria, safety_table
from project.exits.outputs import HeadOutputs
from project.exits.path import BudgetNotKept, Path, drop_bounds, pick_budget, threshold_path
from project.exits.plan import ExitPlan, Floats, raw_outputs
from project.exits.policies import Policy
from project.exits.settings import ExitSettings
from project.exits.simulate import AskedCandidates, rival_depth


@dataclass(frozen=True, eq=False)
class AskedScores:
    """Scored candidates of requests of the fold tune.

    Attributes:
        scores: Score table of m candidates, as `score_every_head` makes it. Where its column `user` is filled in, a
            criterion that learns scores every candidate by a fit that saw no row of its user.
        features: (m, F) their counting features.
        seed: The run's, which drew the requests.
    """

    scores: pl.DataFrame
    features: Floats
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.scores) or len(self.scores) != len(self.features):
            raise DataError(
                f"thresholds were to be priced on {len(self.scores)} candidates of requests with {len(self.features)} "
                "rows of features; expected the same number of both, and at least one"
            )

    @property
    def requests(self) -> int:
        """Number of requests."""
        return int(self.scores["request_id"].n_unique())


@dataclass(frozen=True)
class Curve:
    """One criterion, fitted on tune, with its path and the step that the budget chose."""

    criterion: Criterion
    path: Path
    step: int


class TuneFold:
    """The tune fold under one prior: calibrated outputs and every criterion's curve.

    Args:
        scores: n rows of the fold tune.
        features: (n, F) counting features of the same rows.
        settings: Budget and criteria.
        prior: Whether exit 0 is a head.
        asked: Candidates that are paid for; None pays for the rows.
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
        asked: AskedScores | None = None,
        by_depth: bool = False,
        criterion: Criterion | None = None,
        shown: bool = False,
    ) -> None:
        self.settings, self.prior = settings, prior
        self.labels, self.users = scores["label"].to_numpy(), scores["user"].to_numpy()
        layers = exit_layers_of(scores)
        raw = raw_outputs(scores, features, layers, prior)
        self.calibration = fit_calibration(raw.logits, self.labels, raw.layers, prior)
        self.outputs = self._calibrated(raw)
        self.tokens = _tokens(scores, by_depth)
        self.asked: AskedCandidates | None = None
        self._asked_users: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
        if asked is not None:
            outputs = self._calibrated(raw_outputs(asked.scores, asked.features, layers, prior))
            request = asked.scores["request_id"].rank("dense").cast(pl.Int64).to_numpy()
            self.asked = AskedCandidates(
                outputs, torch.from_numpy(request.copy()), *_tokens(asked.scores, by_depth)
            )
            if not asked.scores["user"].null_count():
                self._asked_users = asked.scores["user"].to_numpy()
        criteria = settings.criteria() if criterion is None else [criterion]
        self.curves = self._curves(criteria, shown)
        self.rival = self.outputs.layers[rival_depth(self.outputs.logits, self.labels)]
        forced = criterion is not None or settings.criterion is not None
        self.best = self.curves[0] if forced else max(self.curves, key=self._worth)

    def plan(self, step: int) -> ExitPlan:
        """The best criterion at one step of its path."""
        thresholds = self.best.path.steps[step].thresholds
        policy = Policy(self.best.criterion, thresholds, self.outputs.layers)
        return ExitPlan(self.calibration, policy, self.prior)

    def _calibrated(self, raw: HeadOutputs) -> HeadOutputs:
        return HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.evidence)

    def _curves(self, criteria: Sequence[Criterion], shown: bool) -> list[Curve]:
        paths = [self._path(deepcopy(criterion)) for criterion in criteria]
        kept, reason = list[Curve](), None
        for criterion, path, bounds in paths:
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
        return [Curve(criterion, path, len(path.steps) - 1) for criterion, path, _ in paths]

    def _path(self, criterion: Criterion) -> tuple[Criterion, Path, list[float] | None]:
        """The criterion, fitted; its path; and an upper bound of each step's drop where the budget asks for one."""
        fresh = deepcopy(criterion)
        criterion.fit(self.outputs)
        safety, paid = self._safety(criterion, fresh)
        path = threshold_path(
            safety,
            self.outputs.logits,
            self.labels,
            self.outputs.layers,
            *self.tokens,
            stream=self.settings.stream,
            asked=None if self.asked is None or paid is None else self.asked.with_safety(paid),
        )
        bounds, doubt = None, self.settings.budget_doubt
        if doubt < 0.5 and self.settings.max_auc_drop is not None:
            bounds = drop_bounds(path, safety, self.outputs.logits, self.labels, self.users, doubt)
        return criterion, path, bounds

    def _safety(self, criterion: Criterion, fresh: Criterion) -> tuple[Tensor, Tensor | None]:
        """Of the rows and of the candidates asked for, out of sample where the criterion learns.

        Candidates of unknown users are scored by the criterion that saw all of tune. They have no labels, and it learns
        from scores only, but rows of the same users among its fit make it look a little surer than it will be.
        """
        asked, users = None if self.asked is None else self.asked.outputs, self._asked_users
        if not criterion.learns:
            return safety_table(criterion, self.outputs), None if asked is None else safety_table(
                criterion, asked
            )
        folds = FoldCriteria(lambda: deepcopy(fresh), self.outputs, self.users)
        safety = folds.safety(self.outputs, self.users)
        if asked is None:
            return safety, None
        return safety, safety_table(criterion, asked) if users is None else folds.safety(asked, users)

    def _worth(self, curve: Curve) -> tuple[float, float]:
        """Cheaper is better where an AUC drop is the budget, a higher AUC where the cost is."""
        point = curve.path.steps[curve.step]
        return (point.auc, -point.cost) if self.settings.max_auc_drop is None else (-point.cost, point.auc)


def budget_plan(
    scores: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    asked_scores: pl.DataFrame | None = None,
    asked_features: Floats | None = None,
    by_depth: bool = False,
    criterion: Criterion | None = None,
) -> ExitPlan:
    """The plan that a budget chooses on the tune fold; nothing is certified, and no other fold is read.

    Args:
        scores: Score table of validation, with its folds.
        features: (n, F) counting features of the same rows.
        settings: Budget, criteria, prior, and whether the stream is paid for.
        asked_scores: Score table of the candidates of requests of the fold tune (`score_every_head`): what is paid for.
            None pays for the labelled rows, each a request of one candidate.
        asked_features: (m, F) counting features of these candidates.
        by_depth: Pay for the mean layer at which candidates leave instead of token-layers.
        criterion: The criterion to use; None: the settings'.

    Raises:
        DataError: No row of the fold tune, or what calibration refuses.
        ConfigError: A budget that no step keeps.
    """
    check_folds(scores, ("tune",))
    if (asked_scores is None) != (asked_features is None):
        raise DataError("asked_scores and asked_features belong together: give both or neither")
    asked = (
        None if asked_scores is None or asked_features is None else AskedScores(asked_scores, asked_features)
    )
    chosen = (scores["fold"] == "tune").fill_null(False).to_numpy()
    prior = settings.prior == "counting"
    tune = TuneFold(scores.filter(chosen), features[chosen], settings, prior, asked, by_depth, criterion)
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
