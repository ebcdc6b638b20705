"""From tune scores to a plan: every criterion's path, one choice within the budget, one certificate."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.errors import ConfigError, DataError
from project.exits.calibration import fit_calibration
from project.exits.certificate import Certificate, CertificateSettings, certify
from project.exits.criteria import Criterion, HeadOutputs, confidence_table, name, out_of_fold_confidence
from project.exits.plan import (
    ExitPlan,
    ExitSettings,
    Floats,
    Plans,
    admit,
    asked_of_fold,
    raw_outputs,
    specification,
)
from project.exits.policy import Policy, leave
from project.exits.search import (
    Ints,
    Path,
    Step,
    bound_margins,
    budget_steps,
    control_curves,
    equal_accuracy_depth,
    threshold_path,
    user_influences,
)
from project.run import exit_layers_of

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
    """The tune fold under one exit 0: calibrated outputs and every criterion's curve.

    Args:
        scores: n rows of the fold tune.
        features: (n, F) features of the same rows.
        settings: Budget and criteria.
        exit_0: Whether exit 0 is a head.
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
        exit_0: bool,
        by_depth: bool = False,
        criterion: Criterion | None = None,
        shown: bool = False,
    ) -> None:
        self.settings, self.exit_0 = settings, exit_0
        self.labels, self.users = scores["label"].to_numpy(), scores["user"].to_numpy()
        self.tokens = _tokens(scores, by_depth)
        # 1. calibrate every head
        raw = raw_outputs(scores, features, exit_layers_of(scores), exit_0)
        self.calibration = fit_calibration(raw.logits, self.labels, raw.layers, exit_0)
        self.outputs = HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.retrieved)
        self.static_exit = self.outputs.layers[equal_accuracy_depth(self.outputs.logits, self.labels)]
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
        return ExitPlan(self.calibration, policy, self.exit_0)

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
        confidence = (
            out_of_fold_confidence(lambda: deepcopy(fresh), self.outputs, self.users)
            if criterion.learns
            else confidence_table(criterion, self.outputs)
        )
        about = confidence, self.outputs.logits, self.labels
        path = threshold_path(
            *about, self.outputs.layers, *self.tokens, prefix_cached=self.settings.prefix_cached
        )
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
        features: (n, F) features of the same rows.
        settings: Budget, criteria, exit 0, and whether the stream is paid for.
        by_depth: Pay for the mean layer at which candidates leave instead of token-layers.
        criterion: The criterion to use; None: the settings'.

    Raises:
        DataError: No row of the fold tune, or what calibration refuses.
        ConfigError: A budget that no step keeps.
    """
    check_folds(scores, ("tune",))
    chosen = (scores["fold"] == "tune").fill_null(False).to_numpy()
    exit_0 = settings.exit_0
    tune = TuneFold(scores.filter(chosen), features[chosen], settings, exit_0, by_depth, criterion)
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


def calibrate(
    scores: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    protocol_hash: str,
    previous: Mapping[str, Any] | None = None,
) -> Plans:
    """Make the exit plans of a run.

    Args:
        scores: Score table of validation, with its folds.
        features: (n, F) features of the same rows.
        settings: What is wanted.
        protocol_hash: Whose folds these are.
        previous: The run's results/calibrate.json, whose certificates must not be tried again.

    Returns:
        The plans, with the body of results/calibrate.json.

    Raises:
        DataError: A fold is empty, one class, NaN logits, heads that are all equal, users in two folds.
        ConfigError: A second certificate on the same fold in risk mode, where it would be the plan.
    """
    # 1. whether the certify fold may be read: it answers one certificate
    issued = (previous or {}).get("ledger", [])
    promise, ledger, why = settings.certificate, issued, "No certificate: exits.certificate is null."
    if promise is not None:
        try:
            ledger = admit(issued, asked_of_fold(settings), protocol_hash)
        except ConfigError as error:
            if settings.mode == "risk":
                raise
            promise, why = None, f"No certificate: {error}."
    check_folds(scores, ("tune", "certify"))
    fold = {f: (scores["fold"] == f).to_numpy() for f in ("tune", "certify")}
    table = {f: scores.filter(chosen) for f, chosen in fold.items()}
    # 2. on tune, with exit 0 and without: calibration, every criterion's path, the budget's step
    on_tune = table["tune"], features[fold["tune"]]
    by_exit_0 = {
        exit_0: TuneFold(*on_tune, settings, exit_0, shown=exit_0 != settings.exit_0)
        for exit_0 in (True, False)
    }
    tune, none = by_exit_0[settings.exit_0], by_exit_0[False]
    # 3. on certify, once: the budget's policy, then faster steps until one fails
    certificate = further = None
    if promise is not None:
        on_certify = table["certify"], features[fold["certify"]]
        certificate, further = _certificates(tune, *on_certify, settings, promise)
        why = certificate.in_words()
    tested = further is not None and further.passed is not None
    passed = None if further is None else further.path_step
    step = tune.best.step if settings.mode == "budget" else (passed or 0)
    last = None if passed is None else _sequence(tune, settings)[passed]
    # 4. what is kept, and what is told
    document = _document(tune, settings, step) | {
        "certificate": None if certificate is None else certificate.to_dict(),
        "certificate_words": why,
        "certified": None
        if last is None or further is None
        else _certified(tune, last, step, further, settings),
        "ledger": ledger if tested else issued,
        "exit_0_rows": {
            "with_exit_0": _exit_0_row(by_exit_0[True]),
            "without_exit_0": _exit_0_row(by_exit_0[False]),
        },
        "adaptive": tune.corrected() if settings.mode == "budget" else {},
    }
    return Plans(
        plan=tune.plan(step),
        static_exit=tune.static_exit,
        without=none.plan(none.best.step),
        static_without=none.static_exit,
        certified=None if last is None else tune.plan(last),
        document=document,
    )


def _certificates(
    tune: TuneFold,
    certify_rows: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    promise: CertificateSettings,
) -> tuple[Certificate, Certificate]:
    """Of the budget's step alone and of the sequence that begins with it; in risk mode both are of the whole path.

    The sequence ends before a step that runs no layer: leaving at exit 0 throughout is not early exit.
    """
    outputs = tune.plan(0).outputs(certify_rows, features)
    confidence = confidence_table(tune.best.criterion, outputs)
    emitted, no_layer = list[Floats](), False
    for step in _sequence(tune, settings):
        exits = leave(confidence, tune.best.path[step].thresholds)
        no_layer = outputs.layers[0] == 0 and not exits.any().item()
        if no_layer:
            break
        emitted.append(outputs.logits.gather(1, exits[:, None]).squeeze(1).double().numpy())
    path = np.stack(emitted)
    users, labels = certify_rows["user"].to_numpy(), certify_rows["label"].to_numpy()
    first = len(path) if settings.mode == "risk" else 1 + (tune.best.step > 0)
    own, further = (certify(part, path[0], labels, users, promise) for part in (path[:first], path))
    if no_layer and len(path) == 1:
        own = replace(own, reason="every row leaves at exit 0, so no layer runs")
    return own, further


def _sequence(tune: TuneFold, settings: ExitSettings) -> list[int]:
    """Steps of the path in the order they are tested, after full depth, which takes no test."""
    first = tune.best.step if settings.mode == "budget" else 1
    return [0, *range(max(first, 1), len(tune.best.path))]


def _certified(
    tune: TuneFold, last: int, step: int, further: Certificate, settings: ExitSettings
) -> dict[str, Any]:
    """`certified` of results/calibrate.json: the policy as measured on tune, and what may be said of it."""
    if settings.mode == "risk":
        words = "Risk mode: the certified policy is the policy in use."
    elif last == step:
        words = "The certified policy is the budget policy: no faster step of its path passed."
    else:
        words = (
            f"Tested after the budget policy, in the order of the path and at the same delta: the certified policy is "
            f"step {last}, {last - step} faster than the budget's. {further.in_words()}"
        )
    found = tune.best.path[last]
    thresholds = _by_layer(tune.outputs.layers, found.thresholds)
    return {"path_step": last, **found.point(), "thresholds": thresholds, "words": words}


def _document(tune: TuneFold, settings: ExitSettings, step: int) -> dict[str, Any]:
    layers = tune.outputs.layers
    policies = [
        {
            "criterion": name(curve.criterion),
            "settings": specification(curve.criterion),
            "mode": settings.mode,
            "thresholds": _by_layer(layers, curve.path[curve.step].thresholds),
            "calibration": tune.calibration.as_dict(),
            "pareto": [s.point() for s in curve.path],
            "chosen_step": step if curve is tune.best else curve.step,
        }
        for curve in tune.curves
    ]
    static_exit = layers.index(tune.static_exit)
    controls = control_curves(tune.outputs, tune.labels, *tune.tokens, settings.prefix_cached)
    static = next(c for c in controls if c["name"] == "fixed_depth")["pareto"]
    return {
        "layers": list(layers),
        "exit_0": settings.exit_0,
        "policies": policies,
        "controls": controls,
        "chosen": name(tune.best.criterion),
        "mode": settings.mode,
        "prefix_cached": settings.prefix_cached,
        "budget": {"max_auc_drop": settings.max_auc_drop, "max_cost": settings.max_cost},
        "static_exit": {k: static[static_exit][k] for k in ("layer", "auc", "cost")},
    }


def _exit_0_row(tune: TuneFold) -> dict[str, Any]:
    """What the comparison of priors needs: calibrated heads on tune, and what the best criterion reached."""
    static = control_curves(
        tune.outputs, tune.labels, *tune.tokens, tune.settings.prefix_cached, "fixed_depth"
    )
    plan = tune.plan(tune.best.step)
    layer, _ = plan.emitted(tune.outputs)
    return {
        "exits": static[0]["pareto"],
        "criterion": name(tune.best.criterion),
        "chosen": tune.best.path[tune.best.step].point(),
        "never_enter_backbone": float((layer == 0).double().mean()),
        "static_exit": tune.static_exit,
    }


def _by_layer(layers: tuple[int, ...], thresholds: Tensor) -> dict[str, float | str]:
    """JSON knows no infinity: "never" where nobody leaves, "everyone" where nobody goes on."""
    words = {np.inf: "never", -np.inf: "everyone"}
    return {str(k): words.get(v, v) for k, v in zip(layers, thresholds.tolist(), strict=True)}
