"""Tests predict end to end: requests of known, unseen and anonymous users, of unseen items, as JSONL and Parquet.

One tiny fit serves all tests. Its model has large weights, so that the tokens it reads move the score. Its retriever is
item_knn, whose neighbours are the user's own rows, and its prompt shows their factorisation: a history that a request
brings must then score as the same rows of the log do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from world import call, given, sharpened, tiny_settings

from project.data.batch import Batch
from project.model.module import ExitRecommender

Record = dict[str, Any]
Predict = Callable[..., pl.DataFrame]
LOGITS = ["logit_0", "logit_1", "logit_3"]
FRESH = {"item_id": "new", "title": "a dog at sea", "year": "2020"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharp_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with layers ten times as large."""
    return sharpened(tiny_model, tmp_path_factory.mktemp("sharp") / "model")


@pytest.fixture(scope="module")
def fitted(
    sharp_model: Path,
    tiny_logs: Path,
    session_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of one tiny fit."""
    folder = tmp_path_factory.mktemp("fitted")
    config = tiny_settings(tiny_logs, sharp_model, folder, name="")
    config["data"] |= {"context_tokens": 768, "batch_tokens": 1024, "mf": {"dim": 2}}
    shown = "{title} ({year}) all {item_percent} near {vote_percent} mf {mf_percent}{mf_number}:"
    config["data"]["prompt"] = {"segment": shown}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    call(session_cache, "fit", "--config", folder / "tiny.yaml")
    return folder / "version_0"


@pytest.fixture
def predict(fitted: Path, run: Callable[..., None], tmp_path: Path) -> Predict:
    """Writes requests, runs the command, returns the score table."""

    def scores(records: list[Record]) -> pl.DataFrame:
        path = tmp_path / "requests.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        run("predict", *given(fitted), "--data.requests", path, "--results.tag", path.stem)
        return pl.read_parquet(fitted / "scores" / f"predict-{path.stem}.parquet")

    return scores


@pytest.fixture(scope="module")
def log(tiny_logs: Path) -> pl.DataFrame:
    """The log in time order, and the user with most rows as `busy`."""
    return pl.read_csv(tiny_logs / "interactions.csv").sort("timestamp")


def history_of(log: pl.DataFrame, user: str, before: float) -> list[Record]:
    past = log.filter((pl.col("user_id") == user) & (pl.col("timestamp") < before))
    rows = past.select("item_id", "rating", "timestamp").iter_rows()
    return [
        {"item_id": item, "rating": rating, "time": float(time)}
        for item, rating, time in rows
    ]


def request(name: str, candidates: list[Any], **about: Any) -> Record:
    return {"request_id": name, "candidates": candidates} | about


def logits(scores: pl.DataFrame, name: str) -> np.ndarray:
    """Shape (candidates, exits)."""
    return scores.filter(pl.col("request_id") == name).select(LOGITS).to_numpy()


def test_everybody_is_scored(predict: Predict, log: pl.DataFrame) -> None:
    """One row a candidate in the order of requests: users that are known, unseen, without a name and without a past."""
    candidates = ["i3", FRESH, "i0"]
    records = [
        request("known", candidates, user_id="u1", time=200.0),
        request("unseen", candidates, user_id="nobody"),
        request("anonymous", candidates, history=history_of(log, "u1", 200.0), time=200.0),
        request("newcomer", candidates, history=[]),
        request("new past", ["i3"], history=[FRESH | {"label": 1, "time": 10.0}]),
    ]
    scores = predict(records)
    expected = [
        (r["request_id"], k, c if isinstance(c, str) else c["item_id"])
        for r in records
        for k, c in enumerate(r["candidates"])
    ]
    assert scores.select("request_id", "candidate_index", "item_id").rows() == expected
    assert np.isfinite(scores.select(LOGITS).to_numpy()).all()
    assert scores["label"].null_count() == scores["row_id"].null_count() == len(scores)
    read = dict(
        scores.group_by("request_id").agg(pl.col("stream_tokens").first()).iter_rows()
    )
    assert (
        read["unseen"]
        == read["newcomer"]
        < read["new past"]
        < read["known"]
        == read["anonymous"]
    )
    np.testing.assert_allclose(
        logits(scores, "unseen"), logits(scores, "newcomer"), atol=1e-5
    )


def test_a_history_scores_as_the_log_does(predict: Predict, log: pl.DataFrame) -> None:
    """Users of the log by name, and by their rows in any order: the same logits to 1e-4, the answers being read."""
    users = log["user_id"].unique().sort().to_list()[:6]
    records = []
    for user in users:
        past = history_of(log, user, 220.0)
        turned = [row | {"rating": 6 - row["rating"]} for row in past]
        records += [
            request(f"{user} named", ["i1", "i2"], user_id=user, time=220.0),
            request(f"{user} given", ["i1", "i2"], history=past[::-1], time=220.0),
            request(f"{user} other", ["i1", "i2"], history=turned, time=220.0),
        ]
    scores = predict(records)
    named, given_rows, other = (
        np.stack([logits(scores, f"{user} {how}") for user in users])
        for how in ("named", "given", "other")
    )
    np.testing.assert_allclose(given_rows, named, atol=1e-4)
    assert np.abs(other - named).max(axis=(0, 1)).min() > 0.05  # at both exits


def test_rows_at_and_after_the_time_are_not_read(
    predict: Predict, log: pl.DataFrame
) -> None:
    """Rows at and after the request's time are not read, of the log or of a history."""
    past = history_of(log, "u1", 150.0)
    later = [
        {"item_id": "i2", "label": 1, "time": 150.0},
        {"item_id": "i4", "label": 0, "time": 180.0},
    ]
    scores = predict(
        [
            request("plain", ["i1"], history=past, time=150.0),
            request("with the future", ["i1"], history=past + later, time=150.0),
            request("named", ["i1"], user_id="u1", time=150.0),
            request("named, later", ["i1"], user_id="u1", time=240.0),
        ]
    )
    # what is read moves a score by .05; places in one batch differ by a rounding
    np.testing.assert_allclose(
        logits(scores, "plain"), logits(scores, "with the future"), atol=1e-5
    )
    read = dict(scores.select("request_id", "stream_tokens").iter_rows())
    assert read["named"] == read["plain"] < read["named, later"]


def test_without_a_time_the_whole_log_and_the_whole_history_are_read(
    predict: Predict, log: pl.DataFrame
) -> None:
    """Requests of now are answered by the index where they are alone, by the walk where others bring histories."""
    end = float(log["timestamp"].max())  # type: ignore[arg-type]
    today = [
        {"item_id": f"i{k}", "label": k % 2, "time": end + 1000.0 + k} for k in range(5)
    ]
    of_now = [
        request("now", ["i1"], user_id="u1"),
        request("later", ["i1"], user_id="u1", time=end + 1e6),
        request("newcomer", ["i1", FRESH], history=[]),
    ]
    histories = [
        request("today", ["i1"], history=today),
        request("today, with a time", ["i1"], history=today, time=end + 2000.0),
    ]
    scores = predict([*of_now, *histories])
    np.testing.assert_allclose(
        predict(of_now).select(LOGITS), scores.head(4).select(LOGITS), atol=1e-5
    )
    np.testing.assert_allclose(logits(scores, "now"), logits(scores, "later"), atol=1e-5)
    assert scores["stream_tokens"][4] == scores["stream_tokens"][5]
    np.testing.assert_allclose(
        logits(scores, "today"), logits(scores, "today, with a time"), atol=1e-5
    )


@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_untrained_model_is_refused_before_the_first_batch(
    command: str,
    fitted: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(request("a", ["i1"], user_id="u1")))
    batches = list[Batch]()
    monkeypatch.setattr(
        ExitRecommender, "forward", lambda self, batch: batches.append(batch)
    )
    message = fails(
        command,
        "--config",
        fitted / "config.yaml",
        "--data.requests",
        path,
        "--trainer.logger",
        "false",
    )
    assert "NotFittedError" in message
    assert "--ckpt_path" in message
    assert batches == []
