"""From the scores of validation to an exit plan: calibrate, draw every criterion's path, choose, certify.

`tune` decides everything (calibration, criterion, thresholds, the honest rival), `certify` is read once
for the certificate, and `select` is not read at all. Both priors are always compared on `tune`; the settings say which
one is used. A budget's policy is tested first; while tests pass, faster steps of its path follow in order, and the last
that passes is the certified policy: one sequence, one delta (Learn-then-Test, Angelopoulos et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from project.errors import ConfigError
from project.exits.budget import TuneFold, check_folds
from project.exits.certificate import Certificate, CertificateSettings, certify
from project.exits.criteria import name, safety_table
from project.exits.ledger import admit, asked_of_fold
from project.exits.plan import Floats, Plans, specification
from project.exits.policies import leave
from project.exits.settings import ExitSettings
from project.exits.simulate import control_curves


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
        features: (n, F) counting features of the same rows.
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
    by_prior = {
        prior: TuneFold(*on_tune, settings, prior == "counting", shown=prior != settings.prior)
        for prior in ("counting", "none")
    }
    tune, none = by_prior[settings.prior], by_prior["none"]
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
        "priors": {key: _prior_row(value) for key, value in by_prior.items()},
        "adaptive": tune.corrected() if settings.mode == "budget" else {},
    }
    return Plans(
        plan=tune.plan(step),
        rival=tune.rival,
        without=none.plan(none.best.step),
        rival_without=none.rival,
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
    safety = safety_table(tune.best.criterion, outputs)
    emitted, no_layer = list[Floats](), False
    for step in _sequence(tune, settings):
        exits = leave(safety, tune.best.path[step].thresholds)
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


def _prior_row(tune: TuneFold) -> dict[str, Any]:
    """What the comparison of priors needs: calibrated heads on tune, and what the best criterion reached."""
    static = control_curves(tune.outputs, tune.labels, *tune.tokens, tune.settings.stream, "fixed_depth")
    plan = tune.plan(tune.best.step)
    layer, _ = plan.emitted(tune.outputs)
    return {
        "exits": static[0]["pareto"],
        "criterion": name(tune.best.criterion),
        "chosen": tune.best.path[tune.best.step].point(),
        "never_enter_trunk": float((layer == 0).double().mean()),
        "rival": tune.rival,
    }


def _by_layer(layers: tuple[int, ...], thresholds: Tensor) -> dict[str, float | str]:
    """JSON knows no infinity: "never" where nobody leaves, "everyone" where nobody goes on."""
    words = {np.inf: "never", -np.inf: "everyone"}
    return {str(k): words.get(v, v) for k, v in zip(layers, thresholds.tolist(), strict=True)}
