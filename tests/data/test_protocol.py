"""A protocol makes one table of coded rows with labels of a log, then says which rows are scored, in which split.

Each split by hand, then by properties.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.data.logs import MovieLens1M, MovieLens100K, MovieLensLatestSmall, RawLogs
from project.data.negatives import Negatives
from project.data.protocol import (
    FOLDS,
    SPLITS,
    Interactions,
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
    label_expression,
)
from project.errors import ConfigError, DataError

MakeLogs = Callable[..., RawLogs]
RULE = Protocol(label="rating > 3")
TWO = [("1", "a", 1.0, 5.0), ("1", "b", 2.0, 1.0)]
CLICKS = [("1", "a", float(time), 5.0) for time in range(10)]
DUPLICATED = [
    ("1", "a", 1.0, 5.0),
    ("1", "b", 1.0, 1.0),
    ("1", "a", 1.0, 2.0),
    ("1", "a", 2.0, 5.0),
]
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


RULES = (
    "",
    "rating",
    "stars > 3",
    "rating => 3",
    "rating > three",
    "rating > 3 or 4",
    "rating > nan",
)
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
        ("dates", ["2024-05-01", "2024-06-01"]),
    ],
)
def test_what_cannot_work_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"data\.protocol\.{key}"):
        Protocol(**{key: value}).check()


MAY = 1_714_521_600  # 2024-05-01 in seconds: 19,844 days
DAYS = [MAY + 86_400 * day for day in range(-20, 20)]
DATES = ["2024-05-01", "2024-05-11"]


def test_split_at_dates() -> None:
    """20 days before the first date, 10 until the second, 10 from then on; the dates make another hash and name."""
    log = coded([0] * 40, DAYS)
    split = apply_protocol(log, Protocol(split="date", dates=DATES))
    assert splits_of(split) == "T" * 20 + "V" * 10 + "E" * 10
    assert split.manifest["name"] == "date-2024-05-01-2024-05-11"
    # a second later that day's row, which is of midnight, lies before the date
    later = ["2024-05-01T00:00:01", "2024-05-11"]
    other = apply_protocol(log, Protocol(split="date", dates=later))
    assert splits_of(other) == "T" * 21 + "V" * 9 + "E" * 10
    assert other.hash != split.hash


def test_rows_from_a_third_date_on_are_not_there(make_logs: MakeLogs) -> None:
    """A new user, a known one's next row, a row that stands twice, text in a column of numbers: nothing moves."""
    rows = [(f"u{k % 3}", f"i{k % 5}", float(day), k % 5) for k, day in enumerate(DAYS)]
    late = [("new", "i0", float(MAY + 86_400 * 15), 9.0)] * 2 + [("u0", "i1", 2e9, 1.0)]
    protocol = Protocol(
        split="date", dates=[*DATES, "2024-05-16"], label="rating > 3", hide_items=0.3
    )
    found = list[SplitInteractions]()
    for more in ([], late):
        raw = make_logs([*rows[:35], *more])
        price = pl.Series("price", ["7", "8", "9", *["1"] * 32, *["x"] * len(more)])
        raw = replace(
            raw, interactions=raw.interactions.with_columns(price), context=("price",)
        )
        found.append(apply_protocol(build_interactions(raw, protocol), protocol))
    one, other = found
    assert one.rows.equals(other.rows)
    assert one.interactions.users.equals(other.interactions.users)
    assert other.interactions.columns == {"context.price": "number"}
    assert one.manifest == other.manifest
    # without it they are read: a row stands twice
    with pytest.raises(DataError, match="duplicate"):
        build_interactions(raw, replace(protocol, dates=DATES))
    early = replace(protocol, dates=["2001-01-01", "2001-01-02", "2001-01-03"])
    with pytest.raises(DataError, match="before the log begins"):
        build_interactions(raw, early)


