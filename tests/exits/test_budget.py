"""The plan of a budget: what it reads and what it pays for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from project.artefacts import score_table
from project.errors import ConfigError, DataError
from project.exits.budget import budget_plan
from project.exits.calibrate import calibrate
from project.exits.criteria import Consistency, Ratio
from project.exits.plan import ExitPlan
from project.exits.settings import ExitSettings

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
    return table(world, split=["valid"] * ROWS, **known), world.evidence.numpy()


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
    """A criterion that is given decides whatever the settings say, and without a prior exit 0 is unknown."""
    plan = budget_plan(*valid, settings(criterion=Ratio(), prior="none"), criterion=Consistency(2))
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
    assert found.document["priors"]["counting"]["chosen"]["cost"] <= 0.1
    fastest = found.document["priors"]["none"]["chosen"]
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
