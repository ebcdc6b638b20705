"""The inference process: it has the model and answers, in batches, what the HTTP process sends it through a pipe.

1. A thread moves payloads from the pipe to an inbox, so that the HTTP process never waits until it may send.
2. The main thread sleeps until a payload is there and takes along what else is there. A batch never waits for company.
3. Between batches it embeds texts of new items, which requests and the store bring. While others ask this takes a
   fifth of the time, a piece at a time; a request with such texts waits aside until they are embedded.
4. The pipe ends where either process ends. The HTTP process then starts a new inference process; the inference process
   ends too. So neither needs to be told to stop: SIGTERM to both leaves this one running until nobody waits any more.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import TextIOBase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from project.errors import ConfigError, ProjectError
from project.request import Item, RankRequest, Scored
from project.serve.settings import ServeSettings, run_name
from project.serve.store import EventStore

logger = logging.getLogger("project.serve")
REST = 1.0  # seconds without a payload, after which events are taken in
PIECE = 512  # characters that are embedded at once, or one text that is longer
SHARE = 0.25  # seconds of embedding for a second of answering
FAILED = HTTPException(503, "The inference process failed; try again.")


def too_much_text() -> HTTPException:
    """The response to what brings texts while too many wait."""
    return HTTPException(
        429,
        "Too much text of new items waits to be embedded; try again in a second.",
        {"Retry-After": "1"},
    )


def run_inference(
    pipe: Connection, settings: ServeSettings, load: Callable[..., Any] | None
) -> None:
    """The process: load the run, send None when it is ready, then answer numbered payloads until the pipe ends."""
    # 1. signals to the process group are the HTTP process's affair: it finishes what is in
    # flight
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_json()
    inbox = queue.SimpleQueue[tuple[int, Any]]()
    threading.Thread(target=receive, args=(pipe, inbox), daemon=True).start()
    # 2. the run
    try:
        served = Served(settings, load)
    except Exception as error:
        logger.error(str(error), exc_info=not isinstance(error, ProjectError))
        sys.exit(1)
    # 3. batches
    with suppress(BrokenPipeError):
        pipe.send(None)
        while True:
            wait = 0.0 if served.busy() else REST
            came = take(inbox, settings.max_batch_requests, wait)
            began = time.monotonic()
            answers = served.turn(came)
            pipe.send((answers, began, served.characters()))
            served.embed(SHARE * (time.monotonic() - began))


def receive(pipe: Connection, inbox: queue.SimpleQueue[tuple[int, Any]]) -> None:
    """Move payloads to the inbox; end this process with the pipe."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(pipe.recv())
    os._exit(0)


def take(
    inbox: queue.SimpleQueue[tuple[int, Any]], most: int, wait: float
) -> list[tuple[int, Any]]:
    """One payload at least and what waits behind it; nothing where none came for `wait` seconds."""
    batch = list[tuple[int, Any]]()
    with suppress(queue.Empty):
        batch.append(inbox.get(timeout=wait))
        while len(batch) < most:
            batch.append(inbox.get_nowait())
    return batch


@dataclass
class Aside:
    """A request that waits for the embedding of its new texts."""

    number: int
    request: RankRequest
    texts: dict[str, None]  # those that are not embedded yet, in their order

    def characters(self) -> int:
        """What is left to embed."""
        return sum(map(len, self.texts))

    def ready(self, now: float) -> bool:
        """Whether it can be answered: its texts are embedded, or exit 0 answers since its deadline has passed."""
        deadline = self.request.deadline
        return not self.texts or (deadline is not None and deadline < now)


