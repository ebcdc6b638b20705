"""`python -m project serve`: HTTP around one ranker, which runs in a process of its own and takes requests in batches.

LitServe has the queue, the process, its restarts and the batches. Its routes are one a model; here many routes share
one, so they are FastAPI's own on LitServe's app, and hand requests to LitServe's handler of the one model.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import logging.config
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from argparse import ArgumentError
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import litserve as ls
import uvicorn
from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from jsonargparse import ArgumentParser
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import wrap_litserve_start
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from project.errors import ConfigError, ProjectError
from project.serve import shapes
from project.serve.request import Ranked, RankRequest
from project.serve.store import EventStore, label_rule

logger = logging.getLogger("project.serve")
MIB = 2**20
LEAVING = 30  # seconds that requests in flight have to end
PROBES = ("/healthz", "/readyz", "/metrics")
REFUSED = (400, 401, 409, 413, 422, 429, 503)
BEARER = HTTPBearer(auto_error=False, description="Where the server has a token.")
Ask = Callable[[object], Awaitable[Any]]


@dataclass(frozen=True)
class ServeSettings:
    """What `serve` can be told; each also as a variable such as EXITREC_TOKEN.

    Args:
        run: Folder of a calibrated run. A reload takes `latest` beside it, where there is one.
        db: SQLAlchemy's address of the database of events: sqlite:///FILE, or postgresql://... for several servers.
        host: Address to listen at.
        port: Port to listen at.
        token: Bearer token that requests must carry.
        unprotected: Listen beyond this machine without a token.
        queue: Requests that may wait or run; more are answered 429.
        batch: Requests that are scored together at most.
        body_mib: Largest body.
        candidates: Most candidates of a request, and events or items of a body.
        history: Most rows of a history that a request brings.
        title: Longest title or other text of an item, in characters.
        cache_mib: Memory for users' histories.
        audit_share: Share of requests that also run to full depth, to see whether early exits still hold.
    """

    run: Path
    db: str = "sqlite:///events.db"
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    unprotected: bool = False
    queue: int = 256
    batch: int = 32
    body_mib: float = 4.0
    candidates: int = 1000
    history: int = 1000
    title: int = 2000
    cache_mib: int = 256
    audit_share: float = 0.01

    def check(self) -> None:
        """Refuse what cannot work or would be open to everybody by mistake."""
        for name in ("config.yaml", "checkpoints/last.ckpt"):
            if not (self.run / name).exists():
                raise ConfigError(f"--run {self.run} lacks {name}; expected the folder of a run.")
        local = self.host == "localhost" or _is_loopback(self.host)
        if not (local or self.token or self.unprotected):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines and there is no token; set EXITREC_TOKEN (or "
                "--token), or --unprotected true if everybody may ask."
            )

    def newest(self) -> Path:
        """The run to switch to: `latest` beside the given one, or that one."""
        latest = self.run.parent / "latest"
        return (latest if latest.exists() else self.run).resolve()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# The inference process


@dataclass(frozen=True)
class Scored:
    """A ranked request and how the inference process is."""

    ranked: Ranked
    items: list[str]  # ids of its candidates
    run: str
    full_depth: bool
    batch: int  # requests that were scored together


class Taken:
    """A queue whose first entry is taken already."""

    def __init__(self, first: object, queue: Any) -> None:
        self._first, self._queue = [first], queue

    def get_nowait(self) -> Any:
        """The first entry, then the queue's."""
        return self._first.pop() if self._first else self._queue.get_nowait()


class Waiting(BatchedLoop):  # type: ignore[misc]
    """Sleeps until a request comes and takes along what else waits: none waits for company, an idle process rests.

    LitServe's own loop asks the queue in a circle while it is empty, or each millisecond of `batch_timeout`.
    """

    def get_batch_requests(
        self, lit_api: ls.LitAPI, request_queue: Any, transport: Any
    ) -> tuple[list[Any], list[Any]]:
        """One request at least, or none after a second."""
        first = self.get_request(request_queue, timeout=1.0)
        parent = multiprocessing.parent_process()
        if (
            parent is not None and not parent.is_alive()
        ):  # killed: nobody is left to stop this process and the queue's
            for pid in lit_api.siblings:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            raise SystemExit
        if first is None:
            lit_api.rest()
            return [], []
        found: tuple[list[Any], list[Any]] = super().get_batch_requests(
            lit_api, Taken(first, request_queue), transport
        )
        return found


