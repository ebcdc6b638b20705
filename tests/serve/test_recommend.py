"""Tests recommendations: what is listed may be, and is ranked as anybody would rank it, whatever happens meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient
from polars.testing import assert_frame_equal
from world import given

from project.api import open_run, recommend
from project.request import HistoryRow, Item, RankRequest, RecommendRequest
from project.serve.inference import Served
from project.serve.ranker import Ranker
from project.serve.settings import ServeSettings
from project.serve.store import Event
from research import recommend as study

pytestmark = pytest.mark.slow


def test_what_is_listed_may_be_listed(
    ranker: Ranker, served_run: Path, tmp_path: Path
) -> None:
    """Nobody's answered, denied or filtered item, in any company, with events between; nor one too many of a value.

    The same request alone has the same response, which is that of the same candidates to `/v1/rank`.
    """
    settings = ServeSettings(served_run, f"sqlite:///{tmp_path}/events.db", cache_mib=1)
    served = Served(settings, lambda *_, **__: ranker)
    new = [
        {"item_id": f"n{k}", "title": f"a dog {k}", "year": str(1999 + k)} for k in range(6)
    ]
    served.store.put_items(new)
    year_of = {f"i{k}": "1999" for k in range(20)} | {r["item_id"]: r["year"] for r in new}
    rng = np.random.default_rng(0)
    texts = 0  # new items that were found by their texts
    for turn in range(12):
        asked = list[Any]()
        for k in range(4):
            user = f"u{rng.integers(40)}"
            asked.append(
                RecommendRequest(
                    user,
                    None,
                    top_n=4,
                    filter={"year": {"max": 2002.0}} if k % 2 else {},
                    deny=[f"i{i}" for i in rng.integers(0, 20, 3)],
                    allow=None if k < 3 else [*year_of, "unknown"][::2],
                    at_most={"year": 2} if k % 3 else {},
                    include_answered=k == 2,
                    request_id=f"{turn}/{k}",
                )
            )
        found = served.answer([*asked, RankRequest("u1", None, ["i3"])])
        for request, one in zip(asked, found, strict=False):
            assert one.error is None
            listed = [one.item_ids[place] for place in one.listed]
            years = [year_of[item_id] for item_id in listed]
            history = {row["item_id"] for row in ranker.user(request.user_id)["history"]}
            assert request.include_answered or not history & {*one.item_ids}
            assert not {*request.deny} & {*one.item_ids}
            assert request.allow is None or {*one.item_ids} <= {*request.allow}
            assert not request.filter or all(int(year_of[i]) <= 2002 for i in one.item_ids)
            most = request.at_most.get("year", 4)
            assert all(years.count(year) <= most for year in years)
            assert request.at_most or len(listed) == min(4, len(one.item_ids))
            texts += sum(source == "text" for source in one.sources)
            (alone,) = ranker.rank_after_log([request])
            plain = RankRequest(request.user_id, None, one.item_ids)
            (ranked,) = ranker.rank_after_log([plain])
            for other in (alone, ranked):
                assert [*other.item_ids] == [*one.item_ids]
                np.testing.assert_allclose(other.logits, one.logits, atol=1e-4)
            assert (alone.listed, alone.sources) == (one.listed, one.sources)
            # with no bound on equal values the order is that of P(like) x (likes of late + 1)
            codes = np.array([ranker._codes[item_id] for item_id in one.item_ids])
            chances = ranked.probabilities * (1 + ranker._finder._popular[codes])
            if not request.at_most:
                best = np.sort(chances)[::-1][: len(one.listed)]
                np.testing.assert_allclose(chances[one.listed], best, rtol=1e-3)
        event = Event(str(turn), asked[0].user_id, f"i{turn}", 1, 5000.0 + turn)
        served.store.add([event])
    assert texts


def test_new_items_and_histories(ranker: Ranker) -> None:
    """An item without a row comes by its text; a history of one's own is read; of nothing the list is empty."""
    ranker.observe([], [{"item_id": "n", "title": "x", "year": "2001"}])
    liked = ranker._items.row(3, named=True)
    titles = ["brand new", liked["title"]]
    history = [HistoryRow(Item(title=title), 1) for title in titles]
    request = RecommendRequest(None, history, top_n=30)
    (found,) = ranker.rank_after_log([request])
    assert {*found.item_ids} == {f"i{k}" for k in range(20)} - {liked["item_id"]} | {"n"}
    assert dict(zip(found.item_ids, found.sources, strict=True))["n"] in ("text", "popular")
    nobody = RecommendRequest("nobody", None, top_n=3)
    (popular,) = ranker.rank_after_log([nobody])
    assert {*popular.sources} == {"popular"}
    (empty,) = ranker.rank_after_log([replace(nobody, allow=["none"])])
    assert (empty.error, [*empty.listed]) == (None, [])
    (wrong,) = ranker.rank_after_log([replace(nobody, at_most={"yaer": 1})])
    assert (
        wrong.error
        == "at_most: unknown column 'yaer' (did you mean year?); expected title, year."
    )


