"""Who decides which candidates leave at an exit: a row policy, or the list of the best k.

Unusual here: nothing is decided in this file. Both kinds call the code that simulation on cached scores calls
(`Policy.leaves`, `TopK.stays`), on the device, with the fitted tensors moved there once. What thresholds say without
looking at a row (nobody leaves, everybody does) is known before the first request, and costs no host sync.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from project.errors import ConfigError
from project.exits.calibration import Calibration
from project.exits.criteria import HeadOutputs, Ratio
from project.exits.plan import ExitPlan
from project.exits.policy import Policy
from project.exits.top_k import TopK


class Decision(Protocol):
    """Exits of an engine.

    Attributes:
        layers: (K,) layers of the heads, 0 first where exit 0 is one of them.
        calibration: Per head, K rows.
    """

    @property
    def layers(self) -> tuple[int, ...]:
        """(K,) layers of the heads."""
        ...

    @property
    def calibration(self) -> Calibration:
        """Per head."""
        ...

    def known(self, head: int) -> bool | None:
        """True: everyone leaves at this head, False: nobody does, None: it depends on the rows."""
        ...

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """Which of m running candidates leave at the last head shown, (m,) bool.

        Args:
            request: (m,) request of each, not decreasing.
            outputs: Their calibrated outputs, heads 0..k.
        """
        ...


class RowExits:
    """Every candidate for itself, by a calibrated plan.

    Args:
        plan: The plan.
        device: Where its tensors will be needed.
    """

    def __init__(self, plan: ExitPlan, device: torch.device | str = "cpu") -> None:
        self._plan = ExitPlan.from_state(_moved(plan.state(), torch.device(device)))
        self._thresholds: list[float] = plan.policy.thresholds.tolist()

    @property
    def layers(self) -> tuple[int, ...]:
        """(K,) layers of the heads."""
        return self._plan.layers

    @property
    def calibration(self) -> Calibration:
        """Per head."""
        return self._plan.calibration

    def known(self, head: int) -> bool | None:
        """From the threshold alone."""
        if head == len(self._thresholds) - 1:
            return True
        return {torch.inf: False, -torch.inf: True}.get(self._thresholds[head])

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """(m,) bool by `Policy.leaves`."""
        del request
        return self._plan.policy.leaves(outputs)


class ListExits:
    """Candidates that can no longer reach the list of the best k leave.

    Args:
        top_k: Length and margins.
        calibration: Of the heads that the margins were fitted on.

    Attributes:
        layers: (K,) layers of the heads.
        calibration: Per head.
    """

    def __init__(self, top_k: TopK, calibration: Calibration) -> None:
        if top_k.margins.numel() != len(calibration.layers):
            raise ConfigError(
                f"top_k has {top_k.margins.numel()} margins, but there are exits at layers {calibration.layers}"
            )
        self.top_k = top_k
        self.layers, self.calibration = calibration.layers, calibration
        self._margins: list[float] = top_k.margins.tolist()

    def known(self, head: int) -> bool | None:
        """Nobody leaves where the margin is infinite."""
        if head == len(self._margins) - 1:
            return True
        return False if self._margins[head] == torch.inf else None

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """(m,) bool by `TopK.stays`."""
        return ~self.top_k.stays(request, outputs.logits[:, -1], outputs.heads - 1)


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: _moved(value, device)
        if isinstance(value, Mapping)
        else value.to(device)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }


def static_exits(plan: ExitPlan, layer: int, device: torch.device | str = "cpu") -> RowExits:
    """Everyone leaves at one layer, with that head's calibrated logit: a static model, full depth at the last layer.

    Only that head runs, so the engine meets no sync and no gather on the way.

    Args:
        plan: Its calibration is used.
        layer: One of its layers.
        device: Where tensors will be needed.
    """
    if layer not in plan.layers:
        raise ConfigError(f"a static model of depth {layer} was asked for; the exits are {plan.layers}")
    heads = [plan.layers.index(layer)]
    if plan.exit_0 and layer > 0:
        heads = [0, *heads]  # its logit is a term of the calibration
    layers = tuple(plan.layers[h] for h in heads)
    thresholds = torch.full((len(heads),), torch.inf, dtype=torch.float64)
    thresholds[-1] = -torch.inf
    calibration = Calibration(layers, plan.calibration.values[heads])
    return RowExits(ExitPlan(calibration, Policy(Ratio(), thresholds, layers), plan.exit_0), device)
