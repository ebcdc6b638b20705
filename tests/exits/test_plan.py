"""A plan survives the checkpoint, and does with a row what its heads say one by one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from project.errors import ConfigError
from project.exits.calibration import fit_calibration
from project.exits.criteria import Learned
from project.exits.plan import ExitPlan, specification
from project.exits.policy import Policy


def test_state_round_trip(world: Any) -> None:
    """Saved the way a checkpoint is (weights only) and loaded, a plan sends every row to the same exit."""
    calibration = fit_calibration(world.raw, world.labels, world.layers, exit_0=True)
    outputs, criterion = world.outputs(calibration), Learned()
    criterion.fit(outputs)
    levels = criterion.confidence(outputs.until(2)).quantile(torch.tensor(0.6, dtype=torch.float64))
    limits = torch.full((len(world.layers),), float(levels), dtype=torch.float64)
    limits[-1] = -torch.inf
    plan = ExitPlan(calibration, Policy(criterion, limits, world.layers), exit_0=True)
    file = io.BytesIO()
    torch.save(plan.state(), file)
    file.seek(0)
    loaded = ExitPlan.from_state(torch.load(file, weights_only=True))
    for before, after in zip(plan.emitted(outputs), loaded.emitted(outputs), strict=True):
        torch.testing.assert_close(after, before)
    assert loaded.criterion == plan.criterion
    assert specification(loaded.policy.criterion) == specification(criterion)
    assert len(plan.emitted(outputs)[0].unique()) > 1


def test_random_thresholds(new_world: Callable[..., Any]) -> None:
    """For random thresholds, the layer and logit of a row are those of the first head whose rule says leave."""
    world, rng = new_world(200, seed=8), np.random.default_rng(8)
    calibration = fit_calibration(world.raw, world.labels, world.layers, exit_0=True)
    outputs = world.outputs(calibration)
    criterion = Learned()
    criterion.fit(outputs)
    for _ in range(5):
        limits = torch.from_numpy(-rng.exponential(0.03, len(world.layers)))
        limits[-1] = -torch.inf
        plan = ExitPlan(calibration, Policy(criterion, limits, world.layers), exit_0=True)
        layer, logit = plan.emitted(outputs)
        for row in range(0, 200, 17):
            alone = outputs.rows(torch.tensor([row]))
            head = next(k for k in range(len(world.layers)) if plan.policy.leaves(alone.until(k)))
            assert layer[row] == world.layers[head]
            assert logit[row] == outputs.logits[row, head]


def test_foreign_criterion_is_refused(world: Any) -> None:
    """A checkpoint that names something else than a criterion does not get it imported as one."""
    calibration = fit_calibration(world.raw, world.labels, world.layers, exit_0=True)
    limits = torch.tensor([torch.inf] * (len(world.layers) - 1) + [-torch.inf])
    state = ExitPlan(calibration, Policy(Learned(), limits, world.layers), True).policy
    broken = {
        "layers": list(world.layers), "exit_0": True, "calibration": calibration.values,
        "thresholds": state.thresholds, "fitted": {},
    }  # fmt: skip
    for path in ("pathlib.Path", "a_package_that_is_not_here.Mine"):
        broken["criterion"] = {"class_path": path, "init_args": {}}
        with pytest.raises(ConfigError, match=path):
            ExitPlan.from_state(broken)
