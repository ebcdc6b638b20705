"""Answers of a retriever of one's own: what it may name, and one clear error for everything else."""

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest

from project.errors import ConfigError
from project.retrieval.base import NO_NEIGHBOURS, Neighbours, Raters, Retriever

NO_CUTS = np.empty(0)


class Answers(Retriever):
    """Answers by a function of (retriever, user, item, raters), which also finds what it was told of."""

    def __init__(self, answer: Callable[..., Any] | None = None) -> None:
        super().__init__(neighbours=3)
        self.answer = answer
        self.told: list[tuple[int, int]] = []

    def begin(self, num_users: int, items: pl.DataFrame) -> None: ...

    def select(self, user: int, item: int, timestamp: float, raters: Raters) -> Neighbours:
        assert self.answer is not None
        found: Neighbours = self.answer(self, user, raters)
        return found

    def observe(self, row: int, user: int, item: int, label: int) -> None:
        self.told.append((row, user))


def ones(rows: Any) -> Neighbours:
    return Neighbours(np.asarray(rows, np.int64), np.ones(len(rows), np.float32))


def if_three(made: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda _, __, raters: made(raters.row[-3:]) if raters.row.size >= 3 else NO_NEIGHBOURS


def positions(_: Answers, __: int, raters: Raters) -> Neighbours:
    return ones(np.arange(raters.row.size)[:3])


def strangers(self: Answers, user: int, _: Raters) -> Neighbours:
    return ones([row for row, other in self.told if other != user][:1])


LEAKS: dict[str, Callable[..., Any]] = {
    "the asked row itself": lambda self, _, __: ones([len(self.told)]),
    "the next row": lambda self, _, __: ones([len(self.told) + 1]),
    "positions in raters": positions,
    "somebody else's row on any item": strangers,
    "no row of the log": lambda _, __, ___: ones([10**6]),
    "a negative row": lambda _, __, ___: ones([-1]),
}
MALFORMED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "None": (lambda rows: None, "returned None"),
    "a list": (lambda rows: rows.tolist(), r"returned \["),
    "a pair": (lambda rows: (rows, np.ones(3)), r"returned \(array"),
    "too many": (lambda rows: ones([*rows, *rows]), "returned 6 rows"),
    "unequal": (lambda rows: Neighbours(rows, np.ones(2, np.float32)), r"returned Neighbours\("),
    "NaN": (lambda rows: Neighbours(rows, np.array([1, np.nan, 1], np.float32)), "NaN or infinite"),
    "infinite": (lambda rows: Neighbours(rows, np.array([1, 1, np.inf], np.float32)), "NaN or infinite"),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_row_that_was_not_handed_out_is_refused(log_of: Callable, retrieved_of: Callable, leak: Any):
    """The future cannot be named, nor what looks like rows: the error names the class and what may be answered."""
    with pytest.raises(ConfigError, match=r"test_checks\.Answers.*may tell the future.*raters\.row"):
        retrieved_of(log_of(0), Answers(leak), NO_CUTS)


@pytest.mark.parametrize(("made", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_refused(log_of: Callable, retrieved_of: Callable, made: Any, words: str):
    """The error names the class, what it returned and what was expected."""
    with pytest.raises(ConfigError, match=rf"test_checks\.Answers.*{words}.*expected Neighbours"):
        retrieved_of(log_of(0), Answers(if_three(made)), NO_CUTS)


def test_raters_and_own_rows_may_be_named_together(log_of: Callable, retrieved_of: Callable):
    """One answer may hold the latest rater of the candidate and the user's own latest row of an earlier second."""

    def mixed(self: Answers, user: int, raters: Raters) -> Neighbours:
        own = [row for row, other in self.told if other == user][-1:]
        return ones([*raters.row[-1:], *own])

    rows = log_of(0)
    found = retrieved_of(rows, Answers(mixed), NO_CUTS)
    assert found["neighbour_count"].max() == 2
    time = dict(rows.select("row_id", "timestamp").iter_rows())
    assert all(
        time[n] < time[row]
        for row, n in found.select("row_id", "neighbours").explode("neighbours").drop_nulls().iter_rows()
    )