class RankAPI(ls.LitAPI):  # type: ignore[misc]
    """The ranker behind LitServe's queue. Payloads are a kind and what it needs: rank, user, about, reload.

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
            logging.config.dictConfig(LOGGING)
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
        ranker.rank([RankRequest(None, [], [{"item_id": "warm", "title": "warm"}])])
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

    def predict(self, batch: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers to a batch of payloads, in their order."""
        if self.loaded is not None:
            self.ranker, self.loaded = self.loaded, None
        self.ranker.follow(self.store)
        asked = [(k, payload) for k, payload in enumerate(batch) if payload[0] == "rank"]
        requests = [body.request(self.ranker, arrived) for _, (_, body, arrived) in asked]
        names = [[c if isinstance(c, str) else c["item_id"] for c in r.candidates] for r in requests]
        ranked = self.ranker.rank(requests) if requests else []
        run, full = "/".join(Path(self.ranker.about["run"]).parts[-2:]), self.ranker.full_depth
        answers: list[Any] = [None] * len(batch)
        for (k, _), found, items in zip(asked, ranked, names, strict=True):
            answers[k] = Scored(found, items, run, full, len(asked))
        for k, payload in enumerate(batch):
            match payload:
                case ("user", user_id):
                    history = self.ranker.history_of(user_id)
                    answers[k] = {"known": self.ranker.knows_user(user_id), "history": history}
                case ("about",):
                    answers[k] = self.ranker.about | {"full_depth": full}
                case ("reload", folder):
                    answers[k] = not self.loading.locked()
                    threading.Thread(target=self.reload, args=(folder,), daemon=True).start()
        return answers


# The HTTP process


class Metrics:
    """What Prometheus reads. Counted in the HTTP process: answers tell what the inference process did."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self.requests = counter("exitrec_requests", "Requests", ["route", "status"])
        self.seconds = histogram("exitrec_request_seconds", "Latency", ["route"])
        self.exits = counter("exitrec_candidates", "Candidates by the exit they left at", ["exit"])
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch = histogram("exitrec_batch_requests", "Requests scored together", buckets=sizes)
        self.layers = counter("exitrec_token_layers", "Token-layers that ran")
        self.full = counter("exitrec_full_depth_token_layers", "Token-layers of full depth")
        self.histories = counter("exitrec_histories", "Users' histories, by whether in memory", ["cached"])
        self.late = counter("exitrec_late", "Requests that their deadline cut")
        self.audits = counter("exitrec_audits", "Requests that also ran to full depth")
        self.events = counter("exitrec_events", "Events that were new")
        self.alarm = gauge("exitrec_drift_alarm", "1: everything runs to full depth")
        gauge("exitrec_queue", "Requests that wait or run").set_function(waiting)

    def count(self, scored: Scored) -> None:
        """An answer."""
        layers = scored.ranked.exit_layer.tolist()
        for layer in set(layers):
            self.exits.labels(layer).inc(layers.count(layer))
        self.batch.observe(scored.batch)
        self.layers.inc(scored.ranked.token_layers)
        self.full.inc(scored.ranked.full_depth_token_layers)
        if scored.ranked.cached is not None:
            self.histories.labels("yes" if scored.ranked.cached else "no").inc()
        self.late.inc(scored.ranked.late)
        self.audits.inc(scored.ranked.audit is not None)
        self.alarm.set(scored.full_depth)


class Observed:
    """ASGI middleware: every request has an id, a line in the log, and is counted."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and watch."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = (
            given if given.isascii() and given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
        )
        scope.setdefault("state", {})["id"] = name
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            about = {"id": name, "method": scope["method"], "path": scope["path"], "status": status}
            level = logging.DEBUG if route in PROBES else logging.INFO
            logger.log(level, "request", extra={"fields": about | {"ms": round(1000 * seconds, 2)}})


