"""Requests: candidates to score for a user, from JSON lines, logs or catalogue."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from project.data.context import CONTEXT, USER, as_given, values_of
from project.data.prompt import PromptEncoder
from project.data.protocol import (
    Interactions,
    SplitInteractions,
    answered,
    known_at,
    label_of,
    until_known,
)
from project.data.stream import Streams, streams_of
from project.errors import ConfigError, DataError
from project.request import (
    HistoryRow,
    Item,
    RankRequest,
    check_names,
    id_of,
    shown,
    text_of,
)

KEYS = [field.name for field in fields(RankRequest) if field.name != "deadline"]
EXAMPLE_HISTORY = '[{"item_id": "242", "label": 1, "time": 880000000}]'
EXAMPLE = '{"request_id": "r1", "user_id": "196", "time": 880000000, "candidates": ["242", "302"]}'


@dataclass(frozen=True)
class InvalidRequest:
    """An invalid request, which costs the others nothing."""

    place: int  # among all requests, from 0
    request_id: str  # its name; its line where it has none
    candidates: tuple[str, ...]  # as text; may be empty
    error: str  # where it was found, why it cannot be scored, and what would help


@dataclass(frozen=True)
class Requests:
    """Requests, whose items are ids, and the catalogue they refer to."""

    requests: list[RankRequest]  # in the order of the file
    items: pl.DataFrame  # the items table, followed by items that only the requests know
    # lines of the same file that are no request, or name unknown items
    invalid: tuple[InvalidRequest, ...] = ()

    @cached_property
    def codes(self) -> dict[str, int]:
        """Item id -> row of `items`."""
        return dict(self.items.select("item_id", "item").iter_rows())

    def table(self) -> pl.DataFrame:
        """One row a candidate: request_id, candidate_index, item_id; its position is the candidate's row id."""
        rows = [
            (r.request_id, k, id_of(c))
            for r in self.requests
            for k, c in enumerate(r.candidates)
        ]
        schema = {
            "request_id": pl.String,
            "candidate_index": pl.Int64,
            "item_id": pl.String,
        }
        return pl.DataFrame(rows, schema=schema, orient="row")


class Catalogue:
    """The items table, and items that requests bring; `codes` are rows of both.

    `codes` and `titles` (item id -> row, title -> id of the first item) of the table save making them anew.
    """

    def __init__(
        self,
        known: pl.DataFrame,
        codes: dict[str, int] | None = None,
        titles: Mapping[str, str] | None = None,
    ) -> None:
        self.known = known
        self.added = list[dict[str, Any]]()  # rows that follow those of `known`
        codes = (
            dict(known.select("item_id", "item").iter_rows()) if codes is None else codes
        )
        self.codes = ChainMap[str, int]({}, codes)
        self._titles = titles_of(known) if titles is None else titles
        self.columns = [name for name in known.columns if name not in ("item", "item_id")]

    def alone(self) -> Catalogue:
        """The same for one request: items that it brings are its own, whatever others bring under the same ids."""
        found = copy(self)
        found.codes = self.codes.new_child()
        return found

    def add(self, item: str | Item) -> str:
        """The id of an item. One that is not known is added; `DataError` where it has no title or unknown columns."""
        given = Item(item) if isinstance(item, str) else item
        columns = dict(given.columns)
        item_id = given.item_id or self._titles.get(given.title, given.title)
        check_names(columns, self.columns, f"item {shown(item_id)} has the unknown column")
        if item_id not in self.codes:
            if not given.title.strip():
                raise DataError(
                    f"item {shown(item_id)} is not in the items table and has no title. Add it to the items table, "
                    'or give it as {"item_id": ..., "title": ...} with any attribute of the items table.'
                )
            code = self.codes[item_id] = self.known.height + len(self.added)
            named = {"item": code, "item_id": item_id, "title": given.title}
            self.added.append(dict.fromkeys(self.columns, "") | columns | named)
        return item_id

    def resolve(self, request: RankRequest, rule: str | None = None) -> RankRequest:
        """The request with an id for each item; items that it brings are added. `rule` makes ratings labels."""
        history = request.history
        if history is not None:
            history = tuple(
                row._replace(
                    item=self.add(row.item),
                    label=label_of(row.rating, row.label, rule, "history: a row"),
                )
                for row in history
            )
        candidates = tuple(
            Item(self.add(item), context=item.context)
            if isinstance(item, Item) and item.context
            else self.add(item)
            for item in request.candidates
        )
        return replace(request, history=history, candidates=candidates)

    def table(self) -> pl.DataFrame:
        """The items table, followed by what requests brought."""
        return pl.concat([self.known, pl.DataFrame(self.added, schema=self.known.schema)])


