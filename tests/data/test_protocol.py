"""Splits: which rows are targets of train, valid and test, and in which fold; each kind by hand, then by properties."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.data.logs import MovieLens1M, MovieLens100K, MovieLensLatestSmall, RawLogs
from project.data.protocol import (
    FOLDS,
    SPLITS,
    Interactions,
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
)
from project.errors import ConfigError, DataError

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
    users = pl.DataFrame({"user": codes, "user_id": [f"u{i}" for i in codes]}).cast({"user": pl.Int32})
    items = rows.select("item", item_id=pl.col("item").cast(pl.String), title=pl.col("item").cast(pl.String))
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


def test_global_time_cuts_at_instants_of_the_targets() -> None:
    """20 targets: cuts are the times at index 16 and 18; rows that tie with a cut fall on its later side."""
    times = [*range(15), 20, 20, 21, 22, 22]  # index 16 -> 20, so the tie at index 15 is valid too
    assert splits_of(apply_protocol(coded([0] * 20, times), Protocol())) == "T" * 15 + "VVV" + "EE"


def test_global_time_cuts_ignore_rows_with_too_little_history() -> None:
    """10 users' first rows at the end are context: cuts come from the 20 rows that are targets."""
    users = [0] * 21 + list(range(1, 11))
    split = apply_protocol(coded(users, list(range(31))), Protocol(minimum_history=1))
    assert splits_of(split) == "t" + "T" * 16 + "VV" + "EE" + "e" * 10
    assert split.manifest["context"] == {"train": 1, "valid": 0, "test": 10}


