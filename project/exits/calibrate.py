"""From the scores of validation to an exit plan: calibrate, draw every criterion's path, choose, certify.

Unusual here: `tune` decides everything (calibration, criterion, thresholds, the honest rival), `certify` is read once
for the certificate, and `select` is not read at all. Both priors are always compared on `tune`; the settings say which
one is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.artefacts import exit_layers_of
from project.errors import DataError
from project.exits.calibration import fit_calibration
from project.exits.certify import Certificate, certify
from project.exits.criteria import Criterion, name, out_of_fold_safety, safety_table
from project.exits.ledger import CertificateLedger, scores_digest
from project.exits.outputs import HeadOutputs
from project.exits.path import Path, pick_budget, threshold_path
from project.exits.plan import ExitPlan, Floats, raw_outputs, specification
from project.exits.policies import Policy
from project.exits.settings import ExitSettings
from project.exits.simulate import control_curves, rival_depth


@dataclass(frozen=True)
class Calibrated:
    """Exit plans and what results/calibrate.json says about them.

    Attributes:
        plan: What the run uses from now on.
        rival: Layer of its honest rival.
        without: The same run without exit 0, at the budget's step: for comparison.
        rival_without: Layer of its honest rival.
        document: Body of results/calibrate.json.
    """

    plan: ExitPlan
    rival: int
    without: ExitPlan
    rival_without: int
    document: dict[str, Any]


@dataclass(frozen=True)
class _Curve:
    """One criterion, fitted on tune, with its path and the step that the budget chose."""

    criterion: Criterion
    path: Path
    step: int


class _Tune:
    """The tune fold under one prior: calibrated outputs and every criterion's curve."""

    def __init__(self, scores: pl.DataFrame, features: Floats, settings: ExitSettings, prior: bool) -> None:
        self.settings, self.prior = settings, prior
        self.labels, self.users = scores["label"].to_numpy(), scores["user"].to_numpy()
        raw = raw_outputs(scores, features, exit_layers_of(scores), prior)
        self.calibration = fit_calibration(raw.logits, self.labels, raw.layers, prior)
        self.outputs = HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.evidence, raw.drift)
        self.tokens = _tokens(scores, "target"), _tokens(scores, "stream")
        self.curves = [self._curve(deepcopy(c)) for c in settings.criteria()]
        self.rival = self.outputs.layers[rival_depth(self.outputs.logits, self.labels)]
        self.best = self.curves[0] if settings.criterion is not None else max(self.curves, key=self._worth)

    def _curve(self, criterion: Criterion) -> _Curve:
        fresh = deepcopy(criterion)
        criterion.fit(self.outputs)
        if criterion.learns:
            safety = out_of_fold_safety(lambda: deepcopy(fresh), self.outputs, self.users)
        else:
            safety = safety_table(criterion, self.outputs)
        path = threshold_path(
            safety,
            self.outputs.logits,
            self.labels,
            self.outputs.layers,
            *self.tokens,
            stream=self.settings.stream,
        )
        step = pick_budget(path, self.settings.max_auc_drop, self.settings.max_cost)
        return _Curve(criterion, path, step)

    def _worth(self, curve: _Curve) -> tuple[float, float]:
        """Cheaper is better where an AUC drop is the budget, a higher AUC where the cost is."""
        point = curve.path.steps[curve.step]
        return (point.auc, -point.cost) if self.settings.max_auc_drop is None else (-point.cost, point.auc)

    def plan(self, step: int) -> ExitPlan:
        """The best criterion at one step of its path."""
        thresholds = self.best.path.steps[step].thresholds
        policy = Policy(self.best.criterion, thresholds, self.outputs.layers)
        return ExitPlan(self.calibration, policy, self.prior)


def _tokens(scores: pl.DataFrame, kind: str) -> Tensor:
    return torch.from_numpy(scores[f"{kind}_tokens"].to_numpy().copy())


def calibrate(
    scores: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    protocol_hash: str,
    previous: Mapping[str, Any] | None = None,
) -> Calibrated:
    """Make the exit plan of a run.

    Args:
        scores: Score table of validation, with its folds.
        features: (n, F) counting features of the same rows.
        settings: What is wanted.
        protocol_hash: Whose folds these are.
        previous: The run's results/calibrate.json, whose certificates must not be tried again.

    Raises:
        DataError: A fold is empty, one class, NaN logits, heads that are all equal, users in two folds.
        ConfigError: A second certificate on the same fold.
    """
    _check_folds(scores)
    fold = {f: (scores["fold"] == f).to_numpy() for f in ("tune", "certify")}
    table = {f: scores.filter(chosen) for f, chosen in fold.items()}
    by_prior = {
        prior: _Tune(table["tune"], features[fold["tune"]], settings, prior == "counting")
        for prior in ("counting", "none")
    }
    tune = by_prior[settings.prior]
    certificate, ledger = _certificate(
        tune, table["certify"], features[fold["certify"]], settings, protocol_hash, previous
    )
    step = tune.best.step if settings.mode == "budget" else (certificate.path_step or 0)
    plan = tune.plan(step)

    none = by_prior["none"]
    document = _document(tune, settings, step) | {
        "certificate": certificate.to_dict() | {"words": certificate.in_words()},
        "ledger": ledger,
        "priors": {key: _prior_row(value) for key, value in by_prior.items()},
    }
    return Calibrated(plan, tune.rival, none.plan(none.best.step), none.rival, document)


