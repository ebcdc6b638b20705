"""Requests: what predict and the engine score. One user, a time, and candidates.

A request becomes a stream of its own: the user's rows strictly earlier than its time (or the history it brings),
then its candidates as target-only rows. Its rows change nobody else's evidence. Lists of what similar users liked
come with the history, so they do not depend on the candidates.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.data.columns import MILLISECONDS
from project.data.interactions import Interactions
from project.data.prompts import PromptEncoder
from project.data.splits import SplitInteractions
from project.data.streams import Streams, streams_of
from project.errors import DataError

EXAMPLE_HISTORY = '[{"item_id": "242", "label": 1, "time": 880000000}]'
EXAMPLE = '{"request_id": "r1", "user_id": "196", "time": 880000000, "candidates": ["242", "302"]}'


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        request_id: Name of the request in the output.
        user_id: A user of the logs (an unknown one has an empty history), or None where `history` is given.
        history: (item id, label 0 or 1, time in seconds) in any order, instead of a user of the logs.
        time: Seconds; only strictly earlier rows are read. None: after all rows of the logs and of `history`.
        candidates: Item ids to score.
    """

    request_id: str
    user_id: str | None
    history: tuple[tuple[str, int, float], ...]
    time: float | None
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A request that cannot be scored, and costs the others nothing.

    Attributes:
        place: Where it stood among all requests, from 0.
        request_id: Its name; its line where it has none.
        candidates: What it asked for, as text; may be empty.
        error: Where it was found, why it cannot be scored, and what would help.
    """

    place: int
    request_id: str
    candidates: tuple[str, ...]
    error: str


@dataclass(frozen=True)
class Requests:
    """Requests and the catalogue they refer to.

    Attributes:
        requests: In the order of the file.
        items: The items table, followed by items that only the requests know.
        codes: Item id -> row of `items`.
        refused: Lines of the same file that are no request, or name unknown items.
    """

    requests: list[Request]
    items: pl.DataFrame
    codes: dict[str, int]
    refused: tuple[Refused, ...] = ()

    def table(self) -> pl.DataFrame:
        """One row a candidate: request_id, candidate_index, item_id; its position is the candidate's row id."""
        rows = [(r.request_id, k, c) for r in self.requests for k, c in enumerate(r.candidates)]
        schema = {"request_id": pl.String, "candidate_index": pl.Int64, "item_id": pl.String}
        return pl.DataFrame(rows, schema=schema, orient="row")


@dataclass
class _Catalogue:
    """Known items, and those that requests bring with a title of their own."""

    items: pl.DataFrame
    codes: dict[str, int]
    added: list[dict[str, str]] = field(default_factory=list)

    def item_id(self, value: Any) -> str:
        """Id of a candidate or history item, given as an id or as an object with item_id and title."""
        details = value if isinstance(value, dict) else {"item_id": value}
        if details.get("item_id") is None:
            raise DataError(f"found an item {_shown(value)} without item_id; expected {EXAMPLE}.")
        item_id = str(details["item_id"]).strip()
        if item_id not in self.codes:
            if not str(details.get("title") or "").strip():
                raise DataError(
                    f"item {_shown(item_id)} is not in the items table and has no title. Add it to the items "
                    'table, or give it as {"item_id": ..., "title": ...} with any attribute of the items table.'
                )
            columns = [c for c in self.items.columns if c not in ("item", "item_id")]
            self.codes[item_id] = len(self.codes)
            self.added.append({"item_id": item_id, **{c: str(details.get(c) or "") for c in columns}})
        return item_id

    def table(self) -> pl.DataFrame:
        """Known items, then added ones."""
        if not self.added:
            return self.items
        codes = range(len(self.items), len(self.items) + len(self.added))
        new = pl.DataFrame(self.added).with_columns(item=pl.Series(codes, dtype=self.items.schema["item"]))
        return pl.concat([self.items, new.select(self.items.columns)])


def read_requests(file: str | None, interactions: Interactions) -> Requests:
    """Read requests from JSONL or Parquet.

    Args:
        file: Path; one JSON object a line, or the same fields as Parquet columns.
        interactions: The logs they refer to.

    Returns:
        What can be scored. What is no request, or names an item that is neither known nor has a title, or has the
        request_id of another one, is in `refused`.

    Raises:
        DataError: The file is missing, empty or no Parquet, or all requests are refused.
    """
    if file is None:
        raise DataError(
            f"predict needs data.requests, a JSONL or Parquet file with lines such as {EXAMPLE}; none was given."
        )
    known = interactions.items
    catalogue = _Catalogue(known, dict(zip(known["item_id"].to_list(), known["item"].to_list(), strict=True)))
    requests, refused, places = list[Request](), list[Refused](), dict[str, str]()
    for place, (at, line) in enumerate(_lines(Path(file))):
        name, candidates = at, tuple[str, ...]()
        try:
            record = _record(line)
            if record.get("request_id") is not None:
                name = str(record["request_id"])
                first = places.setdefault(name, at)
                if first != at:
                    name = f"{name} ({at})"
                    raise DataError(
                        f"request_id {record['request_id']!r} is also that of {first}; expected a name of its own, "
                        "since results are told apart by it."
                    )
            listed = record.get("candidates")
            if isinstance(listed, list):
                candidates = tuple(str(c.get("item_id") if isinstance(c, dict) else c) for c in listed)
            requests.append(_request(record, catalogue))
        except (DataError, RecursionError) as error:
            refused.append(Refused(place, name, candidates, f"{file}, {at}: {error}"))
    if not requests:
        raise DataError(
            f"{refused[0].error} None of the {len(refused)} requests of {file} (data.requests) can be scored."
            if refused
            else f"{file} (data.requests) holds no request; expected lines such as {EXAMPLE}."
        )
    return Requests(requests, catalogue.table(), catalogue.codes, tuple(refused))


