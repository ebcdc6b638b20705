"""The routes of `serve`, what is counted and logged of requests, and their errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    Body,
    Depends,
    FastAPI,
    Query,
    Request,
    Response,
)
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from project.data.context import CONTEXT, USER, brought
from project.errors import ProjectError
from project.request import RankRequest, RecommendRequest, Scored, check_names
from project.serve import shapes
from project.serve.inference import too_much_text
from project.serve.settings import ServeSettings
from project.serve.store import Added, EventStore
from project.serve.versions import Versions

logger = logging.getLogger("project.serve")
PROBES = ("/healthz", "/readyz", "/metrics")
# need no token
PUBLIC = (*PROBES, "/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
MIB = 2**20


# What is counted and logged


class Metrics:
    """What Prometheus reads. Counted in the HTTP process: answers tell what the inference process did."""

    def __init__(
        self, waiting: Callable[[], float], new_characters: Callable[[], float]
    ) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        self.requests = counter("exitrec_requests", "Requests", ["route", "status"])
        self.seconds = histogram("exitrec_request_seconds", "Latency", ["route"])
        self.exits = counter(
            "exitrec_candidates", "Candidates by the exit they left at", ["exit"]
        )
        self.batch = histogram(
            "exitrec_batch_requests",
            "Requests scored together",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.cpu = counter("exitrec_cpu_seconds", "CPU seconds of scoring")
        self.busy = counter("exitrec_busy_seconds", "Seconds of scoring")
        self.layers = counter("exitrec_token_layers", "Token-layers that ran")
        self.full = counter("exitrec_full_depth_token_layers", "Token-layers of full depth")
        self.histories = counter(
            "exitrec_histories", "Users' histories, by whether in memory", ["cached"]
        )
        self.late = counter("exitrec_late", "Requests that their deadline cut")
        self.audits = counter("exitrec_audits", "Requests that also ran to full depth")
        self.events = counter("exitrec_events", "Events that were new")
        self.alarm = gauge(
            "exitrec_drift_alarm", "1: everything runs to full depth", ["version"]
        )
        gauge("exitrec_queue", "Requests that wait or run").set_function(waiting)
        gauge(
            "exitrec_new_characters", "Characters of new items that wait to be embedded"
        ).set_function(new_characters)

    def count(self, found: Scored) -> None:
        """A response."""
        for layer, candidates in found.left_at.items():
            self.exits.labels(layer).inc(candidates)
        self.batch.observe(found.batch)
        self.cpu.inc(found.cpu_seconds)
        self.busy.inc(found.busy_seconds)
        self.layers.inc(found.token_layers)
        self.full.inc(found.full_depth_token_layers)
        if found.cached is not None:
            self.histories.labels("yes" if found.cached else "no").inc()
        self.late.inc(found.late)
        self.audits.inc(found.audit is not None)
        self.alarm.labels("other" if found.other else "run").set(found.full_depth)


@dataclass
class Observed:
    """ASGI middleware: every request has an id, a line in the log, and is counted."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and watch."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        good = given.isascii() and given.isprintable() and 0 < len(given) <= 128
        name = scope.setdefault("state", {})["id"] = given if good else uuid.uuid4().hex
        began = time.perf_counter()
        status = 500

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
            about = {
                "id": name,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(1000 * seconds, 2),
            }
            level = logging.DEBUG if route in PROBES else logging.INFO
            logger.log(level, "request", extra={"fields": about})


# What comes before a body is read, and errors


@dataclass
class Guard:
    """ASGI middleware: checks the token before the body is read, and reads no more of a body than is allowed."""

    app: ASGIApp
    settings: ServeSettings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401 or 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        most = int(self.settings.max_body_mib * MIB)
        too_long = HTTPException(
            413, f"The body has more than {most:,} bytes (--max_body_mib)."
        )
        read = 0  # bytes

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise too_long
            return message

        # 1. the token
        token = self.settings.token
        given = headers.get("authorization", "").encode("latin-1")
        right = token is None or hmac.compare_digest(given, b"Bearer " + token.encode())
        if not right and scope["path"] not in PUBLIC:
            error = HTTPException(
                401, "The bearer token is missing or wrong.", {"WWW-Authenticate": "Bearer"}
            )
            await error_response(error)(scope, receive, send)
            return
        # 2. the length, where the client says it
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            await error_response(too_long)(scope, receive, send)
            return
        # 3. texts and lists are checked where the body is parsed
        shapes.LIMITS.set(self.settings)
        await self.app(scope, counted, send)


