"""Tests context columns and user attributes: read, coded, described, hashed, and as a request brings them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.data.context import MAX_CHARACTERS, brought, code_of
from project.data.logs import OWN_SCORE, RawLogs, RecBoleLogs, TableLogs
from project.data.protocol import (
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
)
from project.errors import ConfigError, DataError

RULES = Protocol(minimum_history=0)
COLUMNS = {
    "context.device": "category",
    "context.price": "number",
    "context.position": "category",
    "user.age": "number",
    "user.country": "category",
}


def clicks(rows: int = 200, seed: int = 0) -> pl.DataFrame:
    """A log of clicks in time order; every tenth price is unknown, the last 40 rows come from a tv."""
    rng = np.random.default_rng(seed)
    place = np.arange(rows)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 10, rows),
            "item_id": rng.integers(0, 8, rows),
            "timestamp": 1e9 + 60 * place,
            "label": rng.integers(0, 2, rows),
            "device": np.where(place < 160, np.array(["phone", "pc"])[place % 2], "tv"),
            "price": np.where(place % 10 == 0, np.nan, rng.random(rows).round(2)),
            "position": rng.integers(1, 4, rows),
        }
    )


@pytest.fixture
def write_log(tmp_path: Path) -> Callable[..., TableLogs]:
    def write(log: pl.DataFrame | None = None, **settings: object) -> TableLogs:
        users = pl.DataFrame(
            {"user_id": range(9), "age": range(20, 29), "country": ["fr", "de", ""] * 3}
        )
        items = pl.DataFrame(
            {"item_id": range(8), "title": [f"item {k}" for k in range(8)]}
        )
        for name, table in (
            ("log", clicks() if log is None else log),
            ("users", users),
            ("items", items),
        ):
            table.write_csv(tmp_path / f"{name}.csv")
        given = {
            "context": ["device", "price", "position"],
            "users": str(tmp_path / "users.csv"),
            "kinds": {"position": "category"},
        } | settings
        return TableLogs(str(tmp_path / "log.csv"), str(tmp_path / "items.csv"), **given)  # type: ignore[arg-type]

    return write


def split_of(logs: TableLogs) -> SplitInteractions:
    return apply_protocol(build_interactions(logs.read(), RULES), RULES)


def test_columns_are_numbers_and_codes(write_log: Callable[..., TableLogs]) -> None:
    """Values stand beside their rows, attributes beside their users; what is empty or NaN is null."""
    log = build_interactions(write_log().read(), RULES)
    assert log.columns == COLUMNS
    rows = log.rows
    first = clicks()
    assert rows["context.device"].to_list() == [code_of(text) for text in first["device"]]
    assert rows["context.price"].to_list() == first["price"].fill_nan(None).to_list()
    assert rows["context.position"][0] == code_of(str(first["position"][0]))
    ages = dict(log.users.select("user_id", "user.age").iter_rows())
    assert ages == {str(k): 20.0 + k if k < 9 else None for k in range(10)}
    countries = log.users["user.country"].to_list()
    assert countries == [code_of("fr"), code_of("de"), None] * 3 + [None]


def test_the_manifest_says_what_there_is(write_log: Callable[..., TableLogs]) -> None:
    """Of 200 rows 20 have no price; 40 rows of a tv are all of test and valid, so their device is new there."""
    found = split_of(write_log()).manifest["columns"]
    assert {name: about["kind"] for name, about in found.items()} == COLUMNS
    assert found["context.device"] == {
        "kind": "category",
        "distinct": 3,
        "missing": 0.0,
        "unseen": {"valid": 1.0, "test": 1.0},
    }
    assert found["context.price"]["missing"] == 0.1


def test_the_hash_covers_columns(write_log: Callable[..., TableLogs]) -> None:
    """A log without columns has the hash of before; columns, their kinds and the users' file each change it."""
    none = {"context": [], "users": None, "kinds": {}}
    plain = split_of(write_log(**none))
    assert "columns" not in plain.manifest
    assert plain.hash == split_of(write_log(context=None, users=None, kinds=None)).hash
    hashes = [
        plain.hash,
        split_of(write_log()).hash,
        split_of(write_log(kinds={})).hash,
        split_of(write_log(context=["device"], kinds={})).hash,
        split_of(write_log(users=None)).hash,
        split_of(write_log(context=[], kinds={})).hash,
    ]
    assert len(set(hashes)) == len(hashes)
    # rows, splits and labels are those of the log without columns
    assert split_of(write_log()).rows.select(plain.rows.columns).equals(plain.rows)


