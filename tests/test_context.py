"""Tests context of requests end to end: training features, predict and the server agree; errors are of one request."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from world import call, tiny_settings

from project.api import Run, open_run
from project.data.requests import (
    Catalogue,
    Requests,
    catalogue_requests,
    read_requests,
)
from project.engine.requests import PreparedRequest, prepare_requests
from project.errors import ConfigError, DataError
from project.evaluation import moment
from project.evaluation.moment import moment_requests
from project.features import FEATURES
from project.request import Item, RankRequest
from project.serve.ranker import Ranker
from project.serve.refit import grown_log
from project.serve.settings import ServeSettings
from project.serve.shapes import LIMITS, RankBody
from project.serve.store import Event, EventStore

pytestmark = pytest.mark.slow
CONTEXT = ["device", "price"]
LATER = 300  # second, after the log


@pytest.fixture(scope="module")
def fitted(
    tiny_model: Path,
    tiny_logs: Path,
    session_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of a tiny fit on the tiny log with a device, a price that may be missing, and a country of users."""
    folder = tmp_path_factory.mktemp("context")
    rng = np.random.default_rng(0)
    log = pl.read_csv(tiny_logs / "interactions.csv")
    n = log.height
    price = np.where(rng.random(n) < 0.2, np.nan, rng.random(n).round(2))
    log.with_columns(
        device=pl.Series(rng.choice(["phone", "pc", "tv"], n)),
        price=pl.Series(price, nan_to_null=True),
    ).write_csv(folder / "log.csv")
    users = log.select("user_id").unique().sort("user_id")
    countries = pl.Series(["fr", "de", "", "es"] * users.height).head(users.height)
    users.with_columns(country=countries).write_csv(folder / "users.csv")
    config = tiny_settings(tiny_logs, tiny_model, folder, name="")
    config["data"]["logs"]["init_args"] |= {
        "interactions": str(folder / "log.csv"),
        "context": CONTEXT,
        "users": str(folder / "users.csv"),
    }
    dates = ["1970-01-01T00:02:30", "1970-01-01T00:03:20"]
    config["data"]["protocol"] |= {"split": "date", "dates": dates}
    config["data"] |= {"serving_values": {"device": "tv"}, "context_tokens": 512}
    del config["data"]["prompt"]  # the default
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    call(session_cache, "fit", "--config", folder / "tiny.yaml")
    return folder / "version_0"


@pytest.fixture
def opened(fitted: Path) -> Run:
    return open_run(fitted)


def prepared_of(run: Run, *requests: RankRequest) -> list[PreparedRequest]:
    """Requests as predict gives them to the engine."""
    catalogue = Catalogue(run.data.split.interactions.items)
    resolved = [catalogue.resolve(request) for request in requests]
    asked = Requests(resolved, catalogue.table())
    return prepare_requests(run.model, run.data, asked)


def exit_0(run: Run, *requests: RankRequest) -> list[np.ndarray]:
    """Exit 0 of every candidate."""
    return [made.exit_0 for made in prepared_of(run, *requests)]


def rows_of(run: Run) -> pl.DataFrame:
    """Rows of the log with what the files say: ids, texts of context."""
    log = run.data.split.interactions
    file = pl.read_csv(run.data.logs.parts[0][1], infer_schema=False)  # type: ignore[attr-defined]
    file = file.with_columns(pl.col("timestamp").cast(pl.Float64))
    rows = run.data.split.rows.select("row_id", "user", "item", "timestamp")
    rows = rows.join(log.users, on="user").join(log.items, on="item")
    keys = ["user_id", "item_id", "timestamp"]
    return rows.join(file.select(*keys, *CONTEXT), on=keys, maintain_order="left")


