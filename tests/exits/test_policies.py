"""Policies: who leaves where, plans in a checkpoint, what exits cost, and controls."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from project.errors import ConfigError
from project.exits.calibration import Calibration, fit_calibration
from project.exits.cost import request_cost, row_tokens
from project.exits.criteria import (
    Consistency,
    HeadOutputs,
    Learned,
    Ratio,
    confidence_table,
)
from project.exits.plan import ExitPlan, specification
from project.exits.policy import leave
from project.exits.search import control_curves, equal_accuracy_exit, point
from project.metrics import auc

NEVER, ALWAYS = torch.inf, -torch.inf


def limits_of(*values):
    return torch.tensor([*values, ALWAYS], dtype=torch.float64)


class TestLeave:
    def test_golden(self):
        """First head that reaches the threshold, equality included; who never does goes to the last head."""
        confidence = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.0, 0.0], [0.4, 0.6, 0.0]])
        assert leave(confidence, torch.tensor([0.5, 0.7, ALWAYS])).tolist() == [1, 0, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_lower_thresholds_never_delay(self, seed):
        generator = torch.Generator().manual_seed(seed)
        confidence, high = (
            torch.rand(500, 5, generator=generator),
            torch.rand(5, generator=generator),
        )
        low = high - torch.rand(5, generator=generator) * 0.3
        assert (leave(confidence, low) <= leave(confidence, high)).all()


class TestPlan:
    @pytest.mark.parametrize("seed", range(3))
    def test_engine_equals_simulation(self, make_criterion, outputs, seed):
        """`leaves`, called head by head on the rows still running, gives the exits of `leave` on the whole table."""
        criterion = make_criterion()
        criterion.fit(outputs)
        table = confidence_table(criterion, outputs)
        generator = torch.Generator().manual_seed(seed)
        share = torch.rand(6, generator=generator, dtype=torch.float64) * 0.6
        first = isinstance(criterion, Consistency)  # head at which it can decide
        limits = [
            table[:, k].quantile(1 - share[k]) if k >= first else NEVER for k in range(6)
        ]
        limits = limits_of(*limits)
        expected = leave(table, limits)
        assert expected.unique().numel() >= 5
        plan = ExitPlan(Calibration(outputs.layers, None), criterion, limits)
        assert torch.equal(plan.exits(outputs), expected)

    def test_refuses_other_layers(self):
        plan = ExitPlan(Calibration((2, 4), None), Ratio(), limits_of(0.5))
        with pytest.raises(ConfigError, match=r"\(2, 4\), found \(2, 6\)"):
            plan.exits(HeadOutputs.of((2, 6), torch.zeros(1, 2)))


def test_plan_in_a_checkpoint(new_world: Callable[..., Any]) -> None:
    """Saved and loaded with weights only, a plan sends every row to the first head whose rule says leave."""
    world, rng = new_world(200, seed=8), np.random.default_rng(8)
    calibration = fit_calibration(world.raw, world.labels, world.layers, exit_0=True)
    outputs, criterion = world.outputs(calibration), Learned()
    criterion.fit(outputs)
    for _ in range(5):
        limits = torch.from_numpy(-rng.exponential(0.03, len(world.layers)))
        limits[-1] = -torch.inf
        file = io.BytesIO()
        torch.save(
            ExitPlan(calibration, criterion, limits).state(),
            file,
        )
        file.seek(0)
        plan = ExitPlan.from_state(torch.load(file, weights_only=True))
        assert specification(plan.criterion) == specification(criterion)
        layer, logit = plan.emitted(outputs)
        for row in range(0, 200, 17):
            alone = outputs.rows(torch.tensor([row]))
            head = next(k for k in range(len(world.layers)) if plan.leaves(alone.until(k)))
            assert layer[row] == world.layers[head]
            assert logit[row] == outputs.logits[row, head]
    assert len(layer.unique()) > 1


@pytest.mark.parametrize(
    "path", ["pathlib.Path", "below_here.Mine", "project.exits.criteria.Nothing"]
)
def test_foreign_criterion_is_an_error(
    world: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that names something else than a known criterion does not get a module below this folder run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("below_here.py").write_text(
        "import pathlib\nfrom project.exits import Criterion\n"
        "pathlib.Path('trace').touch()\nclass Mine(Criterion):\n    confidence = None\n"
    )
    calibration = fit_calibration(world.raw, world.labels, world.layers, exit_0=True)
    state = ExitPlan(calibration, Ratio(), limits_of(*[NEVER] * 6)).state()
    with pytest.raises(ConfigError, match=path):
        ExitPlan.from_state(state | {"criterion": {"class_path": path, "init_args": {}}})
    assert not Path("trace").exists()


@pytest.mark.parametrize(
    ("cached", "costs"), [(False, [440, 840, 0]), (True, [40, 240, 0])]
)
def test_row_golden(cached, costs):
    """4 (10 + 100), 12 (20 + 50), 0 at exit 0; cached: 4 * 10, 12 * 20, 0. A request of one candidate is a row."""
    about = (
        torch.tensor([4, 12, 0]),
        torch.tensor([10, 20, 30]),
        torch.tensor([100, 50, 70]),
    )
    layer, target, stream = about
    scores = pl.DataFrame(
        {"target_tokens": target.numpy(), "stream_tokens": stream.numpy()}
    )
    if not cached:
        assert (layer * row_tokens(scores)).tolist() == costs
    assert request_cost(torch.arange(3), *about, cached).tolist() == costs


def test_request_golden():
    """Request 7: candidates at layers 2 and 6, 10 and 20 tokens, stream 100, which runs to layer 6: 600 + 20 + 120.

    Request 3: one candidate at layer 4, 5 tokens, stream 50: 200 + 20. Warm, the streams' 600 and 200 are gone.
    """
    request = torch.tensor([7, 3, 7])
    layer, target, stream = (
        torch.tensor([2, 4, 6]),
        torch.tensor([10, 5, 20]),
        torch.tensor([100, 50, 100]),
    )
    assert request_cost(request, layer, target, stream).tolist() == [220, 740]
    assert request_cost(request, layer, target, stream, True).tolist() == [20, 140]


def test_curve_golden():
    """Head 0 orders 3 of 4 pairs, head 1 all. Rows 2 and 4 leave at layer 2: (4*2 + 2*4 + 4*2 + 2*4) / (4 * 12) = 2/3.

    Scores 0, .4, 2, .5 against labels 0, 0, 1, 1: all four pairs in order, AUC 1, as at full depth; mean depth 3.
    """
    outputs = HeadOutputs.of(
        (2, 4), torch.tensor([[0.1, 0.0], [0.4, 1.0], [0.2, 2.0], [0.5, 3.0]])
    )
    rows = outputs, [0, 0, 1, 1], torch.tensor([2, 4, 2, 4])
    assert [
        point(*rows, torch.tensor(exits)) for exits in ([1, 0, 1, 0], [0, 0, 0, 0])
    ] == [
        {"cost": pytest.approx(2 / 3), "mean_depth": 3.0, "auc": 1.0, "auc_drop": 0.0},
        {"cost": 0.5, "mean_depth": 2.0, "auc": 0.75, "auc_drop": 0.25},
    ]


def test_controls(world, outputs):
    """Static depths are the heads' own AUCs at cost layer / 12; the oracle goes from full depth to exit 0."""
    controls = control_curves(outputs, world.labels, world.tokens)
    for k, p in enumerate(controls["fixed_depth"]):
        assert p["layer"] == p["mean_depth"] == world.layers[k]
        assert p["cost"] == pytest.approx(world.layers[k] / 12)
        assert p["auc"] == auc(outputs.logits[:, k], world.labels)
    assert controls["oracle"][0]["auc_drop"] == pytest.approx(0, abs=1e-3)
    assert controls["oracle"][-1]["cost"] == 0


def test_one_class_is_undefined(outputs, world):
    found = point(outputs, world.labels * 0 + 1, world.tokens, torch.full((600,), 3))
    assert (found["auc"], found["auc_drop"], found["mean_depth"]) == (None, None, 6.0)


def test_equal_accuracy_golden():
    """Static AUCs .75, 1, 1 at layers 2, 4, 6: layer 4; exactly .002 below the best is near enough."""
    logits = torch.tensor(
        [[0.1, 0.0, 0.0], [0.4, 1.0, 1.0], [0.2, 2.0, 2.0], [0.5, 3.0, 3.0]]
    )
    outputs = HeadOutputs.of((2, 4, 6), logits)
    static = control_curves(outputs, [0, 0, 1, 1], torch.ones(4))["fixed_depth"]
    assert equal_accuracy_exit(static)["layer"] == 4
    assert (
        equal_accuracy_exit([{"layer": 2, "auc": 0.998}, {"layer": 4, "auc": 1.0}])["layer"]
        == 2
    )