def test_a_column_that_tells_the_answer_is_named(
    write_log: Callable[..., TableLogs],
) -> None:
    """A time that only clicks have, with one row in 40 wrong; the other columns tell nothing."""
    log = clicks(400)
    wrong = pl.int_range(pl.len()) % 40 == 0
    known = (pl.col("label") == 1) ^ wrong
    log = log.with_columns(dwell=pl.when(known).then(pl.int_range(pl.len()) % 7))
    split = split_of(write_log(log, context=["device", "price", "position", "dwell"]))
    (warning,) = split.warnings
    assert warning.startswith("context.dwell alone tells train's labels (AUC ")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"context": ["colour"]},
            DataError,
            r"log\.csv: no column colour .*there are user_id",
        ),
        (
            {"context": ["label"]},
            ConfigError,
            "context or own_scores lists label, which is read",
        ),
        ({"kinds": {"colour": "category"}}, ConfigError, "kinds has colour: category"),
        ({"kinds": {"device": "colour"}}, ConfigError, "expected number or category"),
        (
            {"kinds": {"device": "number"}},
            DataError,
            "column device is 'phone'; expected a finite",
        ),
        ({"own_scores": "no_such"}, DataError, "no column no_such"),
        (
            {"own_scores": "text"},
            DataError,
            r"log\.csv, row 1: column text is 'high'; expected a finite",
        ),
        (
            {"own_scores": "nothing"},
            DataError,
            "own_scores is nothing, but no row of train has one",
        ),
    ],
)
def test_errors_of_columns(
    settings: dict[str, object],
    error: type[Exception],
    message: str,
    write_log: Callable[..., TableLogs],
) -> None:
    log = clicks().with_columns(text=pl.lit("high"), nothing=None)
    with pytest.raises(error, match=message):
        split_of(write_log(log, **settings))


def test_a_user_stands_once(write_log: Callable[..., TableLogs], tmp_path: Path) -> None:
    logs = write_log()
    pl.DataFrame({"user_id": ["a", "b", "a"], "age": [1, 2, 3]}).write_csv(
        tmp_path / "users.csv"
    )
    with pytest.raises(
        DataError, match=r"users\.csv, row 3: column user_id is 'a'; expected each"
    ):
        logs.read()


def test_recbole_users(tmp_path: Path) -> None:
    """Further fields of .inter and the .user file, under their names without types."""
    for name, text in {
        "inter": "user_id:token\titem_id:token\ttimestamp:float\tlabel:float\tdevice:token\n"
        + "".join(f"u{k % 3}\ti{k % 2}\t{k}\t{k % 2}\tpc\n" for k in range(12)),
        "item": "item_id:token\ttitle:token_seq\ni0\tzero\ni1\tone\n",
        "user": "user_id:token\tage:token\nu0\t30\nu1\t40\n",
    }.items():
        (tmp_path / f"log.{name}").write_text(text)
    raw = RecBoleLogs(str(tmp_path), "log", context=["device"], users=True).read()
    assert build_interactions(raw, RULES).columns == {
        "context.device": "category",
        "user.age": "number",
    }
    assert RecBoleLogs(str(tmp_path), "log").read().not_read == ("device",)


