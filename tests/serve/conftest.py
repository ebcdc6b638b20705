"""One calibrated run of the tiny world, whose prompts show titles, numbers and items' texts; a client of all routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_ranker import FakeRanker
from fastapi import FastAPI
from fastapi.testclient import TestClient
from world import call, given, sharpened, spread_exits, tiny_settings

from project.serve.inference import Served
from project.serve.ranker import Ranker
from project.serve.routes import Backlog, Desk, Metrics, add_routes
from project.serve.settings import ServeSettings
from project.serve.store import EventStore

Make = Callable[..., TestClient]


@pytest.fixture(scope="session")
def served_run(
    tiny_model: Path,
    tiny_logs: Path,
    session_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of a tiny fit; candidates leave at every exit."""
    folder = tmp_path_factory.mktemp("served")
    config = tiny_settings(
        tiny_logs, sharpened(tiny_model, folder / "model"), folder, name=""
    )
    retriever = {
        "class_path": "project.retrieval.LightGCN",
        "init_args": {"dim": 4, "epochs": 1, "item_neighbours": 3},
    }
    segment = (
        "{item_text}{title} {item_percent}{item_number+vote_number+mf_number+text_number}:"
    )
    config["data"] |= {
        "context_tokens": 256,
        "batch_tokens": 1024,
        "mf": {"dim": 2},
        "retriever": retriever,
    }
    config["data"]["prompt"] = {"segment": segment}
    config["model"]["exit_layers"] = [1, 2, 3]
    config["exits"] = {"criterion": "project.exits.criteria.Ratio"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    run = folder / "version_0"
    call(session_cache, "fit", "--config", folder / "tiny.yaml")
    call(session_cache, "test", *given(run))
    spread_exits(run)
    return run


@pytest.fixture
def ranker(served_run: Path) -> Ranker:
    """The run, loaded anew."""
    return Ranker.load(served_run, audit_share=0.0)


@pytest.fixture
def client(tmp_path: Path) -> Make:
    """Makes a client of all routes with the fake ranker in this process, where no queue and no batches are needed."""

    def make(rule: str | None = "rating > 3", **settings: Any) -> TestClient:
        given = ServeSettings(
            tmp_path / "run", f"sqlite:///{tmp_path}/events.db", **settings
        )
        served = Served(given, FakeRanker.load)

        async def ask(payload: Any) -> Any:
            return served.answer([payload])[0]

        app, store = FastAPI(), EventStore(given.db)
        app.state.ranker = served._ranker
        backlog = Backlog(given.max_waiting_characters)
        metrics = Metrics(lambda: 0, backlog.characters)
        add_routes(app, Desk(ask, lambda: True, given, store, rule, backlog, metrics))
        return TestClient(app)

    return make