class Error(BaseModel):
    """What was found and what is expected, as TEI words it."""

    error: str
    error_type: str


def place(parts: Sequence[object]) -> str:
    """Where an error was found, without the tags of unions, which are no keys."""
    return ".".join(str(part)[:40] for part in parts if not str(part).startswith("<"))


def error_response(found: Exception) -> JSONResponse:
    """Every error has one form, and does not repeat what was sent."""
    status, text, headers = 422, str(found), None
    match found:
        case HTTPException():
            status, text, headers = found.status_code, found.detail, found.headers
            if status == 400 and "parsing the body" in text:
                text = "The body cannot be read as JSON: too deep, a number too long, or no UTF-8."
        case RequestValidationError():
            errors = found.errors()
            if limits := [e["msg"] for e in errors if e["type"] == "limit"]:
                status, text = 413, limits[0]
            else:
                text = "; ".join(f"{place(e['loc'])}: {e['msg']}" for e in errors[:3])
                if len(errors) > 3:
                    text += f" ({len(errors) - 3} more)"
        case SQLAlchemyError():
            logger.error("database", extra={"fields": {"error": text}})
            status, text = (
                503,
                "The database of events does not answer; nothing was kept. Try again.",
            )
    kinds = {429: "overloaded", 424: "backend", 500: "backend", 503: "unhealthy"}
    clean = text.encode(errors="replace").decode()
    return JSONResponse(
        {"error": clean, "error_type": kinds.get(status, "validation")}, status, headers
    )


# What routes share


class Backlog:
    """Characters of new items that wait to be embedded: as last reported, and what was written since."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._reported = 0
        # of writes: time.monotonic() seconds when it was on disk, characters
        self._written = list[tuple[float, int]]()

    def report(self, began: float, characters: int) -> None:
        """Take what waited in the inference process, which read the store after `began`."""
        self._reported = characters
        self._written = [write for write in self._written if write[0] >= began]

    def characters(self) -> int:
        """All that wait."""
        return self._reported + sum(characters for _, characters in self._written)

    @contextmanager
    def writing(self, characters: int, titles: bool) -> Iterator[None]:
        """Count a write; 429 where `most` wait already, or twice as many and it brings ids without titles."""
        if self.characters() >= self.most * (1 if titles else 2):
            raise too_much_text()
        unfinished = (inf, characters)
        self._written.append(unfinished)
        try:
            yield
        finally:
            self._written.remove(unfinished)
            self._written.append((time.monotonic(), characters))


@dataclass(frozen=True)
class Desk:
    """What routes need."""

    ask: Callable[[object], Awaitable[Any]]  # the inference process's answer to a payload
    ready: Callable[[], bool]  # the model is warm
    settings: ServeSettings
    store: EventStore
    rule: str | None  # of the protocol: makes ratings labels
    backlog: Backlog
    metrics: Metrics
    versions: Versions | None = None  # two, of which one answers

    async def rank(self, request: RankRequest) -> Scored:
        """Score a request."""
        found: Scored = await (self.versions or self).ask(request)
        if found.error:
            raise HTTPException(422, found.error)
        self.metrics.count(found)
        return found

    async def check_columns(
        self, bodies: Sequence[shapes.ItemBody | shapes.UserBody]
    ) -> None:
        """Raise `DataError` about an item's column, context or a user's attribute that the run's log has not."""
        if not any(body.model_extra or getattr(body, "context", None) for body in bodies):
            return
        about = await self.ask(("about",))
        for body in bodies:
            further = body.model_extra or {}
            if isinstance(body, shapes.UserBody):
                brought(further, USER, about["columns"])
            else:
                check_names(further, about["item_columns"], "unknown column")
                brought(body.context or {}, CONTEXT, about["columns"])

    async def keep(
        self, events: Sequence[shapes.EventBody], items: Sequence[dict[str, str]]
    ) -> Added:
        """Store items, then events."""
        kept = shapes.labelled(events, self.rule)
        texts = [text for item in items for text in item.values()]
        texts += [event.item_id for event in kept]
        with self.backlog.writing(sum(map(len, texts)), titles=bool(items)):
            replacing = {event.event_id for event in events if event.replaces}
            added = await run_in_threadpool(self.store.add, kept, items, replacing)
        self.metrics.events.inc(added.new)
        # an event that was known may be older than the scores
        if self.versions and added.new == len(kept):
            self.versions.observe(kept)
        return added