def halves(number: int) -> list[int]:
    """Labels of two users whose rows alternate."""
    return [(t // 2 + t) % 2 for t in range(number)]


TIED = [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, *range(10, 30)]


@pytest.mark.parametrize(
    ("users", "times", "labels", "expected"),
    [
        # cuts at index 8, 9 of 10 rows and at 4, 4 (baseline of 4.5) of 5: that user has no valid row
        ([0] * 10 + [1] * 5 + [2] * 10, list(range(25)), None, "TTTTTTTTVE" + "TTTTE" + "TTTTTTTTVE"),
        # both cuts of the first user are at 6, so all four rows that tie are test
        ([0] * 10 + [1] * 10 + [2] * 10, TIED, [0, 1] * 10 + [1, 0] * 5, "TTTTTTEEEE" + "TTTTTTTTVE" * 2),
        # users whose rows alternate in time are cut as if each were alone
        ([0, 1] * 20, list(range(40)), halves(40), "T" * 32 + "V" * 4 + "E" * 4),
    ],
    ids=["by their own rows", "ties stay together", "interleaved"],
)
def test_user_time(users: list[int], times: list[int], labels: list[int] | None, expected: str) -> None:
    split = apply_protocol(coded(users, times, labels=labels), Protocol(split="user_time"))
    assert splits_of(split) == expected


def test_random_is_the_documented_permutation() -> None:
    """The first 80 % of default_rng(seed).permutation(n) are train, the next 10 % valid, the rest test."""
    split = apply_protocol(coded([0] * 40, list(range(40))), Protocol(split="random", seed=7))
    permutation = np.random.default_rng(7).permutation(40)
    for name, part in zip(SPLITS, np.split(permutation, [32, 36]), strict=True):
        assert set(split.rows.filter(pl.col("split") == name)["row_id"]) == set(part.tolist())


def test_leave_last_takes_the_last_two_rows_of_each_user() -> None:
    """In sorted order, ties included; a user with one row has it in test, one with two has no train row."""
    log = coded([0, 0, 0, 1, 2, 2, 0, 0], [1, 2, 3, 3, 4, 4, 5, 5], labels=[1, 0, 1, 0, 1, 0, 0, 1])
    assert splits_of(apply_protocol(log, Protocol(split="leave_last"))) == "TTT" + "E" + "VE" + "VE"


def test_given_splits_and_history_as_context() -> None:
    given = ["history", "history", "train", "train", "valid", "valid", "test"]
    split = apply_protocol(coded([0] * 7, list(range(7)), given), Protocol(split="given"))
    assert splits_of(split) == "tt" + "TT" + "VV" + "E"


def test_folds_are_a_salted_hash_of_the_user() -> None:
    """sha256("salt:user_id") as a number in [0, 1), cut at .2 and .6; only rows of valid have one."""
    users = [i % 30 for i in range(300)]
    split = apply_protocol(coded(users, list(range(300))), Protocol())
    for user, part, fold in split.rows.select("user", "split", "fold").iter_rows():
        digest = hashlib.sha256(f"folds:u{user}".encode()).hexdigest()
        at = int(digest[:16], 16) / 16**16
        assert fold == (
            None if part != "valid" else "select" if at < 0.2 else "tune" if at < 0.6 else "certify"
        )
    folds = split.manifest["folds"]
    assert sum(folds[fold]["targets"] for fold in FOLDS) == split.manifest["counts"]["valid"] == 30
    assert sum(folds[fold]["users"] for fold in FOLDS) == 30


def undated(
    user: list[int], split: list[str | None] | None = None, labels: list[int] | None = None
) -> Interactions:
    """As `coded`, with rows by user and without timestamps."""
    return coded(sorted(user), [None] * len(user), split, labels)


def test_rows_without_timestamps_are_shuffled_inside_their_splits() -> None:
    """Golden: by the permutation of the random split; times are positions, so a test row reads all train rows."""
    log = undated([i % 4 for i in range(40)])
    split = apply_protocol(log, Protocol(split="random", seed=7, minimum_history=2))
    assert split.rows["item"].to_list() == np.random.default_rng(7).permutation(40).tolist()
    assert split.rows["timestamp"].to_list() == split.rows["row_id"].to_list() == list(range(40))
    assert splits_of(split).lower() == "t" * 32 + "v" * 4 + "e" * 4
    for _, own in split.rows.group_by("user"):
        assert own["hist"].to_list() == list(range(10))
        assert own["role"].to_list() == ["context"] * 2 + ["target"] * 8
    assert split.interactions.rows.equals(split.rows.select(log.rows.columns))
    assert (split.manifest["order"], split.manifest["times"], split.manifest["tie_share"]) == (
        "shuffled",
        [],
        0,
    )
    assert apply_protocol(coded([0] * 40, list(range(40))), Protocol()).manifest["order"] == "by time"
    other = apply_protocol(log, Protocol(split="random", seed=8, minimum_history=2))
    assert not other.rows["item"].equals(split.rows["item"])


def test_given_splits_without_timestamps() -> None:
    """History comes first, then train, valid and test, whatever the file's order."""
    given = ["test", "valid", "train", "history"] * 10
    split = apply_protocol(undated([0] * 40, given, [i // 4 % 2 for i in range(40)]), Protocol(split="given"))
    assert splits_of(split) == "t" * 10 + "T" * 10 + "V" * 10 + "E" * 10
    assert split.rows["item"].to_list() != sorted(split.rows["item"])


STREAM = coded([0] * 20, list(range(20)))


@pytest.mark.parametrize(
    ("log", "protocol", "words"),
    [
        (coded(list(range(9)), [1.0] * 9), {}, "train and valid has no targets.*train 0, valid 0, test 9"),
        (STREAM, {"shares": [0.8, 0.2, 0.0]}, "Split test has no targets"),
        (STREAM, {"minimum_history": 50}, "train and valid and test has no targets.*minimum_history"),
        (STREAM, {"minimum_history": 50, "split": "random"}, "train and valid and test has no targets"),
        (STREAM, {"shares": [0.5, 0.1, 0.1]}, r"data\.protocol\.shares"),
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
        (coded([0] * 20, list(range(20)), labels=[0, 1] * 8 + [1, 1, 0, 1]), {}, "of valid have label 1"),
    ],
)
def test_logs_that_cannot_be_split(log: Interactions, protocol: dict[str, Any], words: str) -> None:
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
        "duplicates": 0,
        "dropped": 0,
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

    assert hash_of() == hash_of(replace(log, files={"elsewhere.csv": "aa"})) == "c167403b4ad01fea"
    third = pl.when(pl.col("row_id") == 3)
    flipped = log.rows.with_columns(label=third.then(1 - pl.col("label")).otherwise("label").cast(pl.Int8))
    others = [
        hash_of(replace(log, files={"log.csv": "ab"})),
        hash_of(replace(log, rows=flipped)),
        hash_of(minimum_history=1),
        hash_of(split="random"),
        hash_of(split="random", seed=1),
        hash_of(label="rating > 4"),
    ]
    assert len({hash_of(), *others}) == 1 + len(others)


def test_hidden_items_golden() -> None:
    """40 rows of an item each, cut at 32 and 36. Of 8 hidden items 7 are in train: 40 - 7 rows, 32 - 7 train targets.

    Items are hidden whose sha256("hidden items:seed:id") as a number in [0, 1) is below the share.
    """
    log = coded([0] * 20 + [1] * 20, list(range(40)))
    numbers = [int(hashlib.sha256(f"hidden items:0:{i}".encode()).hexdigest()[:16], 16) for i in range(40)]
    hidden = [i for i, number in enumerate(numbers) if number / 16**16 < 0.2]
    assert hidden == [5, 6, 19, 21, 22, 28, 30, 34]
    split = apply_protocol(log, Protocol(hide_items=0.2))
    assert splits_of(split) == "T" * 25 + "VVVV" + "EEEE"
    rows, manifest = split.rows, split.manifest
    assert (manifest["rows"], manifest["hidden_items"], manifest["hidden_rows"]) == (33, 8, 7)
    assert manifest["counts"] == {"train": 25, "valid": 4, "test": 4}
    assert rows["item"].to_list() == [i for i in range(40) if i >= 32 or i not in hidden]
    assert rows.filter("hidden")["item"].to_list() == [i for i in hidden if i >= 32]
    # what is counted is counted anew
    assert rows["row_id"].to_list() == list(range(rows.height))
    assert rows.filter(user=0)["hist"].to_list() == list(range(rows.filter(user=0).height))
    assert split.interactions.rows.equals(rows.select(split.interactions.rows.columns))


def test_hide_items_is_in_the_hash_where_it_is_not_0() -> None:
    log = coded([0] * 40, list(range(40)))
    hashes = [apply_protocol(log, Protocol(hide_items=share)).hash for share in (0.0, 0.2, 0.21)]
    assert hashes[0] == apply_protocol(log, Protocol()).hash
    assert len({*hashes, apply_protocol(log, Protocol(hide_items=0.2, seed=1)).hash}) == 4
    manifest = apply_protocol(log, Protocol()).manifest
    assert (manifest["hidden_items"], manifest["hidden_rows"]) == (0, 0)


def test_train_users_takes_targets_of_train_alone() -> None:
    """200 users of 10 rows: a smaller share's train targets are among a larger one's; all else is as with all users.

    The number of users is binomial: at .25 within 4 standard deviations, 4 sqrt(200 * .25 * .75) = 24.5, of 50.
    """
    log = coded([row % 200 for row in range(2000)], list(range(2000)))
    whole = apply_protocol(log, Protocol(minimum_history=2))
    assert apply_protocol(log, Protocol(minimum_history=2, train_users=1.0)).hash == whole.hash
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
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=1, max_size=60), st.integers(0, 3))
def test_global_time_is_monotone_in_time(log: list[tuple[int, int]], minimum: int) -> None:
    """Every row of a split is strictly earlier than every row of the next one; roles follow history."""
    ordered = sorted(log, key=lambda row: (row[1], row[0]))
    interactions = coded([user for user, _ in ordered], [float(time) for _, time in ordered])
    try:
        rows = apply_protocol(interactions, Protocol(minimum_history=minimum)).rows
    except DataError:
        return  # too small a log
    times = {name: rows.filter(pl.col("split") == name)["timestamp"] for name in SPLITS}
    assert times["train"].max() < times["valid"].min()
    assert times["valid"].max() < times["test"].min()
    assert ((rows["role"] == "target") == (rows["hist"] >= minimum)).all()


@pytest.fixture(scope="module")
def ml100k() -> RawLogs:
    return MovieLens100K().read()


@pytest.mark.real
@pytest.mark.parametrize(
    ("protocol", "counts"),
    [
        (Protocol(minimum_history=5, label="rating > 3"), (75_599, 9_447, 9_453)),
        (Protocol(split="user_time", label="rating > 3"), (78_595, 9_906, 11_499)),
        (Protocol(split="random", label="rating > 3"), (80_000, 10_000, 10_000)),
        (Protocol(split="leave_last", label="rating > 3"), (98_114, 943, 943)),
    ],
)
def test_real_counts(ml100k: RawLogs, protocol: Protocol, counts: tuple[int, int, int]) -> None:
    manifest = apply_protocol(build_interactions(ml100k, protocol), protocol).manifest
    assert tuple(manifest["counts"].values()) == counts
    if protocol.split != "global_time":
        assert manifest["cold_user_share"]["test"] == 0


@pytest.mark.real
def test_real_shares(ml100k: RawLogs) -> None:
    """ML-100K by time: 85.4 % cold users in test, 197 validation users, 75.8 % ties, 55.4 % positive."""
    protocol = Protocol(minimum_history=5, label="rating > 3")
    split = apply_protocol(build_interactions(ml100k, protocol), protocol)
    assert round(split.manifest["cold_user_share"]["test"], 3) == 0.854
    assert sum(fold["users"] for fold in split.manifest["folds"].values()) == 197
    assert round(split.manifest["tie_share"], 3) == 0.758
    assert round(split.rows["label"].mean(), 3) == 0.554  # type: ignore[arg-type, call-overload]


@pytest.mark.real
def test_real_counts_of_latest_small() -> None:
    protocol = Protocol(minimum_history=5, label="rating > 3.5")
    manifest = apply_protocol(build_interactions(MovieLensLatestSmall().read(), protocol), protocol).manifest
    assert manifest["counts"] == {"train": 77_036, "valid": 9_629, "test": 9_630}


@pytest.mark.real
def test_real_counts_of_movielens_1m() -> None:
    """Targets + context: 771,790 + 31,864 = 803,654 of train, 96,474 + 3,538 = 100,012 of valid, 96,474 + 69 = 96,543
    of test; together 1,000,209.
    """
    protocol = Protocol(minimum_history=5, label="rating > 3")
    manifest = apply_protocol(build_interactions(MovieLens1M().read(), protocol), protocol).manifest
    assert manifest["counts"] == {"train": 771_790, "valid": 96_474, "test": 96_474}
    assert manifest["context"] == {"train": 31_864, "valid": 3_538, "test": 69}