def titles_of(items: pl.DataFrame) -> dict[str, str]:
    """Title -> id of the first item that has it."""
    return dict(items.select("title", "item_id").reverse().iter_rows())


# Requests of a file


def read_requests(file: str | None, interactions: Interactions) -> Requests:
    """Read requests from a file with a JSON object a line, or with the same fields as Parquet columns."""
    path = requests_path(file)
    return some_usable(parse_requests(_lines(path), path, interactions))


def requests_path(file: str | None) -> Path:
    """The file, which is there."""
    if file is None:
        raise DataError(
            f"predict needs data.requests, a JSONL or Parquet file with lines such as {EXAMPLE}; none was given."
        )
    if not Path(file).is_file():
        raise DataError(
            f"{file} (data.requests) does not exist; expected a JSONL or Parquet file."
        )
    return Path(file)


def some_usable(requests: Requests) -> Requests:
    """The same requests; an error where none of them can be scored."""
    if not requests.requests:
        raise DataError(
            f"{requests.invalid[0].error} None of the {len(requests.invalid)} requests (data.requests) can be scored."
        )
    return requests


def parse_requests(
    lines: Iterable[tuple[str, bytes | dict[str, Any]]],
    file: Path,
    interactions: Interactions,
) -> Requests:
    """Requests of lines of a file, each with the place where it stands.

    What is no request, names an item that is neither known nor has a title, or has the request_id of another one, is
    in `invalid`.
    """
    catalogue = Catalogue(interactions.items)
    requests = list[RankRequest]()
    invalid = list[InvalidRequest]()
    places = dict[str, str]()  # request_id -> where it stands
    for place, (at, line) in enumerate(lines):
        name = at
        candidates = tuple[str, ...]()
        try:
            record = _record(line)
            # 1. what names it in results, whatever else is wrong with it
            if record.get("request_id") is None:
                raise DataError(f"no request_id; expected {EXAMPLE}.")
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
                candidates = tuple(
                    str(c.get("item_id") if isinstance(c, dict) else c) for c in listed
                )
            # 2. what it asks
            request = request_of(record)
            values_of(request, interactions.columns, {})
            requests.append(catalogue.resolve(request, interactions.rule))
        except (DataError, RecursionError) as error:
            invalid.append(
                InvalidRequest(place, name, candidates, f"{file}, {at}: {error}")
            )
    if not requests and not invalid:
        raise DataError(
            f"{file} (data.requests) holds no request; expected lines such as {EXAMPLE}."
        )
    return Requests(requests, catalogue.table(), tuple(invalid))


