"""From scores on the fold tune to a plan: every criterion's path, one choice within the budget, one certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from torch import Tensor

from project.arrays import F64
from project.errors import ConfigError, DataError
from project.exits.certificate import Certificate, CertificateSettings, certify
from project.exits.criteria import Criterion, fit_criteria, name
from project.exits.plan import (
    ExitPlan,
    ExitSettings,
    Plans,
    admit,
    certified_settings,
    fit_heads,
    specification,
)
from project.exits.policy import Policy
from project.exits.ranking import no_lists
from project.exits.search import (
    Step,
    ThresholdPath,
    bound_margins,
    budget_step,
    control_curves,
    equal_accuracy_exit,
    threshold_path,
    user_influences,
)
from project.results import Calibration as CalibrationDocument
from project.results import Issued

# With fewer users on tune no bound on the AUC drop holds on fresh users where a few in a
# hundred are served badly by early exits: such users are not among them, or too few to tell
# (results/budget.json).
FEWEST_USERS = 250


@dataclass(frozen=True, eq=False)
class Curve:
    """One criterion, fitted on tune.

    `path` has S steps, `influences` (S, U) are the users', see `user_influences`. `step` is the one that the budget
    chooses.
    """

    criterion: Criterion
    path: ThresholdPath
    influences: F64
    step: int = 0

    @property
    def drops(self) -> F64:
        """(S,) AUC drops by labels, as estimated on tune."""
        return np.array([step.auc_drop for step in self.path])

    @property
    def chosen(self) -> Step:
        """The budget's step."""
        return self.path[self.step]


def cheapest(curves: Sequence[Curve]) -> Curve:
    """The curve whose chosen step costs least; of equal cost the one of higher AUC."""
    return max(curves, key=lambda curve: (-curve.chosen.cost, curve.chosen.auc))


class TuneFold:
    """The tune fold: calibrated outputs, every criterion's curve, and the best of them.

    `scores` and `features` (n, F) are of its n rows. `curves` holds every criterion at the budget's step.
    """

    def __init__(
        self,
        scores: pl.DataFrame,
        features: F64,
        settings: ExitSettings,
    ) -> None:
        self.settings = settings
        self.labels = scores["label"].to_numpy()  # (n,)
        users = scores["user"].to_numpy()  # (n,)
        self.users = int(np.unique(users).size)
        # 1. calibrate every head
        self.calibration, self.outputs, self.tokens = fit_heads(
            scores, features, settings.exit_0, settings.prefix_cached
        )
        # 2. how confident every criterion is
        layer = settings.one_exit
        layers = self.outputs.layers
        if layer is not None and layer not in layers:
            raise ConfigError(
                f"exits.criterion.layer is {layer}; expected one of the exits {layers}."
            )
        unfitted = settings.criteria()
        fitted = fit_criteria(unfitted, self.outputs, users, settings.criterion)
        # 3. controls, every criterion's path, and the step of it that keeps the budget
        self.controls = control_curves(self.outputs, self.labels, self.tokens)
        self.static_exit = equal_accuracy_exit(self.controls["fixed_depth"])
        curves = list[Curve]()
        for criterion, confidence in fitted:
            logits = self.outputs.logits
            path = threshold_path(confidence, logits, self.labels, layers, self.tokens)
            influences = user_influences(path, confidence, logits, self.labels, users)
            curves.append(Curve(criterion, path, influences))
        # a criterion that is given decides alone, the others are only drawn
        self._competing = len(curves) if settings.criterion is None else 1
        self.curves = [replace(curve, step=self.step_of(curve)) for curve in curves]
        # 4. the cheapest of them, at equal cost that of higher AUC; or the one that is given
        self.best = cheapest(self.curves[: self._competing])

    def plan(self, step: int) -> ExitPlan:
        """The best criterion at one step of its path."""
        policy = Policy(
            self.best.criterion, self.best.path[step].thresholds, self.outputs.layers
        )
        return ExitPlan(self.calibration, policy, self.settings.exit_0)

    @property
    def too_few(self) -> bool:
        """Whether the users allow no early exit within a bounded AUC drop; at alpha .5 no bound is asked for."""
        bounded = self.settings.alpha < 0.5 and self.settings.one_exit is None
        return bounded and self.users < FEWEST_USERS

    def in_words(self) -> str | None:
        """Why the plan is full depth, where users are too few."""
        if not self.too_few:
            return None
        return (
            f"So few users allow no plan but full depth: the fold tune has {self.users:,}, and about {FEWEST_USERS} "
            "are needed to bound the AUC that early exits lose on fresh users."
        )

    def step_of(self, curve: Curve) -> int:
        """The budget's step of a curve; a static exit is not the budget's to choose."""
        if self.settings.one_exit is not None:
            return len(curve.path) - 1
        # alpha is shared out among the paths that compete for the choice (Bonferroni)
        margins = bound_margins(curve.influences, self.settings.alpha / self._competing)
        if self.too_few:
            # step 0, full depth, is left
            margins[1:] = np.inf
        return budget_step(curve.path, curve.drops + margins, self.settings.max_auc_drop)


