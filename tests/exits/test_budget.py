"""The plan of a budget: what it reads and what it pays for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from project.errors import ConfigError, DataError
from project.exits.budget import TuneFold, budget_plan, calibrate
from project.exits.criteria import ITEM_ROWS, Consistency, ItemCount, Ratio
from project.exits.plan import ExitPlan, ExitSettings
from project.run import score_table

ROWS = 480


def table(world: Any, **columns: Any) -> pl.DataFrame:
    about = {
        "target_tokens": world.target_tokens.numpy(),
        "stream_tokens": world.stream_tokens.numpy(),
        "logit_0": world.raw[:, 0].numpy(),
        **columns,
    }
    layers = list(world.layers[1:])
    return score_table(about, world.raw[:, 1:].numpy(), layers)


@pytest.fixture(scope="module")
def valid(new_world: Callable[..., Any]) -> tuple[pl.DataFrame, np.ndarray]:
    """Validation: users 0 to 59 tune, 60 to 79 certify; and the rows' features."""
    world = new_world(ROWS, seed=4)
    user = world.users.numpy()
    fold = np.where(user < 60, "tune", "certify")
    known = {"row_id": np.arange(ROWS), "user": user, "fold": fold, "label": world.labels.numpy()}
    return table(world, split=["valid"] * ROWS, **known), world.retrieved.numpy()


def settings(**changes: Any) -> ExitSettings:
    return ExitSettings(**{"compare": [Ratio(), Consistency()], "max_auc_drop": 0.004, **changes})


def thresholds(plan: ExitPlan) -> list[float]:
    return [float(t) for t in plan.policy.thresholds]


def test_it_is_what_calibrate_chooses(valid: Any) -> None:
    """The same thresholds and criterion as `calibrate` in mode budget; no label of another fold has a part in it."""
    plan = budget_plan(*valid, settings())
    found = calibrate(*valid, settings(), "hash")
    assert thresholds(plan) == thresholds(found.plan)
    assert plan.criterion == found.plan.criterion
    turned = valid[0].with_columns(
        label=pl.when(pl.col("fold") == "certify").then(1 - pl.col("label")).otherwise(pl.col("label"))
    )
    assert thresholds(budget_plan(turned, valid[1], settings())) == thresholds(plan)


def test_by_depth_every_layer_costs_the_same(valid: Any) -> None:
    """The plan that pays for mean depth has no larger mean depth on tune than the one that pays for token-layers."""
    scores, features = valid
    tune = (scores["fold"] == "tune").to_numpy()
    plans = [
        budget_plan(*valid, settings(criterion=Ratio()), by_depth=by_depth) for by_depth in (True, False)
    ]
    depth, tokens = (
        p.emitted(p.outputs(scores.filter(tune), features[tune]))[0].double().mean() for p in plans
    )
    assert depth <= tokens + 1e-9


def test_criterion_and_prior(valid: Any) -> None:
    """A criterion that is given decides whatever the settings say, and without a exit 0 exit 0 is unknown."""
    plan = budget_plan(*valid, settings(criterion=Ratio(), exit_0=False), criterion=Consistency(2))
    assert plan.criterion == "consistency"
    assert plan.layers == (2, 4, 6, 8, 10, 12)


def test_who_cannot_keep_the_budget_is_left_out(valid: Any) -> None:
    """A cost that one criterion keeps is enough, also where without exit 0 nobody does; who decides must keep it.

    Layer 2 of 12 with the stream is a sixth of full depth at least, so a cost of .1 takes exit 0; consistency needs two
    heads that agree.
    """
    tight = {"max_cost": 0.1, "max_auc_drop": 0.5}
    both = settings(compare=[Ratio(), Consistency()], **tight)
    found = calibrate(*valid, both, "hash")
    assert thresholds(found.plan) == thresholds(budget_plan(*valid, settings(compare=[Ratio()], **tight)))
    assert [policy["criterion"] for policy in found.document["policies"]] == ["ratio"]
    assert found.document["exit_0_rows"]["with_exit_0"]["chosen"]["cost"] <= 0.1
    fastest = found.document["exit_0_rows"]["without_exit_0"]["chosen"]
    assert fastest["cost"] > 0.1
    with pytest.raises(ConfigError, match=r"keeps exits\.max_cost"):
        calibrate(*valid, settings(compare=[Consistency()], **tight), "hash")


