import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import read_split

from project.data.protocol import Interactions, Protocol
from project.data.requests import read_requests
from project.errors import DataError


@pytest.fixture(scope="module")
def logs(tiny_logs: Path) -> Interactions:
    return read_split(tiny_logs, Protocol()).interactions


def write(folder: Path, *records: object) -> str:
    path = folder / "requests.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", ["line 2", "JSON"]),
        ('{"request_id": ' + 5000 * "1", ["line 2", "JSON"]),
        (99_999 * "[", ["line 2", "JSON"]),
        (
            '{"request_id": "b", "user_id": "u1", "time": 1' + 400 * "0" + ', "candidates": ["i1"]}',
            ["line 2", "time is 1000", "seconds"],
        ),
        ({"request_id": "b", "user_id": "u1", "time": 1.7e12, "candidates": ["i1"]}, ["no milliseconds"]),
        ({"request_id": "b", "user_id": "\ud800", "candidates": ["i1"]}, ["line 2", "not UTF-8"]),
        ({"request_id": "b", "history": 0, "candidates": ["i1"]}, ["line 2", "'history': 0", "list"]),
        (
            {"request_id": "b", "history": [{"item_id": "i1", "answer": 1, "time": 1}], "candidates": ["i1"]},
            ["line 2", "'answer'", "with label 0 or 1"],
        ),
        ([1], ["line 2", "list"]),
        ({"request_id": "b", "user_id": "u1", "candidates": "i1"}, ["line 2", "candidates", "list"]),
        ({"request_id": "b", "user_id": "u1", "candidates": [{"title": "x"}]}, ["line 2", "item_id"]),
        ({"request_id": "b", "user_id": "u1", "candidates": [None]}, ["line 2", "item_id"]),
        ({"request_id": "b", "history": 5, "candidates": ["i1"]}, ["line 2", "history", "list"]),
        (
            {"request_id": "b", "user_id": "u1", "time": float("nan"), "candidates": ["i1"]},
            ["line 2", "time", "nan"],
        ),
        ({"request_id": "b", "candidates": ["i1"]}, ["line 2", "either user_id or a history"]),
        (
            {"request_id": "a", "user_id": "u2", "candidates": ["i2"]},
            ["line 2: request_id 'a' is also that of line 1"],
        ),
        ({"request_id": "a", "user_id": "u2", "candidates": []}, ["line 2: request_id 'a'"]),
        (
            {"request_id": "b", "user_id": "u1", "history": [], "candidates": ["i1"]},
            ["line 2", "either user_id or a history"],
        ),
        ({"request_id": "b", "user": "u1", "candidates": ["i1"]}, ["line 2", "user"]),
        (
            {"request_id": "b", "user_id": "u1", "time": "now", "candidates": ["i1"]},
            ["line 2", "time", "now"],
        ),
        (
            {"request_id": "b", "history": [{"item_id": "i1", "label": 5, "time": 1}], "candidates": ["i1"]},
            ["line 2", "history", "0 or 1"],
        ),
    ],
)
def test_bad_requests(record: object, words: list[str], logs: Interactions, tmp_path: Path) -> None:
    """A line that is no request is refused alone: file, line and what was expected."""
    good = {"request_id": "a", "user_id": "u1", "candidates": ["i1"]}
    found = read_requests(write(tmp_path, good, record, good | {"request_id": "z"}), logs)
    assert [r.request_id for r in found.requests] == ["a", "z"]
    (refused,) = found.refused
    assert refused.place == 1
    assert refused.request_id not in ("a", "z")
    assert all(word in refused.error for word in ["requests.jsonl", *words]), refused.error


UNKNOWN = {"item_id": "zzz", "label": 1, "time": 1}
REFUSED = [
    ({"user_id": "u1", "candidates": []}, "at least one candidate"),
    ({"user_id": "u1", "candidates": ["i1", "zzz"]}, "'zzz' is not in the items table"),
    ({"history": [UNKNOWN], "candidates": ["i1"]}, "'zzz' is not in the items table"),
]


@pytest.mark.parametrize(("record", "words"), REFUSED)
def test_a_request_for_what_is_not_there_is_refused_alone(
    record: dict[str, object], words: str, logs: Interactions, tmp_path: Path
) -> None:
    """Its place, name, candidates and error are kept, the requests around it are read as without it."""
    a, c = ({"request_id": name, "user_id": "u1", "candidates": ["i1", "i1"]} for name in "ac")
    found = read_requests(write(tmp_path, a, {"request_id": "b", **record}, c), logs)
    plain = read_requests(write(tmp_path, a, c), logs)
    assert (found.requests, found.codes) == (plain.requests, plain.codes)
    assert found.items.equals(plain.items)
    (refused,) = found.refused
    assert (refused.place, refused.request_id, refused.candidates) == (1, "b", tuple(record["candidates"]))  # type: ignore[arg-type]
    assert words in refused.error
    assert "line 2" in refused.error


