"""Two versions in one server: who answers whom, what a comparison counts, and what the other version cannot break."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fake_ranker import FakeRanker, serving, until
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from scipy.stats import chisquare

from project.errors import ConfigError
from project.request import RankRequest, Scored
from project.serve import versions
from project.serve.inference import FAILED, Served, too_much_text
from project.serve.routes import Backlog, Desk, Metrics, add_routes
from project.serve.settings import ServeSettings
from project.serve.store import EventStore
from project.serve.versions import Versions, takes
from research.versions import measure

BODY = {"user_id": "u1", "candidates": ["i2", "i3", "i5"]}
EVENT = {"event_id": "e", "user_id": "v", "item_id": "i1", "label": 0, "timestamp": 1.0}


class Reversed(FakeRanker):
    """An item iK has probability 1 - K / 10; it knows no item "odd"."""

    def _one(self, request: RankRequest) -> Scored:
        found = super()._one(request)
        odd = "unknown column" if "odd" in found.item_ids else None
        return replace(found, logits=-found.logits, error=odd)


class Process:
    """An inference process that lives in this one."""

    def __init__(self, settings: ServeSettings, kind: type[FakeRanker]) -> None:
        self.served = Served(settings, kind.load)
        self.ready, self.waiting = True, dict[int, Any]()
        self.raises: HTTPException | None = None
        self.seconds = 0.0

    async def ask(self, payload: Any) -> Any:
        await asyncio.sleep(self.seconds)
        if self.raises:
            raise self.raises
        return self.served.answer([payload])[0]


def made(run: Path, rule: str = "rating > 3") -> Path:
    """A folder that passes for a run."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints/last.ckpt").touch()
    (run / "config.yaml").write_text(f'data: {{protocol: {{label: "{rule}"}}}}')
    return run


class Server(TestClient):
    """A client of both versions, run and b."""

    main: Process
    other: Process

    def count(self, name: str) -> float:
        """A metric of this name and labels; 0 where nothing was counted."""
        lines = dict(x.rsplit(" ", 1) for x in self.get("/metrics").text.splitlines())
        return float(lines.get(f"exitrec_{name}", 0))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def make(**shares: float) -> Server:
            given = ServeSettings(
                made(tmp_path / "run"),
                f"sqlite:///{tmp_path}/events.db",
                other=made(tmp_path / "b"),
                **shares,
            )
            main = Process(given, FakeRanker)
            other = Process(replace(given, run=tmp_path / "b"), Reversed)
            app, backlog = FastAPI(), Backlog(given.max_waiting_characters)
            metrics = Metrics(lambda: 0, backlog.characters)
            both = Versions(given, main, other, metrics.registry)
            common = given, EventStore(given.db), "rating > 3", backlog, metrics, both
            add_routes(app, Desk(main.ask, lambda: True, *common))
            made_client = stack.enter_context(Server(app))  # one event loop for all
            made_client.main, made_client.other = main, other
            return made_client

        yield make


def test_shares_of_users() -> None:
    """Of 2,000 a tenth, by chi-square; always the same ones, also of a larger share, and others beside another run."""
    users = [f"u{k}" for k in range(2000)]
    taken = {user for user in users if takes(user, 0.1, "a/run")}
    assert chisquare([len(taken), 2000 - len(taken)], [200, 1800]).pvalue > 0.001
    assert [k for k in range(60) if f"u{k}" in taken] == [12, 20, 43, 57]
    assert taken < {user for user in users if takes(user, 0.2, "a/run")}
    # independent draws share a tenth of a tenth, 20 users
    assert 5 < sum(takes(user, 0.1, "another/run") for user in taken) < 45
    assert all(takes(user, 1, "a/run") and not takes(user, 0, "a/run") for user in users)
    assert not takes(None, 1, "a/run")


def test_split_answers_as_single_servers(
    server: Callable[..., Server], client: Callable[..., TestClient]
) -> None:
    """Each user is answered by one version, somebody without an id by run; responses and metrics name it."""
    split, alone = server(split=0.5), client()
    for k in range(40):
        body = BODY | {"user_id": f"w{k}"}
        found = split.post("/v1/rank", json=body).json()
        expected = alone.post("/v1/rank", json=body).json()
        if found["model"] == "b":
            for item in expected["items"]:
                item["probability"] = pytest.approx(1 - item["probability"])
            expected["items"].reverse()
        assert (found["items"], found["usage"]) == (expected["items"], expected["usage"])
    b, run = (
        split.count(f'version_seconds_count{{asked="answer",model="{of}"}}')
        for of in ("b", "run")
    )
    assert (b + run, 10 < b < 30) == (40, True)
    guest = {"history": [], "candidates": ["i2"]}
    assert split.post("/v1/rank", json=guest).json()["model"] == "run"
    gorse = {"query": "w0", "documents": ["i2"]}
    one, two = (
        split.post(path, json=body).json()["model"]
        for path, body in (("/v1/rank", BODY | {"user_id": "w0"}), ("/v1/rerank", gorse))
    )
    assert one == two


