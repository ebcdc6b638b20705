"""From scores on the fold tune to a plan: every criterion's path, one choice within the budget, one certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from project.arrays import F64
from project.errors import ConfigError
from project.exits.calibration import fit_calibration
from project.exits.certificate import certify
from project.exits.cost import row_tokens
from project.exits.criteria import Criterion, HeadOutputs, StaticExit, fit_criteria, name
from project.exits.plan import (
    ExitPlan,
    ExitSettings,
    Plans,
    admit,
    raw_outputs,
)
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
from project.results import CertificateRow, Issued

# With fewer users on tune no bound on the AUC drop holds on fresh users where a few in a
# hundred are served badly by early exits: such users are not among them, or too few to tell
# (results/budget.json).
FEWEST_USERS = 250


@dataclass(frozen=True, eq=False)
class Curve:
    """One criterion, fitted on tune.

    `path` has S steps, `bounds` (S,) are upper bounds of their AUC drops on fresh users; `chosen` is the budget's step.
    """

    criterion: Criterion
    path: ThresholdPath
    bounds: F64
    chosen: Step


class TuneFold:
    """The tune fold: calibrated outputs, the curve of every criterion, and the `best` of them.

    `scores` and `features` (n, F) are of its n rows. `budget_words` say why the plan is full depth, where users are too
    few.
    """

    def __init__(self, scores: pl.DataFrame, features: F64, settings: ExitSettings) -> None:
        labels = scores["label"].to_numpy()  # (n,)
        users = scores["user"].to_numpy()  # (n,)
        # 1. calibrate every head
        raw = raw_outputs(scores, features, settings.exit_0)
        layers = raw.layers
        self.calibration = fit_calibration(raw.logits, labels, layers, settings.exit_0)
        logits = self.calibration.apply(raw.logits)  # (n, K)
        self.outputs = HeadOutputs(layers, logits, raw.retrieved)
        # 2. how confident every criterion is; a given one decides alone, the others are only drawn
        given = settings.criterion
        static = given.layer if isinstance(given, StaticExit) else None
        if static is not None and static not in layers:
            raise ConfigError(
                f"exits.criterion.layer is {static}; expected one of the exits {layers}."
            )
        fitted = fit_criteria(given, self.outputs, users)
        competing = len(fitted) if given is None else 1
        # 3. the controls on the same rows
        tokens = row_tokens(scores)  # (n,)
        self.controls = control_curves(self.outputs, labels, tokens)
        self.static_exit = equal_accuracy_exit(self.controls["fixed_depth"])
        # 4. few users allow no early exit within a bounded AUC drop; at alpha .5 no bound is asked for
        count = np.unique(users).size
        too_few = count < FEWEST_USERS and settings.alpha < 0.5 and static is None
        self.budget_words: str | None = None
        if too_few:
            self.budget_words = (
                f"So few users allow no plan but full depth: the fold tune has {count:,}, and about {FEWEST_USERS} "
                "are needed to bound the AUC that early exits lose on fresh users."
            )
        # 5. every criterion's path, and the step of it that keeps the budget
        self.curves = list[Curve]()
        for criterion, confidence in fitted:
            path = threshold_path(confidence, logits, labels, layers, tokens)
            influences = user_influences(path, confidence, logits, labels, users)
            drops = np.array([step.auc_drop for step in path])
            # alpha is shared out among the paths that compete for the choice (Bonferroni)
            bounds = drops + bound_margins(influences, settings.alpha / competing)
            step = 0 if too_few else budget_step(path, bounds, settings.max_auc_drop)
            # a static exit is not the budget's to choose
            chosen = path[step if static is None else -1]
            self.curves.append(Curve(criterion, path, bounds, chosen))
        # 6. the cheapest of them, or the one that is given
        self.best = cheapest(self.curves[:competing])

    def plan(self, curve: Curve) -> ExitPlan:
        """A criterion at its chosen step."""
        return ExitPlan(self.calibration, curve.criterion, curve.chosen.thresholds)


def cheapest(curves: Sequence[Curve]) -> Curve:
    """The curve whose chosen step costs least; at equal cost that of higher AUC."""
    return min(curves, key=lambda curve: (curve.chosen.cost, -curve.chosen.auc))


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
    # 1. the plan, from tune alone
    on_tune = (scores["fold"] == "tune").to_numpy()
    tune = TuneFold(scores.filter(on_tune), features[on_tune], settings)
    plan = tune.plan(tune.best)
    # 2. its certificate, from certify, which is read for one alone
    ledger = list(issued)
    certificate: CertificateRow | None = None
    words = "No certificate: exits.certificate is null."
    if settings.certificate is not None:
        try:
            admitted = admit(issued, settings, checkpoint, protocol_hash, fitting)
        except ConfigError as error:
            words = f"No certificate: {error}."
        else:
            on_certify = (scores["fold"] == "certify").to_numpy()
            rows = scores.filter(on_certify)
            outputs = plan.outputs(rows, features[on_certify])
            left_at, left_with = plan.emitted(outputs)
            reason = None  # to test nothing
            if plan.thresholds[:-1].isposinf().all():
                reason = "the plan is full depth"
            elif len(rows) and not left_at.any():
                reason = "every row leaves at exit 0, so no layer runs"
            full = outputs.logits[:, -1]
            promise = settings.certificate
            certificate = certify(
                left_with, full, rows["label"], rows["user"], promise, reason
            )
            words = certificate["words"]
            if certificate["passed"] is not None:  # else the fold may be read once more
                ledger = admitted
    # 3. what is kept, and what is reported; JSON has no infinity
    infinite = {np.inf: "never", -np.inf: "everyone"}
    document: CalibrationDocument = {
        "policies": [
            {
                "criterion": name(curve.criterion),
                "thresholds": {
                    str(layer): infinite.get(limit, limit)
                    for layer, limit in zip(
                        plan.layers, curve.chosen.thresholds.tolist(), strict=True
                    )
                },
                "calibration": tune.calibration.as_dict(),
                "pareto": [step.point() for step in curve.path],
                "chosen_step": curve.path.index(curve.chosen),
            }
            for curve in tune.curves
        ],
        "controls": tune.controls,
        "chosen": plan.criterion_name,
        "budget": {"max_auc_drop": settings.max_auc_drop},
        "budget_words": tune.budget_words,
        "certificate": certificate,
        "certificate_words": words,
        "lists": no_lists(),
        "ledger": ledger,
    }
    plans = Plans(
        plan,
        tune.static_exit["layer"],
        certificate=certificate,
        budget_words=tune.budget_words,
    )
    return plans, document
