from functools import cache

import numpy as np
import pytest
import torch

from project.errors import ConfigError, DataError
from project.evaluation.metrics import auc_gap
from project.exits import search as search_module
from project.exits.calibration import fit_calibration
from project.exits.criteria import Consistency, DriftHead, Ratio, out_of_fold_safety, safety_table
from project.exits.learned import Learned
from project.exits.path import Asked, drop_bounds, pick_budget, threshold_path
from project.exits.policies import Policy, leave
from project.exits.simulate import (
    AskedCandidates,
    ScoredRows,
    control_curves,
    cost_matched_auc,
    curve,
)

CONSISTENCY, RATIO, DRIFT_HEAD = Consistency(), Ratio(), DriftHead()
COSTS = (0.2, 0.3, 0.45, 0.6)


@cache
def fit(criterion, world, stream="cold", steps=20):
    """Outputs, safety and path of a criterion on a world."""
    outputs = world.calibrated()
    criterion.fit(outputs)
    safety = safety_table(criterion, outputs)
    return (
        outputs,
        safety,
        threshold_path(safety, outputs.logits, world.labels, world.layers, *world.tokens, stream, steps),
    )


def simulated(rows, criterion, path):
    """Points of a path's policies on rows, every policy asked head by head, as an engine asks."""
    return curve(rows, [Policy(criterion, step.thresholds, rows.outputs.layers) for step in path.steps])


def true_aucs(path, criterion, world, outputs, costs=COSTS):
    """True AUC (no label noise) of a path on any rows, at these costs."""
    tokens = (world.target_tokens + world.stream_tokens).double()
    layers = torch.tensor(world.layers)
    safety = safety_table(criterion, outputs)
    points = []
    for step in path.steps:
        exits = leave(safety, step.thresholds)
        cost = float((layers[exits] * tokens).sum() / (12 * tokens.sum()))
        points.append((cost, world.true_auc(outputs.logits.gather(1, exits[:, None])[:, 0])))
    x, y = zip(*sorted(points), strict=True)
    return np.interp(costs, x, y)