def error(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """A refusal, as TEI words it."""
    kinds = {429: "overloaded", 424: "backend", 500: "backend", 503: "unhealthy"}
    clean = text.encode(errors="replace").decode()
    return JSONResponse({"error": clean, "error_type": kinds.get(status, "validation")}, status, headers)


class Refusal(BaseModel):
    """What was found and what is expected."""

    error: str
    error_type: str


def add_errors(app: FastAPI) -> None:
    """Every refusal has one form, and does not repeat what was sent."""

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, found: AnyHTTPException) -> JSONResponse:
        unread = found.status_code == 400 and "parsing the body" in str(found.detail)
        text = (
            "The body cannot be read as JSON: too deep, a number too long, or no UTF-8."
            if unread
            else found.detail
        )
        return error(found.status_code, str(text), dict(found.headers or {}))

    @app.exception_handler(ProjectError)
    async def wrong(request: Request, found: ProjectError) -> JSONResponse:
        return error(422, str(found))

    @app.exception_handler(SQLAlchemyError)
    async def unkept(request: Request, found: SQLAlchemyError) -> JSONResponse:
        logger.error("database", extra={"fields": {"error": str(found)}})
        return error(503, "The database of events does not answer; nothing was kept. Try again.")

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, found: RequestValidationError) -> JSONResponse:
        problems = [(".".join(str(part)[:40] for part in e["loc"]), e["msg"]) for e in found.errors()]
        more = f" ({len(problems) - 3} more)" if len(problems) > 3 else ""
        return error(422, "; ".join(f"{where}: {text}" for where, text in problems[:3]) + more)


