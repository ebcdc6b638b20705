"""Tests turns of the inference process: requests of known items never wait for the embedding of new texts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ranker import FakeRanker

from project.request import Item, RankRequest
from project.serve import inference
from project.serve.inference import Served
from project.serve.settings import ServeSettings

KNOWN = RankRequest("u1", None, ["i1"])
NEW = RankRequest("u1", None, [Item(title="new 1"), Item(title="new 2"), "i1"])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """One text is embedded at a time; 16 characters may wait."""
    monkeypatch.setattr(inference, "PIECE", 1)
    settings = ServeSettings(
        tmp_path / "run", f"sqlite:///{tmp_path}/events.db", max_new_characters=1
    )
    return Served(settings, FakeRanker.load)


def numbers(answers: list[tuple[int, Any]]) -> list[int]:
    return [number for number, _ in answers]


def test_a_request_waits_aside_until_its_texts_are_embedded(served: Served) -> None:
    """Turn by turn one text of it; what came with it is answered at once."""
    assert numbers(served.turn([(0, NEW), (1, KNOWN)])) == [1]
    assert served.characters() == 10
    for left in (5, 0):
        served.embed(0.0)
        assert served.characters() == left
        assert numbers(served.turn([])) == ([] if left else [0])
    assert not served.busy()


def test_a_deadline_ends_the_waiting(served: Served) -> None:
    """Then the request is answered, late, and its texts need not be embedded any more."""
    timed = replace(NEW, deadline=time.monotonic() + 0.05)
    assert served.turn([(0, timed)]) == []
    time.sleep(0.06)
    ((number, answer),) = served.turn([])
    assert (number, answer.late, answer.error, served.busy()) == (0, True, None, False)


def test_the_shortest_first_and_the_store_in_turns(served: Served) -> None:
    """A request with little text does not wait for one with much, nor the store's items for requests."""
    ranker = served._ranker
    small = RankRequest("u1", None, [Item(title="new 3")])
    served.turn([(0, NEW), (1, small)])
    for k in (1, 2):
        ranker.waiting.add(f"i{k}", f"stored {k}")
    served.embed(60.0)
    assert ranker.read == ["stored 1", "new 3", "stored 2", "new 1", "new 2"]
    assert sorted(numbers(served.turn([]))) == [0, 1]


def test_too_much_new_text(served: Served) -> None:
    """A request whose new texts would wait behind 16 characters or more is answered 429; known items are not."""
    more = replace(NEW, candidates=[Item(title="new 3"), Item(title="new 4")])
    found = dict(served.turn([(0, NEW), (1, more), (2, NEW), (3, KNOWN)]))
    assert (found[2].status_code, found[2].headers) == (429, {"Retry-After": "1"})
    assert (sorted(found), found[3].error) == ([2, 3], None)
