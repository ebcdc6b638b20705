from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_ranker import FakeRanker
from fastapi import FastAPI
from fastapi.testclient import TestClient

from project.serve.server import Metrics, Observed, RankAPI, ServeSettings, add_routes


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Makes a client of all routes with the fake ranker in this process, where no queue and no batches are needed."""

    def make(rule: str | None = "rating > 3", **settings: Any) -> TestClient:
        run = tmp_path / "run"
        given = ServeSettings(run, f"sqlite:///{tmp_path}/events.db", **settings)
        api = RankAPI(given, FakeRanker.load)
        api.setup("cpu")

        async def ask(payload: Any) -> Any:
            return api.predict([payload])[0]

        app, metrics = FastAPI(), Metrics(lambda: 0)
        app.add_middleware(Observed, metrics=metrics)
        add_routes(app, ask, given, api.store, rule, metrics)
        return TestClient(app)

    return make