def test_what_has_no_plan(valid: Any) -> None:
    """No rows of tune, and a budget out of reach."""
    scores, features = valid
    certify = (scores["fold"] == "certify").to_numpy()
    with pytest.raises(DataError, match="fold tune of validation has no rows"):
        budget_plan(scores.filter(certify), features[certify], settings())
    with pytest.raises(ConfigError, match=r"keeps exits\.max_cost"):
        budget_plan(scores, features, settings(max_cost=0.01, max_auc_drop=0.0), criterion=Consistency())


def test_a_known_item_leaves_at_0_and_a_new_one_goes_on() -> None:
    """Exit 0 is as good as full depth where the item has earlier rows, and says nothing where it has none."""
    rng = np.random.default_rng(0)
    n, user = 1200, np.arange(1200) % 60
    truth, count = 1.5 * rng.normal(size=n), rng.integers(0, 4, n)
    exit_0 = np.where(count > 0, truth, 0.1 * rng.normal(size=n))
    heads = np.stack([exit_0, truth + rng.normal(size=n), truth], axis=1)
    about = {"user": user, "fold": ["tune"] * n, "label": rng.random(n) < 1 / (1 + np.exp(-truth))}
    about |= {"target_tokens": np.full(n, 20), "stream_tokens": np.full(n, 100), "logit_0": heads[:, 0]}
    scores, features = score_table(about, heads[:, 1:], [2, 4]), np.zeros((n, 3))
    features[:, ITEM_ROWS] = np.log1p(count)
    plan = budget_plan(scores, features, ExitSettings(criterion=ItemCount()))
    layer, _ = plan.emitted(plan.outputs(scores, features))
    assert (layer[count > 0] == 0).all()
    assert (layer[count == 0] == 4).all()
    best = TuneFold(scores, features, ExitSettings(), exit_0=True).best  # among all
    assert best.chosen.cost <= (count == 0).mean() + 0.01


def test_what_choosing_gains_is_taken_off(valid: Any) -> None:
    """A choice that the labels have no part in is told rightly, to 4 errors of 1,000 draws; the best of many is not."""
    tune = (valid[0]["fold"] == "tune").to_numpy()
    part = valid[0].filter(tune), valid[1][tune]
    fixed = TuneFold(*part, settings(criterion=Ratio(), max_auc_drop=None, max_cost=0.5), exit_0=True)
    told, found = fixed.best.drops[fixed.best.step], fixed.corrected()
    error = float(np.sqrt((fixed.best.influences[fixed.best.step] ** 2).sum()))
    assert found["auc_drop_corrected"] == pytest.approx(told, abs=4 * error / np.sqrt(1000))
    low, high = found["auc_drop_corrected_interval"]
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    chosen = TuneFold(*part, settings(alpha=0.5), exit_0=True)
    assert chosen.best.step > 0
    assert chosen.corrected()["auc_drop_corrected"] > chosen.best.drops[chosen.best.step] + 0.0002


@pytest.mark.slow
def test_the_budget_is_kept_on_fresh_users() -> None:
    """16 tune folds of 80 users, 15 % of whom are badly served: tune's estimate breaks the budget oftener than alpha.

    `research/budget.py` with fewer draws; results/budget.json has 500.
    """
    from research.budget import FRESH_USERS, make_world, pipeline

    fresh = make_world(FRESH_USERS, True, np.random.default_rng(10**6))
    rows = [row for seed in range(16) for row in pipeline(80, True, seed, fresh)]
    above = {c: sum(r["drop"] > 0.002 for r in rows if r["choice"] == c) for c in ("estimate", "alpha 0.1")}
    assert above["alpha 0.1"] <= 4 < above["estimate"]
    assert (
        np.mean([r["cost"] for r in rows if r["choice"] == "alpha 0.1"]) < 0.95
    )  # it does let candidates leave


@pytest.mark.parametrize("key", ["max_auc_drop", "max_cost", "alpha"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1])
def test_settings_are_numbers_in_range(key: str, value: float) -> None:
    """What is no finite number in range is refused by its YAML key before anything is trained."""
    with pytest.raises(ConfigError, match=rf"exits\.{key} is {value}"):
        settings(**{key: value})