def test_shadow_changes_no_answer(server: Callable[..., Server]) -> None:
    """Differences of .2, .3 and .5 to .8, .7 and .5 are .6, .4 and 0. Best are i5, i3, i2, or i2, i3, i5."""
    shadow = server(shadow_share=1.0)
    for k, top_n in enumerate((1, 2, 3)):
        found = shadow.post("/v1/rank", json=BODY | {"top_n": top_n}).json()
        assert found["model"] == "run"
        assert [i["item_id"] for i in found["items"]] == ["i5", "i3", "i2"][:top_n]
        until(lambda: shadow.count("shadow_overlap_count") == k + 1)  # noqa: B023
    assert shadow.count("shadow_overlap_sum") == 0 + 0.5 + 1
    assert shadow.count("shadow_difference_sum") == pytest.approx(3 * 1 / 3)
    for labels in ('asked="answer",model="run"', 'asked="shadow",model="b"'):
        assert shadow.count(f"version_seconds_count{{{labels}}}") == 3
    recommended = shadow.post("/v1/recommend", json={"user_id": "u1"}).json()
    assert [item["item_id"] for item in recommended["items"]] == ["i2", "i1"]
    until(lambda: shadow.count("shadow_overlap_sum") == 2.5)


@pytest.mark.parametrize("share", ["split", "shadow_share"])
@pytest.mark.parametrize("reason", ["not loaded", "failed", "busy", "invalid", "slow"])
def test_run_answers_where_the_other_does_not(
    server: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    share: str,
    reason: str,
) -> None:
    """Its answer is its own, and a counter says why; a shadow is never waited for."""
    monkeypatch.setattr(versions, "PATIENCE", 0.05)
    both = server(**{share: 1.0})
    both.other.ready = reason != "not loaded"
    both.other.raises = {"failed": FAILED, "busy": too_much_text()}.get(reason)
    both.other.seconds = 30.0 if reason == "slow" else 0.0
    body = BODY | {"candidates": ["odd", "i2"]} if reason == "invalid" else BODY
    found = both.post("/v1/rank", json=body)
    assert (found.status_code, found.json()["model"]) == (200, "run")
    if (share, reason) == ("shadow_share", "slow"):
        both.other.waiting = dict.fromkeys(range(32))
        both.post("/v1/rank", json=BODY)
        reason = "busy"
    until(lambda: both.count(f'other_missed_total{{reason="{reason}"}}') == 1)
    assert both.count("shadow_overlap_count") == 0
    assert both.count("other_ready") == both.other.ready


def test_events_and_deletions_reach_both(server: Callable[..., Server]) -> None:
    both = server(split=0.5)

    def rows() -> list[int]:
        asked = ("user", "v")
        answers = [p.served.answer([asked])[0] for p in (both.main, both.other)]
        return [len(answer["history"]) for answer in answers]

    both.post("/v1/events", json=[EVENT, EVENT | {"event_id": "f", "item_id": "i2"}])
    assert rows() == [2, 2]
    both.delete("/v1/events/e")
    assert rows() == [1, 1]
    both.delete("/v1/users/v")
    assert rows() == [0, 0]