def scored(missing: int = 0) -> pl.DataFrame:
    """The clicks with the score that a ranker gave each row, of which every `missing`th is unknown."""
    rng = np.random.default_rng(1)
    score = 1e6 * rng.random(200)
    place = np.arange(200)
    known = np.full(200, True) if not missing else place % missing > 0
    return clicks().with_columns(my_ranker=pl.Series(np.where(known, score, np.nan)))


def test_scores_of_the_ranker_that_runs_today(write_log: Callable[..., TableLogs]) -> None:
    """They stand beside their rows, are read or not as context, and change no hash; train's median for none."""
    log = scored()
    without = split_of(write_log(log))
    assert without.interactions.not_read == ("my_ranker",)
    found = split_of(write_log(log, own_scores="my_ranker"))
    assert found.rows[OWN_SCORE].to_list() == log["my_ranker"].to_list()
    assert found.interactions.not_read == ()
    assert found.hash == without.hash
    both = split_of(write_log(log, context=["my_ranker"], kinds={}, own_scores="my_ranker"))
    assert both.interactions.columns["context.my_ranker"] == "number"
    assert both.rows["context.my_ranker"].equals(both.rows[OWN_SCORE], check_names=False)
    # 20 of 200 rows have none; train is the first 160
    log = scored(missing=10)
    found = split_of(write_log(log, own_scores="my_ranker"))
    median = log["my_ranker"][:160].fill_nan(None).median()
    assert found.rows[OWN_SCORE].to_list() == log["my_ranker"].fill_nan(median).to_list()
    assert [line for line in found.warnings if "my_ranker" in line] == [
        "20 of 200 rows have no my_ranker (own_scores): they count as its median on train."
    ]


def test_a_reader_of_ones_own(make_logs: Callable[..., RawLogs]) -> None:
    """It names its context columns; what it returns is checked and coded as that of a file."""
    raw = make_logs([("a", "x", 1.0, 1.0), ("b", "y", 2.0, 1.0)], labels=[0, 1])
    raw = replace(
        raw,
        interactions=raw.interactions.with_columns(hour=pl.Series([3, 4]), other=1),
        context=("hour",),
        users=pl.DataFrame({"user_id": ["a"], "vip": [True]}),
    )
    log = build_interactions(raw, RULES)
    assert log.columns == {"context.hour": "number", "user.vip": "category"}
    assert log.users["user.vip"].to_list() == [code_of("true"), None]
    assert log.not_read == ("other",)


def test_what_a_request_brings() -> None:
    """Numbers as such or as text, codes of categories; what is absent, null or empty is unknown."""
    given = {"device": "tv", "price": "2.5", "position": None}
    assert brought(given, "context.", COLUMNS) == {
        "context.device": code_of("tv"),
        "context.price": 2.5,
    }
    assert brought({"age": 31, "country": " "}, "user.", COLUMNS) == {"user.age": 31.0}
    # half of a pair of surrogates, which JSON can hold, is a text that nobody has seen
    assert brought({"device": "\ud800"}, "context.", COLUMNS).keys() == {"context.device"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devise": "tv"}, "unknown name 'devise'.*expected device, price, position"),
        ({"price": "cheap"}, r"context\.price is 'cheap'; expected a number"),
        ({"price": "1_000"}, r"context\.price is '1_000'; expected a number"),
        ({"price": "１２"}, r"context\.price is '１２'; expected a number"),
        ({"price": 10**400}, r"context\.price is '1000.*'; expected a number"),
        ({"price": "\ud800"}, r"context\.price is .*; expected a number"),
        ({"device": {"a": 1}}, r"context\.device is .* expected text"),
        (
            {"device": "x" * 10_000},
            f"has 10,000 characters; expected at most {MAX_CHARACTERS:,}",
        ),
    ],
)
def test_errors_of_a_request(given: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        brought(given, "context.", COLUMNS)
    assert len(str(caught.value)) < 300
