"""The exit plan of a run: its settings, its state in a checkpoint, and the ledger of its certificates."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl
import torch
from torch import Tensor

from project.arrays import F64
from project.errors import ConfigError
from project.exits.calibration import Calibration
from project.exits.certificate import CertificateSettings
from project.exits.criteria import (
    Criterion,
    HeadOutputs,
    name,
    try_out,
)
from project.exits.policy import leave
from project.exits.ranking import Lists
from project.results import CertificateRow, Issued, Specification
from project.run import Checkpoint, exit_layers_of


@dataclass
class ExitSettings:
    """How exits are calibrated.

    Args:
        criterion: The criterion that decides; None takes the best on `tune` of all there are.
        exit_0: true lets candidates leave before the first layer and enters every head's calibration; false does
            not.
        max_auc_drop: Budget: AUC on `tune` that may be lost against full depth.
        alpha: Budget: chance that the AUC drop is above max_auc_drop after all, in (0, 0.5]; less is slower.
        certificate: What is promised, and tested on the `certify` fold; None makes no certificate.
        lists: Requests of the folds tune and certify, as many of each, that lists of the best k are fitted and
            certified on; 0 fits none.
    """

    criterion: Criterion | None = None
    exit_0: bool = True
    max_auc_drop: float = 0.002
    alpha: float = 0.1
    certificate: CertificateSettings | None = field(default_factory=CertificateSettings)
    lists: int = 100

    def __post_init__(self) -> None:
        if self.lists < 0:
            raise ConfigError(f"exits.lists is {self.lists}; expected 0 or more requests.")
        if not 0 <= self.max_auc_drop < math.inf:
            raise ConfigError(
                f"exits.max_auc_drop is {self.max_auc_drop}; expected 0 or more."
            )
        if not 0 < self.alpha <= 0.5:
            raise ConfigError(
                f"exits.alpha is {self.alpha}; expected a chance above 0 and at most 0.5."
            )
        if self.criterion is not None:
            try_out(self.criterion, self.exit_0)


def raw_outputs(scores: pl.DataFrame, features: F64, exit_0: bool) -> HeadOutputs:
    """Uncalibrated outputs of a score table's n rows at exit 0, where it is a head, and at its exit layers.

    `features` (n, F) are of the same rows.
    """
    layers = [0] * exit_0 + exit_layers_of(scores)
    logits = torch.from_numpy(
        scores.select(f"logit_{k}" for k in layers).cast(pl.Float64).to_numpy().copy()
    )
    return HeadOutputs.of(layers, logits, torch.from_numpy(features))


@dataclass(frozen=True, eq=False)
class ExitPlan:
    """How candidates leave: a calibration per head, a fitted criterion, and a threshold (K,) per head.

    A threshold is +inf where nobody leaves, -inf, as at the last head, where all do. An engine calls `leaves` at one
    exit, a simulation calls `exits` on cached logits; both use `leave`.
    """

    calibration: Calibration
    criterion: Criterion
    thresholds: Tensor

    @property
    def layers(self) -> tuple[int, ...]:
        """(K,) layers of the heads, 0 first where exit 0 is one of them."""
        return self.calibration.layers

    @property
    def exit_0(self) -> bool:
        """Whether exit 0 is a head."""
        return self.layers[0] == 0

    @property
    def criterion_name(self) -> str:
        """In result files."""
        return name(self.criterion)

    def outputs(self, scores: pl.DataFrame, features: F64) -> HeadOutputs:
        """Calibrated outputs of a score table's n rows with these features (n, F)."""
        return self.calibrated(raw_outputs(scores, features, self.exit_0))

    def calibrated(self, raw: HeadOutputs) -> HeadOutputs:
        """The same rows with calibrated logits."""
        return HeadOutputs(raw.layers, self.calibration.apply(raw.logits), raw.retrieved)

    def leaves(self, outputs: HeadOutputs) -> Tensor:
        """Which of n running rows leave at the last head shown, (n,) bool."""
        if outputs.layers != self.layers[: outputs.heads]:
            raise ConfigError(
                f"the plan was made for exits at layers {self.layers}, found {outputs.layers}"
            )
        if outputs.heads == len(self.layers):
            return torch.ones_like(outputs.logits[:, -1], dtype=torch.bool)
        confidence = self.criterion.confidence(outputs)
        # as a table of two heads, this one and one that takes everyone, so that `leave` decides
        here_or_later = torch.stack(
            [confidence, torch.full_like(confidence, torch.inf)], dim=1
        )
        # stacked, not indexed by a list: an engine's thresholds are on the device, and this
        # needs no host sync
        limits = torch.stack([self.thresholds[outputs.heads - 1], self.thresholds[-1]])
        return leave(here_or_later, limits) == 0

    def exits(self, outputs: HeadOutputs) -> Tensor:
        """Index of the head at which each of n rows leaves, (n,) int64; `outputs` has all K heads."""
        # (m,) positions of the rows that still run; shrinks at every head
        running = torch.arange(outputs.logits.shape[0], device=outputs.logits.device)
        # (n,)
        exits = torch.full_like(running, len(self.layers) - 1)
        for head in range(len(self.layers)):
            # (m,) only what an engine knows here: running rows, heads so far
            gone = self.leaves(outputs.rows(running).until(head))
            exits[running[gone]] = head
            running = running[~gone]
        return exits

    def emitted(self, outputs: HeadOutputs) -> tuple[Tensor, Tensor]:
        """Per row of calibrated outputs: the layer it leaves at, (n,) int64, and the logit it leaves with, (n,)."""
        index = self.exits(outputs)
        return torch.tensor(self.layers)[index], outputs.logits.gather(
            1, index[:, None]
        ).squeeze(1)

    def state(self) -> Checkpoint:
        """For a checkpoint: tensors, numbers and text only."""
        return {
            "layers": list(self.layers),
            "calibration": self.calibration.values,
            "thresholds": self.thresholds,
            "criterion": specification(self.criterion),
            "fitted": dict(self.criterion.tensors),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ExitPlan:
        """From what `state` gave; the criterion is of this package, or a class that the configuration has imported.

        Importing what a checkpoint names would run any module that lies below the working directory.
        """
        path = str(state["criterion"]["class_path"])
        layers = tuple(state["layers"])
        module, _, kind = path.rpartition(".")
        found = getattr(sys.modules.get(module), kind, None)
        if not (isinstance(found, type) and issubclass(found, Criterion)):
            raise ConfigError(
                f"the checkpoint's exit criterion is {path!r}, which is no Criterion that the configuration names; "
                "expected one of project.exits, or the class at exits.criterion. Use the run's own "
                "config.yaml, or import the class first in Python."
            )
        criterion: Criterion = found(**state["criterion"]["init_args"])
        criterion.tensors = state["fitted"]
        calibration = Calibration(layers, state["calibration"])
        return cls(calibration, criterion, state["thresholds"])


CHECKPOINT_KEY = "exit_plans"  # of a run's checkpoint, under which its plans lie


@dataclass(frozen=True)
class Plans:
    """The plans of a run, as its checkpoint keeps them.

    `plan` is in use, `certificate` is its test. `static_exit` is the layer of the static exit of equal accuracy: the
    shallowest that is nearly as good as the best on tune. `lists` lets candidates leave by `plan`'s heads where the
    best k are asked for.
    """

    plan: ExitPlan
    static_exit: int
    lists: Lists = field(default_factory=Lists)
    certificate: CertificateRow | None = None
    budget_words: str | None = None  # why the plan is full depth, where users are too few

    def state(self) -> Checkpoint:
        """For a checkpoint."""
        return {
            "plan": self.plan.state(),
            "static_exit": self.static_exit,
            "lists": self.lists.state(),
            "certificate": json.dumps(self.certificate),
            "budget_words": self.budget_words,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Plans:
        """From what `state` gave."""
        return cls(
            ExitPlan.from_state(state["plan"]),
            state["static_exit"],
            Lists.from_state(state["lists"]),
            json.loads(state["certificate"]) or None,
            state.get("budget_words"),
        )


def plans_of(checkpoint: Mapping[str, Any]) -> Plans | None:
    """The exit plans in a loaded checkpoint; None where the run was never calibrated."""
    state = checkpoint.get(CHECKPOINT_KEY)
    return None if state is None else Plans.from_state(state)


def specification(criterion: Criterion) -> Specification:
    """Class path and constructor arguments: what makes two criteria equal before they are fitted."""
    kind = type(criterion)
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {
            key: getattr(criterion, key) for key in inspect.signature(kind).parameters
        },
    }


def admit(
    issued: Sequence[Issued],
    settings: ExitSettings,
    checkpoint: str,
    protocol_hash: str,
    fitting: bool = False,
) -> list[Issued]:
    """The ledger `issued` with one more certificate on the protocol's fold; the identical one is recorded once.

    Noted is, by YAML key, what is promised and what decides which policies are tested for it: budget and exit 0 choose
    these on `tune`, so with others another policy is tested on the same fold. `checkpoint` names the weights. A key
    that an issued certificate lacks is not held against it. Anything else on the same fold is another try, which is an
    error. While `fitting` it is the same try with the next checkpoint, as the certificate has no part in which
    checkpoint is kept.
    """
    criterion = settings.criterion
    promise = {} if settings.certificate is None else asdict(settings.certificate)
    keys = ("exit_0", "max_auc_drop", "alpha", "lists")
    tried: dict[str, object] = {
        "exits.criterion": criterion and specification(criterion),
        **{f"exits.{key}": getattr(settings, key) for key in keys},
        **{f"exits.certificate.{key}": value for key, value in promise.items()},
        "checkpoint": checkpoint,
    }
    ledger = list[Issued]()
    for record in issued:
        if record["protocol_hash"] != protocol_hash:
            ledger.append(record)
            continue
        was = record["settings"]
        changed = [key for key, value in tried.items() if was.get(key, value) != value]
        if changed and not (fitting and changed == ["checkpoint"]):
            differences = ", ".join(
                f"{key} {was[key]!r} -> {tried[key]!r}" for key in changed
            )
            raise ConfigError(
                f"a certificate was already issued on this certify fold with other settings ({differences}): asking "
                "twice voids delta. Keep the settings, or train a new run and fix them before the fold is read"
            )
    return [*ledger, {"protocol_hash": protocol_hash, "settings": tried}]
