"""From a score table to a plan: which fold decides what, what is refused, and both modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from project.errors import ConfigError, DataError
from project.evaluation.result import PlannedRows, adaptive_summary
from project.exits.budget import TuneFold, calibrate
from project.exits.certificate import Certificate, CertificateSettings, certify
from project.exits.criteria import Consistency, Ratio
from project.exits.plan import ExitPlan, ExitSettings, Plans
from project.exits.policy import Policy
from project.metrics import probabilities
from project.run import score_table

ROWS = 900
FEATURES = np.random.default_rng(5).normal(size=(ROWS, 3))


@pytest.fixture(scope="module")
def scores(new_world: Callable[..., Any]) -> pl.DataFrame:
    """A validation score table: users 0 to 19 select, 20 to 49 tune, 50 to 79 certify."""
    world = new_world(ROWS, seed=4)
    user = world.users.numpy()
    fold = np.select([user < 20, user < 50], ["select", "tune"], "certify")
    columns = {
        "row_id": np.arange(ROWS),
        "user": user,
        "split": ["valid"] * ROWS,
        "fold": fold,
        "label": world.labels.numpy(),
        "target_tokens": world.target_tokens.numpy(),
        "stream_tokens": world.stream_tokens.numpy(),
        "logit_0": world.raw[:, 0].numpy(),
    }
    return score_table(columns, world.raw[:, 1:].numpy(), list(world.layers[1:]))


def settings(**changes: Any) -> ExitSettings:
    return ExitSettings(**{"compare": [Ratio(), Consistency()], "alpha": 0.5, **changes})


def thresholds(plan: ExitPlan) -> list[float]:
    return [float(t) for t in plan.policy.thresholds]


def with_fold(scores: pl.DataFrame, fold: str, **changes: pl.Expr) -> pl.DataFrame:
    """Columns changed on one fold only."""
    here = pl.col("fold") == fold
    return scores.with_columns(
        **{name: pl.when(here).then(value).otherwise(pl.col(name)) for name, value in changes.items()}
    )


def test_only_tune_decides(scores: pl.DataFrame) -> None:
    """Turning every label of select and certify round changes neither calibration nor thresholds; of tune it does."""
    before = calibrate(scores, FEATURES, settings(), "hash")
    turned = {"label": (1 - pl.col("label")).cast(pl.Int8)}
    for fold in ("select", "certify"):
        after = calibrate(with_fold(scores, fold, **turned), FEATURES, settings(), "hash")
        assert thresholds(after.plan) == thresholds(before.plan)
        torch.testing.assert_close(after.plan.calibration.values, before.plan.calibration.values)
        assert after.static_exit == before.static_exit
    after = calibrate(with_fold(scores, "tune", **turned), FEATURES, settings(), "hash")
    assert not torch.allclose(after.plan.calibration.values, before.plan.calibration.values)


def test_budget_and_priors(scores: pl.DataFrame) -> None:
    """The chosen step keeps the budget on tune; without a exit 0 the plan does not know exit 0; both are reported."""
    found = calibrate(scores, FEATURES, settings(max_auc_drop=0.003), "hash")
    policy = next(p for p in found.document["policies"] if p["criterion"] == found.document["chosen"])
    point = policy["pareto"][policy["chosen_step"]]
    assert point["auc_drop"] <= 0.003
    assert policy["pareto"][0]["cost"] == pytest.approx(1.0)  # step 0: nobody leaves early
    assert found.plan.layers[0] == 0
    assert found.without.layers[0] == 2
    assert set(found.document["exit_0_rows"]) == {"with_exit_0", "without_exit_0"}
    assert found.document["certificate"]["unit"] == "user"
    assert found.document["certificate"]["n"] == 30
    none = calibrate(scores, FEATURES, settings(max_auc_drop=0.003, exit_0=False), "hash")
    assert thresholds(none.plan) == thresholds(found.without)


def test_named_criterion_decides(scores: pl.DataFrame) -> None:
    """A criterion in the settings decides, whatever the others reach; its class is compared once."""
    found = calibrate(scores, FEATURES, settings(criterion=Consistency(2)), "hash")
    names = [p["criterion"] for p in found.document["policies"]]
    assert found.document["chosen"] == "consistency"
    assert sorted(names) == ["consistency", "ratio"]
    assert found.document["policies"][0]["settings"]["init_args"] == {"heads": 2}


def test_risk_mode(scores: pl.DataFrame) -> None:
    """Risk mode takes the last certified step; where nothing passes it runs full depth and says what it takes."""
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    found = calibrate(scores, FEATURES, settings(mode="risk", certificate=loose), "hash")
    certificate, policy = found.document["certificate"], found.document["policies"][0]
    best = next(p for p in found.document["policies"] if p["criterion"] == found.document["chosen"])
    assert certificate["passed"]
    assert best["chosen_step"] == certificate["path_step"] > 0
    strict = CertificateSettings(risk="score_drift", epsilon=1e-4)
    none = calibrate(scores, FEATURES, settings(mode="risk", certificate=strict), "hash")
    certificate = none.document["certificate"]
    assert (certificate["passed"], certificate["path_step"]) == (None, None)
    assert none.certified is None
    assert all(t == np.inf for t in thresholds(none.plan)[:-1])  # full depth for everybody
    assert "Not enough users: 30 of about 2" in certificate["words"]  # ln 10 / ln(1 + .99e-4) = 23,000
    assert policy["mode"] == "risk"


@pytest.mark.parametrize(
    "promise",
    [
        CertificateSettings(risk="score_drift", epsilon=0.1),
        CertificateSettings(risk="score_drift", epsilon=0.4),
    ],
    ids=["to a failure", "to the end"],
)
def test_certified_goes_on_from_the_budget(scores: pl.DataFrame, promise: CertificateSettings) -> None:
    """Every step from the budget's to the certified one passes, the next fails, each tested alone.

    The certificate is that of the budget's policy, whatever comes after it.
    """
    found = calibrate(scores, FEATURES, settings(criterion=Ratio(), certificate=promise), "hash")
    policy, certified = found.document["policies"][0], found.document["certified"]
    budget = policy["chosen_step"]
    fold = (scores["fold"] == "certify").to_numpy()
    rows = scores.filter(fold)
    outputs = found.plan.outputs(rows, FEATURES[fold])
    tune = (scores["fold"] == "tune").to_numpy()
    path = TuneFold(scores.filter(tune), FEATURES[tune], settings(criterion=Ratio()), True).curves[0].path

    def exits_of(step: int) -> torch.Tensor:
        return Policy(Ratio(), path[step].thresholds, found.plan.layers).exits(outputs)

    def alone(step: int) -> Certificate:
        exits = exits_of(step)
        emitted = outputs.logits.gather(1, exits[:, None])[:, 0]
        full = outputs.logits[:, -1]
        return certify(torch.stack([full, emitted]), full, rows["label"], rows["user"], promise)

    assert found.document["certificate"] == alone(budget).to_dict()
    last = certified["path_step"]
    assert last > budget > 0
    assert all(alone(step).passed for step in range(budget, last + 1))
    end = max(step for step in range(len(path)) if exits_of(step).any())  # behind it no layer runs
    assert (last == end) is (promise.epsilon == 0.4)
    assert last == end or not alone(last + 1).passed
    assert found.certified is not None
    assert thresholds(found.certified) == path[last].thresholds.tolist()
    assert {k: certified[k] for k in path[last].point()} == path[last].point()
    assert certified["cost"] < path[budget].cost
    assert f"step {last}, {last - budget} faster than the budget's" in certified["words"]


def test_nothing_is_certified_behind_a_failed_budget(scores: pl.DataFrame) -> None:
    """A promise that the budget's policy cannot keep: no policy is certified. In risk mode it is the plan itself."""
    strict = CertificateSettings(risk="score_drift", epsilon=1e-4)
    found = calibrate(scores, FEATURES, settings(certificate=strict), "hash")
    assert not found.document["certificate"]["passed"]
    assert found.certified is found.document["certified"] is None
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    risk = calibrate(scores, FEATURES, settings(mode="risk", certificate=loose), "hash")
    assert risk.certified is not None
    assert thresholds(risk.certified) == thresholds(risk.plan)
    assert risk.document["certified"]["path_step"] == risk.document["certificate"]["path_step"]