class TestPath:
    @pytest.mark.parametrize("criterion", [CONSISTENCY, RATIO, DRIFT_HEAD])
    def test_is_a_one_parameter_path(self, tune, criterion):
        """Step 0 is full depth at cost 1; cost falls strictly, and expected AUC strictly after step 0."""
        _, _, path = fit(criterion, tune)
        assert path[0].thresholds.tolist() == [torch.inf] * 6 + [-torch.inf]
        assert (path[0].cost, path[0].mean_depth, path[0].auc_drop) == (pytest.approx(1), 12, 0)
        assert len(path) > 20
        assert all(a.cost > b.cost for a, b in zip(path.steps, path.steps[1:], strict=False))
        assert all(
            a.expected_auc > b.expected_auc for a, b in zip(path.steps[1:], path.steps[2:], strict=False)
        )
        assert all(step.thresholds[-1] == -torch.inf for step in path.steps)

    @pytest.mark.parametrize("stream", ["cold", "warm"])
    def test_steps_say_what_the_policy_does(self, tune, stream):
        """Cost, mean depth, AUC and drop of every step are those of a simulation of its policy."""
        outputs, _, path = fit(CONSISTENCY, tune, stream, steps=8)
        found = simulated(ScoredRows(outputs, tune.labels, *tune.tokens, stream), CONSISTENCY, path)
        for step, point in zip(path.steps, found, strict=True):
            assert step.point() == pytest.approx(point, abs=1e-9)

    @pytest.mark.parametrize("criterion", [CONSISTENCY, RATIO])
    def test_no_static_model_dominates_it(self, tune, criterion):
        """For every depth at which the criterion can decide, a step costs no more and has no less expected AUC."""
        outputs, safety, path = fit(criterion, tune)
        for k in range(criterion.first, 6):
            limits = torch.full((7,), torch.inf)
            limits[k] = -torch.inf
            static = tune.layers[k] / 12
            expected = _expected_auc(outputs.logits[:, k], outputs, tune)
            assert torch.equal(leave(safety, limits), torch.full((1500,), k))
            assert any(s.cost <= static + 1e-9 and s.expected_auc >= expected - 1e-9 for s in path.steps)

    def test_ends_where_everyone_leaves_first(self, tune):
        """The fastest step costs what the first head that can decide costs: layer 2 of 12, or nothing at exit 0."""
        assert fit(CONSISTENCY, tune)[2][-1].cost == pytest.approx(2 / 12)
        assert fit(RATIO, tune)[2][-1].cost == 0

    def test_ties_leave_together(self):
        """Safety of three values: thresholds fall between values, so every step's share is one of their sums."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(300, 2, generator=generator)
        safety = torch.stack([torch.arange(300) % 3, torch.zeros(300)], dim=1)
        tokens = torch.ones(300)
        path = threshold_path(safety, scores, scores[:, 1] > 0, (0, 4), tokens, tokens)
        assert {round(step.cost, 6) for step in path.steps} <= {0.0, round(1 / 3, 6), round(2 / 3, 6), 1.0}
        assert len(path) >= 2

    def test_refuses_what_it_cannot_judge(self, tune):
        """NaN safety names the exit; one class has no AUC."""
        outputs, safety, _ = fit(CONSISTENCY, tune, steps=2)
        rest = (tune.layers, *tune.tokens)
        with pytest.raises(DataError, match="both classes"):
            threshold_path(safety, outputs.logits, tune.labels * 0, *rest)
        safety = safety.clone()
        safety[7, 3] = torch.nan
        with pytest.raises(DataError, match="NaN at the exit at layer 6"):
            threshold_path(safety, outputs.logits, tune.labels, *rest)


@pytest.fixture(scope="module")
def rows(new_world):
    """400 labelled rows with their outputs and safety, and 320 candidates under the same calibration."""
    world, other = new_world(400, seed=1), new_world(320, seed=7)
    outputs = world.calibrated()
    asked = other.outputs(fit_calibration(world.raw, world.labels, world.layers, prior=True))
    return world, outputs, safety_table(DRIFT_HEAD, outputs), asked, safety_table(DRIFT_HEAD, asked)


class TestAsked:
    """What is paid for are candidates of real requests; what is judged are labelled rows."""

    N = 16

    def path(self, rows, asked=None, stream="cold"):
        world, outputs, safety, _, _ = rows
        return threshold_path(
            safety, outputs.logits, world.labels, world.layers, *world.tokens, stream, steps=8, asked=asked
        )

    def asked(self, rows, own=20, shared=700):
        """320 candidates in requests of N, in no order."""
        order = torch.randperm(320, generator=torch.Generator().manual_seed(0))
        tokens = [torch.full((320,), value) for value in (own, shared)]
        return Asked(rows[4][order], (torch.arange(320) // self.N)[order], *tokens), rows[3].rows(order)

    @pytest.mark.parametrize("stream", ["cold", "warm"])
    def test_one_candidate_costs_what_the_row_costs(self, rows, stream):
        """Rows asked for one by one: every step costs what a simulation of one-candidate requests of the rows costs."""
        world, outputs, safety, _, _ = rows
        path = self.path(rows, Asked(safety, torch.arange(400), *world.tokens), stream)
        found = simulated(ScoredRows(outputs, world.labels, *world.tokens, stream), DRIFT_HEAD, path)
        for step, point in zip(path.steps, found, strict=True):
            assert step.point() == pytest.approx(point, abs=1e-9)

    @pytest.mark.parametrize("stream", ["cold", "warm"])
    def test_steps_cost_what_requests_cost(self, rows, stream):
        """`request_cost` of the candidates' exits, relative to full depth; AUC is that of the labelled rows."""
        world, outputs, *_ = rows
        asked, candidates = self.asked(rows)
        path = self.path(rows, asked, stream)
        paid = AskedCandidates(candidates, asked.request, asked.target_tokens, asked.stream_tokens)
        judged = ScoredRows(outputs, world.labels, *world.tokens, stream, paid)
        found = simulated(judged, DRIFT_HEAD, path)
        assert len(path) > 5
        assert path[0].cost == pytest.approx(1)
        for step, point in zip(path.steps, found, strict=True):
            assert step.point() == pytest.approx(point, abs=1e-9)

    def test_warm_stream_is_mean_depth(self, rows):
        """Equal tokens and a cached stream: the cost of every step is the candidates' mean depth over 12."""
        path = self.path(rows, self.asked(rows)[0], "warm")
        assert [s.cost for s in path.steps] == pytest.approx([s.mean_depth / 12 for s in path.steps])

    @pytest.mark.parametrize("budget", [0.003, 0.01])
    def test_huge_stream_makes_a_static_cap(self, rows, budget):
        """A stream of a million tokens to 1: the plan sends everyone out at a head before the last, and costs that."""
        path = self.path(rows, self.asked(rows, own=1, shared=1_000_000)[0])
        step = path[pick_budget(path, max_auc_drop=budget)]
        cap = step.thresholds.tolist().index(-torch.inf)
        assert cap < 6
        assert rows[0].layers[cap] / 12 - 0.05 < step.cost <= rows[0].layers[cap] / 12 + 1e-6

    @pytest.mark.parametrize(("own", "shared"), [(20, 700), (20, 20), (1, 100_000)])
    def test_never_worse_than_the_path_of_single_candidates(self, rows, own, shared):
        """At every budget the plan costs these requests no more than that of `asked=None`; at some it costs less."""
        asked, candidates = self.asked(rows, own, shared)
        paid = AskedCandidates(candidates, asked.request, asked.target_tokens, asked.stream_tokens)
        path, old = self.path(rows, asked), self.path(rows)
        saved = []
        for budget in (0.0, 0.001, 0.002, 0.005, 0.01, 0.03):
            step = path[pick_budget(path, max_auc_drop=budget)]
            before = old[pick_budget(old, max_auc_drop=budget)]
            depth = torch.tensor(rows[0].layers)[leave(asked.safety, before.thresholds)]
            spent, full = (paid.token_layers(d, "cold").sum() for d in (depth, torch.full_like(depth, 12)))
            saved.append(float(spent) / float(full) - step.cost)
        assert min(saved) >= -1e-9
        assert max(saved) > 0.01

    def test_refuses_nan(self, rows):
        """NaN safety of a candidate names the exit."""
        asked, _ = self.asked(rows)
        asked.safety[5, 2] = torch.nan
        with pytest.raises(DataError, match="NaN at the exit at layer 4"):
            self.path(rows, asked)