def _lines(file: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Where each request stands in the file, and what stands there."""
    if not file.is_file():
        raise DataError(f"{file} (data.requests) does not exist; expected a JSONL or Parquet file.")
    if file.suffix == ".parquet":
        try:
            table = pl.read_parquet(file, glob=False)
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{file} (data.requests) cannot be read as Parquet: {error}") from error
        for number, record in enumerate(table.to_dicts(), start=1):
            yield f"row {number}", record
        return
    for number, line in enumerate(file.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", line


def _record(line: bytes | dict[str, Any]) -> dict[str, Any]:
    """The request of a line, as JSON has it.

    Raises:
        DataError: It is no JSON object, or none that Python can hold.
    """
    if isinstance(line, dict):
        return line
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeError as error:
        raise DataError(f"not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:  # also numbers and lists of thousands of digits and levels
        raise DataError(f"not a JSON object ({error}); expected {EXAMPLE}.") from error
    if not isinstance(record, dict):
        raise DataError(f"found {type(record).__name__}; expected an object such as {EXAMPLE}.")
    return record


def _request(record: dict[str, Any], catalogue: _Catalogue) -> Request:
    unknown = set(record) - {"request_id", "user_id", "history", "time", "candidates"}
    if unknown or "candidates" not in record or record.get("request_id") is None:
        raise DataError(
            f"found the fields {_shown(list(record))}; expected request_id, candidates, user_id or history, and "
            "optionally time."
        )
    if (record.get("user_id") is None) == (record.get("history") is None):
        raise DataError("expected either user_id or history, not both and not neither.")
    candidates, history, time = record["candidates"], record.get("history"), record.get("time")
    if not isinstance(candidates, list) or not candidates:
        raise DataError(f"candidates is {_shown(candidates)}; expected a list of at least one item id.")
    if not isinstance(history, list | None):
        raise DataError(f"history is {_shown(history)}; expected a list such as {EXAMPLE_HISTORY}.")
    return Request(
        request_id=str(record["request_id"]),
        user_id=None if record.get("user_id") is None else str(record["user_id"]).strip(),
        history=tuple(_history_row(row, catalogue) for row in history or ()),
        time=None if time is None else _seconds(time),
        candidates=tuple(catalogue.item_id(c) for c in candidates),
    )


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MILLISECONDS:
        raise DataError(
            f"time is {_shown(value)}; expected seconds since 1970 as a number (no milliseconds)."
        )
    return float(value)


def _history_row(row: Any, catalogue: _Catalogue) -> tuple[str, int, float]:
    if not isinstance(row, dict) or row.get("label") not in (0, 1):
        raise DataError(
            f"history holds {_shown(row)}; expected rows such as {EXAMPLE_HISTORY[1:-1]}, with label 0 or 1."
        )
    return catalogue.item_id(row), int(row["label"]), _seconds(row.get("time"))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def request_streams(
    requests: Requests,
    split: SplitInteractions,
    evidence: pl.DataFrame,
    encoder: PromptEncoder,
    ask_retriever: Callable[[pl.DataFrame], pl.DataFrame],
) -> Streams:
    """One stream a request: what the user did strictly before its time, then its candidates.

    Args:
        requests: What is asked.
        split: The logs; requests read all of them, as test does.
        evidence: Evidence of the logs' rows (the table of test).
        encoder: Made for `requests.items`.
        ask_retriever: Gives the evidence, in order, of rows outside the logs (user, item, timestamp, label, candidate).
    """
    log = split.rows.select("user", "item", "row_id", "timestamp", "label").join(evidence, on="row_id")
    log = log.sort("user", "row_id")  # a user's rows stand together, in time order
    of_user, times = log["user"].to_numpy(), log["timestamp"].to_numpy()
    users = dict(split.interactions.users.select("user_id", "user").iter_rows())
    end = float(split.rows["timestamp"].max())  # type: ignore[arg-type]
    known, fresh = [], []
    row_id = 0
    for stream, request in enumerate(requests.requests):
        now = max([end, *(at for _, _, at in request.history)]) + 1
        time = now if request.time is None else request.time
        user = users.get(request.user_id or "", len(users) + stream)
        if request.user_id is not None:
            first, last = np.searchsorted(of_user, [user, user + 1]).tolist()
            rows = log[first : first + int(np.searchsorted(times[first:last], time))]
            known.append(rows.with_columns(stream=pl.lit(stream, pl.Int64), candidate=pl.lit(False)))
        for item, answer, at in request.history:
            if at < time:
                fresh.append((stream, user, requests.codes[item], -1, at, answer, False))
        for item in request.candidates:
            fresh.append((stream, user, requests.codes[item], row_id, time, -1, True))
            row_id += 1
    columns = ["stream", "user", "item", "row_id", "timestamp", "label", "candidate"]
    new = pl.DataFrame(fresh, schema=columns, orient="row").with_columns(pl.col("timestamp").cast(pl.Float64))
    counted = ask_retriever(new).drop("row_id")
    new = pl.concat([new, counted], how="horizontal")
    table = pl.concat([*(k.select(new.columns) for k in known), new], how="vertical_relaxed")
    table = table.with_columns(user=pl.col("stream")).sort(
        "stream", "candidate", "timestamp", maintain_order=True
    )
    candidate = table["candidate"].to_numpy()
    label = table["label"].to_numpy().astype(np.int8)
    return streams_of(table, label, candidate, ~candidate, encoder)