@pytest.mark.parametrize(
    "dates",
    [
        *(None, DATES[:1], DATES[::-1], [DATES[0]] * 2, ["2024-05-01", "June"]),
        *([*DATES, DATES[0]], [*DATES, "2024-06-01", "2024-07-01"]),
    ],
)
def test_dates_that_cannot_work(dates: list[str] | None) -> None:
    with pytest.raises(ConfigError, match=r"data\.protocol\.dates is .* two ascending"):
        Protocol(split="date", dates=dates).check()


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
        [
            ("10", "b", 2.0, 5.0),
            ("9", "b", 1.0, 3.0),
            ("9", "a", 2.0, 4.0),
            ("10", "a", 2.0, 1.0),
        ]
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
    others = {
        "timestamp": pl.Float64,
        "label": pl.Int8,
        "rating": pl.Float64,
        "given_split": pl.String,
    }
    assert dict(built.rows.schema) == integers | others
    assert built.files == raw.files


@pytest.mark.parametrize(("ids", "order"), [("10 9 x", "10 9 x"), ("7 07", "07 7")])
def test_ids_that_are_not_all_integers_are_ordered_as_text(
    ids: str, order: str, make_logs: MakeLogs
) -> None:
    """One id with a letter, and "10" comes before "9"; "7" and "07" are two users."""
    raw = make_logs(
        [(name, "i", float(k), 5.0 - 2 * (k > 0)) for k, name in enumerate(ids.split())]
    )
    assert build_interactions(raw, RULE).users["user_id"].to_list() == order.split()