async def desk_of(request: Request) -> Desk:
    """That of the app."""
    desk: Desk = request.app.state.desk
    return desk


Here = Annotated[Desk, Depends(desk_of)]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error} for status in (400, 401, 404, 409, 413, 422, 429, 503)
}
# for /docs: `Guard` checks the token
bearer = Depends(HTTPBearer(auto_error=False, description="Where the server has a token."))
router = APIRouter(dependencies=[bearer], responses=ERRORS)
public = APIRouter()


def add_routes(app: FastAPI, desk: Desk) -> None:
    """All routes, what every request passes first, and the form of errors."""
    app.state.desk = desk
    app.include_router(router)
    app.include_router(public)
    for kind in (HTTPException, RequestValidationError, ProjectError, SQLAlchemyError):
        app.add_exception_handler(kind, lambda _, found: error_response(found))
    app.add_middleware(Guard, settings=desk.settings)
    app.add_middleware(Observed, metrics=desk.metrics)  # the outermost


# 1. Scores


class RankResponses(BaseModel):
    """A response for each request, in their order; an error where one could not be answered."""

    responses: list[shapes.RankResponse | Error]


@router.post("/v1/rank", response_model_exclude_none=True)
async def rank(
    body: shapes.RankBodyOrBodies, request: Request, desk: Here
) -> shapes.RankResponse | RankResponses:
    """Candidates of a user, best first, with exit layers and the features behind each score; or of several requests."""

    async def one(asked: shapes.RankBody, name: str) -> shapes.RankResponse:
        found = await desk.rank(asked.request(name))
        return shapes.rank_response(found, found.best_first(asked.top_n))

    async def member(given: dict[str, Any], name: str) -> shapes.RankResponse | Error:
        error: Exception
        try:
            return await one(shapes.RankBody.model_validate(given), name)
        except ValidationError as found:
            error = RequestValidationError(
                [e | {"loc": ("body", *e["loc"])} for e in found.errors()]
            )
        except (HTTPException, ProjectError) as found:
            error = found
        return Error.model_validate_json(bytes(error_response(error).body))

    name = request.state.id
    if isinstance(body, shapes.RankBody):
        return await one(body, name)
    # at once, so that they are scored together
    members = (member(given, f"{name}/{k}") for k, given in enumerate(body.requests))
    return RankResponses(responses=await asyncio.gather(*members))


@router.post("/v1/recommend", response_model_exclude_none=True)
async def recommend(
    body: shapes.RecommendBody, request: Request, desk: Here
) -> shapes.RankResponse:
    """The best of all items that a user has not answered, with the source that found each."""
    found = await desk.rank(body.request(request.state.id))
    return shapes.rank_response(found, found.listed)


@router.get("/api/recommend/{user_id:path}")
async def gorse(
    user_id: shapes.Id, request: Request, desk: Here, n: Annotated[int, Query(ge=1)] = 10
) -> list[str]:
    """Gorse's recommendation: ids of items."""
    found = await desk.rank(
        RecommendRequest(user_id, None, top_n=n, request_id=request.state.id)
    )
    return [found.item_ids[place] for place in found.listed]


@router.post("/v1/rerank", response_model_exclude_none=True)
@router.post("/v2/rerank", response_model_exclude_none=True)
async def cohere(
    body: shapes.CohereBody, request: Request, desk: Here
) -> shapes.CohereResponse:
    """Cohere's rerank."""
    return shapes.cohere_response(
        body, await desk.rank(body.request(body.documents, request.state.id))
    )


@router.post("/rerank", response_model_exclude_none=True)
async def rerank(
    body: shapes.RerankBody, request: Request, desk: Here
) -> shapes.CohereResponse | list[shapes.TeiResult]:
    """Cohere's rerank, or TEI's, which has `texts`."""
    if isinstance(body, shapes.CohereBody):
        return await cohere(body, request, desk)
    return shapes.tei_response(
        body, await desk.rank(body.request(body.texts, request.state.id))
    )


