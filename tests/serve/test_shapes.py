"""Every body that a client sends, the body it gets, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any

import pytest
from fake_ranker import FakeRanker
from fastapi.testclient import TestClient

from project.errors import ConfigError
from project.request import RankRequest, Scored
from project.serve.settings import ServeSettings
from project.serve.shapes import AHEAD

Make = Callable[..., TestClient]
# i2 leaves at 2, i3 at 4; nobody would run 4 + 4
USAGE = {"token_layers": 6, "full_depth_token_layers": 8, "left_at": {"2": 1, "4": 1}}


def test_own(client: Make) -> None:
    body = {"user_id": "u1", "candidates": ["i2", {"item_id": "i3", "year": 1999}]}
    answer = client().post("/v1/rank", json=body).json()
    assert answer == {
        "id": answer["id"],
        "model": "run",
        "items": [
            {
                "index": 1,
                "item_id": "i3",
                "title": "i3",
                "probability": 0.3,
                "exit_layer": 4,
                "why": {"item_count": 3.0},
            },
            {
                "index": 0,
                "item_id": "i2",
                "title": "Brazil",
                "probability": 0.2,
                "exit_layer": 2,
                "why": {"item_count": 2.0},
            },
        ],
        "usage": USAGE,
        "depth_saved": 0.25,
        "late": False,
        "full_depth": False,
    }


def test_own_with_a_history(client: Make) -> None:
    """A title names a known item, i1, or a new one; the deadline is over before anything ran."""
    body = {
        "history": [{"title": "Alien", "label": 1}],
        "candidates": [{"title": "Alien"}, {"title": "New"}],
    }
    answer = client().post("/v1/rank", json=body | {"deadline_ms": 1e-6, "top_n": 1}).json()
    assert [(i["item_id"], i["probability"]) for i in answer["items"]] == [
        ("i1", pytest.approx(0.1))
    ]
    assert answer["late"]


def test_every_dialect_asks_for_lists(
    client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`top_n` and `exhaustive` reach the ranker; without them every score is asked for."""
    asked = list[tuple[int, bool]]()
    rank = FakeRanker.rank_after_log

    def noted(
        ranker: FakeRanker, requests: Sequence[RankRequest], embed: bool = True
    ) -> list[Scored]:
        asked.extend((r.list_of, r.exhaustive) for r in requests)
        return rank(ranker, requests, embed)

    monkeypatch.setattr(FakeRanker, "rank_after_log", noted)
    server = client()
    bodies: dict[str, dict[str, Any]] = {
        "/v1/rank": {"user_id": "u1", "candidates": ["i1", "i2"]},
        "/v1/rerank": {"query": "u1", "documents": ["i1", "i2"]},
        "/rerank": {"query": "u1", "texts": ["i1", "i2"]},
    }
    for path, body in bodies.items():
        asked.clear()
        for more in ({}, {"top_n": 1}, {"top_n": 1, "exhaustive": True}):
            found = server.post(path, json=body | more).json()
            listed = (
                found if isinstance(found, list) else found.get("items") or found["results"]
            )
            assert len(listed) == (1 if more else 2)
        assert asked == [(0, False), (1, False), (0, True)]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_cohere(client: Make, path: str) -> None:
    """A document is a title that is known, an id, or a new text; the client's other keys are no error."""
    body = {
        "model": "m",
        "query": "u1",
        "documents": ["Brazil", "i3", "a new film"],
        "top_n": 2,
    }
    body |= {"return_documents": True, "max_tokens_per_doc": 4096, "priority": 0}
    answer = client().post(path, json=body).json()
    assert answer["results"] == [
        {"index": 1, "relevance_score": 0.3, "exit_layer": 4, "document": {"text": "i3"}},
        {
            "index": 0,
            "relevance_score": 0.2,
            "exit_layer": 2,
            "document": {"text": "Brazil"},
        },
    ]


def test_tei(client: Make) -> None:
    """Raw scores are logits: of .3 log(3/7)."""
    body = {
        "query": "u1",
        "texts": ["i2", "i3"],
        "raw_scores": False,
        "return_text": True,
        "truncate": False,
    }
    make = client()
    assert make.post("/rerank", json=body).json() == [
        {"index": 1, "score": 0.3, "text": "i3"},
        {"index": 0, "score": 0.2, "text": "i2"},
    ]
    raw = make.post(
        "/rerank", json=body | {"raw_scores": True, "return_text": False}
    ).json()
    assert raw == [
        {"index": 1, "score": pytest.approx(log(3 / 7))},
        {"index": 0, "score": pytest.approx(-log(4))},
    ]