@settings(derandomize=True, max_examples=30)
@given(st.permutations(range(12)), st.booleans())
def test_order_of_the_file_does_not_matter(order: list[int], dated: bool) -> None:
    """With timestamps or without."""
    columns = {
        "user_id": [str(i % 3) for i in range(12)],
        "item_id": [str(i % 4) for i in range(12)],
        "timestamp": [float(i // 5) if dated else None for i in range(12)],
        "rating": [i % 5 + 1 for i in range(12)],
    }
    log, items = (
        pl.DataFrame(columns),
        pl.DataFrame({"item_id": list("0123"), "title": list("abcd")}),
    )
    protocol = replace(RULE, split="random", shares=[0.4, 0.4, 0.2])
    one, other = (
        apply_protocol(
            build_interactions(RawLogs(rows, items, {}), protocol), protocol
        ).rows
        for rows in (log, log[order])
    )
    assert one.equals(other)


def test_dropped_ratings_and_their_users_are_gone(make_logs: MakeLogs) -> None:
    """drop_ratings removes rows before anything else; the catalogue keeps every item."""
    raw = make_logs([("1", "a", 1.0, 5.0), ("2", "b", 2.0, 3.0), ("1", "c", 3.0, 1.0)])
    built = build_interactions(raw, Protocol(drop_ratings=[3], label="rating > 3"))
    assert (built.rows.height, built.users.height, built.items.height) == (2, 1, 3)


@pytest.mark.parametrize(("policy", "rating"), [("first", 5.0), ("last", 2.0)])
def test_duplicates_by_policy(make_logs: MakeLogs, policy: Any, rating: float) -> None:
    """Rows 1 and 3 repeat (user, item, timestamp): one stays; the same item at another time is no repetition."""
    built = build_interactions(
        make_logs(DUPLICATED), Protocol(duplicates=policy, label="rating > 3")
    )
    kept = built.rows.filter((pl.col("item") == 0) & (pl.col("timestamp") == 1))
    assert kept["rating"].to_list() == [rating]
    assert built.rows.height == 3


@pytest.mark.parametrize(
    ("rows", "labels", "protocol", "words"),
    [
        (
            DUPLICATED,
            None,
            RULE,
            "1 duplicate rows.*item 'a': log.csv row 1, log.csv row 3",
        ),
        (
            UNDATED,
            None,
            replace(RULE, split="random"),
            "2 duplicate rows.*item 'a': log.csv row 1, .* row 3, .* row 4",
        ),
        (
            UNDATED,
            None,
            RULE,
            "no column timestamp, but .*split global_time.*split: random",
        ),
        (
            CLICKS,
            None,
            Protocol(label="clicked", negatives=Negatives()),
            "were not found: .* of 1 items",
        ),
        (TWO, [0, 1], Protocol(drop_ratings=[3]), r"drop_ratings is \[3\]"),
        (
            TWO,
            [1, 0],
            RULE,
            r"log\.csv, row 1: no rating .*there are who, what.*label: null",
        ),
        (
            TWO,
            None,
            Protocol(label=None),
            r'log\.csv, row 1: no label .*label: "rating > 3"',
        ),
    ],
)
def test_logs_that_a_protocol_cannot_use(
    rows: list[Any],
    labels: list[int] | None,
    protocol: Protocol,
    words: str,
    make_logs: MakeLogs,
) -> None:
    raw = replace(make_logs(rows, labels), columns=("who", "what"))
    with pytest.raises((ConfigError, DataError), match=words):
        apply_protocol(build_interactions(raw, protocol), protocol)


def test_an_item_without_a_title_has_its_id(make_logs: MakeLogs) -> None:
    raw = make_logs([*TWO, ("1", "c", 3.0, 0.0)])
    items = raw.items.with_columns(title=pl.Series([None, "Brazil", "  "]))
    built = build_interactions(replace(raw, items=items), RULE)
    assert built.items["title"].to_list() == ["a", "Brazil", "c"]


CODES = {"user": pl.Int32, "item": pl.Int32, "label": pl.Int8}
TYPES = CODES | {"timestamp": pl.Float64, "rating": pl.Float64, "given_split": pl.String}


def coded(
    user: list[int],
    time: list[float] | list[int] | list[None],
    split: list[str | None] | None = None,
    labels: list[int] | None = None,
) -> Interactions:
    """Interactions in the order given (by time), a new item each, labels 1, 0, 1, 0, ... by default."""
    number = len(user)
    columns = {
        "row_id": range(number),
        "user": user,
        "item": range(number),
        "timestamp": time,
        "label": labels or [(i + 1) % 2 for i in range(number)],
        "rating": [None] * number,
        "given_split": split or [None] * number,
    }
    rows = pl.DataFrame(columns, schema_overrides=TYPES)
    codes = range(max(user) + 1)
    users = pl.DataFrame({"user": codes, "user_id": [f"u{i}" for i in codes]}).cast(
        {"user": pl.Int32}
    )
    items = rows.select(
        "item", item_id=pl.col("item").cast(pl.String), title=pl.col("item").cast(pl.String)
    )
    return Interactions(rows, users, items, {"log.csv": "aa"})


def splits_of(split: SplitInteractions) -> str:
    """One letter a row: t(rain), v(alid), e (test); capitals are targets."""
    letters = {"train": "t", "valid": "v", "test": "e"}
    return "".join(
        letters[name].upper() if role == "target" else letters[name]
        for name, role in split.rows.select("split", "role").iter_rows()
    )


def test_history_counts_strictly_earlier_rows_of_the_user() -> None:
    """Rows of one user at one instant have the same history; other users do not count."""
    log = coded([0, 1, 0, 0, 1, 0] + [0] * 14, [1, 1, 2, 2, 2, 3, *range(10, 24)])
    assert apply_protocol(log, Protocol()).rows["hist"].to_list()[:6] == [0, 0, 1, 1, 1, 3]


USER_TIME = Protocol(split="user_time")
GIVEN = Protocol(split="given")
HALVES = [(t // 2 + t) % 2 for t in range(40)]  # labels of two users whose rows alternate
TIED = [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, *range(10, 30)]
ALTERNATING = [i // 4 % 2 for i in range(40)]


@pytest.mark.parametrize(
    ("log", "protocol", "expected"),
    [
        # 20 targets: cuts are the times at index 16 and 18. Index 16 is 20, so the tie at
        # index 15 is valid too
        (
            coded([0] * 20, [*range(15), 20, 20, 21, 22, 22]),
            Protocol(),
            "T" * 15 + "VVV" + "EE",
        ),
        # 10 users' first rows at the end are context: cuts come from the 20 rows that are
        # targets
        (
            coded([0] * 21 + list(range(1, 11)), list(range(31))),
            Protocol(minimum_history=1),
            "t" + "T" * 16 + "VV" + "EE" + "e" * 10,
        ),
        # cuts at index 8, 9 of 10 rows and at 4, 4 (of 4.5) of 5: that user has no valid
        # row
        (
            coded([0] * 10 + [1] * 5 + [2] * 10, list(range(25))),
            USER_TIME,
            "TTTTTTTTVE" + "TTTTE" + "TTTTTTTTVE",
        ),
        # both cuts of the first user are at 6, so all four rows that tie are test
        (
            coded([0] * 10 + [1] * 10 + [2] * 10, TIED, labels=[0, 1] * 10 + [1, 0] * 5),
            USER_TIME,
            "TTTTTTEEEE" + "TTTTTTTTVE" * 2,
        ),
        # users whose rows alternate in time are cut as if each were alone
        (
            coded([0, 1] * 20, list(range(40)), labels=HALVES),
            USER_TIME,
            "T" * 32 + "V" * 4 + "E" * 4,
        ),
        # ties count in sorted order; a user with one row has it in test, one with two has
        # no train row
        (
            coded(
                [0, 0, 0, 1, 2, 2, 0, 0],
                [1, 2, 3, 3, 4, 4, 5, 5],
                labels=[1, 0, 1, 0, 1, 0, 0, 1],
            ),
            Protocol(split="leave_last"),
            "TTT" + "E" + "VE" + "VE",
        ),
        # history is context
        (
            coded(
                [0] * 7,
                list(range(7)),
                ["history"] * 2 + ["train"] * 2 + ["valid"] * 2 + ["test"],
            ),
            GIVEN,
            "tt" + "TT" + "VV" + "E",
        ),
        # without times history comes first, then train, valid and test, whatever the file's
        # order
        (
            coded(
                [0] * 40,
                [None] * 40,
                ["test", "valid", "train", "history"] * 10,
                ALTERNATING,
            ),
            GIVEN,
            "t" * 10 + "T" * 10 + "V" * 10 + "E" * 10,
        ),
    ],
)
def test_splits_by_hand(log: Interactions, protocol: Protocol, expected: str) -> None:
    assert splits_of(apply_protocol(log, protocol)) == expected


def test_random_is_the_documented_permutation() -> None:
    """The first 80 % of default_rng(seed).permutation(n) are train, the next 10 % valid, the rest test."""
    split = apply_protocol(
        coded([0] * 40, list(range(40))), Protocol(split="random", seed=7)
    )
    permutation = np.random.default_rng(7).permutation(40)
    for name, part in zip(SPLITS, np.split(permutation, [32, 36]), strict=True):
        assert set(split.rows.filter(pl.col("split") == name)["row_id"]) == set(
            part.tolist()
        )


def test_folds_are_a_salted_hash_of_the_user() -> None:
    """sha256("salt:user_id") as a number in [0, 1), cut at .2 and .6; only rows of valid have one."""
    users = [i % 30 for i in range(300)]
    split = apply_protocol(coded(users, list(range(300))), Protocol())
    for user, part, fold in split.rows.select("user", "split", "fold").iter_rows():
        digest = hashlib.sha256(f"folds:u{user}".encode()).hexdigest()
        at = int(digest[:16], 16) / 16**16
        assert fold == (
            None
            if part != "valid"
            else "select"
            if at < 0.2
            else "tune"
            if at < 0.6
            else "certify"
        )
    folds = split.manifest["folds"]
    assert (
        sum(folds[fold]["targets"] for fold in FOLDS)
        == split.manifest["counts"]["valid"]
        == 30
    )
    assert sum(folds[fold]["users"] for fold in FOLDS) == 30


def test_rows_without_timestamps_are_shuffled_inside_their_splits() -> None:
    """Golden: by the permutation of the random split; times are positions, so a test row reads all train rows."""
    log = coded(sorted(i % 4 for i in range(40)), [None] * 40)
    split = apply_protocol(log, Protocol(split="random", seed=7, minimum_history=2))
    assert split.rows["item"].to_list() == np.random.default_rng(7).permutation(40).tolist()
    assert (
        split.rows["timestamp"].to_list()
        == split.rows["row_id"].to_list()
        == list(range(40))
    )
    assert splits_of(split).lower() == "t" * 32 + "v" * 4 + "e" * 4
    for _, own in split.rows.group_by("user"):
        assert own["hist"].to_list() == list(range(10))
        assert own["role"].to_list() == ["context"] * 2 + ["target"] * 8
    assert split.interactions.rows.equals(split.rows.select(log.rows.columns))
    manifest = split.manifest
    assert (manifest["order"], manifest["times"], manifest["tie_share"]) == (
        "shuffled",
        [],
        0,
    )
    assert (
        apply_protocol(coded([0] * 40, list(range(40))), Protocol()).manifest["order"]
        == "by time"
    )


STREAM = coded([0] * 20, list(range(20)))


@pytest.mark.parametrize(
    ("log", "protocol", "words"),
    [
        (
            coded(list(range(9)), [1.0] * 9),
            {},
            "train and valid has no targets.*train 0, valid 0, test 9",
        ),
        (STREAM, {"shares": [0.8, 0.2, 0.0]}, "Split test has no targets"),
        (
            coded([0] * 40, DAYS),
            {"split": "date", "dates": ["2024-05-01", "2024-06-01"]},
            "from 2024-04-11T00:00:00 to 2024-05-20T00:00:00",
        ),
        (
            STREAM,
            {"minimum_history": 50},
            "train and valid and test has no targets.*minimum_history",
        ),
        (
            coded([0] * 4, list(range(4)), ["train", "train", None, "test"]),
            {"split": "given"},
            r"1 of 4 rows name no split.*columns\.split",
        ),
        (
            coded([0] * 20, list(range(20)), labels=[1] * 16 + [0, 1, 0, 1]),
            {},
            "of train have label 1.*Clicks alone need rows with label 0",
        ),
        (
            coded([0] * 20, list(range(20)), labels=[0, 1] * 8 + [1, 1, 0, 1]),
            {},
            "of valid have label 1",
        ),
    ],
)
def test_logs_that_cannot_be_split(
    log: Interactions, protocol: dict[str, Any], words: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        apply_protocol(log, Protocol(**protocol))


def test_manifest_counts() -> None:
    """Golden: user 1 is unseen in train, so both test targets and one of two valid targets are cold."""
    split = apply_protocol(coded([0] * 17 + [1] * 3, [*range(19), 18]), Protocol())
    manifest = split.manifest
    assert splits_of(split) == "T" * 16 + "VV" + "EE"
    expected = {
        "counts": {"train": 16, "valid": 2, "test": 2},
        "positives": {"train": 8, "valid": 1, "test": 1},
        "cold_user_share": {"valid": 0.5, "test": 1.0},
        "cold_item_share": {"valid": 1.0, "test": 1.0},
        "tie_share": 2 / 20,
        "rows": 20,
        "name": "global_time-80-10-10",
        "hash": split.hash,
    }
    assert {name: manifest[name] for name in expected} == expected
    assert json.loads(json.dumps(manifest)) == manifest


def test_hash_is_stable_and_sees_every_change() -> None:
    """Golden for the format; any other field, checksum or label makes another hash, another name of a file does not."""
    log = coded([0] * 40, list(range(40)))

    def hash_of(log: Interactions = log, **changes: Any) -> str:
        return apply_protocol(log, Protocol(**{"label": "rating > 3"} | changes)).hash

    same = hash_of(
        replace(log, files={"elsewhere.csv": "aa"}), hide_items=0.0, train_users=1.0
    )
    assert hash_of() == same == "c167403b4ad01fea"
    third = pl.when(pl.col("row_id") == 3)
    flipped = log.rows.with_columns(
        label=third.then(1 - pl.col("label")).otherwise("label").cast(pl.Int8)
    )
    others = [
        hash_of(replace(log, files={"log.csv": "ab"})),
        hash_of(replace(log, rows=flipped)),
        hash_of(minimum_history=1),
        hash_of(split="random"),
        hash_of(split="random", seed=1),
        hash_of(label="rating > 4"),
        *(hash_of(hide_items=share, seed=seed) for share in (0.2, 0.21) for seed in (0, 1)),
    ]
    assert len({hash_of(), *others}) == 1 + len(others)


def test_hidden_items_golden() -> None:
    """40 rows of an item each, cut at 32 and 36. Of 8 hidden items 7 are in train: 40 - 7 rows, 32 - 7 train targets.

    Items are hidden whose sha256("hidden items:seed:id") as a number in [0, 1) is below the share.
    """
    log = coded([0] * 20 + [1] * 20, list(range(40)))
    numbers = [
        int(hashlib.sha256(f"hidden items:0:{i}".encode()).hexdigest()[:16], 16)
        for i in range(40)
    ]
    hidden = [i for i, number in enumerate(numbers) if number / 16**16 < 0.2]
    assert hidden == [5, 6, 19, 21, 22, 28, 30, 34]
    split = apply_protocol(log, Protocol(hide_items=0.2))
    assert splits_of(split) == "T" * 25 + "VVVV" + "EEEE"
    rows, manifest = split.rows, split.manifest
    assert manifest["rows"] == 33
    assert manifest["counts"] == {"train": 25, "valid": 4, "test": 4}
    assert rows["item"].to_list() == [i for i in range(40) if i >= 32 or i not in hidden]
    assert rows.filter("hidden")["item"].to_list() == [i for i in hidden if i >= 32]
    # what is counted is counted anew
    assert rows["row_id"].to_list() == list(range(rows.height))
    assert rows.filter(user=0)["hist"].to_list() == list(range(rows.filter(user=0).height))
    assert split.interactions.rows.equals(rows.select(split.interactions.rows.columns))


def test_train_users_takes_targets_of_train_alone() -> None:
    """200 users of 10 rows: a smaller share's train targets are among a larger one's; all else is as with all users.

    The number of users is binomial: at .25 within 4 standard deviations, 4 sqrt(200 * .25 * .75) = 24.5, of 50.
    """
    log = coded([row % 200 for row in range(2000)], list(range(2000)))
    whole = apply_protocol(log, Protocol(minimum_history=2))
    targets = set(whole.rows.filter(split="train", role="target")["row_id"])
    for share in (0.25, 0.05):
        part = apply_protocol(log, Protocol(minimum_history=2, train_users=share))
        assert part.hash != whole.hash
        assert part.rows.drop("role").equals(whole.rows.drop("role"))
        later = pl.col("split") != "train"
        assert part.rows.filter(later).equals(whole.rows.filter(later))
        taken = part.rows.filter(split="train", role="target")
        assert set(taken["row_id"]) < targets
        targets = set(taken["row_id"])
        users = taken["user"].n_unique()
        assert abs(users - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5
        theirs = whole.rows.filter(
            pl.col("user").is_in(taken["user"].implode()), split="train", role="target"
        )
        assert taken["row_id"].equals(theirs["row_id"])  # all rows of a user, or none


@settings(derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=60),
    st.integers(0, 3),
)
def test_global_time_is_monotone_in_time(log: list[tuple[int, int]], minimum: int) -> None:
    """Every row of a split is strictly earlier than every row of the next one; roles follow history."""
    ordered = sorted(log, key=lambda row: (row[1], row[0]))
    interactions = coded(
        [user for user, _ in ordered], [float(time) for _, time in ordered]
    )
    try:
        rows = apply_protocol(interactions, Protocol(minimum_history=minimum)).rows
    except DataError:
        return  # too small a log
    times = {name: rows.filter(pl.col("split") == name)["timestamp"] for name in SPLITS}
    assert times["train"].max() < times["valid"].min()
    assert times["valid"].max() < times["test"].min()
    assert ((rows["role"] == "target") == (rows["hist"] >= minimum)).all()


FIVE = Protocol(minimum_history=5, label="rating > 3")


@pytest.mark.real
@pytest.mark.parametrize(
    ("logs", "protocol", "counts", "context"),
    [
        (MovieLens100K(), FIVE, (75_599, 9_447, 9_453), None),
        (
            MovieLens100K(),
            replace(USER_TIME, label="rating > 3"),
            (78_595, 9_906, 11_499),
            None,
        ),
        (
            MovieLens100K(),
            Protocol(split="random", label="rating > 3"),
            (80_000, 10_000, 10_000),
            None,
        ),
        (
            MovieLens100K(),
            Protocol(split="leave_last", label="rating > 3"),
            (98_114, 943, 943),
            None,
        ),
        (
            MovieLensLatestSmall(),
            replace(FIVE, label="rating > 3.5"),
            (77_036, 9_629, 9_630),
            None,
        ),
        # with context 803,654 of train, 100,012 of valid, 96,543 of test, together
        # 1,000,209
        (MovieLens1M(), FIVE, (771_790, 96_474, 96_474), (31_864, 3_538, 69)),
    ],
)
def test_real_counts(logs: Any, protocol: Protocol, counts: Any, context: Any) -> None:
    manifest = apply_protocol(build_interactions(logs.read(), protocol), protocol).manifest
    assert tuple(manifest["counts"].values()) == counts
    assert context is None or tuple(manifest["context"].values()) == context
