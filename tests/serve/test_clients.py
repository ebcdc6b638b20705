"""Real clients, and requests made of the OpenAPI document, against a running server."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import cohere
import httpx
import numpy as np
import pytest
from fake_ranker import serving

from project.request import Item, RankRequest
from project.serve.ranker import Ranker

pytestmark = pytest.mark.slow


def test_clients_get_the_rankers_scores(
    served_run: Path,
    tmp_path: Path,
    ranker: Ranker,
) -> None:
    """Cohere's client in both versions, Gorse's and TEI's request: the probabilities of the bare ranker.

    After an event of the user they are another's; a posted event is read by the next request.
    """
    titles = ranker.about["examples"]["items"]
    (alone,) = ranker.rank_after_log(
        [RankRequest("u1", None, [Item(title=title) for title in titles])]
    )
    ids, expected = alone.item_ids, alone.probabilities
    with (
        serving(tmp_path, "--audit_share", 0, run=served_run) as (_, address),
        httpx.Client(base_url=address) as http,
    ):
        post = http.post

        def close(scores: dict[int, float]) -> bool:
            return bool(
                np.allclose(
                    [scores[k] for k in range(len(ids))], expected, atol=1e-6, rtol=0
                )
            )

        # 1. Cohere's
        more = {"additional_body_parameters": {"user_id": "u1", "item_ids": ids}}
        for version in (cohere.Client, cohere.ClientV2):
            client = version(api_key="none", base_url=address, httpx_client=http)
            for query, options in (("u1", None), ("", more)):
                found = client.rerank(
                    model="m", query=query, documents=titles, request_options=options
                )
                scores = [r.relevance_score for r in found.results]
                assert scores == sorted(scores, reverse=True)
                assert close({r.index: r.relevance_score for r in found.results})
        # 2. requests as others send them
        gorse = post(
            "/v1/rerank",
            json={"model": "exitrec", "query": "u1", "top_n": 12, "documents": titles},
        ).json()
        assert close({r["index"]: r["relevance_score"] for r in gorse["results"]})
        tei = post(
            "/rerank",
            json={"query": "u1", "texts": titles, "raw_scores": False, "truncate": True},
        ).json()
        assert close({r["index"]: r["score"] for r in tei})
        # 3. an event is read at once
        event = {
            "event_id": "e1",
            "user_id": "u1",
            "item_id": "i3",
            "rating": 5,
            "timestamp": time.time(),
        }
        assert post("/v1/events", json=[event]).json()["new"] == 1
        after = post("/rerank", json={"query": "u1", "texts": titles}).json()
        assert not close({r["index"]: r["score"] for r in after})


def test_requests_made_of_the_document(tmp_path: Path) -> None:
    """A few hundred, of which none is answered 5xx; 10,000 are run by hand."""
    with serving(tmp_path) as (_, address):
        command = [
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{address}/openapi.json",
            "--seed",
            "1",
        ]
        command += [
            "--checks",
            "not_a_server_error",
            "--phases",
            "fuzzing",
            "--max-examples",
            "20",
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