class Served:
    """The ranker of a run, which follows the store, and the one that is loaded to follow it.

    Args:
        settings: What `serve` was told.
        load: Makes the ranker of a folder; None is `Ranker.load`.
    """

    def __init__(
        self, settings: ServeSettings, load: Callable[..., Any] | None = None
    ) -> None:
        if load is None:
            from project.serve.ranker import Ranker  # the HTTP process imports no torch

            load = Ranker.load
        self.settings = settings
        self.store = EventStore(settings.db)
        self._load = load
        # held while a run is loaded beside the one that answers
        self._loading = threading.Lock()
        self._loaded: Any = None  # a ranker that is ready; the next batch begins with it
        self._ranker = self._warm(settings.run.resolve())
        self._aside = list[Aside]()
        self._store_is_next = True  # to have texts embedded

    def _warm(self, run: Path) -> Any:
        """A ranker that has read the store's events and scored once."""
        ranker = self._load(
            run,
            cache_mib=self.settings.cache_mib,
            audit_share=self.settings.audit_share,
        )
        ranker.max_new_characters = self.settings.max_new_characters
        ranker.follow(self.store)
        (answer,) = ranker.rank_after_log([RankRequest(None, [], [Item("warm", "warm")])])
        if answer.error is not None:
            raise ConfigError(f"the run {run} cannot score: {answer.error}.")
        return ranker

    def _reload(self, run: str) -> None:
        """Load a run beside the one that answers. A run that cannot be loaded is logged and left."""
        try:
            self._loaded = self._warm(Path(run))
        except Exception:
            logger.exception("reload failed", extra={"fields": {"run": run}})
        finally:
            self._loading.release()

    def turn(self, came: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Numbered answers to numbered payloads, those of earlier turns included."""
        # 1. requests that have waited long enough come along
        now = time.monotonic()
        batch = [
            *came,
            *((one.number, one.request) for one in self._aside if one.ready(now)),
        ]
        self._aside = [one for one in self._aside if not one.ready(now)]
        if not batch:
            # nobody asks: the next request need not wait for the store's events
            with suppress(SQLAlchemyError):
                self._ranker.follow(self.store, embed=False)
            return []
        try:
            found = self.answer([payload for _, payload in batch])
        except Exception:
            logger.exception("a batch failed")
            found = [FAILED] * len(batch)
        # 2. those whose texts are not embedded wait aside
        answers = list[tuple[int, Any]]()
        for (number, payload), answer in zip(batch, found, strict=True):
            texts = answer.waits_for if isinstance(answer, Scored) else ()
            if not texts:
                answers.append((number, answer))
            elif self.characters() >= self.settings.max_waiting_characters:
                answers.append((number, too_much_text()))
            else:
                self._aside.append(Aside(number, payload, dict.fromkeys(texts)))
        return answers

    def busy(self) -> bool:
        """Whether texts wait to be embedded, or requests for them."""
        return bool(self._aside or self._ranker.waiting.texts)

    def characters(self) -> int:
        """Of all texts that wait to be embedded."""
        stored: int = self._ranker.waiting.characters
        return stored + sum(one.characters() for one in self._aside)

    def embed(self, seconds: float) -> None:
        """Embed texts for so many seconds, one piece at least: the store's and requests' in turns."""
        end = time.monotonic() + seconds
        while True:
            # 1. whose turn it is; among requests the one with the least text is the first
            texts: Iterable[str] = self._ranker.waiting.texts.values()
            asked = [one for one in self._aside if one.texts]
            if asked and not (texts and self._store_is_next):
                texts = min(asked, key=Aside.characters).texts
            self._store_is_next = not self._store_is_next
            # 2. a piece of them
            piece = list[str]()
            room = PIECE
            for text in texts:
                room -= len(text)
                if piece and room < 0:
                    break
                piece.append(text)
            if not piece:
                return
            # 3. who waits for it
            self._ranker.embed(piece)
            for one in asked:
                for text in piece:
                    one.texts.pop(text, None)
            if time.monotonic() >= end:
                return

    def answer(self, batch: Sequence[RankRequest | tuple[str, ...]]) -> list[Any]:
        """Answers to payloads in their order: requests, or a kind (user, about, reload) and what it needs."""
        if self._loaded is not None:
            self._ranker = self._loaded
            self._loaded = None
        ranker = self._ranker
        ranker.follow(self.store, embed=False)
        # 1. requests are scored together
        began = time.perf_counter()
        cpu = time.process_time()
        requests = [payload for payload in batch if isinstance(payload, RankRequest)]
        scored: list[Scored] = (
            ranker.rank_after_log(requests, embed=False) if requests else []
        )
        together = sum(not one.waits_for for one in scored)
        cost: dict[str, Any] = {
            "cpu_seconds": (time.process_time() - cpu) / max(together, 1),
            "busy_seconds": (time.perf_counter() - began) / max(together, 1),
        }
        ranked = iter(scored)
        # 2. all answers, in order
        run = run_name(Path(ranker.about["run"]))
        answers = list[Any]()
        for payload in batch:
            match payload:
                case RankRequest():
                    answers.append(replace(next(ranked), run=run, batch=together, **cost))
                case ("user", name):
                    answers.append(ranker.user(name))
                case ("item", name):
                    answers.append(ranker.item(name))
                case ("about",):
                    answers.append(ranker.about | {"full_depth": ranker.full_depth})
                case ("reload", folder):
                    free = self._loading.acquire(blocking=False)
                    if free:
                        threading.Thread(
                            target=self._reload, args=(folder,), daemon=True
                        ).start()
                    answers.append(free)
        return answers


# The log


class JsonLines(logging.Formatter):
    """A line of log as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, further fields, traceback."""
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Printed(TextIOBase):
    """Standard output and error of libraries: what they print is a line of log."""

    def write(self, text: str) -> int:
        """Log each line; of a progress bar every state is one."""
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                logger.info(line.strip())
        return len(text)


def log_json() -> None:
    """Log to standard output as lines of JSON, warnings and whatever is printed included."""
    handler = logging.StreamHandler(sys.__stdout__)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # of a log that nobody reads any more
    sys.stdout = sys.stderr = Printed()
