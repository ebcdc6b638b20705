"""Tests the drift monitor: false alarms in clean streams, delay in drifted ones, and what an audit answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from example_engine import (
    EXITS,
    World,
    make_module,
    random_request,
    raw_outputs,
    with_thresholds,
)
from scipy.stats import binom

from project.arrays import F64, I64
from project.engine import Engine, ListExits, PreparedRequest, RowExits
from project.exits.criteria import Ratio
from project.exits.plan import ExitPlan
from project.exits.ranking import Lists
from project.request import RankRequest
from project.serve.drift import Capital, Monitor, answered
from project.serve.ranker import Ranker

STREAMS, DELTA = 200, 0.1
Losses = F64


def alarms(null: float, losses: Losses, delta: float = DELTA) -> I64:
    """The audit at which each stream (audits, streams) raises the alarm; one more than there are where none does."""
    capital, first = (
        Capital(np.full(losses.shape[1], null)),
        np.full(losses.shape[1], len(losses) + 1),
    )
    for audit, loss in enumerate(losses, start=1):
        capital.stake(loss)
        first[capital.highest >= -np.log(delta)] = np.minimum(first, audit)[
            capital.highest >= -np.log(delta)
        ]
    return first


CLEAN: dict[str, Callable[[np.random.Generator, float], Losses]] = {
    "narrow": lambda rng, mean: rng.beta(mean * 100, (1 - mean) * 100, (2000, STREAMS)),
    "wide": lambda rng, mean: rng.beta(mean, 1 - mean, (2000, STREAMS)),
    "0 or 1": lambda rng, mean: (rng.random((2000, STREAMS)) < mean).astype(float),
}


@pytest.mark.parametrize("draw", CLEAN.values(), ids=CLEAN)
@pytest.mark.parametrize("null", [0.017, 0.1])
def test_clean_streams_raise_few_false_alarms(
    null: float, draw: Callable[..., Losses]
) -> None:
    """200 streams of 2,000 audits whose expected loss is the null itself, the worst there is: at most delta of them.

    Slack: more than the 99.9 % point of 200 draws at chance delta would be needed to fail.
    """
    found = alarms(null, draw(np.random.default_rng(0), null))
    assert (found <= 2000).sum() <= binom.ppf(0.999, STREAMS, DELTA)


@pytest.mark.parametrize(("clean", "audits"), [(0, 40), (100, 50), (1000, 65)])
def test_late_drift_is_found_too(clean: int, audits: int) -> None:
    """After so many clean audits, the loss doubles to twice the null: all 200 streams find it within so many more."""
    rng, null = np.random.default_rng(1), 0.04
    before = rng.beta(2.5, 97.5, (clean, STREAMS))  # mean .025
    after = rng.beta(8, 92, (audits, STREAMS))  # mean .08
    found = alarms(null, np.concatenate([before, after]), delta=0.01)
    assert clean < found.min()
    assert found.max() <= clean + audits


@pytest.fixture(scope="module")
def world() -> World:
    """Requests of 3 to 12 candidates."""
    rng, module = np.random.default_rng(0), make_module()
    requests = [
        random_request(rng, f"r{i}", i, n) for i, n in enumerate([3, 12, 8, 6, 9, 5])
    ]
    with torch.no_grad():
        return World(module, requests, [raw_outputs(module, r) for r in requests])


def agreeing(world: World) -> tuple[ExitPlan, list[PreparedRequest]]:
    """A plan by which half leaves at exit 0 and nobody between, and requests whose exit 0 nearly is full depth.

    Calibrated, exit 0 is 1.2 e + .2 and full depth .8 d + .24 e - .2 (`World.plan`): equal at e = (.8 d - .4) / .96.
    """
    rng, plan = np.random.default_rng(2), world.plan(Ratio(), 0.4)
    requests = []
    for request, outputs in zip(world.requests, world.outputs, strict=True):
        same = (0.8 * outputs.logits[:, -1].numpy() - 0.4) / 0.96
        requests.append(replace(request, exit_0=same + 0.1 * rng.normal(size=len(same))))
    return with_thresholds(plan, [0.3, *[np.inf] * (len(EXITS) - 1), -np.inf]), requests


def test_shuffled_features_raise_the_alarm(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """60 clean audits raise none; then candidates get the features of each other, and 30 audits are enough.

    The alarm is one line in the log, and the answers stay the plan's.
    """
    plan, requests = agreeing(world)
    clean = Monitor(world.module, plan, Lists(), reference=0.5)
    for request in requests:
        clean.audit(request)
    monitor, rng = (
        Monitor(world.module, plan, Lists(), reference=clean.mean),
        np.random.default_rng(3),
    )
    assert 0 < clean.mean < 0.03
    for k in range(60):
        monitor.audit(requests[k % len(requests)])
    assert (monitor.alarm, monitor.audits) == (False, 60)
    assert monitor.lower <= monitor.mean == pytest.approx(clean.mean, abs=0.002)
    with caplog.at_level(logging.WARNING):
        for k in range(30):
            request = requests[k % len(requests)]
            mixed = rng.permutation(len(request))
            shuffled = replace(
                request, exit_0=request.exit_0[mixed], retrieved=request.retrieved[mixed]
            )
            found = monitor.audit(shuffled)
            assert set(found.exit_layers) <= {0, EXITS[-1]}
    assert monitor.alarm
    assert monitor.lower >= monitor.null
    assert [r.message.startswith("drift: the prob") for r in caplog.records] == [True]


def test_an_audit_answers_what_the_plan_answers(world: World) -> None:
    """Exits and, to 1e-5, logits are those of the engine with the plan; the loss is the mean distance to full depth."""
    plan = world.plan(Ratio(), 0.4)
    monitor, engine = (
        Monitor(world.module, plan, Lists(), reference=0.1),
        Engine(world.module, RowExits(plan)),
    )
    losses = []
    for i, request in enumerate(world.requests):
        found, expected = monitor.audit(request), engine.score([request])[0]
        np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        assert found.token_layers == EXITS[-1] * (
            len(request.stream) + len(request.candidates.values)
        )
        assert found.audit is not None
        losses.append(np.abs(found.probabilities - found.audit).mean())
        assert losses[-1] == pytest.approx(
            answered(plan, world.calibrated(plan, i))[2].mean(), abs=1e-5
        )
    assert monitor.audits == len(losses)
    assert monitor.mean == pytest.approx(np.mean(losses), abs=1e-5)


def test_a_late_audit_shows_nothing(world: World) -> None:
    """Its deadline has passed before it began: it leaves at exit 0, and is no audit."""
    monitor = Monitor(world.module, world.plan(Ratio(), 0.4), Lists(), reference=0.1)
    found = monitor.audit(replace(world.requests[1], deadline=0.0))
    assert (found.late, found.audit) == (True, None)
    assert (found.exit_layers == 0).all()
    assert (monitor.audits, monitor.alarm) == (0, False)


def test_the_lot(world: World) -> None:
    """One in a hundred of 20,000, within 4 standard deviations."""
    monitor = Monitor(world.module, world.plan(Ratio(), 0.4), Lists(), 0.1)
    drawn = sum(monitor.draws() for _ in range(20_000))
    assert abs(drawn - 200) < 4 * np.sqrt(198)


@pytest.mark.slow
def test_a_ranker_falls_back_to_full_depth(
    served_run: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Audits answer as the plan does, and know full depth; after the alarm it answers, once and for all."""
    requests = [RankRequest(f"u{k}", None, [f"i{i}" for i in range(12)]) for k in range(6)]
    plain, audited = (Ranker.load(served_run, audit_share=share) for share in (0.0, 1.0))
    expected, audits = plain.rank_after_log(requests), audited.rank_after_log(requests)
    for found, other in zip(audits, expected, strict=True):
        np.testing.assert_array_equal(found.exit_layers, other.exit_layers)
        np.testing.assert_allclose(found.probabilities, other.probabilities, atol=1e-5)
        assert other.audit is None
    assert (audited.monitor.audits, audited.full_depth) == (6, False)
    for _ in range(20):
        audited.monitor.observe(1.0)
    for found, other in zip(audited.rank_after_log(requests), audits, strict=True):
        assert (found.exit_layers == audited.about["exit_layers"][-1]).all()
        assert other.audit is not None
        np.testing.assert_allclose(found.probabilities, other.audit, atol=1e-5)
    assert audited.full_depth
    assert sum("drift" in r.message for r in caplog.records) == 1


