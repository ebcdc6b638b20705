"""`python -m project serve`: HTTP around one ranker, which runs in a process of its own and takes requests in batches.

LitServe has the queue, the process, its restarts and the batches. Its routes are one a model; here many routes share
one, so they are FastAPI's own on LitServe's app, and hand requests to LitServe's handler of the one model.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import litserve as ls
import uvicorn
from fastapi import HTTPException
from jsonargparse import ArgumentParser
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import LitAPIStatus, ResponseBufferItem, wrap_litserve_start
from sqlalchemy.exc import SQLAlchemyError
from starlette.middleware.gzip import GZipMiddleware

from project.errors import ConfigError
from project.request import Item, RankRequest, Scored
from project.serve.routes import Desk, Metrics, Observed, add_routes
from project.serve.settings import ServeSettings
from project.serve.store import EventStore, label_rule

logger = logging.getLogger("project.serve")
MIB = 2**20
LEAVING = 30  # seconds that requests in flight have to end


# The inference process


class Waiting(BatchedLoop):  # type: ignore[misc]
    """Sleeps until a request comes and takes along what else waits: none waits for company, an idle process rests.

    LitServe's own loop asks the queue in a circle while it is empty, or each millisecond of `batch_timeout`.
    """

    def put_response(
        self,
        transport: Any,
        response_queue_id: int,
        uid: str,
        response_data: Any,
        status: str,
        response_type: Any,
    ) -> None:
        """Answers alone: nobody need be told who took a request, see `InFlight`."""
        if status != LitAPIStatus.START:
            super().put_response(transport, response_queue_id, uid, response_data, status, response_type)

    def get_batch_requests(
        self, lit_api: ls.LitAPI, request_queue: Any, transport: Any
    ) -> tuple[list[Any], list[Any]]:
        """One request at least, or none after a second."""
        first = self.get_request(request_queue, timeout=1.0)
        parent = multiprocessing.parent_process()
        # where it was killed, nobody else is left to stop this process and the queue's
        if parent is not None and not parent.is_alive():
            for pid in lit_api.siblings:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            raise SystemExit
        if first is None:
            lit_api.rest()
            return [], []
        entries = chain([first], iter(request_queue.get_nowait, None))
        queue = SimpleNamespace(get_nowait=lambda: next(entries))
        found: tuple[list[Any], list[Any]] = super().get_batch_requests(lit_api, queue, transport)
        return found


class RankAPI(ls.LitAPI):  # type: ignore[misc]
    """The ranker behind LitServe's queue. Payloads are requests, or a kind and what it needs: user, about, reload.

    Args:
        settings: What `serve` was told.
        load: Makes the ranker of a folder; the default is `Ranker.load`.
    """

    def __init__(self, settings: ServeSettings, load: Callable[..., Any] | None = None) -> None:
        super().__init__(max_batch_size=max(settings.batch, 2), api_path="/queue", loop=Waiting())
        self.settings, self._load = settings, load
        self.siblings: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        """For the inference process: with the queue's process, which it ends where this one was killed."""
        siblings = [p.pid for p in multiprocessing.active_children() if p.name.startswith("SyncManager")]
        return self.__dict__ | {"siblings": siblings}

    def setup(self, device: str) -> None:
        """Load the run and score once, so that the first request finds a warm model."""
        if multiprocessing.parent_process() is not None:
            log_json()
            signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # Ctrl+C: the HTTP process finishes what is in flight
        self.store = EventStore(self.settings.db)
        self.loaded, self.loading = None, threading.Lock()
        self.ranker = self.warm(self.settings.run.resolve())

    def warm(self, run: Path) -> Any:
        """A ranker that has seen the store's events and scored once."""
        if self._load is None:
            from project.serve.ranker import Ranker  # the HTTP process needs no torch

            self._load = Ranker.load
        ranker = self._load(run, cache_mib=self.settings.cache_mib, audit_share=self.settings.audit_share)
        ranker.follow(self.store)
        (answer,) = ranker.rank_after_log([RankRequest(None, [], [Item("warm", "warm")])])
        if answer.error is not None:
            raise ConfigError(f"the run {run} cannot score: {answer.error}.")
        return ranker

    def reload(self, run: str) -> None:
        """Load a run beside the one that answers, one at a time; `predict` takes it when it is there."""
        if not self.loading.acquire(blocking=False):
            return
        try:
            self.loaded = self.warm(Path(run))
        except Exception:
            logger.exception("reload failed", extra={"fields": {"run": run}})
        finally:
            self.loading.release()

    def rest(self) -> None:
        """Take in what came to the store while nothing is asked, so that the next request need not wait for it."""
        try:
            self.ranker.follow(self.store)
        except SQLAlchemyError as found:
            logger.warning("database", extra={"fields": {"error": str(found)}})

    def predict(self, batch: Sequence[RankRequest | tuple[Any, ...]]) -> list[Any]:
        """Answers to a batch of payloads, in their order."""
        if self.loaded is not None:
            self.ranker, self.loaded = self.loaded, None
        self.ranker.follow(self.store)
        ranker, answers = self.ranker, list[Any]()
        requests = [payload for payload in batch if isinstance(payload, RankRequest)]
        ranked: Iterator[Scored] = iter(ranker.rank_after_log(requests) if requests else [])
        run = "/".join(Path(ranker.about["run"]).parts[-2:])
        for payload in batch:
            match payload:
                case RankRequest():
                    about = {"run": run, "full_depth": ranker.full_depth, "batch": len(requests)}
                    answers.append(replace(next(ranked), **about))
                case ("user", name):
                    answers.append({"known": ranker.knows_user(name), "history": ranker.history_of(name)})
                case ("about",):
                    answers.append(ranker.about | {"full_depth": ranker.full_depth})
                case ("reload", folder):
                    answers.append(not self.loading.locked())
                    threading.Thread(target=self.reload, args=(folder,), daemon=True).start()
        return answers


