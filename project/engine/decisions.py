"""Decides who leaves at an exit: by a calibrated plan, candidate by candidate, or by the list that a request asks for.

Both call the code that a simulation on cached scores calls (`ExitPlan.leaves`, `TopK.stays`), on the device, with the
fitted tensors moved there once.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from project.arrays import I64
from project.engine.attention import upload
from project.errors import ConfigError
from project.exits.calibration import Calibration
from project.exits.criteria import HeadOutputs, Ratio
from project.exits.plan import ExitPlan
from project.exits.ranking import Lists


class RowExits:
    """Every candidate for itself, by a calibrated plan whose tensors are moved to `device`.

    `layers` (K,) are those of the heads, 0 first where exit 0 is one of them, `calibration` is of the K heads.
    """

    lists = Lists()  # that it decides

    def __init__(self, plan: ExitPlan, device: torch.device | str = "cpu") -> None:
        self._plan = ExitPlan.from_state(move_data_to_device(plan.state(), device))
        self._thresholds: list[float] = plan.thresholds.tolist()  # (K,)
        self.layers = self._plan.layers
        self.calibration = self._plan.calibration

    def known(self, head: int, list_of: I64) -> bool | None:
        """True: everyone leaves at this head, False: nobody does, None: it depends on the rows, and costs a sync.

        `list_of` (m,) is the length of each running candidate's list; 0: its score is asked for. Here the threshold
        alone says it; the last one is -inf.
        """
        return {torch.inf: False, -torch.inf: True}.get(self._thresholds[head])

    def leaves(self, request: Tensor, list_of: I64, outputs: HeadOutputs) -> Tensor:
        """Which of m running candidates leave at the last head shown, (m,) bool, by `ExitPlan.leaves`.

        `request` (m,) is the request of each, not decreasing; outputs are calibrated, heads 0..k.
        """
        return self._plan.leaves(outputs)


class ListExits(RowExits):
    """By the request: candidates of a list that can no longer reach it leave, the others by the plan."""

    def __init__(
        self, plan: ExitPlan, lists: Lists, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(plan, device)
        self.lists = lists
        self._moved = Lists(move_data_to_device(lists.margins, device))

    def known(self, head: int, list_of: I64) -> bool | None:
        """The same for all: the plan's, and of lists that nobody leaves where the margin is infinite."""
        found = set[bool | None]()
        for k in np.unique(list_of).tolist():
            if k == 0 or head == len(self.layers) - 1:
                found.add(super().known(head, list_of))
            else:
                margin = float(self.lists.top_k(k).margins[head])
                found.add(False if margin == torch.inf else None)
        return found.pop() if len(found) == 1 else None

    def leaves(self, request: Tensor, list_of: I64, outputs: HeadOutputs) -> Tensor:
        """(m,) bool by `TopK.stays` for each length of list, by `ExitPlan.leaves` for the others."""
        head = outputs.heads - 1
        leaves = torch.zeros_like(request, dtype=torch.bool)
        for k in np.unique(list_of).tolist():
            rows = upload(np.flatnonzero(list_of == k), request.device)
            own = outputs.rows(rows)
            if k == 0:
                leaves[rows] = super().leaves(request[rows], list_of, own)
            else:
                stays = self._moved.top_k(k).stays(request[rows], own.logits[:, -1], head)
                leaves[rows] = ~stays
        return leaves


class EveryHead:
    """Nobody leaves before the last head; calibrated outputs of all heads are kept, batch by batch."""

    lists = Lists()

    def __init__(self, calibration: Calibration) -> None:
        self.layers = calibration.layers
        self.calibration = calibration
        self.outputs: list[HeadOutputs] = []  # of each batch

    def known(self, head: int, list_of: I64) -> bool | None:
        """Nobody leaves before the last head, where `leaves` must be called to keep the outputs."""
        return None if head == len(self.layers) - 1 else False

    def leaves(self, request: Tensor, list_of: I64, outputs: HeadOutputs) -> Tensor:
        """(m,) all True, at the last head."""
        self.outputs.append(outputs)
        return torch.ones_like(request, dtype=torch.bool)


Decision = RowExits | EveryHead  # who leaves at an engine's exits


def static_exits(
    plan: ExitPlan, layer: int, device: torch.device | str = "cpu"
) -> RowExits:
    """Everyone leaves at one layer of a plan with that head's calibrated logit: a static exit.

    Only that head runs, so the engine meets no sync and no gather on the way.
    """
    if layer not in plan.layers:
        raise ConfigError(
            f"a static exit of layer {layer} was requested; the exits are {plan.layers}"
        )
    heads = [plan.layers.index(layer)]
    if plan.exit_0 and layer > 0:
        heads = [0, *heads]  # its logit is a term of the calibration
    layers = tuple(plan.layers[h] for h in heads)
    calibration = Calibration(layers, plan.calibration.values[heads])
    cut = ExitPlan(calibration, Ratio(), plan.thresholds[heads])
    return RowExits(nobody_leaves(cut), device)


def nobody_leaves(plan: ExitPlan) -> ExitPlan:
    """The same heads and calibration, everyone at the last: full depth, which a deadline can cut at every head."""
    thresholds = torch.full_like(plan.thresholds, torch.inf)
    thresholds[-1] = -torch.inf
    return replace(plan, thresholds=thresholds)
