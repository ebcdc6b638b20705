import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.data.logs import MovieLens100K, MovieLensLatestSmall, RawLogs
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

MakeLogs = Callable[..., RawLogs]


def coded(
    user: list[int],
    time: list[float] | list[int],
    split: list[str] | None = None,
    labels: list[int] | None = None,
) -> Interactions:
    """Interactions in the order given (by time), a new item each, labels 1, 0, 1, 0, ... by default."""
    number = len(user)
    rows = pl.DataFrame(
        {
            "row_id": range(number),
            "user": pl.Series(user, dtype=pl.Int32),
            "item": pl.Series(range(number), dtype=pl.Int32),
            "timestamp": pl.Series(time, dtype=pl.Float64),
            "label": pl.Series(labels or [(i + 1) % 2 for i in range(number)], dtype=pl.Int8),
            "rating": pl.Series([None] * number, dtype=pl.Float64),
            "given_split": pl.Series(split or [None] * number, dtype=pl.String),
        }
    )
    size = max(user) + 1
    users = pl.DataFrame(
        {"user": pl.Series(range(size), dtype=pl.Int32), "user_id": [f"u{i}" for i in range(size)]}
    )
    items = pl.DataFrame(
        {"item": pl.Series(range(number), dtype=pl.Int32), "item_id": [str(i) for i in range(number)]}
    ).with_columns(title=pl.col("item_id"))
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
    rows = apply_protocol(log, Protocol()).rows
    assert rows["hist"].to_list()[:6] == [0, 0, 1, 1, 1, 3]


def test_global_time_cuts_at_instants_of_the_targets() -> None:
    """20 targets: cuts are the times at index 16 and 18; rows that tie with a cut fall on its later side."""
    times = [*range(15), 20, 20, 21, 22, 22]  # index 16 -> 20, so the tie at index 15 is valid too
    assert splits_of(apply_protocol(coded([0] * 20, times), Protocol())) == "T" * 15 + "VVV" + "EE"


def test_global_time_cuts_ignore_rows_with_too_little_history() -> None:
    """10 users' first rows at the end are context: cuts come from the 20 rows that are targets."""
    users = [0] * 21 + list(range(1, 11))
    protocol = Protocol(minimum_history=1)
    split = apply_protocol(coded(users, list(range(31))), protocol)
    assert splits_of(split) == "t" + "T" * 16 + "VV" + "EE" + "e" * 10
    assert split.manifest["context"] == {"train": 1, "valid": 0, "test": 10}


def test_user_time_cuts_each_user_by_their_own_rows() -> None:
    """Users of 10 and 5 rows: cuts at index 8, 9 and at 4, 4 (baseline of 4.5): the second has no valid row."""
    users = [0] * 10 + [1] * 5 + [2] * 10
    split = apply_protocol(coded(users, list(range(25))), Protocol(split="user_time"))
    assert splits_of(split) == "TTTTTTTTVE" + "TTTTE" + "TTTTTTTTVE"


def test_user_time_keeps_ties_together() -> None:
    """Times 0..5, 6, 6, 6, 6: both cuts of that user are at 6, so all four rows are test."""
    users = [0] * 10 + [1] * 10 + [2] * 10
    times = [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, *range(10, 20), *range(20, 30)]
    labels = [i % 2 for i in range(20)] + [(i + 1) % 2 for i in range(10)]
    split = apply_protocol(coded(users, times, labels=labels), Protocol(split="user_time"))
    assert splits_of(split) == "TTTTTTEEEE" + "TTTTTTTTVE" * 2