def _lines(file: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Where each request stands in the file, and what stands there."""
    if file.suffix == ".parquet":
        try:
            table = pl.read_parquet(file, glob=False)
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{file} (data.requests) cannot be read as Parquet: {error}"
            ) from error
        for number, record in enumerate(table.to_dicts(), start=1):
            yield f"row {number}", record
        return
    for number, line in enumerate(
        file.read_bytes().removeprefix(BOM_UTF8).split(b"\n"), start=1
    ):
        if line.strip():
            yield f"line {number}", line


def _record(line: bytes | dict[str, Any]) -> dict[str, Any]:
    """The request of a line, as JSON has it."""
    if isinstance(line, dict):  # a row of Parquet
        return line
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeError as error:
        raise DataError(f"not UTF-8 text ({error}). Save the file as UTF-8.") from error
    # also numbers and lists of thousands of digits and levels
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON object ({error}); expected {EXAMPLE}.") from error
    if not isinstance(record, dict):
        raise DataError(
            f"found {type(record).__name__}; expected an object such as {EXAMPLE}."
        )
    return record


def request_of(record: Mapping[str, Any]) -> RankRequest:
    """The request of an object of JSON; `DataError` names the field that is wrong."""
    check_names(record, KEYS, "unknown key")
    # types; `RankRequest` checks values
    user = record.get("user_id")
    rows = record.get("history")
    candidates = record.get("candidates")
    if (user is None) == (rows is None):
        raise DataError(f"expected either user_id or a history, found {shown(record)}.")
    if not isinstance(candidates, list):
        raise DataError(
            f"candidates is {shown(candidates)}; expected a list of items, as in {EXAMPLE}."
        )
    if rows is not None and not (
        isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    ):
        raise DataError(
            f"history is {shown(rows)}; expected a list such as {EXAMPLE_HISTORY}."
        )
    return RankRequest(
        user_id=None if user is None else str(user).strip(),
        history=None if rows is None else tuple(map(_history_row, rows)),
        candidates=tuple(map(item_of, candidates)),
        time=_seconds(record.get("time")),
        top_n=record.get("top_n"),
        exhaustive=record.get("exhaustive") or False,
        context=record.get("context"),
        user=record.get("user"),
        request_id=str(record["request_id"]),
    )


def _history_row(row: dict[str, Any]) -> HistoryRow:
    item = dict(row)
    label = item.pop("label", None)
    rating = item.pop("rating", None)
    time = item.pop("time", None)
    if label is None and rating is None:
        raise DataError(
            f"history: found {shown(row)}; expected {EXAMPLE_HISTORY} with label 0 or 1, or a rating."
        )
    return HistoryRow(item_of(item), label, _seconds(time), rating)


def _seconds(value: Any) -> float | None:
    if not isinstance(value, int | float | None) or isinstance(value, bool):
        raise DataError(f"time is {shown(value)}; expected seconds since 1970.")
    return value


def item_of(value: Any) -> str | Item:
    """An item as JSON has it: an id, or an object with an item_id or a title, and other columns of the items table."""
    if not isinstance(value, dict):
        return text_of("item_id", value).strip()
    # Parquet has null in columns that only other rows fill
    texts = {
        name: text_of(name, given)
        for name, given in value.items()
        if given is not None and name != "context"
    }
    context = value.get("context") or {}
    if not isinstance(context, dict):
        raise DataError(f"context is {shown(context)}; expected names and values.")
    item = Item(
        texts.pop("item_id", "").strip(),
        texts.pop("title", ""),
        tuple(texts.items()),
        tuple(context.items()),
    )
    if not (item.item_id or item.title.strip()):
        raise DataError(f"found the item {shown(value)}; expected an item_id or a title.")
    return item


# Room in a window


def _too_long(item_id: str, tokens: int, context_tokens: int) -> str:
    return (
        f"The prompt of item {item_id!r} alone has {tokens:,} tokens (instruction, segment and answer), but "
        f"data.context_tokens is {context_tokens:,}"
    )


_SHORTEN = (
    "Shorten what is long in data.prompt.segment, for example {title:.40}, leave a field out, or raise "
    "data.context_tokens (and data.batch_tokens)."
)


def check_items(encoder: PromptEncoder, items: pl.DataFrame, context_tokens: int) -> None:
    """Raise `ConfigError` if the segment of an item has no room in a window."""
    lengths = encoder.least_lengths()
    long = int((lengths > context_tokens).sum())
    if long:
        problem = _too_long(
            items["item_id"][int(lengths.argmax())], int(lengths.max()), context_tokens
        )
        raise ConfigError(
            f"{problem} ({long:,} of {len(items):,} items are too long). {_SHORTEN}"
        )


def check_streams(streams: Streams, context_tokens: int) -> None:
    """Raise `ConfigError` if a segment as it is shown, or a list of similar users' likes, has no room in a window."""
    segments = len(streams.row_id)
    lengths = streams.tokens.lengths
    instructions = np.repeat(lengths[segments:], np.diff(streams.offsets))
    tokens = (lengths[:segments] + instructions).max()
    if tokens > context_tokens:
        raise ConfigError(
            f"A segment or a list (data.prompt.similar) has {tokens:,} tokens, the instruction included, but "
            f"data.context_tokens is {context_tokens:,}. {_SHORTEN}"
        )


def without_long(
    requests: Requests, encoder: PromptEncoder, context_tokens: int
) -> Requests:
    """Requests whose items all have room in a window; the others are invalid, each alone."""
    lengths = encoder.least_lengths()  # (items,)
    if lengths.max(initial=0) <= context_tokens:
        return requests
    invalid = {one.place: one for one in requests.invalid}
    places = (k for k in count() if k not in invalid)
    kept = list[RankRequest]()
    for place, request in zip(places, requests.requests, strict=False):
        candidates = tuple(map(id_of, request.candidates))
        named = (*candidates, *(id_of(row.item) for row in request.history or ()))
        tokens_of = {item_id: int(lengths[requests.codes[item_id]]) for item_id in named}
        longest = max(named, key=tokens_of.__getitem__)
        if tokens_of[longest] <= context_tokens:
            kept.append(request)
            continue
        problem = _too_long(longest, tokens_of[longest], context_tokens)
        error = f"request {request.request_id!r}: {problem}. Give it a shorter title."
        invalid[place] = InvalidRequest(place, request.request_id, candidates, error)
    found = sorted(invalid.values(), key=lambda one: one.place)
    return replace(requests, requests=kept, invalid=tuple(found))


# Requests as streams


def request_streams(
    requests: Requests,
    split: SplitInteractions,
    retrieved: pl.DataFrame,
    encoder: PromptEncoder,
    retrieve: Callable[[pl.DataFrame], pl.DataFrame],
) -> Streams:
    """One stream a request: what the user did strictly before its time, then its candidates.

    `retrieved` are features of all rows of the log, which requests read as test does; `retrieve` gives them, in order,
    for rows outside the log (stream, user, item, timestamp, label, candidate).
    """
    # 1. rows of the users' log, in time order, and rows outside it: histories of requests,
    # and candidates
    users = dict(split.interactions.users.select("user_id", "user").iter_rows())
    asked = {users[r.user_id] for r in requests.requests if r.user_id in users}
    log = split.rows.filter(answered(split.rows), pl.col("user").is_in(sorted(asked)))
    log = log.with_columns(known_at=known_at(log))
    names = ("user", "item", "row_id", "timestamp", "known_at", "label", "rating")
    log = log.select(names).join(retrieved, on="row_id").sort("user", "row_id")
    if split.protocol.answer_delay:  # as in training
        log = until_known(log)
    of_user = log["user"].to_numpy()  # (rows,) ascending
    known = list[pl.DataFrame]()  # rows of the log, a table a request
    # rows outside it: (stream, user, item, row_id, timestamp, label, rating, candidate)
    fresh = list[tuple[Any, ...]]()
    row_id = 0  # of the next candidate
    for stream, request in enumerate(requests.requests):
        time = request.asked_at(split.latest)
        user = users.get(request.user_id or "", len(users) + stream)
        if request.user_id is not None:
            first, last = np.searchsorted(of_user, [user, user + 1]).tolist()
            rows = log[first:last].filter(pl.col("known_at") < time)
            known.append(
                rows.with_columns(stream=pl.lit(stream, pl.Int64), candidate=pl.lit(False))
            )
        if request.user_id not in users:
            for name, answer, at, rating in request.past(time):
                item = requests.codes[name]
                fresh.append((stream, user, item, -1, at, answer, rating, False))
        for asked_item in request.candidates:
            item = requests.codes[id_of(asked_item)]
            fresh.append((stream, user, item, row_id, time, -1, np.nan, True))
            row_id += 1
    # 2. retrieved features of the rows outside the log
    columns = ("stream", *names[:4], "label", "rating", "candidate")
    new = pl.DataFrame(fresh, schema=columns, orient="row").with_columns(
        pl.col("timestamp", "rating").cast(pl.Float64)
    )
    new = pl.concat([new, retrieve(new).drop("row_id", strict=False)], how="horizontal")
    # 3. a stream each, candidates last: nobody sees them
    tables = [*(k.select(new.columns) for k in known), new]
    table = (
        pl.concat(tables, how="vertical_relaxed")
        .with_columns(user="stream")
        .sort("stream", "candidate", "timestamp", maintain_order=True)
    )
    candidate = table["candidate"].to_numpy()
    return streams_of(table, candidate, ~candidate, encoder)


# Requests made of a log, whose answers it knows

SCHEMA: dict[str, type[pl.DataType]] = {
    "request_id": pl.String,
    "candidate_index": pl.Int64,
    "user": pl.Int32,
    "label": pl.Int8,
    "row_id": pl.Int64,
}


@dataclass(frozen=True)
class Workload:
    """Requests and the answers that the log knows.

    `table` (`SCHEMA`) has one row a candidate, in the order of `requests.table()`; label and row_id are null for a
    candidate from the catalogue.
    """

    requests: Requests
    table: pl.DataFrame


def catalogue_requests(
    split: SplitInteractions,
    part: str,
    count: int,
    candidates: int,
    seed: int,
    history: int | None = None,
) -> Workload:
    """Requests of sampled targets, each at its own time, filled up with items from the catalogue.

    The target's item is the labelled candidate, at a random place. The others are distinct items that the user has not
    rated strictly earlier; a request is shorter where fewer are left. A target has the same candidates whatever
    `count` is, and a larger sample contains the smaller one. All candidates have the context of the target's row. With
    `history`, requests bring the user's latest so many strictly earlier rows as a history of their own, and the user's
    attributes; targets with fewer are left out. None: the log's, as long as it is.
    """
    if count < 1 or candidates < 1:
        raise ConfigError(
            f"found {count} requests of {candidates} candidates; expected 1 or more of both"
        )
    targets = targets_for_requests(split, part)
    if history is not None:
        targets = targets.filter(pl.col("hist") >= history)
        if targets.is_empty():
            raise DataError(
                f"no target of {part} has {history} strictly earlier rows; request fewer."
            )
    drawn = np.sort(np.random.default_rng(seed).permutation(targets.height)[:count])
    past = split.rows.filter(
        answered(split.rows), pl.col("user").is_in(targets["user"].unique().implode())
    )
    rated = past.partition_by("user", as_dict=True)
    log = split.interactions
    items = log.items
    ids = items["item_id"].to_list()
    requests = list[RankRequest]()
    rows = list[tuple[Any, ...]]()  # as `SCHEMA`
    for row in targets[drawn].iter_rows(named=True):
        user = row["user"]
        time = row["timestamp"]
        request_id = f"catalogue/{part}/{row['row_id']}"
        # 1. candidates
        rng = np.random.default_rng([seed, row["row_id"]])
        earlier = rated[user,].filter(known_at(rated[user,]) < time)
        free = np.ones(len(ids), dtype=bool)
        free[earlier["item"].to_numpy()] = free[row["item"]] = False
        others = rng.permutation(np.flatnonzero(free))[: candidates - 1]
        place = int(rng.integers(len(others) + 1))
        listed = tuple(ids[item] for item in np.insert(others, place, row["item"]))
        # 2. answers: that of the target alone is known
        known = {place: (row["label"], row["row_id"])}
        rows += [
            (request_id, k, user, *known.get(k, (None, None))) for k in range(len(listed))
        ]
        # 3. history: the user's in the log, or the latest rows of it that the request
        # brings
        whose = log.users.row(user, named=True)
        context = as_given(row, CONTEXT, log.texts) or None
        request = RankRequest(
            whose["user_id"],
            None,
            listed,
            context=context,
            time=time,
            request_id=request_id,
        )
        if history is not None:
            latest = earlier.tail(history).select("item", "label", "timestamp", "rating")
            request = replace(
                request,
                user_id=None,
                history=tuple(
                    HistoryRow(ids[item], *rest) for item, *rest in latest.iter_rows()
                ),
                user=as_given(whose, USER, log.texts),
            )
        requests.append(request)
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return Workload(Requests(requests, items), table)


def targets_for_requests(split: SplitInteractions, part: str) -> pl.DataFrame:
    """Targets of test or of a fold; `ConfigError` where a fold's requests would read rows of test."""
    column = "split" if part == "test" else "fold"
    targets = split.rows.filter(pl.col(column) == part, role="target")
    if targets.is_empty():
        raise DataError(
            f"{part} has no targets to make requests of: give more data or change the shares"
        )
    last = targets["timestamp"].max()
    early = split.rows.filter(pl.col("timestamp") < last, split="test").height
    if part != "test" and early:
        raise ConfigError(
            f"data.protocol.split is {split.protocol.split}: {early:,} test rows lie before the last request of the "
            f"fold {part}, which would read them. Expected a split by time: set data.protocol.split to global_time, "
            "or give files that follow each other in time."
        )
    return targets