def test_a_file_of_refused_requests_stops(logs: Interactions, tmp_path: Path) -> None:
    """Nothing to score is an error: the first refusal, and how many there were."""
    records = [{"request_id": str(number), **record} for number, (record, _) in enumerate(REFUSED)]
    with pytest.raises(DataError, match=r"line 1: found .*at least one candidate.*None of the 3 requests"):
        read_requests(write(tmp_path, *records), logs)


def test_no_requests(logs: Interactions, tmp_path: Path) -> None:
    """No file, an absent file and an empty file are told apart."""
    for file, word in (
        (None, "data.requests"),
        ("absent.jsonl", "does not exist"),
        (write(tmp_path), "no request"),
    ):
        with pytest.raises(DataError, match=word):
            read_requests(file, logs)


def test_unreadable_parquet(logs: Interactions, tmp_path: Path) -> None:
    """A Parquet file that is none is named."""
    (tmp_path / "requests.parquet").write_text("no")
    with pytest.raises(DataError, match=r"requests\.parquet \(data\.requests\) cannot be read"):
        read_requests(str(tmp_path / "requests.parquet"), logs)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_requests_that_are_not_utf8(encoding: str, logs: Interactions, tmp_path: Path) -> None:
    """Another encoding is named as what it is not; the mark that Windows puts before UTF-8 is none."""
    line = json.dumps({"request_id": "é", "user_id": "u1", "candidates": ["i1"]}, ensure_ascii=False)
    file = tmp_path / "requests.jsonl"
    file.write_bytes(line.encode(encoding))
    with pytest.raises(DataError, match=r"requests\.jsonl, line 1: not UTF-8 text"):
        read_requests(str(file), logs)
    file.write_bytes(line.encode("utf-8-sig"))
    assert [r.request_id for r in read_requests(str(file), logs).requests] == ["é"]


def test_a_line_ends_at_its_newline_only(logs: Interactions, tmp_path: Path) -> None:
    """What Unicode calls a line's end may stand in a text, as JSON allows; a file may come from Windows."""
    record = {"request_id": "a\u2028b\x85c", "user_id": "u1", "candidates": ["i1"]}
    file = tmp_path / "requests.jsonl"
    file.write_bytes((json.dumps(record, ensure_ascii=False) + "\r\n").encode())
    found = read_requests(str(file), logs)
    assert [r.request_id for r in found.requests] == ["a\u2028b\x85c"]


def test_parquet_equals_jsonl(logs: Interactions, tmp_path: Path) -> None:
    """The same requests from Parquet and JSONL are equal; a new item gets a code after the known ones."""
    records = [
        {"request_id": "a", "user_id": "u1", "time": 5.0, "candidates": ["i1", "i2"]},
        {"request_id": "b", "user_id": "nobody", "time": None, "candidates": ["i3"]},
    ]
    pl.DataFrame(records).write_parquet(tmp_path / "requests.parquet")
    parquet = read_requests(str(tmp_path / "requests.parquet"), logs)
    assert parquet.requests == read_requests(write(tmp_path, *records), logs).requests
    new = {"item_id": "fresh", "title": "a dog"}
    more = read_requests(
        write(tmp_path, {"request_id": "c", "user_id": "u1", "candidates": [new, "i1"]}), logs
    )
    assert more.codes["fresh"] == len(logs.items)
    assert more.items["title"][-1] == "a dog"
    assert more.table()["item_id"].to_list() == ["fresh", "i1"]


@given(data=st.data())
@settings(derandomize=True, max_examples=100)
def test_a_mutated_line_never_ends_the_file(
    data: st.DataObject, logs: Interactions, tmp_path_factory: Any
) -> None:
    """Some bytes of a line are others: it is read or refused, and the next line is read."""
    history = [
        {"item_id": "i1", "label": 1, "time": 5},
        {"item_id": "n", "title": "a dog", "label": 0, "time": 6.5},
    ]
    line = json.dumps(
        {"request_id": "a", "history": history, "time": 9, "candidates": ["i2", {"item_id": "n"}]}
    )
    mutated = bytearray(line.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3)).replace(
            b"\n", b" "
        )
    file = tmp_path_factory.mktemp("mutated") / "requests.jsonl"
    file.write_bytes(bytes(mutated) + b'\n{"request_id": "z", "user_id": "u1", "candidates": ["i1"]}')
    found = read_requests(str(file), logs)
    assert [r.request_id for r in found.requests][-1] == "z"
    assert len(found.requests) + len(found.refused) <= 2