def test_plans_travel_with_a_checkpoint(scores: pl.DataFrame) -> None:
    """State and back keeps all plans."""
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    plans = found = calibrate(scores, FEATURES, settings(certificate=loose), "hash")
    again = Plans.from_state(plans.state())
    assert again.certified is not None
    assert found.certified is not None
    assert thresholds(again.certified) == thresholds(found.certified)
    rows = PlannedRows(plans.plan, scores, FEATURES, False, draws=2)
    summary = adaptive_summary(plans, rows, ("score_drift", "users"))
    assert set(summary["certified"]) == set(summary["without_exit_0"]) | {"risk"}
    assert summary["certified"]["mean_depth"] < summary["mean_depth"]
    assert adaptive_summary(replace(plans, certified=None), rows)["certified"] is None


def test_the_risk_is_of_the_certificates_unit(scores: pl.DataFrame) -> None:
    """Of users: the mean over users of their rows' means; of rows: over rows. Users have uneven rows here."""
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    plan = calibrate(scores, FEATURES, settings(certificate=loose), "hash").certified
    assert plan is not None
    first = scores["user"] == scores["user"][0]
    uneven = np.flatnonzero((first | (scores["row_id"] % 3 == 0)).to_numpy())
    rows = PlannedRows(plan, scores[uneven], FEATURES[uneven], False, draws=20)
    full = rows.calibrated[:, -1]
    losses = np.abs(probabilities(rows.logit) - probabilities(full))
    by_user = [losses[rows.users == user].mean() for user in np.unique(rows.users)]
    assert rows.risk("score_drift", "rows")["value"] == pytest.approx(losses.mean())
    found = rows.risk("score_drift", "users")
    assert found["value"] == pytest.approx(np.mean(by_user))
    assert found["value"] != pytest.approx(losses.mean(), rel=1e-3)
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_too_few_to_certify(scores: pl.DataFrame) -> None:
    """Two users cannot certify an AUC gap: neither passed nor failed, and the fold, unread, may be asked again."""
    kept = (pl.col("fold") != "certify") | pl.col("user").is_in([50, 51])
    mask = scores.select(kept).to_series().to_numpy()
    found = calibrate(scores.filter(mask), FEATURES[mask], settings(), "hash").document
    certificate = found["certificate"]
    assert (certificate["passed"], certificate["n"], certificate["users_needed"]) == (None, 2, 232)
    assert (certificate["bound"], certificate["estimate"], found["ledger"]) == (None, None, [])