class TestBudget:
    def test_auc_budget(self, tune):
        """The fastest step whose AUC by labels and expected AUC both keep the budget; 0 never gives a worse AUC."""
        _, _, path = fit(DRIFT_HEAD, tune)
        chosen = pick_budget(path, max_auc_drop=0.002)
        assert path[chosen].auc_drop <= 0.002
        assert 0 < chosen < len(path) - 1
        for faster in path.steps[chosen + 1 :]:
            assert max(faster.auc_drop, path[0].expected_auc - faster.expected_auc) > 0.002
        assert path[pick_budget(path, max_auc_drop=0.0)].auc >= path[0].auc
        assert pick_budget(path, max_auc_drop=1.0) == len(path) - 1

    def test_doubt_bounds_every_step(self, tune):
        """A step's bound is its drop plus z standard errors over users: z is 0 at one half, 1.2816 at one in ten."""
        outputs, safety, path = fit(DRIFT_HEAD, tune)
        about = (path, safety, outputs.logits, tune.labels, tune.users)
        even, sure = (np.array(drop_bounds(*about, doubt)) for doubt in (0.5, 0.1))
        assert even == pytest.approx([step.auc_drop for step in path.steps], abs=1e-9)
        errors = []
        for step in path.steps:
            adaptive = outputs.logits.gather(1, leave(safety, step.thresholds)[:, None])[:, 0]
            full = outputs.logits[:, -1]
            errors.append(auc_gap(adaptive.numpy(), full.numpy(), tune.labels, tune.users)[1])
        assert sure - even == pytest.approx(1.2815516 * np.array(errors), abs=1e-9)
        assert errors[0] == 0
        chosen = pick_budget(path, max_auc_drop=0.002, bounds=list(sure))
        assert sure[chosen] <= 0.002
        assert 0 < chosen < pick_budget(path, max_auc_drop=0.002)

    def test_doubt_keeps_the_budget_on_fresh_rows(self, new_world, fresh):
        """16 small worlds: an estimate on tune breaks the budget in 7 of them, a doubt of .1 in none.

        .1 bounds one step; that the fastest of many is picked is what it does not pay for, so 2 of 16 may pass.
        """
        broken = {0.5: 0, 0.1: 0}
        for seed in range(16):
            world = new_world(300, seed=100 + seed)
            calibration = fit_calibration(world.raw, world.labels, world.layers, prior=True)
            outputs, other = world.outputs(calibration), fresh.outputs(calibration)
            safety, there = safety_table(DRIFT_HEAD, outputs), safety_table(DRIFT_HEAD, other)
            about = (safety, outputs.logits, world.labels)
            path = threshold_path(*about, world.layers, *world.tokens, steps=4)
            for doubt in broken:
                bounds = drop_bounds(path, *about, world.users, doubt)
                step = path[pick_budget(path, max_auc_drop=0.002, bounds=bounds)]
                adaptive = other.logits.gather(1, leave(there, step.thresholds)[:, None])[:, 0]
                broken[doubt] += fresh.true_auc(other.logits[:, -1]) - fresh.true_auc(adaptive) > 0.002
        assert broken[0.1] <= 2
        assert broken[0.5] >= 4

    def test_cost_budget(self, tune):
        """The first step that costs at most the budget; with an AUC budget as well, the fastest that keeps both."""
        _, _, path = fit(DRIFT_HEAD, tune)
        chosen = pick_budget(path, max_cost=0.5)
        assert path[chosen].cost <= 0.5 < path[chosen - 1].cost
        assert pick_budget(path, max_auc_drop=0.002, max_cost=0.9) == pick_budget(path, max_auc_drop=0.002)

    def test_impossible_budgets(self, tune):
        """None, out of range, or kept by no step: errors that name the YAML key."""
        _, _, path = fit(CONSISTENCY, tune)
        for arguments, word in (
            ({}, "max_auc_drop and exits.max_cost are both null"),
            ({"max_auc_drop": -0.1}, "max_auc_drop is -0.1"),
            ({"max_auc_drop": float("nan")}, "max_auc_drop is nan"),
            ({"max_cost": 0.0}, "max_cost is 0.0"),
            ({"max_cost": 0.1}, r"keeps exits.max_cost 0\.1.*costs 0\.167"),
            ({"max_cost": 0.2, "max_auc_drop": 0.0}, "keeps exits.max_cost"),
        ):
            with pytest.raises(ConfigError, match=word):
                pick_budget(path, **arguments)