def context_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says; its device is never missing, since requests without one have serving_values."""
    return {name: row[name] for name in CONTEXT if row[name] is not None}


def as_requests(rows: pl.DataFrame) -> list[RankRequest]:
    """Each row as a request at its time: context of the request or of its candidate, by turns."""
    requests = []
    for place, row in enumerate(rows.iter_rows(named=True)):
        context = context_of(row)
        own = Item(row["item_id"], context=tuple(context.items()) if place % 2 else ())
        whole = None if place % 2 else context
        asked = RankRequest(row["user_id"], None, [own], context=whole)
        requests.append(replace(asked, time=row["timestamp"], request_id=str(place)))
    return requests


def with_rows(
    fitted: Path, said: list[tuple[str, str, int, dict[str, Any]]], folder: Path
) -> Path:
    """The run on its log and further rows after it: user, item, label and context, a second each."""
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    place = config["data"]["logs"]["init_args"]
    rows = [
        {"user_id": user, "item_id": item, "timestamp": LATER + k, "rating": 1 + 4 * label}
        | context
        for k, (user, item, label, context) in enumerate(said)
    ]
    log = pl.read_csv(place["interactions"])
    more = pl.DataFrame(rows, schema_overrides={"rating": pl.Float64})
    pl.concat([log, more], how="diagonal_relaxed").write_csv(folder / "log.csv")
    run = folder / "run"
    shutil.copytree(fitted, run)
    place["interactions"] = str(folder / "log.csv")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def served(ranker: Ranker, request: RankRequest) -> PreparedRequest:
    """A request for items of the log as the server gives it to the engine."""
    known = ranker._codes, ranker._items, ranker._encoder
    return ranker._prepare(replace(request, time=None), *known)[0]


def test_training_predict_and_server_agree(opened: Run, fitted: Path) -> None:
    """Exit 0 of 500 rows to 1e-6: from training's table, and as a request at its time; then after the log."""
    run = opened
    rows = rows_of(run)
    assert rows.height >= 490
    baseline = run.model.feature_baseline()
    assert len(baseline.weights) > len(FEATURES)
    table = run.data.retrieved["test"]
    expected = baseline.logits(rows.select("row_id").join(table, on="row_id"))
    requests = as_requests(rows)
    found = np.concatenate(exit_0(run, *requests))
    assert found == pytest.approx(expected, abs=1e-6)
    # the test can fail: context moves exit 0
    bare = [replace(r, context=None) for r in requests]
    without = exit_0(run, *bare)
    assert np.abs(np.concatenate(without) - found).max() > 1e-3
    # and no token of a prompt
    for said, unsaid in zip(
        prepared_of(run, *requests[:20]), prepared_of(run, *bare[:20]), strict=True
    ):
        assert said.candidates.values.tolist() == unsaid.candidates.values.tolist()
    # the server, after the log, by HTTP's body: a request a user, of all their rows
    ranker = Ranker.load(fitted, audit_share=0.0)
    LIMITS.set(ServeSettings(fitted))
    late = []
    for user, part in rows.group_by("user_id", maintain_order=True):
        candidates = [
            {"item_id": row["item_id"], "context": context_of(row)}
            for row in part.iter_rows(named=True)
        ]
        body = {"user_id": user[0], "candidates": candidates, "context": {"price": 0.5}}
        late.append(RankBody.model_validate(body).request(str(len(late))))
    for one, value in zip(late, exit_0(run, *late), strict=True):
        resolved = ranker._catalogue().resolve(one)
        assert served(ranker, resolved).exit_0 == pytest.approx(value, abs=1e-6)


