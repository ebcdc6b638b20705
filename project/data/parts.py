"""Cuts requests by user: all of a user's are in one part. Processes that read requests import this and no more."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from typing import Any
from zlib import crc32

import polars as pl


def by_part(rows: Any, parts: int, done: set[int]) -> Any:
    """Arrow table of lines, or of requests as columns, to one of part, user and line; `done` parts are left out."""
    table = pl.DataFrame(rows)
    if table.columns == ["text"]:
        mark = BOM_UTF8.decode("latin-1")
        lines = [line.removeprefix(mark).strip(" \t\r") for line in table["text"].to_list()]
    else:
        lines = [json.dumps(record, default=str) for record in table.to_dicts()]
    users = list(map(user_of, lines))
    part = [crc32(user.encode()) % parts for user in users]  # all of a user's are in one
    schema = {"part": pl.Int64, "user": pl.String, "line": pl.String}
    asked = pl.DataFrame({"part": part, "user": users, "line": lines}, schema)
    return asked.filter(~pl.col("part").is_in(done)).to_arrow()


def user_of(line: str) -> str:
    """The user that a request names; the line itself where it names none, or is no request."""
    try:
        user = json.loads(line.encode("latin-1"))["user_id"]
        name = line if user is None else str(user).strip()
        name.encode()  # half a surrogate pair is no text
    except (ValueError, TypeError, LookupError, RecursionError):
        return line
    return name