def _check_folds(scores: pl.DataFrame) -> None:
    owners = scores.drop_nulls("fold").group_by("user").agg(pl.col("fold").n_unique())
    shared = owners.filter(pl.col("fold") > 1)
    if len(shared):
        raise DataError(
            f"{len(shared)} users of validation stand in more than one fold (user code {shared['user'][0]}); expected "
            "each in one: what chose the checkpoint must not calibrate or certify. Run `validate` again."
        )
    counts = {f: int((scores["fold"] == f).sum()) for f in ("tune", "certify")}
    empty = [f for f, count in counts.items() if not count]
    if empty:
        raise DataError(
            f"the fold {empty[0]} of validation has no rows; expected users in every fold. "
            "Use more validation data, or raise its share in data.protocol.fold_shares."
        )


def _certificate(
    tune: _Tune,
    certify_rows: pl.DataFrame,
    features: Floats,
    settings: ExitSettings,
    protocol_hash: str,
    previous: Mapping[str, Any] | None,
) -> tuple[Certificate, list[dict[str, Any]]]:
    """One certificate: of the chosen step in budget mode, of the last step that passes in risk mode."""
    last = len(tune.best.path.steps) - 1
    steps = [tune.best.step] if settings.mode == "budget" else list(range(1, last + 1))
    plan = tune.plan(0)
    outputs = plan.outputs(certify_rows, features)
    emitted = [_emitted(tune.plan(k), outputs) for k in [0, *(s for s in steps if s > 0)]]
    users = certify_rows["user"].to_numpy()
    digest = scores_digest(certify_rows["row_id"].to_numpy(), users, outputs.logits.numpy())
    ledger = CertificateLedger(previous).admit(
        settings.certificate, specification(tune.best.criterion), settings.mode, protocol_hash, digest
    )
    found = certify(
        np.stack(emitted), emitted[0], certify_rows["label"].to_numpy(), users, settings.certificate
    )
    return found, ledger


def _emitted(plan: ExitPlan, outputs: HeadOutputs) -> Floats:
    logits: Tensor = plan.emitted(outputs)[1]
    return logits.double().numpy()


def _document(tune: _Tune, settings: ExitSettings, step: int) -> dict[str, Any]:
    layers = tune.outputs.layers
    policies = [
        {
            "criterion": name(curve.criterion),
            "settings": specification(curve.criterion),
            "mode": settings.mode,
            "thresholds": _by_layer(layers, curve.path.steps[curve.step].thresholds),
            "calibration": tune.calibration.as_dict(),
            "pareto": [s.point() for s in curve.path.steps],
            "chosen_step": step if curve is tune.best else curve.step,
        }
        for curve in tune.curves
    ]
    rival = layers.index(tune.rival)
    controls = control_curves(tune.outputs, tune.labels, *tune.tokens, settings.stream)
    static = next(c for c in controls if c["name"] == "fixed_depth")["pareto"]
    return {
        "layers": list(layers),
        "prior": settings.prior,
        "policies": policies,
        "controls": controls,
        "chosen": name(tune.best.criterion),
        "mode": settings.mode,
        "stream": settings.stream,
        "budget": {"max_auc_drop": settings.max_auc_drop, "max_cost": settings.max_cost},
        "rival": {k: static[rival][k] for k in ("layer", "auc", "cost")},
    }


def _prior_row(tune: _Tune) -> dict[str, Any]:
    """What the comparison of priors needs: calibrated heads on tune, and what the best criterion reached."""
    static = control_curves(tune.outputs, tune.labels, *tune.tokens, tune.settings.stream, "fixed_depth")
    plan = tune.plan(tune.best.step)
    layer, _ = plan.emitted(tune.outputs)
    return {
        "exits": static[0]["pareto"],
        "criterion": name(tune.best.criterion),
        "chosen": tune.best.path.steps[tune.best.step].point(),
        "never_enter_trunk": float((layer == 0).double().mean()),
        "rival": tune.rival,
    }


def _by_layer(layers: tuple[int, ...], thresholds: Tensor) -> dict[str, float | str]:
    """JSON knows no infinity: "never" where nobody leaves, "everyone" where nobody goes on."""
    words = {np.inf: "never", -np.inf: "everyone"}
    return {str(k): words.get(v, v) for k, v in zip(layers, thresholds.tolist(), strict=True)}
