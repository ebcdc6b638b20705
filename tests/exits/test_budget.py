"""The plan of a budget: what it reads, what it pays for, and that criteria that learn never see a candidate's user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from project.artefacts import score_table
from project.errors import ConfigError, DataError
from project.exits import budget
from project.exits.budget import budget_plan
from project.exits.calibrate import calibrate
from project.exits.certificate import CertificateSettings
from project.exits.criteria import Consistency, DriftHead, FoldCriteria, Ratio
from project.exits.learned import Learned
from project.exits.plan import ExitPlan
from project.exits.settings import ExitSettings

ROWS, N = 480, 8


def table(world: Any, **columns: Any) -> pl.DataFrame:
    about = {
        "target_tokens": world.target_tokens.numpy(),
        "stream_tokens": world.stream_tokens.numpy(),
        "logit_0": world.raw[:, 0].numpy(),
        **columns,
    }
    layers = list(world.layers[1:])
    return score_table(about, world.raw[:, 1:].numpy(), layers, world.drift[:, 1:-1].numpy())


@pytest.fixture(scope="module")
def valid(new_world: Callable[..., Any]) -> tuple[pl.DataFrame, np.ndarray]:
    """Validation: users 0 to 59 tune, 60 to 79 certify; and the rows' features."""
    world = new_world(ROWS, seed=4)
    user = world.users.numpy()
    fold = np.where(user < 60, "tune", "certify")
    known = {"row_id": np.arange(ROWS), "user": user, "fold": fold, "label": world.labels.numpy()}
    return table(world, split=["valid"] * ROWS, **known), world.evidence.numpy()


@pytest.fixture(scope="module")
def asked(new_world: Callable[..., Any]) -> tuple[pl.DataFrame, np.ndarray]:
    """40 requests of 8 candidates of tune users, with a stream of 700 tokens; and their features."""
    world = replace(
        new_world(40 * N, seed=9),
        stream_tokens=torch.full((40 * N,), 700),
        target_tokens=torch.full((40 * N,), 20),
    )
    request = np.arange(40 * N) // N
    names = [f"r{r}" for r in request]
    about = {"request_id": names, "candidate_index": np.arange(40 * N) % N, "user": request}
    return table(world, **about), world.evidence.numpy()


def settings(**changes: Any) -> ExitSettings:
    return ExitSettings(**{"compare": [Ratio(), DriftHead()], "max_auc_drop": 0.004, **changes})


def thresholds(plan: ExitPlan) -> list[float]:
    return [float(t) for t in plan.policy.thresholds]


def cost(plan: ExitPlan, scores: pl.DataFrame, features: np.ndarray, by_depth: bool = False) -> float:
    """Request by request: own tokens as deep as each candidate, the stream as deep as the deepest, over full depth."""
    layer, _ = plan.emitted(plan.outputs(scores, features))
    spent, full = 0, 0
    for part in scores.with_columns(layer=layer.numpy()).partition_by("request_id"):
        own, shared = (1, 0) if by_depth else (part["target_tokens"], part["stream_tokens"][0])
        spent += (part["layer"] * own).sum() + part["layer"].max() * shared
        full += 12 * ((part["layer"] * 0 + own).sum() + shared)
    return spent / full


def test_it_is_what_calibrate_chooses(valid: Any, asked: Any) -> None:
    """The same thresholds and criterion as `calibrate` in mode budget, with and without requests."""
    for given in ((), asked):
        plan = budget_plan(*valid, settings(), *given)
        found = calibrate(*valid, settings(), "hash", asked=budget.AskedScores(*given) if given else None)
        assert thresholds(plan) == thresholds(found.plan)
        assert plan.criterion == found.plan.criterion
        assert (found.document["candidates"], found.document["requests"]) == ((1, 40) if given else (1, None))
    turned = valid[0].with_columns(
        label=pl.when(pl.col("fold") == "certify").then(1 - pl.col("label")).otherwise(pl.col("label"))
    )
    assert thresholds(budget_plan(turned, valid[1], settings(), *asked)) == thresholds(plan)


