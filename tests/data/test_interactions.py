"""A protocol is checked before a log is read; then it makes one table of coded rows and 0/1 labels of the log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.data.logs import RAW_SCHEMA, RawLogs
from project.data.negatives import Negatives
from project.data.protocol import Protocol, apply_protocol, build_interactions, label_expression
from project.errors import ConfigError, DataError

MakeLogs = Callable[..., RawLogs]
RULE = Protocol(label="rating > 3")
TWO = [("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0)]
CLICKS = [("1", "a", float(time), 5.0) for time in range(10)]
DUPLICATED = [("1", "a", 1.0, 5.0), ("1", "b", 1.0, 1.0), ("1", "a", 1.0, 2.0), ("1", "a", 2.0, 5.0)]

UNDATED = [(user, item, None, rating) for user, item, _, rating in DUPLICATED]


def test_label_rules() -> None:
    ratings = pl.DataFrame({"rating": [2.0, 3.0, 4.0]})
    for rule, labels in (
        ("rating > 3", [0, 0, 1]),
        ("rating >= 3", [0, 1, 1]),
        ("rating<3", [1, 0, 0]),
        (" rating <= 3.0 ", [1, 1, 0]),
        ("rating == 3", [0, 1, 0]),
    ):
        assert ratings.select(label_expression(rule)).to_series().to_list() == labels


RULES = ("", "rating", "stars > 3", "rating => 3", "rating > three", "rating > 3 or 4", "rating > nan")
SHARES = ([0.8, 0.1], [0.8, 0.1, 0.2], [1.2, -0.1, -0.1], [])
FOLD_SHARES = ([0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("label", rule) for rule in RULES),
        *(("shares", shares) for shares in SHARES),
        *(("fold_shares", shares) for shares in (*SHARES, *FOLD_SHARES)),
        ("label", "clicked"),
        ("negatives", Negatives()),
        ("minimum_history", -1),
        ("seed", -1),
        *(("hide_items", share) for share in (-0.1, 1.0, 1.5, float("nan"))),
        *(("train_users", share) for share in (-0.1, 0.0, 1.5, float("nan"))),
    ],
)
def test_what_cannot_work_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.protocol\.{key}"):
        Protocol(**{key: value}).check()


def test_shares_and_names() -> None:
    """Shares that sum to one only in decimal pass; a name is made from what matters."""
    Protocol(shares=[0.7, 0.1, 0.2]).check()
    for protocol, name in (
        (Protocol(minimum_history=5), "global_time-80-10-10-h5"),
        (Protocol(split="user_time", shares=[0.7, 0.05, 0.25]), "user_time-70-5-25"),
        (Protocol(split="random", seed=3), "random-80-10-10-seed3"),
        (Protocol(split="leave_last", minimum_history=1), "leave_last-h1"),
        (Protocol(split="given"), "given"),
        (Protocol(minimum_history=5, hide_items=0.2), "global_time-80-10-10-h5-cold20"),
        (Protocol(train_users=0.05), "global_time-80-10-10-users5"),
    ):
        assert protocol.name == name


def test_golden_table(make_logs: MakeLogs) -> None:
    """Codes in numeric order (9 before 10), rows by (timestamp, user, item), labels by the rule."""
    raw = make_logs(
        [("10", "b", 2.0, 5.0), ("9", "b", 1.0, 3.0), ("9", "a", 2.0, 4.0), ("10", "a", 2.0, 1.0)]
    )
    built = build_interactions(raw, RULE)
    assert built.users.rows() == [(0, "9"), (1, "10")]
    assert built.items.rows() == [(0, "a", "Title a"), (1, "b", "Title b")]
    assert built.rows.rows() == [
        (0, 0, 1, 1.0, 0, 3.0, None),
        (1, 0, 0, 2.0, 1, 4.0, None),
        (2, 1, 0, 2.0, 0, 1.0, None),
        (3, 1, 1, 2.0, 1, 5.0, None),
    ]
    integers = {"row_id": pl.Int64, "user": pl.Int32, "item": pl.Int32}
    others = {"timestamp": pl.Float64, "label": pl.Int8, "rating": pl.Float64, "given_split": pl.String}
    assert dict(built.rows.schema) == integers | others
    assert built.files == raw.files


@pytest.mark.parametrize(("ids", "order"), [("10 9 x", "10 9 x"), ("7 07", "07 7")])
def test_ids_that_are_not_all_integers_are_ordered_as_text(ids: str, order: str, make_logs: MakeLogs) -> None:
    """One id with a letter, and "10" comes before "9"; "7" and "07" are two users."""
    raw = make_logs([(name, "i", float(k), 5.0 - 2 * (k > 0)) for k, name in enumerate(ids.split())])
    assert build_interactions(raw, RULE).users["user_id"].to_list() == order.split()


@settings(derandomize=True, max_examples=30)
@given(st.permutations(range(12)))
def test_order_of_the_file_does_not_matter(order: list[int]) -> None:
    rows = [(str(i % 3), str(i % 4), float(i // 5), float(i % 5 + 1)) for i in range(12)]
    items = pl.DataFrame({"item_id": ["0", "1", "2", "3"], "title": ["a", "b", "c", "d"]})

    def built(rows: list[tuple[str, str, float, float]]) -> pl.DataFrame:
        frame = pl.DataFrame(rows, ["user_id", "item_id", "timestamp", "rating"], orient="row")
        absent = [pl.lit(None, kind).alias(name) for name, kind in RAW_SCHEMA.items() if name not in frame]
        return build_interactions(RawLogs(frame.with_columns(absent), items, {}), RULE).rows

    assert built([rows[i] for i in order]).equals(built(rows))


def test_nor_does_it_without_timestamps(make_logs: MakeLogs) -> None:
    protocol = replace(RULE, split="random", shares=[0.5, 0.3, 0.2])
    rows: list[Any] = [(str(i % 3), str(i % 4), None, float(i % 5 + 1)) for i in range(12)]
    one, other = (build_interactions(make_logs(order), protocol) for order in (rows, rows[::-1]))
    assert apply_protocol(one, protocol).rows.equals(apply_protocol(other, protocol).rows)


def test_dropped_ratings_and_their_users_are_gone(make_logs: MakeLogs) -> None:
    """drop_ratings removes rows before anything else; the catalogue keeps every item."""
    raw = make_logs([("1", "a", 1.0, 5.0), ("2", "b", 2.0, 3.0), ("1", "c", 3.0, 1.0)])
    built = build_interactions(raw, Protocol(drop_ratings=[3], label="rating > 3"))
    assert (built.rows.height, built.users.height, built.items.height, built.dropped) == (2, 1, 3, 1)


def test_a_log_of_labels_needs_no_rule(make_logs: MakeLogs) -> None:
    assert build_interactions(make_logs(TWO, labels=[0, 1]), Protocol()).rows["label"].to_list() == [0, 1]


@pytest.mark.parametrize(("policy", "rating"), [("first", 5.0), ("last", 2.0)])
def test_duplicates_by_policy(make_logs: MakeLogs, policy: Any, rating: float) -> None:
    """Rows 1 and 3 repeat (user, item, timestamp): one stays; the same item at another time is no repetition."""
    built = build_interactions(make_logs(DUPLICATED), Protocol(duplicates=policy, label="rating > 3"))
    kept = built.rows.filter((pl.col("item") == 0) & (pl.col("timestamp") == 1))
    assert kept["rating"].to_list() == [rating]
    assert (built.rows.height, built.duplicates) == (3, 1)


@pytest.mark.parametrize(
    ("rows", "labels", "protocol", "words"),
    [
        (DUPLICATED, None, RULE, "1 duplicate rows.*item 'a', timestamp 1: log.csv row 1, log.csv row 3"),
        (
            UNDATED,
            None,
            replace(RULE, split="random"),
            "2 duplicate rows.*item 'a': log.csv row 1, .* row 3, .* row 4",
        ),
        (UNDATED, None, RULE, "no column timestamp, but .*split global_time cuts by time.*split: random"),
        (CLICKS, None, Protocol(label="clicked", negatives=Negatives()), "were not found: .* of 1 items"),
        (TWO, [0, 1], Protocol(drop_ratings=[3]), r"drop_ratings is \[3\]"),
        (TWO, [1, 0], RULE, r"log\.csv, row 1: no rating .*there are who, what.*label: null"),
        (TWO, None, Protocol(label=None), r'log\.csv, row 1: no label .*label: "rating > 3"'),
        (CLICKS, None, RULE, "train have label 1 .*Clicks alone need rows with label 0"),
        (TWO, None, replace(RULE, drop_ratings=[1, 5]), "train and valid and test has no targets"),
    ],
)
def test_logs_that_a_protocol_cannot_use(
    rows: list[Any], labels: list[int] | None, protocol: Protocol, words: str, make_logs: MakeLogs
) -> None:
    raw = replace(make_logs(rows, labels), columns=("who", "what"))
    with pytest.raises((ConfigError, DataError), match=words):
        apply_protocol(build_interactions(raw, protocol), protocol)


def test_an_item_without_a_title_has_its_id(make_logs: MakeLogs) -> None:
    raw = make_logs([*TWO, ("1", "c", 3.0, 0.0)])
    items = raw.items.with_columns(title=pl.Series([None, "Brazil", "  "]))
    built = build_interactions(replace(raw, items=items), RULE)
    assert built.items["title"].to_list() == ["a", "Brazil", "c"]
    assert built.items_without_title == 2
