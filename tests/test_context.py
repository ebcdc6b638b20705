"""Tests context of requests end to end: training features, predict and the server agree; errors are of one request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from world import call, tiny_settings

from project.api import Run, open_run
from project.data.requests import Catalogue, Requests, read_requests
from project.engine.requests import prepare_requests
from project.errors import DataError
from project.features import FEATURES
from project.request import Item, RankRequest
from project.serve.ranker import Ranker
from project.serve.settings import ServeSettings
from project.serve.shapes import LIMITS, RankBody

pytestmark = pytest.mark.slow
CONTEXT = ["device", "price"]


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
    config["data"] |= {"serving_values": {"device": "tv"}, "context_tokens": 512}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    call(session_cache, "fit", "--config", folder / "tiny.yaml")
    return folder / "version_0"


@pytest.fixture
def opened(fitted: Path, session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PROJECT_CACHE", str(session_cache))
    return open_run(fitted)


def exit_0(run: Run, *requests: RankRequest) -> list[np.ndarray]:
    """Exit 0 of every candidate, as predict has it."""
    catalogue = Catalogue(run.data.split.interactions.items)
    resolved = [catalogue.resolve(request) for request in requests]
    asked = Requests(resolved, catalogue.table(), catalogue.codes)
    return [made.exit_0 for made in prepare_requests(run.model, run.data, asked)]


def rows_of(run: Run) -> pl.DataFrame:
    """Rows of test with what the files say: ids, texts of context."""
    log = run.data.split.interactions
    file = pl.read_csv(run.data.logs.parts[0][1], infer_schema=False)  # type: ignore[attr-defined]
    file = file.with_columns(pl.col("timestamp").cast(pl.Float64))
    rows = run.data.split.rows.filter(pl.col("split") == "test")
    rows = rows.select("row_id", "user", "item", "timestamp", "split", "label")
    rows = rows.join(log.users, on="user").join(log.items, on="item")
    keys = ["user_id", "item_id", "timestamp"]
    return rows.join(file.select(*keys, *CONTEXT), on=keys, maintain_order="left")


def request(row: dict[str, Any], place: int, time: float | None) -> RankRequest:
    """A row as a request: context of the request or of its candidate, by turns."""
    context = {name: row[name] for name in CONTEXT if row[name] is not None}
    item = Item(row["item_id"], context=tuple(context.items()) if place % 2 else ())
    whole = None if place % 2 else context
    return RankRequest(
        row["user_id"], None, [item], context=whole, time=time, request_id=str(place)
    )


def test_training_predict_and_server_agree(opened: Run, fitted: Path) -> None:
    """Exit 0 of each row of test to 1e-6: from the training table, and as a request at its time; then after the log."""
    run = opened
    rows = rows_of(run)
    assert rows.height > 20
    baseline = run.model.feature_baseline()
    assert len(baseline.weights) > len(FEATURES)
    # what the log says of a row: its device is never missing, since requests without one have serving_values
    expected = baseline.logits(run.data.retrieved_of(rows))
    requests = [
        request(row, k, row["timestamp"])
        for k, row in enumerate(rows.iter_rows(named=True))
    ]
    found = np.concatenate(exit_0(run, *requests))
    assert found == pytest.approx(expected, abs=1e-6)
    # the server, after the log; by HTTP's body, too
    ranker = Ranker.load(fitted, audit_share=0.0)
    late = [replace(one, time=None) for one in requests[:20]]
    for one, value in zip(late, exit_0(run, *late), strict=True):
        item = one.candidates[0]
        assert isinstance(item, Item)
        body: dict[str, Any] = {"user_id": one.user_id, "candidates": [item.item_id]}
        if item.context:
            body["candidates"] = [{"item_id": item.item_id, "context": dict(item.context)}]
        else:
            body["context"] = one.context
        LIMITS.set(ServeSettings(fitted))
        sent = RankBody.model_validate(body).request("name")
        resolved = ranker._catalogue().resolve(sent)
        assert ranker.prepare(resolved).exit_0 == pytest.approx(value, abs=1e-6)
    # the test can fail: context moves exit 0
    assert (
        np.abs(
            np.concatenate(exit_0(run, *(replace(r, context=None) for r in requests)))
            - found
        ).max()
        > 1e-3
    )


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
        ({"context": {"price": "cheap"}}, "expected a number"),
        ({"context": {"device": "x" * 10_000}}, "10,000 characters"),
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
