"""The path of thresholds: its order and its numbers, the budget's step, bounds, and what beats static exits."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch

from project.exits import search as search_module
from project.exits.calibration import Calibration, fit_calibration
from project.exits.criteria import (
    Consistency,
    Learned,
    Ratio,
    confidence_table,
    out_of_fold_confidence,
)
from project.exits.plan import ExitPlan
from project.exits.policy import leave
from project.exits.search import (
    Step,
    bound_margins,
    budget_step,
    point,
    threshold_path,
    user_influences,
)
from project.metrics import Pairs

CONSISTENCY, RATIO, LEARNED = Consistency(), Ratio(), Learned()
COSTS = (0.2, 0.3, 0.45, 0.6)


@cache
def fit(criterion, world):
    """Outputs, confidence and path of a criterion on a world."""
    outputs = world.calibrated()
    criterion.fit(outputs)
    confidence = confidence_table(criterion, outputs)
    return (
        outputs,
        confidence,
        threshold_path(
            confidence, outputs.logits, world.labels, world.layers, world.tokens
        ),
    )


def true_aucs(path, criterion, world, outputs, costs=COSTS):
    """True AUC (no label noise) of a path on any rows, at these costs."""
    tokens = (world.target_tokens + world.stream_tokens).double()
    layers = torch.tensor(world.layers)
    confidence = confidence_table(criterion, outputs)
    points = []
    for step in path:
        exits = leave(confidence, step.thresholds)
        cost = float((layers[exits] * tokens).sum() / (12 * tokens.sum()))
        points.append(
            (cost, world.true_auc(outputs.logits.gather(1, exits[:, None])[:, 0]))
        )
    x, y = zip(*sorted(points), strict=True)
    return np.interp(costs, x, y)


class TestPath:
    @pytest.mark.parametrize("criterion", [CONSISTENCY, RATIO, LEARNED])
    def test_is_a_one_parameter_path(self, tune, criterion):
        """Step 0 is full depth at cost 1; cost falls strictly, and expected AUC strictly after step 0."""
        _, _, path = fit(criterion, tune)
        assert path[0].thresholds.tolist() == [torch.inf] * 6 + [-torch.inf]
        assert (path[0].cost, path[0].mean_depth, path[0].auc_drop) == (
            pytest.approx(1),
            12,
            0,
        )
        assert len(path) > 20
        assert all(a.cost > b.cost for a, b in itertools.pairwise(path))
        assert all(a.expected_auc > b.expected_auc for a, b in itertools.pairwise(path))
        assert all(step.thresholds[-1] == -torch.inf for step in path)

    def test_steps_say_what_the_policy_does(self, tune):
        """Cost, mean depth, AUC and drop of every step are those of its policy, head by head, as an engine calls it."""
        outputs, _, path = fit(CONSISTENCY, tune)
        for step in path[::4]:
            plan = ExitPlan(Calibration(outputs.layers, None), CONSISTENCY, step.thresholds)
            exits = plan.exits(outputs)
            assert step.point() == pytest.approx(
                point(outputs, tune.labels, tune.tokens, exits), abs=1e-9
            )

    @pytest.mark.parametrize("criterion", [CONSISTENCY, RATIO])
    def test_no_static_model_dominates_it(self, tune, criterion):
        """For every depth at which the criterion can decide, a step costs no more and has no less expected AUC."""
        outputs, confidence, path = fit(criterion, tune)
        for k in range(isinstance(criterion, Consistency), 6):
            limits = torch.full((7,), torch.inf)
            limits[k] = -torch.inf
            static = tune.layers[k] / 12
            expected = _expected_auc(outputs.logits[:, k], outputs, tune)
            assert torch.equal(leave(confidence, limits), torch.full((1500,), k))
            assert any(
                s.cost <= static + 1e-9 and s.expected_auc >= expected - 1e-9 for s in path
            )

    def test_ends_where_everyone_leaves_first(self, tune):
        """The fastest step costs what the first head that can decide costs: layer 2 of 12, or nothing at exit 0."""
        assert fit(CONSISTENCY, tune)[2][-1].cost == pytest.approx(2 / 12)
        assert fit(RATIO, tune)[2][-1].cost == 0

    def test_ties_leave_together(self):
        """Confidence of three values: thresholds fall between values, so every step's share is one of their sums."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(300, 2, generator=generator)
        confidence = torch.stack([torch.arange(300) % 3, torch.zeros(300)], dim=1)
        tokens = torch.ones(300)
        path = threshold_path(confidence, scores, scores[:, 1] > 0, (0, 4), tokens)
        assert {round(step.cost, 6) for step in path} <= {
            0.0,
            round(1 / 3, 6),
            round(2 / 3, 6),
            1.0,
        }
        assert len(path) >= 2


def steps(*about):
    """A path of (cost, expected AUC)."""
    return tuple(
        Step(torch.zeros(2), cost, 0.0, 0.7, 0.0, expected) for cost, expected in about
    )