def add_routes(
    app: FastAPI, ask: Ask, settings: ServeSettings, store: EventStore, rule: str | None, metrics: Metrics
) -> None:
    """All routes but LitServe's /readyz.

    Args:
        app: Where to.
        ask: Hands a payload to the inference process.
        settings: Limits and the token.
        store: Where events go.
        rule: The label rule of the run's protocol.
        metrics: What is counted.
    """

    async def authorised(found: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        given, wanted = found.credentials if found else "", settings.token
        if wanted is not None and not hmac.compare_digest(given.encode("latin-1"), wanted.encode()):
            raise HTTPException(401, "The bearer token is missing or wrong.", {"WWW-Authenticate": "Bearer"})

    refusals: dict[int | str, dict[str, Any]] = {code: {"model": Refusal} for code in REFUSED}
    router = APIRouter(dependencies=[Depends(authorised)], responses=refusals)
    public = APIRouter()

    def limit(name: str, count: int, most: int) -> None:
        if count > most:
            raise HTTPException(413, f"{name} has {count:,} entries; this server takes {most:,}.")

    async def rank(asked: shapes.Asked, request: Request) -> tuple[Scored, dict[str, Any]]:
        """Score; returns what was found, and what an answer says of the server."""
        limit("the list of candidates", len(asked.candidates), settings.candidates)
        limit("history", len(asked.history or ()), settings.history)
        longest = max(map(len, asked.texts()))
        if longest > settings.title:
            raise HTTPException(
                413, f"a text has {longest:,} characters; this server takes {settings.title:,}."
            )
        scored: Scored = await ask(("rank", asked, time.monotonic()))
        if scored.ranked.error:
            raise HTTPException(422, scored.ranked.error)
        metrics.count(scored)
        return scored, {"id": request.state.id, "model": scored.run, "full_depth": scored.full_depth}

    # 1. scores

    @router.post("/v1/rank")
    async def own(body: shapes.RankBody, request: Request) -> shapes.RankAnswer:
        """Candidates of a user, best first, with exit layers and the features behind each score."""
        scored, about = await rank(body.asked(), request)
        return shapes.rank_answer(scored.items, scored.ranked, body.top_n, about)

    @router.post("/v1/rerank", response_model_exclude_none=True)
    @router.post("/v2/rerank", response_model_exclude_none=True)
    async def cohere(body: shapes.CohereBody, request: Request) -> shapes.CohereAnswer:
        """Cohere's rerank."""
        scored, about = await rank(body.asked(body.documents), request)
        return shapes.cohere_answer(body, scored.ranked, about)

    @router.post("/rerank", response_model_exclude_none=True)
    async def rerank(
        body: shapes.RerankBody, request: Request
    ) -> shapes.CohereAnswer | list[shapes.TeiResult]:
        """Cohere's rerank, or TEI's, which has `texts`."""
        if isinstance(body, shapes.CohereBody):
            return await cohere(body, request)
        scored, _ = await rank(body.asked(body.texts), request)
        return shapes.tei_answer(body, scored.ranked)

    @router.post("/v1/score")
    async def score(body: shapes.ScoreBody, request: Request) -> shapes.ScoreAnswer:
        """SGLang's score."""
        scored, about = await rank(body.asked(), request)
        return shapes.score_answer(scored.ranked, about)

    # 2. events

    def keep(events: Sequence[shapes.EventBody]) -> shapes.Kept:
        limit("the list of events", len(events), settings.candidates)
        kept = shapes.labelled(events, rule)
        if items := shapes.new_items(events):
            store.put_items(items)
        new = store.add(kept)
        metrics.events.inc(new)
        return shapes.Kept(new=new, RowAffected=new)

    @router.post("/v1/events")
    def events(body: list[shapes.EventBody]) -> shapes.Kept:
        """Keep answers of users; they are on disk when this returns. An event_id known before changes nothing."""
        return keep(body)

    @router.post("/api/feedback")
    @router.put("/api/feedback")
    def feedback(body: list[shapes.GorseFeedback]) -> shapes.Kept:
        """Gorse's feedback."""
        return keep([row.event() for row in body])

    @router.post("/events")
    def personalize(body: shapes.PersonalizeBody) -> shapes.Kept:
        """AWS Personalize's PutEvents."""
        return keep(body.events())

    @router.put("/v1/items")
    def items(body: Annotated[list[shapes.Item], Body(min_length=1)]) -> dict[str, int]:
        """Make items known: item_id, title and other columns of the items table."""
        limit("the list of items", len(body), settings.candidates)
        rows = [item.columns() for item in body]
        if unnamed := [k for k, row in enumerate(rows) if not ("item_id" in row and row.get("title"))]:
            raise HTTPException(422, f"item {unnamed[0]} lacks an item_id or a title; give both.")
        store.put_items(rows)
        return {"items": len(rows)}

    # 3. operations

    @router.get("/v1/users/{user_id:path}")
    async def user(user_id: shapes.Id) -> dict[str, Any]:
        """A user's history."""
        found: dict[str, Any] = await ask(("user", user_id))
        return found

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """Run, protocol hash, certificate, model licence."""
        about: dict[str, Any] = await ask(("about",))
        return about

    @router.post("/v1/reload", status_code=202)
    async def reload() -> dict[str, str]:
        """Load the newest run beside the one that answers, and switch to it; /info tells when."""
        run = str(settings.newest())
        if not await ask(("reload", run)):
            raise HTTPException(409, "A run is being loaded already; ask again when /info names it.")
        return {"loading": run}

    @public.get("/healthz")
    async def alive() -> dict[str, str]:
        """Whether this process answers; /readyz tells whether the model does."""
        return {"status": "ok"}

    @public.get("/metrics", include_in_schema=False)
    async def numbers() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @public.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    app.include_router(router)
    app.include_router(public)
    add_errors(app)


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
    app = server.app
    app.title = "exitrec"
    ours = ("/", "/litserve", api.api_path)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in ours]
    handler = RegularRequestHandler(api, server)

    async def ask(payload: object) -> Any:
        if len(server.response_buffer) >= settings.queue:
            raise HTTPException(
                429, f"{settings.queue} requests wait or run; try again in a second.", {"Retry-After": "1"}
            )
        try:
            return await handler.handle_request(payload, type(payload))
        except HTTPException as found:
            if found.status_code != 500:
                raise
            raise HTTPException(503, "The inference process failed or is starting; try again.") from None

    add_routes(app, ask, settings, EventStore(settings.db), rule, metrics)
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


LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": JsonLines}},
    "handlers": {
        "out": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stdout"}
    },
    "root": {"handlers": ["out"], "level": "INFO"},
}


def run_serve(arguments: Sequence[str], load: Callable[..., Any] | None = None) -> None:
    """The command `serve`: answers until it is told to stop, then finishes what is in flight."""
    parser = ArgumentParser(
        prog="python -m project serve",
        description=__doc__,
        exit_on_error=False,
        default_env=True,
        env_prefix="EXITREC",
    )
    parser.add_class_arguments(ServeSettings)
    try:
        settings = ServeSettings(**parser.parse_args(list(arguments)).as_dict())
    except ArgumentError as found:
        raise ConfigError(f"serve: {found}") from None
    settings.check()
    server = make_server(settings, label_rule(settings.run), load)
    logging.config.dictConfig(LOGGING)
    http = uvicorn.Server(
        uvicorn.Config(
            server.app,
            settings.host,
            settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=LEAVING,
        )
    )
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