def test_auc_of_later_events(server: Callable[..., Server]) -> None:
    """By hand: run scores .1, .2, .3, .4, labels are 0, 1, 0, 1, so 3 of 4 pairs are right; of the other 1 of 4.

    An event that was there before, once more, or of somebody deleted, counts for nothing.
    """
    both = server(shadow_share=1.0)

    def aucs() -> list[float]:
        return [both.count(f'later_auc{{model="{of}"}}') for of in ("run", "b")]

    def event(k: int, user: str = "v") -> dict[str, Any]:
        ids = {"event_id": f"{user}{k}", "item_id": f"i{k}", "user_id": user}
        return EVENT | ids | {"label": 1 - k % 2}

    both.post("/v1/events", json=[event(4)])
    for user in ("v", "gone"):
        body = {"user_id": user, "candidates": ["i1", "i2", "i3", "i4"]}
        both.post("/v1/rank", json=body)
    until(lambda: both.count("shadow_overlap_count") == 2)
    both.delete("/v1/users/gone")
    both.post("/v1/events", json=[event(4)])
    both.post("/v1/events", json=[event(1), event(3), event(1, "gone"), event(1, "x")])
    assert both.count("later_events") == 2
    assert [value != value for value in aucs()] == [True, True]  # one class has none
    both.post("/v1/events", json=[event(2), event(4) | {"event_id": "again"}])
    both.post("/v1/events", json=[event(2) | {"event_id": "more"}])
    assert (both.count("later_events"), aucs()) == (4, [0.75, 0.25])


def test_promotion(
    server: Callable[..., Server], client: Callable[..., TestClient]
) -> None:
    """The other run answers everybody, and is not compared with itself."""
    both = server(shadow_share=1.0)
    assert both.post("/v1/reload?promote=true").json()["loading"].endswith("/b")
    until(lambda: both.post("/v1/rank", json=BODY).json()["model"] == "b")
    compared = both.count("shadow_overlap_count")
    both.post("/v1/rank", json=BODY)
    assert both.count("shadow_overlap_count") == compared
    refused = client().post("/v1/reload?promote=true")
    assert (refused.status_code, "no --other" in refused.json()["error"]) == (422, True)


@pytest.mark.parametrize(
    ("other", "shares", "found"),
    [
        ("b", {"split": 1.5}, "--split 1.5"),
        ("b", {"shadow_share": float("nan")}, "--shadow_share nan"),
        ("b", {}, "one above 0 with --other"),
        (None, {"split": 0.1}, "--other is None"),
        ("nothing", {"split": 0.1}, r"--other .*nothing lacks config.yaml"),
        ("run", {"split": 0.1}, "both .*/run; expected two runs"),
        ("link", {"split": 0.1}, "both .*/run; expected two runs"),
        ("rule", {"split": 0.1}, "by 'rating > 3', --other by 'rating > 4'"),
    ],
)
def test_wrong_settings(
    tmp_path: Path, other: str | None, shares: dict[str, float], found: str
) -> None:
    for name in ("run", "b"):
        made(tmp_path / name)
    made(tmp_path / "rule", "rating > 4")
    (tmp_path / "link").symlink_to("run")
    folder = other and tmp_path / other
    with pytest.raises(ConfigError, match=found):
        ServeSettings(tmp_path / "run", other=folder, **shares).check()  # type: ignore[arg-type]


@pytest.mark.slow
def test_another_run_that_ends_and_cannot_be_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process is killed, and the next finds a broken run: no request is lost, and the log has the errors."""
    other = made(tmp_path / "b")
    said = list[str]()

    def told(text: str) -> bool:
        said.append(capfd.readouterr().out)
        return text in "".join(said)

    with serving(tmp_path, "--other", other, "--split", 1) as (process, address):

        def model() -> str:
            answer = httpx.post(f"{address}/v1/rank", json=BODY, timeout=60)
            assert answer.status_code == 200
            return str(answer.json()["model"])

        until(lambda: model() == "b")
        (other / "broken").touch()
        children = psutil.Process(process.pid).children()
        max(children, key=lambda child: child.pid).kill()  # the latest
        until(lambda: model() == "run")
        until(lambda: told("this run is broken") and told('"was_ready": false'))
        assert told("an inference process ended")
        assert model() == "run"
        missed = 'exitrec_other_missed_total{reason="not loaded"}'
        assert missed in httpx.get(f"{address}/metrics").text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_real_runs_under_load(served_run: Path, tmp_path: Path) -> None:
    """No request is dropped, also while the other run is promoted; responses are those of single servers."""
    other = shutil.copytree(served_run, tmp_path / "version_1", symlinks=True)
    checkpoint = other / "checkpoints/last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    # other probabilities
    content["exit_plans"]["plan"]["calibration"][:, 2] += 0.5
    torch.save(content, checkpoint)
    found = measure(served_run, other, 4.0, users=4, split=0.5, shadow_share=0.5)
    assert found["passed"], found
    assert 0 < found["users_of_other"] < found["users"]
    assert found["metrics"]["shadow_difference_sum"] > 0
    assert found["split_distance"] < 1e-4
    assert found["promoted_distance"] < 1e-4