class TestBudget:
    def test_the_walk_ends_at_the_first_step_that_breaks_it(self):
        """Of .002, drops 0, .001, .003, .0015 choose step 1; 0, .001, .002, .0015 the last; expected AUC counts too."""
        path = steps((1.0, 0.76), (0.8, 0.76), (0.6, 0.76), (0.4, 0.76))
        drops = np.array(
            [[0.0, 0.001, 0.003, 0.0015], [0.0, 0.001, 0.002, 0.0015], [9.0, 9.0, 0.0, 0.0]]
        )
        assert [budget_step(path, row, 0.002) for row in drops] == [1, 3, 0]
        worse = steps((1.0, 0.76), (0.8, 0.759), (0.6, 0.757), (0.4, 0.756))
        assert budget_step(worse, np.zeros(4), 0.002) == 1

    def test_influence_is_what_more_of_a_user_does(self, tune):
        """A user's influence is the slope of the drop in the weight of the user's rows."""
        outputs, confidence, path = fit(LEARNED, tune)
        influences = user_influences(
            path, confidence, outputs.logits, tune.labels, tune.users
        )
        assert influences.shape == (len(path), 80)
        assert influences.sum(axis=1) == pytest.approx(0, abs=1e-12)
        assert (influences[0] == 0).all()
        adaptive = outputs.logits.gather(
            1, leave(confidence, path[-1].thresholds)[:, None]
        )[:, 0]
        for user in (3, 40):
            weights = 1 + 1e-5 * (tune.users == user).double()
            rows = np.asarray(weights, dtype=float)[None]
            positive = np.asarray(tune.labels, dtype=float)
            pair = (outputs.logits[:, -1], adaptive)
            full, less = (
                Pairs(x.double().numpy(), positive).weighted_auc(rows)[0] for x in pair
            )
            assert influences[-1, user] == pytest.approx(
                (full - less - path[-1].auc_drop) / 1e-5, abs=1e-6
            )

    def test_margins_golden(self):
        """Four users, t(3) at .9 is 1.63774. Influences +-.001: error sqrt(1e-6 16 / 3), no skewness, .003782.

        Thrice -.001, and .003: error .004, skewness 6 / 3^1.5 = 1.1547: .004 (1.63774 + 1.1547 (1 + 2 1.63774^2) / 12).
        """
        influences = 0.001 * np.array([[-1, -1, 1, 1], [-1, -1, -1, 3], [0, 0, 0, 0]])
        assert bound_margins(influences, 0.1) == pytest.approx(
            [0.0037821, 0.0090005, 0.0], abs=2e-7
        )
        # one user says nothing
        assert bound_margins(np.array([[0.0], [0.1]]), 0.1).tolist() == [0.0, np.inf]


class TestOnFreshRows:
    """Fitted on one world, scored on another by the truth: what decides between methods."""

    def test_beats_the_static_model_of_equal_cost(self, tune, fresh):
        """`learned` loses less than static models at cost .2 to .6, and less than half of it from .45 on."""
        calibration = fit_calibration(tune.raw, tune.labels, tune.layers, exit_0=True)
        outputs, other = tune.outputs(calibration), fresh.outputs(calibration)
        criterion = Learned()
        criterion.fit(outputs)
        confidence = out_of_fold_confidence(Learned, outputs, tune.users)
        path = threshold_path(
            confidence, outputs.logits, tune.labels, tune.layers, tune.tokens
        )
        full = fresh.true_auc(other.logits[:, -1])
        static = [fresh.true_auc(other.logits[:, k]) for k in range(7)]
        loss = full - true_aucs(path, criterion, fresh, other)
        static_loss = full - np.interp(COSTS, np.array(tune.layers) / 12, static)
        assert (loss < 0.9 * static_loss).all()
        assert (loss[2:] < 0.5 * static_loss[2:]).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("own_noise", "reference"), [(0.05, "labels"), (0.35, "last head")]
    )
    def test_teacher(self, new_world, monkeypatch, own_noise, reference):
        """Mean true AUC over 4 draws and 4 costs: the teacher beats raw labels, and the last head where it is noisy."""
        teachers = {
            "teacher": search_module._teacher,
            "labels": lambda scores, labels: labels,
            "last head": lambda scores, labels: 1 / (1 + np.exp(-scores[:, -1])),
        }
        found = {"teacher": [], reference: []}
        for seed in range(4):
            world, other = (
                new_world(n, s, own_noise=own_noise)
                for n, s in ((2000, 10 + seed), (8000, 50 + seed))
            )
            calibration = fit_calibration(
                world.raw, world.labels, world.layers, exit_0=True
            )
            for name, values in found.items():
                monkeypatch.setattr(search_module, "_teacher", teachers[name])
                _, _, path = fit.__wrapped__(LEARNED, world)
                values.append(
                    true_aucs(path, LEARNED, other, other.outputs(calibration)).mean()
                )
        assert np.mean(found["teacher"]) > np.mean(found[reference]) + 1e-4


def _expected_auc(scores, outputs, world):
    """Expected AUC of scores under the path's teacher, pair by pair, without a row's pair with itself."""
    positive = torch.from_numpy(
        search_module._teacher(outputs.logits.numpy(), world.labels.double().numpy())
    )
    pairs = positive[:, None] * (1 - positive)
    pairs.fill_diagonal_(0)
    return float((pairs * (scores[:, None] > scores)).sum() / pairs.sum())