def test_user_time_of_interleaved_users() -> None:
    """Users whose rows alternate in time are cut as if each were alone."""
    times = [float(t) for t in range(40)]
    labels = [(t // 2 + t) % 2 for t in range(40)]
    split = apply_protocol(coded([0, 1] * 20, times, labels=labels), Protocol(split="user_time"))
    assert splits_of(split) == "T" * 32 + "V" * 4 + "E" * 4


def test_random_is_the_documented_permutation() -> None:
    """The first 80 % of default_rng(seed).permutation(n) are train, the next 10 % valid, the rest test."""
    split = apply_protocol(coded([0] * 40, list(range(40))), Protocol(split="random", seed=7))
    permutation = np.random.default_rng(7).permutation(40)
    for name, part in zip(SPLITS, np.split(permutation, [32, 36]), strict=True):
        assert set(split.rows.filter(pl.col("split") == name)["row_id"]) == set(part.tolist())


def test_leave_last_takes_the_last_two_rows_of_each_user() -> None:
    """In sorted order, ties included; a user with one row has it in test, one with two has no train row."""
    users = [0, 0, 0, 1, 2, 2, 0, 0]
    split = apply_protocol(
        coded(users, [1, 2, 3, 3, 4, 4, 5, 5], labels=[1, 0, 1, 0, 1, 0, 0, 1]), Protocol(split="leave_last")
    )
    assert splits_of(split) == "TTT" + "E" + "VE" + "VE"


def test_given_splits_and_history_as_context() -> None:
    """The log's own splits; history rows are train context, never targets."""
    given = ["history", "history", "train", "train", "valid", "valid", "test"]
    split = apply_protocol(coded([0] * 7, list(range(7)), given), Protocol(split="given"))
    assert splits_of(split) == "tt" + "TT" + "VV" + "E"


def test_given_without_splits_is_an_error() -> None:
    """A row without a split is counted, and the keys that help are named."""
    log = coded([0] * 4, list(range(4)), ["train", "train", None, "test"])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"1 of 4 rows name no split.*columns\.split"):
        apply_protocol(log, Protocol(split="given"))


def test_folds_are_a_salted_hash_of_the_user() -> None:
    """sha256("salt:user_id") as a number in [0, 1), cut at .2 and .6; only rows of valid have one."""
    users = [i % 30 for i in range(300)]
    split = apply_protocol(coded(users, list(range(300))), Protocol(fold_salt="pepper"))
    for user, part, fold in split.rows.select("user", "split", "fold").iter_rows():
        digest = hashlib.sha256(f"pepper:u{user}".encode()).hexdigest()
        at = int(digest[:16], 16) / 16**16
        assert fold == (
            None if part != "valid" else "select" if at < 0.2 else "tune" if at < 0.6 else "certify"
        )
    folds = split.manifest["folds"]
    assert sum(folds[fold]["targets"] for fold in FOLDS) == split.manifest["counts"]["valid"] == 30
    assert sum(folds[fold]["users"] for fold in FOLDS) == 30


def test_fold_shares_of_users() -> None:
    """Of 3,000 users about 20, 40 and 40 % are in the folds: within 4 standard errors (.036)."""
    users = list(range(3000))
    log = coded(users * 3, list(range(9000)))
    rows = apply_protocol(log, Protocol(split="leave_last")).rows.filter(pl.col("split") == "valid")
    shares = [rows.filter(pl.col("fold") == fold).height / 3000 for fold in FOLDS]
    assert shares == pytest.approx([0.2, 0.4, 0.4], abs=0.036)


def test_split_without_targets_is_an_error() -> None:
    """All rows at one instant are test; the message has the counts and what to change."""
    with pytest.raises(
        DataError, match=r"Split train and valid has no targets.*train 0, valid 0, test 9.*shares"
    ):
        apply_protocol(coded(list(range(9)), [1.0] * 9), Protocol())


def test_share_of_zero_leaves_its_split_empty() -> None:
    """A share of 0 is a legal number and an empty split, which is an error of its own."""
    with pytest.raises(DataError, match="Split test has no targets"):
        apply_protocol(coded([0] * 20, list(range(20))), Protocol(shares=[0.8, 0.2, 0.0]))


def test_history_longer_than_any_users_is_an_error() -> None:
    """No row is a target: under any kind of split that is said."""
    log = coded([0] * 20, list(range(20)))
    for split in ("global_time", "random"):
        with pytest.raises(DataError, match=r"train and valid and test has no targets.*minimum_history"):
            apply_protocol(log, Protocol(minimum_history=50, split=split))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["train", "valid"])