def test_other_requests_are_another_try(valid: Any, asked: Any) -> None:
    """A seed draws the requests that thresholds are priced on, so with another one the same fold is asked again."""
    wanted = settings(
        candidates=8, certificate=CertificateSettings("score_drift", 0.4), max_auc_drop=None, max_cost=0.5
    )
    first = calibrate(*valid, wanted, "hash", asked=budget.AskedScores(*asked, seed=0)).document
    again = calibrate(*valid, wanted, "hash", first, budget.AskedScores(*asked, seed=0)).document
    assert again["ledger"] == first["ledger"]
    assert len(first["ledger"]) == 1
    other = calibrate(*valid, wanted, "hash", first, budget.AskedScores(*asked, seed=1)).document
    assert "seed_everything 0 -> 1" in other["certificate_words"]


def test_every_price_has_its_plan(valid: Any, asked: Any) -> None:
    """The plan of a price is never dearer by that price than the plans of the other prices.

    By tokens a stream of 700 runs as deep as the deepest of 8, so token-layers and mean depth want different plans.
    """
    forced = {"criterion": DriftHead()}
    real = budget_plan(*valid, settings(), *asked, **forced)
    depth = budget_plan(*valid, settings(), *asked, by_depth=True, **forced)
    single = budget_plan(*valid, settings(), **forced)
    assert cost(real, *asked) <= min(cost(p, *asked) for p in (depth, single)) + 1e-9
    assert cost(real, *asked) < cost(single, *asked) - 0.005
    assert cost(depth, *asked, by_depth=True) <= cost(single, *asked, by_depth=True) + 1e-9
    rows = budget_plan(*valid, settings(), by_depth=True, **forced)
    assert rows.layers == depth.layers == (0, 2, 4, 6, 8, 10, 12)


def test_criterion_and_prior(valid: Any) -> None:
    """A criterion that is given decides whatever the settings say, and without a prior exit 0 is unknown."""
    plan = budget_plan(*valid, settings(criterion=Ratio(), prior="none"), criterion=Consistency(2))
    assert plan.criterion == "consistency"
    assert plan.layers == (2, 4, 6, 8, 10, 12)


def test_learned_safety_of_candidates_is_out_of_sample(
    valid: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are scored by a fit without their user; of unknown users, by the fit on all of tune."""
    seen = []
    safety = FoldCriteria.safety

    def spy(self: FoldCriteria, outputs: Any, users: Any) -> Any:
        seen.append(len(users))
        return safety(self, outputs, users)

    monkeypatch.setattr(FoldCriteria, "safety", spy)
    tune = int((valid[0]["fold"] == "tune").sum())
    budget_plan(*valid, settings(), *asked, criterion=Learned())
    assert seen == [tune, 40 * N]
    unknown = asked[0].with_columns(user=pl.lit(None, pl.Int32))
    budget_plan(*valid, settings(), unknown, asked[1], criterion=Learned())
    assert seen[2:] == [tune]


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


def test_what_cannot_be_priced(valid: Any, asked: Any) -> None:
    """No rows of tune, features without scores, features of other rows, no candidate, a budget out of reach."""
    scores, features = valid
    certify = (scores["fold"] == "certify").to_numpy()
    with pytest.raises(DataError, match="fold tune of validation has no rows"):
        budget_plan(scores.filter(certify), features[certify], settings())
    with pytest.raises(DataError, match="belong together"):
        budget_plan(scores, features, settings(), asked[0])
    with pytest.raises(DataError, match="320 candidates of requests with 319"):
        budget_plan(scores, features, settings(), asked[0], asked[1][1:])
    with pytest.raises(DataError, match="at least one"):
        budget_plan(scores, features, settings(), asked[0][:0], asked[1][:0])
    with pytest.raises(ConfigError, match=r"keeps exits\.max_cost"):
        budget_plan(scores, features, settings(max_cost=0.01, max_auc_drop=0.0), criterion=Consistency())


@pytest.mark.parametrize("key", ["candidates", "requests"])
def test_settings_are_checked(key: str) -> None:
    """Fewer than one candidate or request is refused by its YAML key."""
    with pytest.raises(ConfigError, match=rf"exits\.{key} is 0; expected 1 or more"):
        settings(**{key: 0})
