"""Tests candidates: their sources by hand, whose turn it is, and what may be listed."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from example_logs import CUTS, NUM_ITEMS, by_time, make_log, make_split
from hypothesis import given
from hypothesis import strategies as st

from project.data.filters import passing, spread
from project.errors import ConfigError
from project.retrieval.candidates import (
    CandidateFinder,
    CandidateSettings,
    merged,
)
from project.retrieval.walk import Snapshots

ITEMS = pl.DataFrame(
    {
        "item": [0, 1, 2, 3],
        "item_id": ["a", "b", "c", "d"],
        "title": ["One (1)", "Two, too", "Three", "Four"],
        "genres": ["Action Drama", "Drama|Children's", "", "Sci-Fi, Action"],
        "price": ["5", " 7.5", "cheap", ""],
    }
)
NO_TEXT = np.zeros(NUM_ITEMS)
ALL = np.ones(NUM_ITEMS, np.bool_)


def finder(
    source: str, rows: list[tuple[Any, ...]], number: int = 9, before: float = 99.0
) -> CandidateFinder:
    """One source alone, of a log of rows (user, item, seconds, label); vectors are those of one fit at 20 s."""
    names = ("user", "item", "timestamp", "label")
    kinds = {"user": pl.Int32, "item": pl.Int32, "timestamp": pl.Float64, "label": pl.Int8}
    table = pl.DataFrame(rows, kinds, orient="row").with_row_index("row_id")
    assert tuple(table.columns[1:]) == names
    weighted = np.zeros((NUM_ITEMS, 2), np.float32)
    weighted[:4] = [[1, 0], [0.5, 0.5], [0, 1], [-1, 0]]
    snapshots = Snapshots(CUTS[:1], [{"weighted": weighted}])
    settings = CandidateSettings(number, {source: 1.0})
    split = make_split(table, by_time(table))
    return CandidateFinder(split, snapshots, settings, before)


def answers(*past: tuple[int, int]) -> Any:
    """Items and labels."""
    return np.array(past, np.int64).reshape(-1, 2).T


LOG = [
    *((0, 0, 0.0, 1), (0, 1, 1.0, 1), (0, 4, 2.0, 0)),
    *((1, 0, 3.0, 1), (1, 1, 4.0, 1), (1, 2, 5.0, 1)),
    *((2, 1, 6.0, 1), (2, 3, 7.0, 1), (2, 5, 39.0, 1)),
]


def test_similar_by_hand() -> None:
    """Of item 0 (users 0, 1): item 1 (0, 1, 2) has 2 / sqrt(6) = .82, item 2 (1) has 1 / sqrt(2) = .71, others 0."""
    found = finder("similar", LOG).find(*answers((0, 1), (4, 0)), ALL, NO_TEXT)
    assert list(found) == [0, 1, 2]  # item 0 itself has 1
    without = ALL.copy()
    without[0] = False
    assert list(finder("similar", LOG).find(*answers((0, 1)), without, NO_TEXT)) == [1, 2]
    assert finder("similar", LOG).find(*answers((4, 0)), ALL, NO_TEXT) == {}


def test_light_gcn_by_hand() -> None:
    """Likes before 20 s: 2, 3, 1, 1. Item 0 liked is the vector (1, 0): sqrt 2, sqrt 3 / 2, 0, -1. Others have none.

    Item 3 disliked alone is -.5 (-1, 0), the same direction; a vector of nothing finds nothing.
    """
    made = finder("light_gcn", LOG)
    for past in ((0, 1), (3, 0)):
        assert list(made.find(*answers(past), ALL, NO_TEXT)) == [0, 1, 2, 3]
    assert list(made.find(*answers((3, 1)), ALL, NO_TEXT)) == [3, 2, 1, 0]
    assert (
        made.find(*answers((7, 1)), ALL, NO_TEXT)
        == made.find(*answers(), ALL, NO_TEXT)
        == {}
    )


def test_a_fit_is_read_from_its_second_on() -> None:
    """It read what is strictly earlier; test begins with a fit where its share of the rows is that of a block."""
    for before, count in ((19.0, 0), (20.0, 4)):
        made = finder("light_gcn", LOG, before=before)
        assert len(made.find(*answers((0, 1)), ALL, NO_TEXT)) == count


def test_popular_of_late() -> None:
    """Half counts after 22.4 s, the latest tenth of 8 likes. Item 5 at 39 s: 1; item 1 at 1, 4, 6 s: 1.008.

    Item 0: .63. An event of a like counts, on a new item, too: at 60 s 1.9; of a dislike it does not.
    """
    made = finder("popular", LOG, number=3)
    assert list(made.find(*answers(), ALL, NO_TEXT)) == [1, 5, 0]
    more = np.ones(NUM_ITEMS + 1, np.bool_)
    for label in (0, 1):
        made.observe(NUM_ITEMS, label, 60.0)
        first = next(iter(made.find(*answers(), more, np.zeros(NUM_ITEMS + 1))))
        assert first == (NUM_ITEMS if label else 1)


def test_weights_by_hand() -> None:
    """Likes of late and one, to the power that the settings say: an item without any counts 1."""
    made = finder("popular", LOG)
    made._popular[:2] = [3.0, -1e-9]
    items = np.array([0, 1, NUM_ITEMS + 5])
    np.testing.assert_allclose(made.weights(items), [4.0, 1.0, 1.0])
    made.settings = CandidateSettings(popularity=0.5)
    np.testing.assert_allclose(made.weights(items), [2.0, 1.0, 1.0])
    with pytest.raises(ConfigError, match=r"popularity is -1; expected 0 or more"):
        CandidateSettings(popularity=-1)


def test_deleted_likes_count_no_more() -> None:
    """Of user 1: nobody likes item 2 with item 1 any more, and .67 of item 1 is left. How many liked an item stays."""
    for source in ("similar", "popular"):
        made = finder(source, LOG)
        made.observe(6, 1, 50.0)
        made.forget(1, [(0, 1, 3.0), (1, 1, 4.0), (2, 1, 5.0)])
        made.forget(99, [(6, 1, 50.0)])
        found = made.find(*answers((1, 1)), ALL, NO_TEXT)
        assert [*found][:4] == ([1, 3, 5, 0] if source == "similar" else [5, 1, 3, 0])


def test_what_lies_ahead_is_not_read() -> None:
    """As of a second, the rows from then on could be any."""
    rows = make_log(0)
    weighted = np.random.default_rng(0).normal(size=(2, NUM_ITEMS, 3)).astype(np.float32)
    found = list[Any]()
    for kept in (rows, rows.filter(pl.col("timestamp") < 30)):
        fitted = [{"weighted": weighted[0]}, {"weighted": weighted[1] * len(kept)}]
        made = CandidateFinder(
            make_split(kept, by_time(kept)),
            Snapshots(CUTS, fitted),
            CandidateSettings(5),
            before=30.0,
        )
        found.append(made.find(*answers((0, 1), (3, 0)), ALL, NO_TEXT))
    assert found[0] == found[1]
    assert set(found[0].values()) == {"light_gcn", "similar", "popular"}


LISTS = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, 12), unique=True), min_size=1
)


@given(LISTS, st.integers(1, 12), st.randoms())
def test_turns(ranked: dict[str, list[int]], number: int, random: Any) -> None:
    """No item twice, each from a source that has it, as many as there are; shares hold where nobody runs out."""
    shares = {name: random.choice([0.5, 1.0, 3.0]) for name in ranked}
    found = merged({k: np.array(v, np.int64) for k, v in ranked.items()}, shares, number)
    assert all(item in ranked[source] for item, source in found.items())
    assert len(found) == min(number, len({item for of in ranked.values() for item in of}))
    apart = {name: np.arange(20) + 100 * k for k, name in enumerate(ranked)}
    counts = list(merged(apart, shares, number).values())
    for name, share in shares.items():
        exact = number * share / sum(shares.values())
        assert abs(counts.count(name) - exact) < len(shares)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, "abcd"),
        ({"genres": ["Children's", "Sci-Fi"]}, "bd"),
        ({"genres": ["Child", "Sci", "A.tion"]}, ""),
        ({"genres": [""]}, "c"),
        ({"title": ["One (1)", "Two, too"]}, "ab"),
        ({"price": {"max": 7.5}}, "ab"),
        ({"genres": ["Drama"], "price": {"min": 6}}, "b"),
    ],
)
def test_filters(wanted: dict[str, Any], expected: str) -> None:
    """Values whole or between separators, numbers between bounds, all conditions together."""
    kept = ITEMS["item_id"].filter(pl.Series(passing(ITEMS, wanted)))
    assert "".join(kept) == expected


def test_spread() -> None:
    """At most one of a value, and the next ones move up; an empty value is no value."""
    items = ITEMS[[0, 0, 2, 2, 3]]
    assert spread([4, 1, 0, 2, 3], items, {"genres": 1}) == [4, 1, 2, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"number": 0},
        *({"shares": s} for s in ({}, {"txt": 1.0}, {"text": -1.0}, {"text": 0.0})),
        {"shares": {"text": 1.0, "popular": float("nan")}},
    ],
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    """An unknown source, a negative share, nothing at all: by message, before the log is read."""
    found = r"data.candidates has .*of light_gcn, similar, text, popular"
    with pytest.raises(ConfigError, match=found):
        CandidateSettings(**settings)