def test_events(client: Make) -> None:
    """The rule is rating > 3; an event that is known changes nothing, with other content it is a conflict.

    A user of an event is known at once.
    """
    make, now = client(), time.time()
    event = {
        "event_id": "e1",
        "user_id": "new",
        "item_id": 7,
        "title": "Seven",
        "rating": 4,
        "timestamp": now - 9,
    }
    assert make.post("/v1/events", json=[event, event]).json() == {"new": 1, "conflict": []}
    other = event | {"rating": 1}
    assert make.post("/v1/events", json=[other]).json() == {"new": 0, "conflict": ["e1"]}
    read = GORSE | {"ItemId": "9", "FeedbackType": "read"}
    for _ in range(2):
        make.put("/api/feedback", json=[GORSE, read])
    history = make.get("/v1/users/new").json()["history"]
    assert [(row["item_id"], row["label"]) for row in history] == [
        ("7", 1),
        ("8", 1),
        ("9", 0),
    ]
    assert history[1]["time"] == 1577836800


def test_gorses_feedback_means_what_its_type_means(client: Make) -> None:
    """A value of 0 is what Gorse's clients send where there is none; conditions are those of Gorse's configuration."""
    make = client(gorse_positive="star, like, read>=3", gorse_read="read")
    for k, (kind, value) in enumerate(
        [("star", 0), ("read", 0), ("read", 3), ("read", None), ("like", 2)]
    ):
        sent = GORSE | {"FeedbackType": kind, "ItemId": f"i{k}", "Value": value}
        assert make.post("/api/feedback", json=[sent]).status_code == 200
    assert [row["label"] for row in make.get("/v1/users/new").json()["history"]] == [
        1,
        0,
        1,
        0,
        1,
    ]


def test_items_and_users(client: Make) -> None:
    make = client()
    assert make.put(
        "/v1/items", json=[{"item_id": "i99", "title": "New", "year": "2026"}]
    ).json() == {"items": 1}
    assert make.put("/v1/users", json=[{"user_id": "u", "age": 31}]).json() == {"users": 1}


JSON = {"content-type": "application/json"}
EVENT = {"event_id": "e", "user_id": "u", "item_id": "i", "timestamp": 1}
GORSE = {
    "FeedbackType": "star",
    "UserId": "new",
    "ItemId": "8",
    "Timestamp": "2020-01-01T00:00:00Z",
}
WRONG = [
    ("/v1/rank", {"candidates": ["i1"]}, 422, "either user_id or history"),
    ("/v1/rank", {"user_id": "u1", "candidates": []}, 422, "at least 1 item"),
    (
        "/v1/rank",
        {"user_id": "u1", "candidates": ["i1"], "topn": 1},
        422,
        "'topn' (did you mean top_n?)",
    ),
    (
        "/v1/rank",
        {"user_id": "u1", "candidates": ["i1"], "context": "phone"},
        422,
        "context",
    ),
    (
        "/v1/rank",
        {"user_id": "u1", "candidates": [{"title": "New", "list_price": {}}]},
        422,
        ".0.list_price: ",
    ),
    ("/v1/rank", {"user_id": "u1", "candidates": ["i1", ""]}, 422, "candidates.1: "),
    ("/v1/rank", {"user_id": "u1", "candidates": ["unknown"]}, 422, "no title"),
    ("/v1/rank", {"user_id": "u" * 300, "candidates": ["i1"]}, 422, "at most 256"),
    ("/v1/rank", {"user_id": "\0", "candidates": ["i1"]}, 422, "NUL"),
    (
        "/v1/rank",
        {"history": [{"item_id": "i1", "label": 1}] * 4, "candidates": ["i1"]},
        413,
        "takes 3",
    ),
    (
        "/v1/rank",
        {"history": [{"item_id": "i1", "label": 1, "time": -1}], "candidates": ["i1"]},
        422,
        "time",
    ),
    (
        "/v1/rank",
        {"user_id": "u1", "candidates": ["i1"], "deadline_ms": float("nan")},
        422,
        "deadline_ms",
    ),
    (
        "/rerank",
        {"query": "u1", "documents": ["a"], "item_ids": ["1", "2"]},
        422,
        "2 ids for 1",
    ),
    ("/rerank", {"query": "\ud800", "documents": ["a"]}, 422, "surrogate"),
    ("/rerank", {"query": "u1", "documents": [{"year": 1999}]}, 422, "item_id or a title"),
    ("/v1/events", [EVENT], 422, "neither rating nor label"),
    ("/v1/events", [EVENT | {"rating": float("inf")}], 422, "finite"),
    (
        "/v1/events",
        [EVENT | {"label": 1, "timestamp": time.time() + AHEAD + 3600}],
        422,
        "after now",
    ),
    ("/v1/events", [EVENT | {"label": 2}], 422, "label"),
    ("/v1/events", [EVENT | {"label": 1, "lable": 1}], 422, "'lable'"),
    (
        "/v1/events",
        [EVENT | {"label": 1, "context": {"devise": "pc"}}],
        422,
        "did you mean device?",
    ),
    (
        "/v1/items",
        [{"item_id": "i99", "title": "x", "yaer": "1999"}],
        422,
        "did you mean year?",
    ),
    ("/v1/users", [{"user_id": "u", "aeg": 3}], 422, "did you mean age?"),
    ("/v1/users", [{"user_id": "u", "age": "old"}], 422, "user.age is 'old'"),
    ("/api/feedback", [GORSE | {"FeedbackType": "share"}], 422, "'share'"),
    ("/v1/items", [{"item_id": "i99"}], 422, "0.title: Field required"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), WRONG)
