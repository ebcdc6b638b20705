"""Tests a retriever of one's own: which rows it may name, what it must answer, and its part of the cache's key."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
from example_logs import make_log, make_split, retrieved

from project.data.logs import TableLogs
from project.datamodule import InteractionData
from project.errors import ConfigError
from project.retrieval import RetrievedFeatures, Retriever
from project.retrieval.base import NO_NEIGHBOURS, Neighbours, Raters, failures_named

NO_CUTS = np.empty(0)


class Answers(Retriever):
    """Answers by a function of (retriever, user, raters), and keeps the rows that it observed."""

    def __init__(self, answer: Callable[..., Any] | None = None) -> None:
        super().__init__(neighbours=3)
        self.answer = answer
        self.observed: list[tuple[int, int]] = []

    def begin(self, num_users: int, items: pl.DataFrame) -> None: ...

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        assert self.answer is not None
        found: Neighbours = self.answer(self, user, raters)
        return found

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        self.observed.append((row, user))


def ones(rows: Any) -> Neighbours:
    return Neighbours(np.asarray(rows, np.int64), np.ones(len(rows), np.float32))


LEAKS: dict[str, Callable[..., Any]] = {
    "the answered row itself": lambda self, _, __: ones([len(self.observed)]),
    "the next row": lambda self, _, __: ones([len(self.observed) + 1]),
    "positions in raters": lambda _, __, raters: ones(np.arange(raters.row.size)[:3]),
    "a stranger's row": lambda self, user, _: ones(
        [row for row, who in self.observed if who != user][:1]
    ),
    "no row of the log": lambda _, __, ___: ones([10**6]),
    "a negative row": lambda _, __, ___: ones([-1]),
}
MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "None": (lambda rows: None, "returned None"),
    "a pair": (lambda rows: (rows, np.ones(3)), r"returned \(array"),
    "too many": (lambda rows: ones([*rows, *rows]), "6 rows"),
    "unequal": (
        lambda rows: Neighbours(rows, np.ones(2, np.float32)),
        r"returned Neighbours\(",
    ),
    "NaN": (
        lambda rows: Neighbours(rows, np.array([1, np.nan, 1], np.float32)),
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_row_that_was_not_given_is_refused(leak: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"test_own_retriever\.Answers.*may leak the future"
    ):
        retrieved(make_log(0), Answers(leak), NO_CUTS)


@pytest.mark.parametrize(("made", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_refused(made: Any, words: str) -> None:
    def answer(_: Answers, __: int, raters: Raters) -> Any:
        return made(raters.row[-3:]) if raters.row.size >= 3 else NO_NEIGHBOURS

    with pytest.raises(
        ConfigError, match=rf"test_own_retriever\.Answers.*{words}.*expected Neighbours"
    ):
        retrieved(make_log(0), Answers(answer), NO_CUTS)


def test_raters_and_own_rows_may_be_named_together() -> None:
    """The latest rater of the candidate and the user's own latest row of an earlier second."""

    def mixed(self: Answers, user: int, raters: Raters) -> Neighbours:
        return ones(
            [*raters.row[-1:], *[row for row, other in self.observed if other == user][-1:]]
        )

    rows = make_log(0)
    found = retrieved(rows, Answers(mixed), NO_CUTS)
    assert found["neighbour_count"].max() == 2
    time = rows["timestamp"].to_list()
    named = found.select("row_id", "neighbours").explode("neighbours").drop_nulls()
    assert all(time[neighbour] < time[row] for row, neighbour in named.iter_rows())


SOURCE = """
import numpy as np
from project.retrieval.base import Neighbours, Retriever

class Mine(Retriever):
    def __init__(self, k=5):
        {init}

    {more}

    def begin(self, num_users, items):
        pass

    def select(self, user, item, timestamp, raters):
        rows = raters.row{which}[:1]
        return Neighbours(rows, np.ones(rows.size, np.float32))
"""
KEEPS = "super().__init__(); self.k = k"
Write = Callable[..., type[Retriever]]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Write]:
    """Writes and imports a module with a retriever of one's own, again and again."""

    def write(which: str = "", init: str = KEEPS, more: str = "") -> type[Retriever]:
        file = tmp_path / "mine.py"
        file.write_text(SOURCE.format(which=which, init=init, more=more))
        module = ModuleType("mine")
        module.__file__ = str(file)
        sys.modules["mine"] = module  # where inspect looks for a class's file
        exec(compile(file.read_text(), file, "exec"), module.__dict__)
        kind: type[Retriever] = module.Mine
        return kind

    yield write
    sys.modules.pop("mine", None)


def test_an_edited_retriever_answers_again(written: Write, tmp_path: Path) -> None:
    """First rater, then latest: another source is another key, and the cache gives the new one's answers."""
    rows = make_log(0)
    split = make_split(rows, np.zeros(rows.height, int))

    def votes(which: str) -> list[float | None]:
        tables = RetrievedFeatures(split, written(which)(), 3, tmp_path / "cache").tables()
        return tables["train"]["vote"].to_list()

    first, latest = votes(""), votes("[::-1]")
    assert first != latest
    assert votes("") == first
    assert len(list((tmp_path / "cache" / "retrieved").iterdir())) == 2


def test_a_base_in_another_file_and_a_class_without_a_file_count(written: Write) -> None:
    """Typed into a notebook, a class counts by what its methods do."""

    def child(which: str) -> str:
        kind = type("Child", (written(which),), {"__module__": __name__})
        found: str = kind().settings()["source"]
        return found

    def typed(which: str) -> str:
        names: dict[str, Any] = {"__name__": "notebook"}
        exec(SOURCE.format(which=which, init=KEEPS, more=""), names)
        found: str = names["Mine"]().settings()["source"]
        return found

    for source in (child, typed):
        assert source("") == source("") != source("[::-1]")


WRONG = {
    "no super": (
        {"init": "self.k = k"},
        r"Mine, which has no attribute neighbours.*Write super\(\)",
    ),
    "not kept": (
        {"init": "super().__init__(); self._k = k"},
        r"Mine, which has no attribute k.*self\.k = k",
    ),
    "observe": (
        {"more": "def observe(self, row, label): pass"},
        r"Mine, whose observe takes \(row, label\); expected observe\(row, user, item, label\)",
    ),
}


@pytest.mark.parametrize(("how", "words"), WRONG.values(), ids=WRONG)
def test_a_class_that_does_not_fit_is_refused_before_a_log_is_read(
    written: Write, how: dict[str, str], words: str
) -> None:
    """The base's constructor, each argument under its name, and the arguments of methods."""
    with pytest.raises(ConfigError, match=rf"data\.retriever is {words}"):
        InteractionData(TableLogs("absent.csv", "absent.csv"), written(**how)())


def test_what_it_raises_names_class_and_method(written: Write) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"data\.retriever: Mine\.fit failed: ZeroDivisionError"
        ),
        failures_named(mine := written(more="def fit(self, edges, block): 1 / 0")()),
    ):
        retrieved(make_log(0), mine, np.array([3.0]))
