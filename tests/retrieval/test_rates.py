"""Tests context in features: as-of rates against counts by filters, leaks, requests, and the terms of exit 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from example_logs import at_random, by_time, items_table, make_log, make_split

from project.data.context import code_of
from project.data.protocol import Interactions, SplitInteractions
from project.features import (
    FEATURES,
    FeatureBaseline,
    Retrieved,
    Term,
    feature_matrix,
    fit_terms,
    log_odds,
)
from project.retrieval import NoRetriever, RetrievedFeatures
from project.retrieval.rates import ContextRates, with_context

COLUMNS = {"context.device": "category", "context.price": "number", "user.age": "number"}
RATES = [f"rate.{c}{w}" for c in COLUMNS for w in ("", "*item", "*kind")]
DEVICES = [code_of(text) for text in ("phone", "pc")]


def split_of(
    seed: int = 0, codes: Callable[[pl.DataFrame], np.ndarray] = by_time
) -> SplitInteractions:
    """A small log with two context columns, one attribute of users, one of items; some values are missing."""
    split = make_split(make_log(seed), codes(make_log(seed)))
    rng = np.random.default_rng(seed)
    n = split.rows.height
    device = pl.Series(rng.choice(DEVICES, n)).set(pl.Series(rng.random(n) < 0.2), None)
    context = {
        "context.device": device,
        "context.price": pl.Series(rng.integers(0, 3, n) * 1.5),
    }
    users = split.interactions.users
    users = users.with_columns(
        pl.Series("user.age", rng.integers(0, 3, users.height) * 10.0)
    )
    items = items_table().with_columns(
        kind=pl.Series(["a", "b", ""] * 3), item_id=pl.col("item").cast(pl.String)
    )
    log = Interactions(
        split.interactions.rows.with_columns(**context),
        users,
        items,
        {"log": "0"},
        columns=COLUMNS,
    )
    return replace(split, interactions=log, rows=split.rows.with_columns(**context))


def tables_of(split: SplitInteractions, cache: Path) -> dict[str, pl.DataFrame]:
    return RetrievedFeatures(split, NoRetriever(), 2, cache).tables()


def test_rates_are_those_of_a_count(tmp_path: Path) -> None:
    """Every rate, by a filter over strictly earlier rows of splits up to its own; also where splits mix."""
    for codes in (by_time, at_random):
        split = split_of(1, codes)
        base = ContextRates(split).base
        whole = split.rows.join(split.interactions.users, on="user").join(
            split.interactions.items, on="item"
        )
        whole = whole.sort("row_id")
        order = whole["split"].to_physical()
        for k, (name, table) in enumerate(
            tables_of(split, tmp_path / codes.__name__).items()
        ):
            readable = whole.filter(order <= k)
            assert set(RATES) <= set(table.columns), name
            for row in range(0, readable.height, 7):
                own = readable.row(row, named=True)
                for rate in RATES:
                    column, _, part = rate.removeprefix("rate.").partition("*")
                    same = [pl.col(c) == pl.lit(own[c]) for c in (column, part) if c]
                    missing = own[column] is None or (part == "kind" and own["kind"] == "")
                    earlier = readable.filter(pl.col("timestamp") < own["timestamp"], *same)
                    label = earlier["label"].head(0 if missing else earlier.height)
                    likes, count = float(label.sum()), float(label.len())
                    expected = log_odds(np.array([likes]), np.array([count]), base)[0]
                    assert table[rate][row] == pytest.approx(expected, abs=1e-6), (
                        rate,
                        own,
                    )


@pytest.mark.parametrize("codes", [by_time, at_random])
def test_a_row_cannot_change_what_it_reads(
    codes: Callable[[pl.DataFrame], np.ndarray], tmp_path: Path
) -> None:
    """Neither a row's own answer nor a context value of a later row, or of its own second, moves its features."""
    split = split_of(2, codes)
    rates = ContextRates(split)
    original = rates.of_log(split.rows)
    row = split.rows.height // 2
    time = split.rows["timestamp"][row]
    flip = pl.when(pl.col("row_id") == row).then(1 - pl.col("label")).otherwise("label")
    late = pl.when(pl.col("timestamp") >= time, pl.col("row_id") != row)
    moved = late.then(DEVICES[0]).otherwise("context.device")
    for name, change in (("label", flip.cast(pl.Int8)), ("context.device", moved)):
        changed = rates.of_log(split.rows.with_columns(change.alias(name)))
        before = split.rows["timestamp"] < time
        assert changed.filter(before).equals(original.filter(before))
        assert changed[row].equals(original[row])
        # the test can fail: later rows read it
        assert not changed.select(RATES).equals(original.select(RATES))