def test_one_class_in_a_split_is_an_error(name: str) -> None:
    """Train and valid need both classes; the message has the split and its label."""
    log = coded([0] * 40, list(range(40)))
    inside = apply_protocol(log, Protocol()).rows["split"] == name
    labels = pl.when(inside).then(1).otherwise(pl.col("label")).cast(pl.Int8).alias("label")
    with pytest.raises(
        DataError, match=rf"targets of {name} have label 1.*Clicks alone need rows with label 0"
    ):
        apply_protocol(replace(log, rows=log.rows.with_columns(labels)), Protocol())


def test_bad_shares_are_refused_here_too() -> None:
    """`apply_protocol` checks the protocol."""
    with pytest.raises(ConfigError, match=r"data\.protocol\.shares"):
        apply_protocol(coded([0] * 9, list(range(9))), Protocol(shares=[0.5, 0.1, 0.1]))


def test_manifest_counts() -> None:
    """Golden: user 1 is unseen in train, so both test targets and one of two valid targets are cold."""
    users = [0] * 17 + [1] * 3
    split = apply_protocol(coded(users, [*range(19), 18]), Protocol())
    manifest = split.manifest
    assert splits_of(split) == "T" * 16 + "VV" + "EE"
    assert manifest["counts"] == {"train": 16, "valid": 2, "test": 2}
    assert manifest["positives"] == {"train": 8, "valid": 1, "test": 1}
    assert manifest["cold_user_share"] == {"valid": 0.5, "test": 1.0}
    assert manifest["cold_item_share"] == {"valid": 1.0, "test": 1.0}
    assert manifest["tie_share"] == 2 / 20
    assert (manifest["rows"], manifest["duplicates"], manifest["dropped"]) == (20, 0, 0)
    assert manifest["name"] == "global_time-80-10-10"
    assert manifest["hash"] == split.hash
    assert json.loads(json.dumps(manifest)) == manifest


def test_hash_is_stable_and_sees_every_change() -> None:
    """Golden for the format; any other field, checksum or label makes another hash, a rerun does not."""
    log = coded([0] * 40, list(range(40)))
    base = apply_protocol(log, Protocol(label="rating > 3")).hash
    assert base == apply_protocol(log, Protocol(label="rating > 3")).hash == "c167403b4ad01fea"
    flipped = (
        pl.when(pl.col("row_id") == 3).then(1 - pl.col("label")).otherwise(pl.col("label")).cast(pl.Int8)
    )
    others = [
        apply_protocol(replace(log, files={"log.csv": "ab"}), Protocol(label="rating > 3")).hash,
        apply_protocol(
            replace(log, rows=log.rows.with_columns(label=flipped)), Protocol(label="rating > 3")
        ).hash,
        apply_protocol(log, Protocol(name="mine", label="rating > 3")).hash,
        apply_protocol(log, Protocol(minimum_history=1, label="rating > 3")).hash,
        apply_protocol(log, Protocol(split="random", label="rating > 3")).hash,
        apply_protocol(log, Protocol(split="random", seed=1, label="rating > 3")).hash,
        apply_protocol(log, Protocol(fold_salt="x", label="rating > 3")).hash,
        apply_protocol(log, Protocol(label="rating > 4")).hash,
    ]
    assert len({base, *others}) == 1 + len(others)


def test_file_names_do_not_enter_the_hash() -> None:
    """The same bytes under another name are the same data."""
    log = coded([0] * 40, list(range(40)))
    moved = replace(log, files={"elsewhere.csv": "aa"})
    assert apply_protocol(moved, Protocol()).hash == apply_protocol(log, Protocol()).hash


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
    bounds = rows.group_by("split").agg(
        pl.col("timestamp").min().alias("low"), pl.col("timestamp").max().alias("up")
    )
    by_split = {name: (low, up) for name, low, up in bounds.iter_rows()}
    assert by_split["train"][1] < by_split["valid"][0]
    assert by_split["valid"][1] < by_split["test"][0]
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
    """Acceptance counts of the four protocols on ML-100K."""
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
    """Acceptance counts of the demo's protocol."""
    protocol = Protocol(minimum_history=5, label="rating > 3.5")
    manifest = apply_protocol(build_interactions(MovieLensLatestSmall().read(), protocol), protocol).manifest
    assert manifest["counts"] == {"train": 77_036, "valid": 9_629, "test": 9_630}