def test_an_item_too_long_for_a_prompt_costs_nobody(ranker: Ranker) -> None:
    """It is not recommended."""
    ranker.observe([], [{"item_id": "long", "title": "long " * 400}])
    (found,) = ranker.rank_after_log([RecommendRequest("u1", None, include_answered=True)])
    assert (found.error, len(found.item_ids)) == (None, 20)


def test_predict_recommends_as_the_server_does(
    ranker: Ranker, served_run: Path, run: Callable[..., None]
) -> None:
    """For every user of the log; a row an item, and no request file is needed; so does Python."""
    run("predict", *given(served_run), "--recommend", 3)
    table = pl.read_parquet(served_run / "scores" / "recommendations.parquet")
    for (user,), own in table.group_by("user_id"):
        (found,) = ranker.rank_after_log([RecommendRequest(str(user), None, top_n=3)])
        assert own["item_id"].to_list() == [found.item_ids[k] for k in found.listed]
        assert own["source"].to_list() == [found.sources[k] for k in found.listed]
    assert table["user_id"].n_unique() == 30
    listed = recommend(open_run(served_run), ["u3", "u1"], top_n=3)
    both = pl.concat(table.filter(user_id=user) for user in ("u3", "u1"))
    # other users beside them move the last bits of a probability
    assert_frame_equal(listed, both, rel_tol=0, abs_tol=1e-6)


def test_the_study(
    served_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs. By hand: of {1, 2} and {3, 4} liked, 2 (new) and 3, 4 are found, so (.5 + 1) / 2; of known 0 and 1."""
    monkeypatch.setattr(study, "CATALOGUE", 1000)
    study.study(served_run, tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["rows"]) == 9
    # as the run's test has it
    tested = json.loads((served_run / "results" / "test.json").read_text())["candidates"]
    recalled = next(r for r in result["recall_100"] if r["split"] == "test")
    assert tested == {
        "candidates": 100,
        "recall": {k: recalled[k] for k in tested["recall"]},
    }
    assert "choose from 100" in (served_run / "report" / "report.md").read_text()
    known = np.array([1, 1, 0, 1, 1], np.bool_)
    at = study.Frozen(9.0, {1: [], 2: [(0, 1)]}, {1: {1, 2}, 2: {3, 4}}, known)
    found = study.recalls({1: {2: "text"}, 2: {4: "text", 3: "text"}}, at)
    assert [found[name]["value"] for name in ("all", "known", "new")] == [0.75, 0.5, 1.0]
    assert found["users_with_history"] == {"value": 1.0, "users": 1}


def test_routes(client: Callable[..., TestClient]) -> None:
    """A body's conditions arrive as they are meant; Gorse's route lists ids."""
    make = client()
    ranker = make.app.state.ranker  # type: ignore[attr-defined]
    body = {
        "user_id": "u1",
        "filter": {"year": 1999, "list_price": {"max": 5}},
        "deny": [3],
    }
    response = make.post("/v1/recommend", json=body).json()
    assert [item["source"] for item in response["items"]] == ["popular", "text"]
    assert ranker.asked.filter == {
        "year": ["1999"],
        "list_price": {"min": None, "max": 5.0},
    }
    assert (ranker.asked.deny, ranker.asked.top_n) == (["3"], 10)
    assert make.get("/api/recommend/a/b?n=1").json() == ["i2"]
    assert ranker.asked.user_id == "a/b"
    for wrong in (
        {"list_price": {"most": 3}},
        {"year": []},
        {"year": [{}]},
        {"year": {"max": "x"}},
    ):
        answer = make.post("/v1/recommend", json=body | {"filter": wrong})
        assert (answer.status_code, f"filter.{next(iter(wrong))}" in answer.text) == (
            422,
            True,
        )
        assert "function" not in answer.text
    assert make.post("/v1/recommend", json=body | {"history": []}).status_code == 422
    assert (
        "source"
        not in make.post("/v1/rank", json={"user_id": "u1", "candidates": ["i1"]}).json()[
            "items"
        ][0]
    )