class TestOnFreshRows:
    """Fitted on one world, scored on another by the truth: what decides between methods."""

    def test_beats_the_static_model_of_equal_cost(self, tune, fresh):
        """`learned` (evidence, no drift heads) has a third of the static models' AUC loss or less at cost .2 to .6."""
        calibration = fit_calibration(tune.raw, tune.labels, tune.layers, prior=True)
        outputs, other = tune.outputs(calibration), fresh.outputs(calibration)
        criterion = Learned()
        criterion.fit(outputs)
        safety = out_of_fold_safety(Learned, outputs, tune.users)
        path = threshold_path(safety, outputs.logits, tune.labels, tune.layers, *tune.tokens)
        full = fresh.true_auc(other.logits[:, -1])
        static = [fresh.true_auc(other.logits[:, k]) for k in range(7)]
        loss = full - true_aucs(path, criterion, fresh, other)
        static_loss = full - np.interp(COSTS, np.array(tune.layers) / 12, static)
        assert (loss < 0.5 * static_loss).all()

    def test_oracle_dominates_on_labels_too(self, fresh):
        """At every oracle point its AUC is above static and random exits of that cost, until all curves meet."""
        controls = {
            c["name"]: c["pareto"] for c in control_curves(fresh.calibrated(), fresh.labels, *fresh.tokens)
        }
        inner = [p for p in controls["oracle"] if 0.02 < p["cost"] < 0.7]
        assert len(inner) >= 5
        for p in inner:
            assert p["auc"] > cost_matched_auc(controls["fixed_depth"], p["cost"])
            assert p["auc"] > cost_matched_auc(controls["random"], p["cost"])

    @pytest.mark.slow
    @pytest.mark.parametrize(("own_noise", "reference"), [(0.05, "labels"), (0.35, "last head")])
    def test_teacher(self, new_world, monkeypatch, own_noise, reference):
        """Mean true AUC over 4 draws and 4 costs: the teacher beats raw labels, and the last head where it is noisy."""
        teacher = search_module._teacher
        judges = {
            "teacher": teacher,
            "labels": lambda scores, labels: labels,
            "last head": lambda scores, labels: 1 / (1 + np.exp(-scores[:, -1])),
        }
        found = {"teacher": [], reference: []}
        for seed in range(4):
            world, other = (
                new_world(n, s, own_noise=own_noise) for n, s in ((2000, 10 + seed), (8000, 50 + seed))
            )
            calibration = fit_calibration(world.raw, world.labels, world.layers, prior=True)
            for judge, values in found.items():
                monkeypatch.setattr(search_module, "_teacher", judges[judge])
                _, _, path = fit.__wrapped__(DRIFT_HEAD, world)
                values.append(true_aucs(path, DRIFT_HEAD, other, other.outputs(calibration)).mean())
        assert np.mean(found["teacher"]) > np.mean(found[reference]) + 1e-4


def _expected_auc(scores, outputs, world):
    """Expected AUC of scores under the path's teacher, pair by pair, without a row's pair with itself."""
    positive = torch.from_numpy(search_module._teacher(outputs.logits.numpy(), world.labels.double().numpy()))
    pairs = positive[:, None] * (1 - positive)
    pairs.fill_diagonal_(0)
    return float((pairs * (scores[:, None] > scores)).sum() / pairs.sum())