def test_an_audited_list_is_what_the_engine_lists(world: World) -> None:
    """Its exits, and its loss: the share of full depth's list that is not in it."""
    plan = world.plan(Ratio(), 0.4)
    lists = Lists({3: torch.tensor([0.5, 0.2, 0.1, 0.0, 0.0], dtype=torch.float64)})
    monitor = Monitor(world.module, plan, lists, reference=0.1)
    engine = Engine(world.module, ListExits(plan, lists))
    losses = []
    for i, request in enumerate(world.requests):
        asked = replace(request, list_of=3)
        found, expected = monitor.audit(asked), engine.score([asked])[0]
        np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
        assert found.audit is not None
        if found.list_of:
            best = set(world.calibrated(plan, i).logits[:, -1].topk(3).indices.tolist())
            losses.append(1 - len(best & set(found.best_first(3))) / 3)
    assert monitor.lists.audits == len(losses) == 5  # the request of three is no list
    assert monitor.audits == 1
    assert 0 < monitor.lists.mean == pytest.approx(np.mean(losses))


@pytest.mark.slow
def test_lists_fall_back_alone(served_run: Path) -> None:
    """After their alarm lists are full depth's best, whatever else is in the batch; other requests keep the plan."""
    ranker = Ranker.load(served_run, audit_share=0.0)
    plain = RankRequest("u1", None, [f"i{i}" for i in range(12)])
    listed = replace(plain, top_n=3)
    requests = [listed, plain, replace(listed, exhaustive=True)]
    before = ranker.rank_after_log(requests)
    assert [one.list_of for one in before] == [3, 0, 0]
    assert len(before[0].left_at) > 1
    for _ in range(30):
        ranker.monitor.lists.observe(1.0)
    after = ranker.rank_after_log(requests)
    assert [one.full_depth for one in after] == [True, False, False]
    assert after[0].left_at == {3: 12}
    for found, expected in zip(after[1:], before[1:], strict=True):
        np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    ranker.full_depth = True
    (whole,) = ranker.rank_after_log([plain])
    assert after[0].best_first(3) == whole.best_first(3)