def test_refused(client: Make, path: str, body: object, status: int, text: str) -> None:
    method = "PUT" if path in ("/v1/items", "/v1/users") else "POST"
    made = client(max_history_rows=3)
    answer = made.request(method, path, content=json.dumps(body), headers=JSON)
    assert (answer.status_code, text in answer.json()["error"]) == (status, True), (
        answer.text
    )


@pytest.mark.parametrize(
    "body", ["[" * 100_000, '{"query":' * 5000, "9" * 5000, "{", "\xff", ""]
)
def test_no_json(client: Make, body: str) -> None:
    answer = client().post("/rerank", content=body.encode("latin-1"), headers=JSON)
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]


def test_token(client: Make) -> None:
    make = client(token="sécret")
    bodies = {"/v1/rank": {"user_id": "u1", "candidates": ["i1"]}, "/v1/reload": None}
    for path, body in bodies.items():
        assert make.post(path, json=body).status_code == 401
        assert (
            make.post(
                path, json=body, headers={"authorization": "Bearer secret"}
            ).status_code
            == 401
        )
    right = {"authorization": "Bearer sécret".encode()}
    assert make.post("/v1/rank", json=bodies["/v1/rank"], headers=right).status_code == 200
    assert [
        make.get(path).status_code
        for path in ("/healthz", "/metrics", "/", "/docs", "/info")
    ] == [200] * 4 + [401]


def test_not_open_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        with pytest.raises(ConfigError, match="lacks"):
            ServeSettings(tmp_path).check()
        (tmp_path / name).touch()
    for settings in (
        {"host": "::1"},
        {"host": "0.0.0.0", "token": "t"},
        {"host": "h", "unprotected": True},
    ):
        ServeSettings(tmp_path, **settings).check()
    with pytest.raises(ConfigError, match="EXITREC_TOKEN"):
        ServeSettings(tmp_path, host="0.0.0.0").check()


def test_metrics_and_ids(client: Make) -> None:
    make = client()
    for name in ("mine", "no\tgood"):
        found = make.post(
            "/rerank",
            json={"query": "u1", "texts": ["i2", "i3"]},
            headers={"x-request-id": name},
        )
        assert (found.headers["x-request-id"] == name) == (name == "mine")
    lines = make.get("/metrics").text.splitlines()
    for line in (
        'exitrec_requests_total{route="/rerank",status="200"} 2.0',
        'exitrec_candidates_total{exit="2"} 2.0',
        "exitrec_token_layers_total 12.0",
        "exitrec_full_depth_token_layers_total 16.0",
        'exitrec_batch_requests_bucket{le="1.0"} 2.0',
    ):
        assert line in lines