def test_an_event_is_the_row_it_would_be_in_the_log(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 0 of the next requests to 1e-6, of a server that got events and of a log that has them as rows.

    An event's own prompt does not hold its answer.
    """
    ranker = Ranker.load(fitted, audit_share=0.0)
    other = Ranker.load(fitted, audit_share=0.0)
    said = [
        ("u1", "i7", 1, {"device": "pc", "price": 0.25}),
        ("u3", "i7", 0, {"device": "pc"}),
        ("u1", "i2", 0, {}),
        ("u2", "i4", 1, {"device": "pc", "price": 0.75}),
        ("u5", "i7", 1, {"device": "watch", "price": 0.25}),
    ]
    asked = [
        RankRequest(user, None, ["i7", "i2", "i4"], context=context)
        for user in ("u1", "u2", "u5")
        for context in ({"device": "pc"}, {"device": "watch", "price": 0.25})
    ]
    before = [served(ranker, one).exit_0 for one in asked]
    with monkeypatch.context() as changed:
        # as if nothing was fitted anew
        cuts = ranker._data.features.cuts
        changed.setattr("project.retrieval.features.block_cuts", lambda *_: cuts)
        run = open_run(with_rows(fitted, said, tmp_path))
        expected = exit_0(
            run, *(replace(a, request_id=str(k)) for k, a in enumerate(asked))
        )
    events = [
        # a store may hold what this run's log has no column for
        Event(str(k), user, item, label, LATER + k, json.dumps(context | {"gone": 1}))
        for k, (user, item, label, context) in enumerate(said)
    ]
    ranker.observe(events, [])
    other.observe([events[0]._replace(label=0)], [])
    read, opposite = (
        made._history(made._users["u1"]).tokens[-k] for made, k in ((ranker, 2), (other, 1))
    )
    assert (read != opposite).sum() == 1  # the answer's token
    found = [served(ranker, one).exit_0 for one in asked]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert (np.abs(np.array(found) - before).max(axis=1) > 1e-3).all()


def test_users_that_are_put(fitted: Path, opened: Run, tmp_path: Path) -> None:
    """A user's attributes are those put last, also after a restart; a request's own `user` wins over them."""
    store = EventStore(f"sqlite:///{tmp_path}/events.db")
    went_on = Ranker.load(fitted, audit_share=0.0)
    asked = RankRequest("u1", None, ["i1", "i2"], request_id="0")
    for country in ("es", "de", "fr"):
        named = {"u1": country, "new": " nz "}
        users = [{"user_id": user, "country": of} for user, of in named.items()]
        store.put_users(users)
        went_on.follow(store)
    restarted = Ranker.load(fitted, audit_share=0.0)
    restarted.follow(store)
    countries = ("fr", "es", None)
    given = [replace(asked, user={"country": c}, request_id=str(c)) for c in countries]
    expected = exit_0(opened, *given)
    for ranker in (went_on, restarted):
        for request, value in ((asked, expected[0]), (given[1], expected[1])):
            assert served(ranker, request).exit_0 == pytest.approx(value, abs=1e-6)
        shown = [ranker.user(user)["attributes"]["country"] for user in ("u1", "new", "u0")]
        assert shown == ["fr", "nz", "fr"]
    # the log has another country
    assert np.abs(expected[0] - expected[2]).max() > 1e-3
    # which a refit would lose
    with pytest.raises(
        ConfigError, match=r"The run reads .*user\.country.*, and refit writes"
    ):
        grown_log(fitted, store)


def test_requests_of_a_log_have_its_context(opened: Run) -> None:
    """Exit 0 and tokens of a target among other candidates are those of its row; all have the row's context.

    A request with a history of its own brings the user's attributes, too.
    """
    run = opened
    drawn = catalogue_requests(run.data.split, "test", 1000, 5, seed=0)
    known = drawn.table.drop_nulls("row_id")
    assert known.height == len(drawn.requests.requests) > 20
    table = run.data.retrieved["test"]
    expected = run.model.feature_baseline().logits(
        known.select("row_id").join(table, on="row_id", maintain_order="left")
    )
    prepared = prepare_requests(run.model, run.data, drawn.requests)
    streams = run.data.streams("test")
    for row, logit, made in zip(
        known.iter_rows(named=True), expected, prepared, strict=True
    ):
        place = row["candidate_index"]
        np.testing.assert_allclose(made.exit_0[place], logit, atol=1e-6)
        (at,) = np.flatnonzero(streams.row_id == row["row_id"])
        own = streams.tokens[at][: streams.slots[at] + 1]
        assert made.candidates[place].tolist() == own.tolist()
    brought = catalogue_requests(run.data.split, "test", 1000, 5, seed=0, history=1)
    said = {one.user["country"] if one.user else None for one in brought.requests.requests}
    assert said == {"fr", "de", "es", None}


def test_the_first_row_of_a_moment_is_the_row_as_tested(
    opened: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit 0 and tokens are those of its row; candidates after it have its context, so not all of their own."""
    monkeypatch.setattr(moment, "LEAST", 1)
    run = opened
    drawn = moment_requests(run.data.split, "test")
    assert drawn is not None
    prepared = prepare_requests(run.model, run.data, drawn.requests)
    table = run.data.retrieved["test"]
    rows = drawn.table.select("row_id").join(table, on="row_id", maintain_order="left")
    expected = run.model.feature_baseline().logits(rows)
    found = np.concatenate([one.exit_0 for one in prepared])
    first = (drawn.table["candidate_index"] == 0).to_numpy()
    assert first.sum() == len(prepared) > 10
    np.testing.assert_allclose(found[first], expected[first], atol=1e-6)
    assert abs(found - expected)[~first].max() > 0.01
    streams = run.data.streams("test")
    for row_id, made in zip(drawn.table["row_id"].filter(first), prepared, strict=True):
        (at,) = np.flatnonzero(streams.row_id == row_id)
        own = streams.tokens[at][: streams.slots[at] + 1]
        assert made.candidates[0].tolist() == own.tolist()


def test_what_is_absent(opened: Run) -> None:
    """A device has its serving value; unseen and absent values differ from known ones; candidates have their own."""
    row = rows_of(opened).row(0, named=True)
    plain = RankRequest(row["user_id"], None, [row["item_id"]], request_id="0")
    said = replace(plain, context={"device": "tv"})
    other = replace(plain, context={"device": "pc"})
    new = replace(plain, context={"device": "watch"})
    values = np.concatenate(exit_0(opened, plain, said, other, new))
    assert values[0] == values[1] != values[2]
    assert values[3] not in values[:3]
    nobody = replace(plain, user_id="nobody")
    from_france = replace(nobody, user={"country": "fr"})
    first, second = np.concatenate(exit_0(opened, nobody, from_france))
    assert first != second
    both = replace(
        plain,
        candidates=[Item(row["item_id"], context=(("device", d),)) for d in ("tv", "pc")],
    )
    assert exit_0(opened, both)[0].tolist() == pytest.approx(values[[1, 2]].tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"context": {"devise": "tv"}}, "unknown name 'devise'.*device, price"),
        ({"context": "tv"}, "context is 'tv'"),
        ({"user": {"age": 3}}, "unknown name 'age'.*expected country"),
        (
            {"candidates": [{"item_id": "i1", "context": {"where": 1}}]},
            "unknown name 'where'",
        ),
    ],
)
def test_an_error_is_of_its_request(
    given: dict[str, Any], message: str, opened: Run, tmp_path: Path
) -> None:
    """In a file the others are scored, in Python it names the request."""
    good = {"request_id": "good", "user_id": "u1", "candidates": ["i1"]}
    file = tmp_path / "requests.jsonl"
    file.write_text(
        "\n".join(json.dumps(line) for line in (good, good | {"request_id": "bad"} | given))
    )
    found = read_requests(str(file), opened.data.split.interactions)
    assert [one.request_id for one in found.requests] == ["good"]
    (invalid,) = found.invalid
    with pytest.raises(DataError, match=message):
        raise DataError(invalid.error)
    assert len(invalid.error) < 500