# The HTTP process


class InFlight(dict[str, ResponseBufferItem]):
    """Requests that wait or run, all with the one inference process: where it dies, LitServe refuses them.

    LitServe learns who has taken a request by one message more, and reads a dictionary that another thread changes.
    """

    def __setitem__(self, uid: str, item: ResponseBufferItem) -> None:
        item.worker_id = 0
        super().__setitem__(uid, item)

    def items(self) -> Any:
        """As they are now."""
        return list(super().items())


def make_server(
    settings: ServeSettings, rule: str | None = None, load: Callable[..., Any] | None = None
) -> ls.LitServer:
    """The app, its queue and its one model; `wrap_litserve_start` starts the inference process."""
    api = RankAPI(settings, load)
    metrics = Metrics(lambda: len(server.response_buffer))
    server = ls.LitServer(
        api,
        accelerator="cpu",  # one process; the ranker finds its device itself
        devices=1,
        timeout=False,
        healthcheck_path="/readyz",
        info_path="/litserve",
        max_payload_size=int(settings.body_mib * MIB),
        middlewares=[(Observed, {"metrics": metrics})],
        restart_workers=True,
    )
    server.response_buffer = InFlight()
    app = server.app
    app.title = "exitrec"
    ours = ("/", "/litserve", api.api_path)
    # an answer is small, and compressing it took a fifth of this process: a proxy can where networks are slow
    app.user_middleware[:] = [part for part in app.user_middleware if part.cls is not GZipMiddleware]
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in ours]
    handler = RegularRequestHandler(api, server)

    async def ask(payload: object) -> Any:
        if len(server.response_buffer) >= settings.queue:
            text = f"{settings.queue} requests wait or run; try again in a second."
            raise HTTPException(429, text, {"Retry-After": "1"})
        try:
            return await handler.handle_request(payload, type(payload))
        except HTTPException as found:
            if found.status_code != 500:
                raise
            raise HTTPException(503, "The inference process failed or is starting; try again.") from None

    add_routes(app, Desk(ask, settings, EventStore(settings.db), rule, metrics))
    return server


# The command


class JsonLines(logging.Formatter):
    """A line of log as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, further fields, traceback."""
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line |= {"message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_json() -> None:
    """Log to standard output, as lines of JSON."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def run_serve(arguments: Sequence[str], load: Callable[..., Any] | None = None) -> None:
    """The command `serve`: answers until it is told to stop, then finishes what is in flight."""
    about: dict[str, Any] = {"prog": "python -m project serve", "description": __doc__}
    parser = ArgumentParser(exit_on_error=False, default_env=True, env_prefix="EXITREC", **about)
    parser.add_class_arguments(ServeSettings)
    try:
        settings = ServeSettings(**parser.parse_args(list(arguments)).as_dict())
    except ArgumentError as found:
        raise ConfigError(f"serve: {found}") from None
    settings.check()
    server = make_server(settings, label_rule(settings.run), load)
    log_json()
    options: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": LEAVING}
    http = uvicorn.Server(uvicorn.Config(server.app, settings.host, settings.port, **options))
    failed = threading.Event()

    def watch() -> None:
        try:
            server.verify_worker_status()
        except RuntimeError:  # the process has logged why
            failed.set()
            http.should_exit = True

    def reload(*_: object) -> None:
        queue, payload = server.litapi_request_queues["/queue"], ("reload", str(settings.newest()))
        # in a thread: the signal may come while this one talks to the queue
        threading.Thread(target=queue.put, args=((0, "SIGHUP", time.monotonic(), payload),)).start()

    with wrap_litserve_start(server, worker_monitor=True):
        # uvicorn finishes what is in flight and then raises its signal again: leave through the `with`
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGHUP, reload)
        threading.Thread(target=watch, daemon=True).start()
        with suppress(KeyboardInterrupt):
            http.run()
    if failed.is_set():
        raise ConfigError(f"--run {settings.run} could not be loaded; the log above says why.")
