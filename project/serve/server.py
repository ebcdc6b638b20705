"""`python -m project serve`: HTTP around one ranker, which runs in a process of its own and takes requests in batches.

This process checks and translates bodies, writes events, and hands payloads to the inference process
(project/serve/inference.py), which it starts anew where it ended.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from itertools import count
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from fastapi import FastAPI
from jsonargparse import ArgumentParser
from starlette.exceptions import HTTPException

from project.errors import ConfigError
from project.run import label_rule
from project.serve.inference import FAILED, log_json, run_inference
from project.serve.routes import Backlog, Desk, Metrics, add_routes
from project.serve.settings import ServeSettings
from project.serve.store import EventStore
from project.serve.versions import Versions

logger = logging.getLogger("project.serve")
LEAVING = 30  # seconds that requests in flight have to end


class Inference:
    """The HTTP process's end of the pipe: payloads that wait for an answer, and the process that answers them.

    Args:
        settings: What `serve` was told.
        load: Makes the ranker of a folder; None is `Ranker.load`.
        stop: Called where the run cannot be loaded.
    """

    def __init__(
        self,
        settings: ServeSettings,
        load: Callable[..., Any] | None,
        stop: Callable[[], None],
    ) -> None:
        self._arguments = settings, load
        self._most = settings.max_waiting_requests
        self._stop = stop
        self.backlog = Backlog(settings.max_waiting_characters)
        self._numbers = count()
        # by number, in the order they came
        self.waiting: dict[int, tuple[object, asyncio.Future[Any]]] = {}
        self.ready = False  # the model is warm; until then payloads wait here
        self.failed = False  # the run cannot be loaded
        self._process: BaseProcess | None = None  # until the event loop runs

    def start(self) -> None:
        """Start the process; the event loop is told when it says something."""
        self._pipe, theirs = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=run_inference, args=(theirs, *self._arguments))
        # Ctrl+C reaches all processes of a terminal: the new one ignores it from its first
        # moment
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)
        # uvloop has just made it non-blocking: half a message would be an error
        os.set_blocking(self._pipe.fileno(), True)

    async def ask(self, payload: object) -> Any:
        """The answer to a payload."""
        if len(self.waiting) >= self._most:
            raise HTTPException(
                429,
                f"{self._most} requests wait or run; try again in a second.",
                {"Retry-After": "1"},
            )
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self.waiting[number] = payload, future
        if self.ready:
            self._send(number, payload)
        try:
            return await future
        finally:
            self.waiting.pop(number, None)

    def _send(self, number: int, payload: object) -> None:
        with suppress(BrokenPipeError):  # `_receive` is called soon, and answers it
            self._pipe.send((number, payload))

    def _receive(self) -> None:
        """Hand on what the process says: None when it is ready, then its turns. The pipe's end is the process's."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._restart()
            return
        if message is None:
            self.ready = True
            for number, (payload, _) in self.waiting.items():
                self._send(number, payload)
            return
        answers, *report = message
        self.backlog.report(*report)
        for number, answer in answers:
            if number in self.waiting:  # the client may be gone
                settle(self.waiting[number][1], answer)

    def _restart(self) -> None:
        """Answer what the ended process had, and start a new one; not where it never got ready."""
        about = {"run": str(self._arguments[0].run), "was_ready": self.ready}
        logger.error("an inference process ended", extra={"fields": about})
        self.close()
        for _, future in self.waiting.values():
            settle(future, FAILED)
        if self.ready:
            self.ready = False
            self.start()
        else:
            self.failed = True
            self._stop()

    def close(self) -> None:
        """End the process, which the end of the pipe tells to go."""
        if self._process is None:
            return
        with suppress(RuntimeError, OSError):  # no event loop runs any more; closed already
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._pipe.close()
        self._process.join(LEAVING)
        self._process.kill()


def settle(future: asyncio.Future[Any], answer: Any) -> None:
    """Answer a request, or raise the exception that is its answer."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def make_app(inferences: Sequence[Inference], settings: ServeSettings) -> FastAPI:
    """The routes around inference processes that start with them."""
    rule = label_rule(settings.run)  # makes ratings labels
    inference = inferences[0]

    def reload() -> None:
        app.state.reloading = asyncio.ensure_future(
            inference.ask(("reload", str(settings.newest())))
        )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for one in inferences:
            one.start()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
        yield

    app = FastAPI(title="exitrec", lifespan=lifespan)
    metrics = Metrics(lambda: len(inference.waiting), inference.backlog.characters)
    versions = None
    if settings.other is not None:
        versions = Versions(settings, inference, inferences[1], metrics.registry)
    desk = Desk(
        inference.ask,
        lambda: inference.ready,
        settings,
        EventStore(settings.db),
        rule,
        inference.backlog,
        metrics,
        versions,
    )
    add_routes(app, desk)
    return app


def run_serve(arguments: Sequence[str], load: Callable[..., Any] | None = None) -> None:
    """The command `serve`: answers until it is told to stop, then finishes what is in flight."""
    # 1. settings
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
    except ArgumentError as error:
        raise ConfigError(f"serve: {error}") from None
    settings.check()
    # 2. the processes; where --other's cannot be loaded --run answers everything
    inference = Inference(settings, load, stop=lambda: setattr(http, "should_exit", True))
    inferences = [inference]
    if settings.other is not None:
        second = replace(settings, run=settings.other)
        inferences.append(Inference(second, load, stop=lambda: None))
    app = make_app(inferences, settings)
    options = uvicorn.Config(
        app,
        settings.host,
        settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=LEAVING,
    )
    http = uvicorn.Server(options)
    # 3. until a signal: uvicorn finishes what is in flight, then raises the signal again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log_json()
    try:
        http.run()
    except KeyboardInterrupt:
        pass
    finally:
        for one in inferences:
            one.close()
        sys.stderr = sys.__stderr__
    if inference.failed:
        raise ConfigError(
            f"--run {settings.run} could not be loaded; the log above says why."
        )
