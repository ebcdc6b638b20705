"""Every body that a client sends, and the body it gets."""

from __future__ import annotations

from collections.abc import Callable

from fastapi.testclient import TestClient

Make = Callable[..., TestClient]


def test_own(client: Make) -> None:
    """i3 is .3 and left at 4, i2 is .2 and left at 2: 6 of 8 token-layers."""
    body = {"user_id": "u1", "candidates": ["i2", {"item_id": "i3", "year": "1999"}]}
    answer = client().post("/v1/rank", json=body).json()
    assert answer.pop("id")
    assert answer == {
        "model": answer["model"],
        "items": [
            {"index": 1, "item_id": "i3", "probability": 0.3, "exit_layer": 4, "why": {"item_count": 3.0}},
            {"index": 0, "item_id": "i2", "probability": 0.2, "exit_layer": 2, "why": {"item_count": 2.0}},
        ],
        "usage": {"token_layers": 6, "full_depth_token_layers": 8},
        "depth_saved": 0.25,
        "late": False,
        "full_depth": False,
    }


def test_cohere(client: Make) -> None:
    body = {"model": "m", "query": "u1", "documents": ["Brazil", "i7", "a new film"], "top_n": 2}
    body |= {"return_documents": True, "max_tokens_per_doc": 4096, "priority": 0}
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = client().post(path, json=body).json()
        assert answer["results"] == [
            {"index": 1, "relevance_score": 0.7, "exit_layer": 4, "document": {"text": "i7"}},
            {"index": 0, "relevance_score": 0.2, "exit_layer": 2, "document": {"text": "Brazil"}},
        ]
