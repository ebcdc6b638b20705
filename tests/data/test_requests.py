"""Requests are read line by line: what is no request is invalid alone, what is one is read whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Letters, read_split

from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Interactions, Protocol
from project.data.requests import Requests, read_requests, some_usable, without_long
from project.errors import DataError

A = {"request_id": "a", "user_id": "u1", "candidates": ["i1", "i1"]}
B = {"request_id": "b", "user_id": "u1", "candidates": ["i1"]}
ROW = {"item_id": "i1", "label": 1, "time": 1}
NEW = {"item_id": "new", "title": "a dog"}


@pytest.fixture(scope="module")
def logs(tiny_logs: Path) -> Interactions:
    return read_split(tiny_logs, Protocol()).interactions


def read(logs: Interactions, folder: Path, *records: object) -> Requests:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return read_requests(str(path), logs)


def names(requests: Requests) -> list[str]:
    return [r.request_id for r in requests.requests]


def past(**changes: object) -> dict[str, object]:
    """A request that brings one row."""
    return {"request_id": "b", "history": [ROW | changes], "candidates": ["i1"]}


NOT_THERE = [B | {"candidates": []}, B | {"candidates": ["i1", "zzz"]}, past(item_id="zzz")]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (NOT_THERE[0], ["at least one candidate"]),
        (NOT_THERE[1], ["'zzz' is not in the items table"]),
        (NOT_THERE[2], ["'zzz' is not in the items table"]),
        ("{", ["JSON"]),
        ('{"request_id": ' + 5000 * "1", ["JSON"]),
        (99_999 * "[", ["JSON"]),
        (
            json.dumps(B | {"time": "@"}).replace('"@"', "1" + 400 * "0"),
            ["time is 1000", "seconds"],
        ),
        (B | {"time": 1.7e12}, ["milliseconds"]),
        (B | {"time": float("nan")}, ["time", "nan"]),
        (B | {"time": "now"}, ["time", "now"]),
        (B | {"user_id": "\ud800"}, ["not UTF-8"]),
        (B | {"candidates": "i1"}, ["candidates", "list"]),
        (B | {"candidates": [{"year": "1999"}]}, ["item_id or a title"]),
        (B | {"candidates": [None]}, ["item_id"]),
        (B | {"history": []}, ["either user_id or a history"]),
        (B | {"history": 0, "user_id": None}, ["history is 0", "list"]),
        (
            past() | {"history": [{"item_id": "i1", "answer": 1, "time": 1}]},
            ["'answer'", "label 0 or 1"],
        ),
        (past(label=5), ["history", "0 or 1"]),
        (past(label=None, rating="5"), ["rating is '5'", "number"]),
        (past(label=1, rating=2.0), ["label 1", "rating > 3 makes label 0", "2.0"]),
        ([1], ["list"]),
        ({"request_id": "b", "candidates": ["i1"]}, ["either user_id or a history"]),
        ({"request_id": "b", "user": "u1", "candidates": ["i1"]}, ["user"]),
        (B | {"request_id": "a"}, ["request_id 'a' is also that of line 1"]),
        (B | {"request_id": "a", "candidates": []}, ["request_id 'a'"]),
        (B | {"candidate": ["i1"]}, ["'candidate'", "did you mean candidates?"]),
        (
            B | {"candidates": [NEW | {"yaer": "1999"}]},
            ["'yaer'", "did you mean year?", "title, year"],
        ),
        (
            B | {"candidates": [{"item_id": "i1", "yaer": "1999"}]},
            ["'yaer'", "did you mean year?"],
        ),
        (past(yaer="1999"), ["'yaer'", "did you mean year?"]),
        (B | {"candidates": [NEW | {"year": {"a": 1}}]}, ["year is {'a': 1}"]),
        (
            past() | {"history": [ROW, {"item_id": "i1", "label": 1}]},
            ["every row its time, or none"],
        ),
    ],
)
def test_bad_requests(
    record: Any, words: list[str], logs: Interactions, tmp_path: Path
) -> None:
    """A line that is no request is invalid alone, with its file and line; others are read as without it."""
    c = A | {"request_id": "c"}
    found, plain = read(logs, tmp_path, A, record, c), read(logs, tmp_path, A, c)
    assert (found.requests, found.codes) == (plain.requests, plain.codes)
    assert found.items.equals(plain.items)
    (invalid,) = found.invalid
    assert invalid.place == 1
    assert all(word in invalid.error for word in ["requests.jsonl", "line 2", *words]), (
        invalid.error
    )
    if record in NOT_THERE:
        assert (invalid.request_id, invalid.candidates) == (
            "b",
            tuple(record["candidates"]),
        )
    else:
        assert invalid.request_id not in ("a", "c")


def test_files_without_a_request(logs: Interactions, tmp_path: Path) -> None:
    """No file, an absent file, an empty one, one that is no Parquet, and one of invalid requests are told apart."""
    (tmp_path / "a.parquet").write_text("no")
    (tmp_path / "empty.jsonl").write_text("")
    for file, words in (
        (None, r"data\.requests"),
        ("absent.jsonl", "does not exist"),
        (str(tmp_path / "a.parquet"), r"a\.parquet .*cannot be read"),
        (str(tmp_path / "empty.jsonl"), "no request"),
    ):
        with pytest.raises(DataError, match=words):
            read_requests(file, logs)
    records = [
        record | {"request_id": str(number)} for number, record in enumerate(NOT_THERE)
    ]
    with pytest.raises(
        DataError,
        match=r"line 1: candidates is empty.*at least one candidate.*None of the 3 requests",
    ):
        read(logs, tmp_path, *records)


def test_encodings(logs: Interactions, tmp_path: Path) -> None:
    """UTF-8, with the mark of Windows or without; a line ends at its newline, not where Unicode says."""
    name = "é\u2028b\x85c"
    line = json.dumps(B | {"request_id": name}, ensure_ascii=False)
    file = tmp_path / "requests.jsonl"
    for encoding in ("latin-1", "utf-16"):
        file.write_bytes(line.replace("\u2028", "").encode(encoding))
        with pytest.raises(DataError, match=r"requests\.jsonl, line 1: not UTF-8 text"):
            read_requests(str(file), logs)
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes((line + "\r\n").encode(encoding))
        assert names(read_requests(str(file), logs)) == [name]


def test_parquet_equals_jsonl(logs: Interactions, tmp_path: Path) -> None:
    records = [
        {"request_id": "a", "user_id": "u1", "time": 5.0, "candidates": ["i1", "i2"]},
        {"request_id": "b", "user_id": "nobody", "time": None, "candidates": ["i3"]},
    ]
    pl.DataFrame(records).write_parquet(tmp_path / "requests.parquet")
    parquet = read_requests(str(tmp_path / "requests.parquet"), logs)
    assert parquet.requests == read(logs, tmp_path, *records).requests
    more = read(
        logs, tmp_path, B | {"candidates": [{"item_id": "fresh", "title": "a dog"}, "i1"]}
    )
    assert more.codes["fresh"] == len(logs.items)
    assert more.items["title"][-1] == "a dog"
    assert more.table()["item_id"].to_list() == ["fresh", "i1"]


def test_values_of_the_items_table(logs: Interactions, tmp_path: Path) -> None:
    """Numbers and lists are what the items file has of them: text, lists joined."""
    values = {"99": 99, "4.5": 4.5, "true": True, "a, 1": ["a", 1], "": None}
    values |= {str(10**400): 10**400}  # larger than any float
    items = [
        {"item_id": f"n{k}", "title": "New", "year": value}
        for k, value in enumerate(values.values())
    ]
    found = read(logs, tmp_path, B | {"candidates": items}).items
    assert found["year"].tail(len(values)).to_list() == list(values)


@given(data=st.data())
@settings(derandomize=True, max_examples=100)
def test_a_mutated_line_never_ends_the_file(
    data: st.DataObject, logs: Interactions, tmp_path_factory: Any
) -> None:
    """Some bytes of a line are others: it is read or invalid, and the next line is read."""
    history = [
        ROW | {"time": 5},
        {"item_id": "n", "title": "a dog", "label": 0, "time": 6.5},
    ]
    asked = {
        "request_id": "a",
        "history": history,
        "time": 9,
        "candidates": ["i2", {"item_id": "n"}],
    }
    mutated = bytearray(json.dumps(asked).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        put = data.draw(st.binary(max_size=3)).replace(b"\n", b" ")
        mutated[place : place + data.draw(st.integers(0, 3))] = put
    file = tmp_path_factory.mktemp("mutated") / "requests.jsonl"
    file.write_bytes(
        bytes(mutated) + b'\n{"request_id": "z", "user_id": "u1", "candidates": ["i1"]}'
    )
    found = read_requests(str(file), logs)
    assert names(found)[-1] == "z"
    assert len(found.requests) + len(found.invalid) <= 2


def test_a_request_with_a_long_title_is_invalid_alone(
    logs: Interactions, tmp_path: Path
) -> None:
    """As candidate or in the history; who asks for items that fit is served. Nobody left is an error."""
    new = {"item_id": "new", "title": "x" * 200}
    records = [
        B | {"request_id": "unknown", "candidates": ["nowhere"]},
        B | {"request_id": "long", "candidates": ["i1", new]},
        B | {"request_id": "fits"},
        past(**new) | {"request_id": "past"},
    ]
    requests = read(logs, tmp_path, *records)
    encoder = PromptEncoder(
        Letters(), Prompt(instruction="I\n", segment="{title}:"), requests.items
    )
    found, tokens = without_long(requests, encoder, 100), 200 + len("I\n: yes")
    assert names(found) == ["fits"]
    assert [(r.place, r.request_id) for r in found.invalid] == [
        (0, "unknown"),
        (1, "long"),
        (3, "past"),
    ]
    assert (
        f"request 'long': The prompt of item 'new' alone has {tokens} tokens"
        in found.invalid[1].error
    )
    assert without_long(requests, encoder, tokens) is requests
    with pytest.raises(DataError, match="None of the 1 requests"):
        some_usable(without_long(read(logs, tmp_path, records[1]), encoder, 100))