# 2. Events


@router.post("/v1/events")
async def events(body: shapes.Listed[shapes.EventBody], desk: Here) -> dict[str, Any]:
    """Keep answers of users; they are on disk when this returns.

    An event_id known before changes nothing; `conflict` has those that came with another user, item, label, time or
    context.
    """
    await desk.check_columns(body)
    return (await desk.keep(body, shapes.new_items(body)))._asdict()


@router.post("/api/feedback")
@router.put("/api/feedback")
async def feedback(body: shapes.Listed[shapes.GorseFeedback], desk: Here) -> dict[str, int]:
    """Gorse's feedback."""
    events = [row.event(desk.settings) for row in body]
    return {"RowAffected": (await desk.keep(events, [])).new}


@router.put("/v1/items")
async def items(
    body: Annotated[shapes.Listed[shapes.NewItem], Body(min_length=1)], desk: Here
) -> dict[str, int]:
    """Make items known: item_id, title and other columns of the items table."""
    await desk.check_columns(body)
    await desk.keep([], shapes.new_items(body))
    return {"items": len(body)}


@router.put("/v1/users")
async def users(
    body: Annotated[shapes.Listed[shapes.UserBody], Body(min_length=1)], desk: Here
) -> dict[str, int]:
    """Make attributes of users known, in place of all that were put before, and of those that the log has."""
    await desk.check_columns(body)
    await run_in_threadpool(desk.store.put_users, [user.model_dump() for user in body])
    return {"users": len(body)}


# 3. Operations


@router.get("/v1/users/{user_id:path}")
async def user(user_id: shapes.Id, desk: Here) -> dict[str, Any]:
    """A user's history, and attributes as requests read them."""
    return dict(await desk.ask(("user", user_id)))


@router.delete("/v1/users/{user_id:path}")
async def forget_user(user_id: shapes.Id, desk: Here) -> dict[str, int]:
    """Delete all that is known of a user: how many rows the history had, and how many events were on disk."""
    known = await desk.ask(("user", user_id))
    events = await run_in_threadpool(desk.store.delete, user_id)
    if desk.versions:
        desk.versions.forget(user_id)
    return {"rows": len(known["history"]), "events": events}


@router.delete("/v1/events/{event_id:path}")
async def forget_event(event_id: shapes.Id, desk: Here) -> dict[str, int]:
    """Delete an event. Its id is free then: a correction is posted under the same one."""
    return {"events": await run_in_threadpool(desk.store.delete, event_id=event_id)}


@router.get("/v1/items/{item_id:path}")
async def item(item_id: shapes.Id, desk: Here) -> dict[str, Any]:
    """A known item: title and other columns, likes and rows as of now."""
    found = await desk.ask(("item", item_id))
    if found is None:
        raise HTTPException(
            404, f"No item {item_id!r} is known; PUT /v1/items makes one known."
        )
    return dict(found)


@router.get("/info")
async def info(desk: Here) -> dict[str, Any]:
    """Run, protocol hash, certificate, model licence."""
    return dict(await desk.ask(("about",)))


@router.post("/v1/reload", status_code=202)
async def reload(desk: Here, promote: bool = False) -> dict[str, str]:
    """Load the newest run, or --other's, beside the one that answers, and switch to it; /info tells when."""
    run = str(desk.settings.newest(promote))
    if not await desk.ask(("reload", run)):
        raise HTTPException(
            409, "A run is being loaded already; ask again when /info names it."
        )
    return {"loading": run}


@public.get("/healthz")
async def alive() -> dict[str, str]:
    """Whether this process answers; /readyz tells whether the model does."""
    return {"status": "ok"}


@public.get("/readyz")
async def ready(desk: Here) -> dict[str, str]:
    """Whether the model answers: 503 while it is loaded."""
    if not desk.ready():
        raise HTTPException(503, "The run is being loaded.")
    return {"status": "ok"}


@public.get("/metrics", include_in_schema=False)
async def numbers(desk: Here) -> Response:
    """What was counted, for Prometheus."""
    return Response(generate_latest(desk.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@public.get("/", include_in_schema=False)
async def index() -> FileResponse:
    """The page to try it."""
    return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")