def test_a_users_table_is_read_as_it_stands() -> None:
    """An attribute is that of the table for all rows of its user, whenever they were: docs/data.md says so."""
    split = split_of(3)
    users = split.interactions.users.with_columns(pl.lit(7.0).alias("user.age"))
    changed = replace(split, interactions=replace(split.interactions, users=users))
    assert (ContextRates(changed).of_log(split.rows)["user.age"] == 7.0).all()


def test_requests_read_what_rows_read() -> None:
    """A row of the log as a request of its own second has the row's features; after the log, all rows count."""
    split = split_of(4)
    rates = ContextRates(split)
    table = rates.of_log(split.rows)
    values = {name: table[name].to_numpy().astype(np.float64) for name in COLUMNS}
    item = split.rows["item"].to_numpy().astype(np.int64)
    time = split.rows["timestamp"].to_numpy()
    items = split.interactions.items
    found = rates.of_requests(values, item, time, items)
    late = rates.of_requests(values, item, np.full(item.size, time.max() + 1), items)
    with_later = pl.concat(
        [
            split.rows,
            split.rows.with_columns(
                timestamp=pl.lit(time.max() + 1), label=pl.lit(1, pl.Int8)
            ),
        ]
    )
    after = rates.of_log(with_later)[split.rows.height :]
    for name in RATES:
        assert found[name] == pytest.approx(table[name].to_numpy(), abs=1e-6)
        assert late[name] == pytest.approx(after[name].to_numpy(), abs=1e-6)
    # nothing known: every rate is that of nothing
    none = rates.of_requests({}, item, time, items)
    assert none["rate.user.age"] == pytest.approx(np.log(rates.base / (1 - rates.base)))


def test_a_log_without_columns_is_left_alone() -> None:
    split = split_of(5)
    bare = replace(split, interactions=replace(split.interactions, columns={}))
    table = {"train": pl.DataFrame({"row_id": [0]})}
    assert with_context(bare, table, True) is table


def test_terms() -> None:
    """Numbers are standardised, logarithms where skewed; a category of 20 rows is told apart; missing is a flag."""
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "context.price": np.exp(rng.normal(0, 2, 100)),
            "context.hour": np.arange(100) % 10 * 1.0,
            "context.device": [1.0] * 60 + [2.0] * 20 + [3.0] * 19 + [None],
            "rate.context.device": np.linspace(-1, 1, 100),
        }
    )
    kinds = {
        "context.price": "number",
        "context.hour": "number",
        "context.device": "category",
    }
    terms = fit_terms(table, kinds, 0.25)
    assert [term[:2] for term in terms] == [
        ("rate.context.device", "rate"),
        ("context.price", "log"),
        ("context.hour", "number"),
        ("context.device", "is"),
        ("context.device", "is"),
        ("context.device", "missing"),
    ]
    found = feature_matrix(Retrieved.of(table), 0.25, terms)[:, len(FEATURES) :]
    assert found[:, 1].mean() == pytest.approx(0, abs=0.05)
    assert found[:10, 2] == pytest.approx(
        (np.arange(10) - 4.5) / table["context.hour"].std()
    )
    assert found[:, 3:].sum(0).tolist() == [60, 20, 1]
    # unseen and missing are zero everywhere else
    new = pl.DataFrame({"context.device": [9.0, None], "context.hour": [None, None]})
    rest = feature_matrix(Retrieved.of(new), 0.25, terms)[:, len(FEATURES) :]
    assert rest[0].tolist() == pytest.approx([np.log(1 / 3), 0, 0, 0, 0, 0])
    assert rest[1].tolist() == pytest.approx([np.log(1 / 3), 0, 0, 0, 0, 1])


def test_exit_0_comes_back_with_its_terms() -> None:
    """What the checkpoint keeps, an array and plain lists, gives the same logits."""
    split = split_of(6)
    found = ContextRates(split).of_log(split.rows).with_columns(item_count=pl.lit(0))
    fitted = FeatureBaseline.fit(found, split.rows["label"].to_numpy(), COLUMNS)
    assert len(fitted.weights) == len(fitted.names) > len(FEATURES) + len(RATES)
    kept = [list(term) for term in fitted.terms]
    again = FeatureBaseline.from_array(
        fitted.to_array(), tuple(Term(*term) for term in kept)
    )
    assert (again.logits(found) == fitted.logits(found)).all()
    assert np.ptp(fitted.logits(found)) > 0
