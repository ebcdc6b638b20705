"""The exit plan: everything a calibrated run has decided about exits, frozen: calibration, criterion, thresholds.

Unusual here: validation, test, predict and the engine all ask this one object, and nothing in it can change after the
`certify` fold was read. Where a run uses exit 0, it is head 0 and its logit enters every head's calibration; without
a prior the plan does not know exit 0 at all.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from project.errors import ConfigError
from project.exits.calibration import Calibration
from project.exits.criteria import Criterion, name
from project.exits.outputs import HeadOutputs
from project.exits.policies import Policy

Floats = NDArray[np.float64]


def raw_outputs(scores: pl.DataFrame, features: Floats, exit_layers: list[int], prior: bool) -> HeadOutputs:
    """What a score table says, before calibration.

    Args:
        scores: n rows of a score table (logit_<layer>).
        features: (n, F) counting features of the same rows.
        exit_layers: Layers of the heads, ascending.
        prior: Whether exit 0 is a head.
    """
    layers = [0, *exit_layers] if prior else list(exit_layers)
    logits = torch.from_numpy(scores.select(f"logit_{k}" for k in layers).cast(pl.Float64).to_numpy().copy())
    return HeadOutputs.of(layers, logits, torch.from_numpy(features))


@dataclass(frozen=True)
class ExitPlan:
    """How candidates leave.

    Attributes:
        calibration: Per head, exit 0 first where there is a prior.
        policy: A fitted criterion with its thresholds.
        prior: Whether exit 0 is a head.
    """

    calibration: Calibration
    policy: Policy
    prior: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """(K,) layers of the heads, 0 first where there is a prior."""
        return self.policy.layers

    def outputs(self, scores: pl.DataFrame, features: Floats) -> HeadOutputs:
        """Calibrated outputs of a score table's rows. Arguments as in `raw_outputs`."""
        raw = raw_outputs(scores, features, [k for k in self.layers if k > 0], self.prior)
        return self.calibrated(raw)

    def calibrated(self, raw: HeadOutputs) -> HeadOutputs:
        """The same rows with calibrated logits; the first heads alone will do."""
        return HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.evidence)

    def emitted(self, outputs: HeadOutputs) -> tuple[Tensor, Tensor]:
        """Per row of calibrated outputs: the layer it leaves at, (n,) int64, and the logit it leaves with, (n,)."""
        index = self.policy.exits(outputs)
        layer = torch.tensor(self.layers)[index]
        return layer, outputs.logits.gather(1, index[:, None]).squeeze(1)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and text only."""
        criterion = self.policy.criterion
        return {
            "layers": list(self.layers),
            "prior": self.prior,
            "calibration": self.calibration.values,
            "thresholds": self.policy.thresholds,
            "criterion": specification(criterion),
            "fitted": criterion.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ExitPlan:
        """From what `state` gave."""
        criterion = _criterion(state["criterion"])
        criterion.load(state["fitted"])
        layers = tuple(state["layers"])
        policy = Policy(criterion, state["thresholds"], layers)
        return cls(Calibration(layers, state["calibration"]), policy, state["prior"])

    @property
    def criterion(self) -> str:
        """Name of the criterion in result files."""
        return name(self.policy.criterion)


@dataclass(frozen=True)
class Plans:
    """The plans of a run, as its checkpoint keeps them.

    Attributes:
        plan: In use.
        rival: Layer of its honest rival.
        without: The same run's without exit 0, at the budget's step: for comparison.
        rival_without: Layer of that plan's rival.
        certified: The fastest plan that the certificate reached; None where its first test failed, or in a checkpoint
            of a version that did not look for one.
        document: Body of results/calibrate.json; from a checkpoint, its `certificate` alone.
    """

    plan: ExitPlan
    rival: int
    without: ExitPlan
    rival_without: int
    certified: ExitPlan | None = None
    document: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "plan": self.plan.state(),
            "rival": self.rival,
            "without": self.without.state(),
            "rival_without": self.rival_without,
            "certified": None if self.certified is None else self.certified.state(),
            "certificate": json.dumps(self.document.get("certificate", {})),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Plans:
        """From what `state` gave."""
        plan, without = (ExitPlan.from_state(state[key]) for key in ("plan", "without"))
        known = state.get("certified")
        certified = None if known is None else ExitPlan.from_state(known)
        document = {"certificate": json.loads(state["certificate"])}
        return cls(plan, state["rival"], without, state["rival_without"], certified, document)


def specification(criterion: Criterion) -> dict[str, Any]:
    """Class path and constructor arguments: what makes two criteria equal before they are fitted."""
    kind = type(criterion)
    names = list(inspect.signature(kind).parameters)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {n: getattr(criterion, n) for n in names},
    }


def _criterion(spec: Mapping[str, Any]) -> Criterion:
    module, _, kind = str(spec["class_path"]).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, Criterion)):
        raise ConfigError(
            f"the checkpoint's exit criterion is {spec['class_path']!r}, which is no Criterion that can be imported; "
            "install the package it comes from, or run the verb calibrate again"
        )
    made: Criterion = found(**spec["init_args"])
    return made