def calibrate(
    scores: pl.DataFrame,
    features: F64,
    settings: ExitSettings,
    protocol_hash: str,
    issued: Sequence[Issued] = (),
    checkpoint: str = "",
    fitting: bool = False,
) -> tuple[Plans, CalibrationDocument]:
    """The exit plans of a run, and the body of results/calibrate.json.

    `scores` is the score table of validation with its folds, `features` (n, F) are of the same rows, `issued` is the
    ledger of the run's results/calibrate.json, which must not be tried again. `checkpoint` names the weights that made
    the scores. Where `fitting`, they are the next ones of a fit, which chooses among checkpoints on `select` alone.
    """
    _check_folds(scores)
    # 1. the plan, from tune alone
    on_tune = (scores["fold"] == "tune").to_numpy()
    tune = TuneFold(scores.filter(on_tune), features[on_tune], settings)
    plan = tune.plan(tune.best.step)
    # 2. its certificate, from certify, which is read for one alone
    ledger = list(issued)
    certificate = None
    words = "No certificate: exits.certificate is null."
    if settings.certificate is not None:
        tried = certified_settings(settings) | {"checkpoint": checkpoint}
        try:
            admitted = admit(issued, tried, protocol_hash, fitting)
        except ConfigError as error:
            words = f"No certificate: {error}."
        else:
            certificate = certificate_of(plan, scores, features, settings.certificate)
            words = certificate.in_words()
            if certificate.passed is not None:  # else the fold may be read once more
                ledger = admitted
    # 3. what is kept, and what is reported
    document: CalibrationDocument = {
        "policies": [
            {
                "criterion": name(curve.criterion),
                "settings": specification(curve.criterion),
                "thresholds": _by_layer(plan.layers, curve.chosen.thresholds),
                "calibration": tune.calibration.as_dict(),
                "pareto": [step.point() for step in curve.path],
                "chosen_step": curve.step,
            }
            for curve in tune.curves
        ],
        "controls": tune.controls,
        "chosen": plan.criterion,
        "budget": {"max_auc_drop": settings.max_auc_drop},
        "budget_words": tune.in_words(),
        "certificate": None if certificate is None else certificate.to_dict(),
        "certificate_words": words,
        "lists": no_lists(),
        "ledger": ledger,
    }
    plans = Plans(
        plan=plan,
        static_exit=tune.static_exit["layer"],
        certificate=document["certificate"],
        budget_words=document["budget_words"],
    )
    return plans, document


def certificate_of(
    plan: ExitPlan, scores: pl.DataFrame, features: F64, promise: CertificateSettings
) -> Certificate:
    """The certificate of a plan by the rows of the fold certify; a plan that is full depth or exit 0 takes no test."""
    on_certify = (scores["fold"] == "certify").to_numpy()
    rows = scores.filter(on_certify)
    outputs = plan.outputs(rows, features[on_certify])
    layers, emitted = plan.emitted(outputs)
    reason = None
    if plan.policy.thresholds[:-1].isposinf().all():
        reason = "the plan is full depth"
    elif len(rows) and not layers.any():
        reason = "every row leaves at exit 0, so no layer runs"
    full = outputs.logits[:, -1]
    return certify(emitted, full, rows["label"], rows["user"], promise, reason)


def _check_folds(scores: pl.DataFrame) -> None:
    """Users in two folds of validation are an error, and a fold tune without rows."""
    owners = scores.drop_nulls("fold").group_by("user").agg(pl.col("fold").n_unique())
    shared = owners.filter(pl.col("fold") > 1)
    if len(shared):
        raise DataError(
            f"{len(shared)} users of validation stand in more than one fold (user code {shared['user'][0]}); expected "
            "each in one: what chose the checkpoint must not calibrate or certify. Run `validate` again."
        )
    if not (scores["fold"] == "tune").any():
        raise DataError(
            f"the fold tune of validation has no rows: all {len(owners):,} users are in other folds; expected at least "
            "one user there, with rows of both labels. Use more validation data, or raise the second number of "
            "data.protocol.fold_shares."
        )


def _by_layer(layers: tuple[int, ...], thresholds: Tensor) -> dict[str, float | str]:
    """Thresholds by layer. JSON has no infinity: "never" where nobody leaves, "everyone" where nobody goes on."""
    words = {np.inf: "never", -np.inf: "everyone"}
    return {
        str(k): words.get(v, v) for k, v in zip(layers, thresholds.tolist(), strict=True)
    }
