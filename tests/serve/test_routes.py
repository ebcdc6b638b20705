"""What every route has in common: the token comes first, and texts that come to stay are bounded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from project.serve.routes import Backlog

Make = Callable[..., TestClient]
JSON = {"content-type": "application/json"}
LONG = "x" * 2001
EVENT = {"event_id": "e", "user_id": "u", "item_id": "i9", "label": 1, "timestamp": 1.0}
ITEM = {"item_id": "i9", "title": "Nine"}
GORSE = {
    "FeedbackType": "star",
    "UserId": "u",
    "ItemId": "i9",
    "Timestamp": "2020-01-01T00:00:00Z",
}


def test_the_token_comes_before_the_body(client: Make) -> None:
    """Without it a request is told so whatever it sends, and its body is not read."""
    make = client(token="secret")
    assert make.post("/v1/rank", content="no JSON", headers=JSON).status_code == 401
    answers = list[dict[str, Any]]()

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": "/v1/items",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(make.app(scope, receive, send))  # type: ignore[arg-type]
    assert answers[0]["status"] == 401
    assert (b"www-authenticate", b"Bearer") in answers[0]["headers"]
    assert json.loads(answers[1]["body"])["error_type"] == "validation"


@pytest.mark.parametrize(
    ("method", "path", "body", "found"),
    [
        ("PUT", "/v1/items", [ITEM | {"title": LONG}], "2,001 characters"),
        ("PUT", "/v1/items", [ITEM | {LONG: "x"}], "2,001 characters"),
        ("PUT", "/v1/items", [ITEM | {f"c{k}": "x" for k in range(5000)}], "5,002 columns"),
        ("POST", "/v1/events", [EVENT | {"title": LONG}], "2,001 characters"),
        ("POST", "/v1/events", [EVENT] * 1001, "1,001"),
        ("POST", "/api/feedback", [GORSE] * 1001, "1,001"),
        (
            "POST",
            "/v1/rerank",
            {"query": "u", "documents": [{"text": LONG}]},
            "2,001 characters",
        ),
        (
            "POST",
            "/v1/rank",
            {"user_id": "u", "candidates": [ITEM | {LONG: "x"}]},
            "2,001 characters",
        ),
        ("POST", "/rerank", {"query": "u", "texts": ["x"] * 1001}, "1,001"),
    ],
)
def test_what_comes_to_stay_is_bounded(
    client: Make, method: str, path: str, body: object, found: str
) -> None:
    """413 with the number, and nothing was kept."""
    make = client()
    answer = make.request(method, path, content=json.dumps(body), headers=JSON)
    assert (answer.status_code, found in answer.json()["error"]) == (413, True), (
        answer.text[:500]
    )
    unknown = {"known": False, "history": [], "attributes": {}}
    assert make.get("/v1/users/u").json() == unknown


def test_a_body_that_is_too_long(client: Make) -> None:
    """By its length where the client says it, else while it is read: no more of it is kept."""
    make = client(max_body_mib=0.001)
    long = b"[" + b" " * 2000 + b"]"
    assert make.put("/v1/items", content=long).status_code == 413
    assert make.put("/v1/items", content=iter([long[:600]] * 4)).status_code == 413
    assert make.put("/v1/items", json=[ITEM]).status_code == 200


def test_writes_of_new_texts_are_bounded(client: Make) -> None:
    """While 16 characters wait no item is taken, while 32 do no event either; the report of the embedding ends it."""
    make = client(max_new_characters=1)
    backlog: Backlog = make.app.state.desk.backlog  # type: ignore[attr-defined]

    def statuses() -> list[int]:
        item = {"item_id": "n", "title": "sixteen letters"}
        plain = EVENT | {"item_id": "n", "event_id": "plain"}
        found = [
            make.put("/v1/items", json=[item]),
            make.post("/v1/events", json=[EVENT | item]),
            make.post("/v1/events", json=[plain]),
        ]
        assert all("retry-after" in f.headers for f in found if f.status_code == 429)
        return [f.status_code for f in found]

    # 1. n and sixteen letters are 16 characters
    assert statuses() == [200, 429, 200]
    assert "exitrec_new_characters 17.0" in make.get("/metrics").text
    backlog.report(time.monotonic(), 32)
    assert statuses() == [429, 429, 429]
    # 2. what was written after the store was read is not in a report
    backlog.report(0.0, 0)
    assert statuses() == [200, 429, 200]
    backlog.report(0.0, 0)
    assert statuses() == [429, 429, 200]
    backlog.report(time.monotonic(), 0)
    assert backlog.characters() == 0


def test_operators_read_and_delete(client: Make) -> None:
    """A user's rows, once; an event, whose id is free then, or is replaced; an item that nobody knows is an error."""
    make = client()
    second = EVENT | {"event_id": "a/b", "item_id": "i1"}
    make.post("/v1/events", json=[EVENT, second, EVENT | {"user_id": "v", "event_id": "f"}])
    assert make.delete("/v1/events/a/b").json() == {"events": 1}
    assert make.delete("/v1/users/u").json() == {"rows": 1, "events": 1}
    assert make.delete("/v1/users/u").json() == {"rows": 0, "events": 0}
    assert make.delete("/v1/events/a/b").json() == {"events": 0}
    assert not make.get("/v1/users/u").json()["known"]
    assert len(make.get("/v1/users/v").json()["history"]) == 1
    assert make.post("/v1/events", json=[second | {"label": 0}]).json()["conflict"] == []
    fixed = EVENT | {"event_id": "g", "user_id": "v", "label": 0, "replaces": True}
    assert make.post("/v1/events", json=[fixed]).json() == {"new": 1, "conflict": []}
    assert [r["label"] for r in make.get("/v1/users/v").json()["history"]] == [0]
    assert make.get("/v1/items/i1").json()["title"] == "Alien"
    unknown = make.get("/v1/items/i0")
    assert (unknown.status_code, "i0" in unknown.json()["error"]) == (404, True)


def test_several_requests_in_one(client: Make) -> None:
    """Each is answered in its place as alone, or has its own error; candidates count together."""
    make = client(max_candidates=4)
    good = {"user_id": "u1", "candidates": ["i3", "i5"], "top_n": 1}
    wrong = [
        {"user_id": "u1"},
        good | {"candidate": []},
        good | {"candidates": ["unknown"]},
    ]
    found = make.post("/v1/rank", json={"requests": [wrong[0], good, wrong[1]]})
    responses = found.json()["responses"]
    assert responses[1]["items"] == make.post("/v1/rank", json=good).json()["items"]
    assert responses[1]["id"] == found.headers["x-request-id"] + "/1"
    responses += make.post("/v1/rank", json={"requests": [wrong[2]]}).json()["responses"]
    for one, body in zip((responses[0], *responses[2:]), wrong, strict=True):
        assert one["error"] == make.post("/v1/rank", json=body).json()["error"]
    many = make.post("/v1/rank", json={"requests": [good] * 3})
    assert (many.status_code, "6 candidates" in many.json()["error"]) == (413, True)
    for none in ([], [1], {}):
        assert make.post("/v1/rank", json={"requests": none}).status_code == 422