def test_second_certificate(scores: pl.DataFrame) -> None:
    """Another promise, budget, criterion or exit 0 on the same fold gets its plan, but no certificate.

    The same may be computed again, also from scores that differ a little. In risk mode the certificate is the plan,
    so a second one is refused.
    """
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    first = calibrate(scores, FEATURES, settings(certificate=loose), "hash").document
    assert first["certificate"]["passed"]
    again = calibrate(scores, FEATURES, settings(certificate=loose), "hash", first).document
    assert again["certificate"] == first["certificate"]
    assert len(again["ledger"]) == 1
    rescored = with_fold(scores, "certify", logit_2=pl.col("logit_2") + 1e-6)
    for change, words in (
        ({"max_auc_drop": 0.01}, "exits.max_auc_drop 0.002 -> 0.01"),
        ({"criterion": Ratio()}, "exits.criterion"),
        ({"exit_0": False}, "exits.exit_0"),
    ):
        changed = settings(**{"certificate": loose, **change})
        second = calibrate(rescored, FEATURES, changed, "hash", first)
        assert second.document["certificate"] is second.certified is None
        assert words in second.document["certificate_words"]
        assert second.document["ledger"] == first["ledger"]
        alone = calibrate(rescored, FEATURES, changed, "another protocol")
        assert thresholds(second.plan) == thresholds(alone.plan)
    with pytest.raises(ConfigError, match=r"exits\.mode 'budget' -> 'risk'"):
        calibrate(scores, FEATURES, settings(mode="risk", certificate=loose), "hash", first)
    other = calibrate(scores, FEATURES, settings(certificate=loose), "another protocol", first).document
    assert len(other["ledger"]) == 2


def test_no_certificate(scores: pl.DataFrame) -> None:
    """exits.certificate: null makes the same plan, reads no certify fold and says so; one may follow."""
    loose = CertificateSettings(risk="score_drift", epsilon=0.4)
    none = calibrate(scores, FEATURES, settings(certificate=None), "hash")
    found = calibrate(scores, FEATURES, settings(certificate=loose), "hash", none.document)
    assert thresholds(none.plan) == thresholds(found.plan)
    assert none.document["certificate"] is none.certified is None
    assert none.document["certificate_words"] == "No certificate: exits.certificate is null."
    assert (none.document["ledger"], len(found.document["ledger"])) == ([], 1)


def test_no_layer_is_no_early_exit(scores: pl.DataFrame) -> None:
    """A plan whose every row leaves at exit 0 is neither passed nor failed, and no such step is certified."""
    loose = CertificateSettings(risk="score_drift", epsilon=0.9)
    all_leave = {"criterion": Ratio(), "max_auc_drop": None, "max_cost": 1e-9}
    found = calibrate(scores, FEATURES, settings(certificate=loose, **all_leave), "hash")
    assert thresholds(found.plan)[0] == -np.inf
    certificate = found.document["certificate"]
    assert (certificate["passed"], found.certified, found.document["ledger"]) == (None, None, [])
    assert certificate["words"] == "Nothing to certify: every row leaves at exit 0, so no layer runs."
    risk = calibrate(scores, FEATURES, settings(mode="risk", certificate=loose, criterion=Ratio()), "hash")
    assert risk.document["certified"]["mean_depth"] > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user": pl.lit(20, pl.Int32)}, "more than one fold"),
        ({"label": pl.lit(1, pl.Int8)}, "both classes"),
        ({"logit_4": pl.lit(float("nan"), pl.Float32)}, "layer 4"),
        ({f"logit_{k}": pl.lit(0.5, pl.Float32) for k in (0, 2, 4, 6, 8, 10, 12)}, "same logit"),
        ({f"logit_{k}": pl.col("logit_2") for k in (0, 2, 4, 6, 8, 10, 12)}, "all equal"),
    ],
    ids=["shared user", "one class", "NaN", "constant", "equal heads"],
)
def test_unusable_scores(scores: pl.DataFrame, change: dict[str, pl.Expr], words: str) -> None:
    """What cannot be calibrated is refused, and the message says where."""
    fold = "certify" if "user" in change else "tune"
    with pytest.raises(DataError, match=words):
        calibrate(with_fold(scores, fold, **change), FEATURES, settings(), "hash")


def test_empty_fold(scores: pl.DataFrame) -> None:
    """Without users in tune there is nothing to calibrate on."""
    mask = (scores["fold"] != "tune").to_numpy()
    with pytest.raises(DataError, match="fold tune"):
        calibrate(scores.filter(mask), FEATURES[mask], settings(), "hash")
