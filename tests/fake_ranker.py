"""A ranker without a model: probabilities follow from ids alone, so that bodies can be written down."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from project.request import Item, RankRequest, RecommendRequest, Scored
from project.serve.store import Deleted, Event, EventStore
from project.serve.waiting import Waiting

ROOT = Path(__file__).parents[1]
TITLES = {"Alien": "i1", "Brazil": "i2"}


class FakeRanker:
    """Knows u1, two titles and what the store brings.

    A candidate iK has probability K / 10, any other .05; it leaves at layer 2 if K is even, else at 4. An item of the
    title "slow" takes a second. Titles that begin with "new" are texts to embed.
    """

    full_depth = False

    def __init__(self, run: Path) -> None:
        self.about = {
            "run": run.name,
            "exit_layers": [0, 2, 4],
            "model": "tiny",
            "item_columns": ["title", "year", "list_price", "genres"],
            "columns": {"context.device": "category", "user.age": "number"},
            "examples": {"users": ["u1"], "items": [*TITLES]},
        }
        self.seq, self.events = 0, list[Event]()
        self.waiting, self.read = Waiting(), list[str]()
        self._diverged = (run / "diverged").exists()

    @classmethod
    def load(cls, run: Path, **_: object) -> FakeRanker:
        if (run / "broken").exists():
            raise ValueError("this run is broken")
        return cls(run)

    def embed(self, texts: Sequence[str]) -> None:
        self.read += texts
        self.waiting.release(texts)

    def follow(self, store: EventStore, embed: bool = True) -> None:
        self.seq, arrived = store.arrivals(self.seq)
        for what in arrived:
            if isinstance(what, Event):
                self.events.append(what)
            elif isinstance(what, Deleted):
                self.events = [
                    e
                    for e in self.events
                    if e.user_id != what.user_id
                    or not what.covers(e.item_id, e.label, e.timestamp)
                ]

    def item(self, item_id: str) -> dict[str, Any] | None:
        return {"item_id": "i1", "title": "Alien"} if item_id == "i1" else None

    def user(self, user_id: str) -> dict[str, Any]:
        history = [
            {
                "item_id": e.item_id,
                "title": e.item_id,
                "label": e.label,
                "time": e.timestamp,
            }
            for e in self.events
            if e.user_id == user_id
        ]
        known = bool(history) or user_id == "u1"
        return {"known": known, "history": history, "attributes": {}}

    def rank_after_log(
        self, requests: Sequence[RankRequest], embed: bool = True
    ) -> list[Scored]:
        found = list[Scored]()
        for request in requests:
            if not isinstance(request, RecommendRequest):
                found.append(self._one(request))
                continue
            self.asked = request
            scored = self._one(replace(request, candidates=["i1", "i2"]))
            listed = scored.best_first(request.top_n)
            found.append(replace(scored, listed=listed, sources=["text", "popular"]))
        return found

    def _one(self, request: RankRequest) -> Scored:
        given = [Item(c) if isinstance(c, str) else c for c in request.candidates]
        names = [item.item_id or TITLES.get(item.title, item.title) for item in given]
        late = request.deadline is not None and request.deadline < time.monotonic()
        new = [n for n in names if n.startswith("new") and n not in self.read]
        if new and not late:
            return replace(Scored.failed(request, None), waits_for=new)
        if self._diverged:
            return Scored.failed(request, "the model's scores are NaN")
        if "unknown" in names:
            return Scored.failed(request, "item 'unknown' has no title.")
        if "die" in names:
            os._exit(1)
        if "slow" in names:
            time.sleep(1)
        number = [int(n[1:]) if n[:1] == "i" and n[1:].isdigit() else 0.5 for n in names]
        chance = np.clip(np.array(number) / 10, 0.001, 0.999)
        layer = np.array([4 if n % 2 else 2 for n in number])
        return Scored(
            request.request_id,
            np.log(chance / (1 - chance)),
            layer,
            int(layer.sum()),
            late=late,
            item_ids=names,
            titles=[{i: t for t, i in TITLES.items()}.get(name, name) for name in names],
            features={"item_count": np.array(number, float)},
            full_depth_token_layers=4 * len(names),
        )


@contextmanager
def serving(
    folder: Path, *options: object, run: Path | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`serve` in a process group of its own, warm; the process and its address. Without a run the ranker is fake."""
    command = ["-m", "project", "serve"] if run else [__file__]
    if run is None:
        run = folder / "run"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints/last.ckpt").touch()
        (run / "config.yaml").write_text('data: {protocol: {label: "rating > 3"}}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [
        "--run",
        run,
        "--port",
        port,
        "--db",
        f"sqlite:///{folder}/events.db",
        *options,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, given)],
        env=environment,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        until(
            lambda: (
                process.poll() is not None
                or httpx.get(f"{address}/readyz").status_code == 200
            )
        )
        yield process, address
    finally:
        process.terminate()
        process.wait(30)


def until(true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that may not answer yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if true():
                return
        time.sleep(0.1)
    raise TimeoutError(true)


if __name__ == "__main__":
    # the inference process cannot import __main__
    from fake_ranker import FakeRanker as Importable

    from project.serve.server import run_serve

    run_serve(sys.argv[1:], Importable.load)
