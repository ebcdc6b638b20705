"""Tests that no whole prompt leaks an answer, lists of similar users' likes included, under every split kind.

Splits and block cuts are held fixed; retrieved features have canaries of their own in tests/retrieval.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from world import Letters, no_retrieved, read_split, whole_prompts

from project.data.logs import RawLogs, TableLogs
from project.data.prompt import Prompt, PromptEncoder, RatingScale
from project.data.protocol import (
    SPLITS,
    Protocol,
    SplitInteractions,
    apply_protocol,
    build_interactions,
    known_at,
)
from project.data.stream import build_streams
from project.retrieval import (
    ItemKNN,
    LightGCN,
    MatrixFactorisation,
    RetrievedFeatures,
    Retriever,
)
from project.retrieval.past import WalkRows
from project.retrieval.walk import block_cuts, fit_snapshots, walk
from research.packing import prompts_of

KINDS = ("global_time", "user_time", "random", "leave_last", "given")
SEGMENT = (
    "{title} all {item_percent} {item_count_number+item_number+vote_number} user {user_percent} {user_number} "
    "near {vote_percent}:"
)


def split_of(kind: str, logs: Path) -> SplitInteractions:
    if kind == "delayed":
        delayed = Protocol(split="user_time", minimum_history=1, answer_delay=8)
        return read_split(logs, delayed)
    if kind not in ("given", "undated"):
        return read_split(logs, Protocol(split=kind, minimum_history=1))  # type: ignore[arg-type]
    protocol = Protocol(split="given", label="rating > 3", duplicates="first")
    raw = TableLogs(str(logs / "interactions.csv"), str(logs / "items.csv")).read()
    names = np.random.default_rng(1).choice(
        [*SPLITS, "history"], size=len(raw.interactions), p=[0.5, 0.2, 0.2, 0.1]
    )
    named = raw.interactions.with_columns(split=pl.Series(names))
    if kind == "undated":
        named = named.with_columns(timestamp=None)
    return apply_protocol(
        build_interactions(RawLogs(named, raw.items, raw.files), protocol), protocol
    )


def prompts(
    split: SplitInteractions,
    rows: pl.DataFrame,
    name: str,
    retriever: Retriever,
    cuts: np.ndarray,
    absent: int,
    leak: bool = False,
) -> dict[int, str]:
    """Prompt of every target of one split, by row id; row `absent` is answered but in nobody's past.

    With `leak`, every list of similar users' likes stands one row of its user too early.
    """
    order = SPLITS.index(name)
    rows = rows.filter(pl.col("split").to_physical() <= order)
    log = WalkRows.from_log(rows)
    inert = log.row_id == absent
    log = WalkRows(**{**vars(log), "rater": log.rater & ~inert, "own": log.own & ~inert})
    items = split.interactions.items
    past = rows.filter(pl.col("row_id") != absent)
    snapshots = fit_snapshots(past, retriever, split.interactions.users.height, items, cuts)
    retrieved = walk(log, retriever, items, cuts, snapshots.fitted)
    if leak:
        users = rows.select("row_id", "user")
        early = pl.col("similar_after").shift(-1).over("user")
        retrieved = (
            retrieved.join(users, on="row_id", maintain_order="left")
            .with_columns(early)
            .drop("user")
        )
    similar = "[{titles}]" if retriever.similar_every else None
    encoder = PromptEncoder(
        Letters(),
        Prompt(instruction="I\n", segment=SEGMENT, similar=similar),
        items,
        scale=RatingScale(3.0, 1.0),
    )
    return whole_prompts(build_streams(rows, retrieved, name, encoder))


def cuts_of(split: SplitInteractions) -> np.ndarray:
    return block_cuts(split.rows["timestamp"].to_numpy(), 5)


def lists(prompt: str) -> list[str]:
    return re.findall(r"\[.*?\]", prompt)


@pytest.mark.parametrize("kind", [*KINDS, "undated", "delayed"])
@pytest.mark.parametrize(
    "retriever",
    [ItemKNN(), LightGCN(dim=8, epochs=1), LightGCN(dim=8, epochs=1, similar_every=2)],
    ids=["item_knn", "lightgcn", "similar_users"],
)
@pytest.mark.slow
def test_a_row_cannot_change_its_own_prompt(
    kind: str, retriever: Retriever, tiny_logs: Path
) -> None:
    """Flipping a target's answer, or taking the row out of everybody's past, leaves its own prompt identical."""
    split = split_of(kind, tiny_logs)
    rng = np.random.default_rng(0)
    known = known_at(split.rows)
    lists_changed = 0
    for name in SPLITS:
        cuts = cuts_of(split)
        original = prompts(split, split.rows, name, retriever, cuts, absent=-1)
        assert any("[" in text for text in original.values()) == (
            retriever.similar_every > 0
        )
        changed_elsewhere = 0
        for row in rng.choice(list(original), size=3, replace=False).tolist():
            here = pl.col("row_id") == row
            flip = pl.when(here).then(1 - pl.col("label")).otherwise("label")
            other = pl.when(here).then(7 - pl.col("rating")).otherwise("rating")
            changed = split.rows.with_columns(label=flip.cast(pl.Int8), rating=other)
            flipped = prompts(split, changed, name, retriever, cuts, absent=-1)
            deleted = prompts(split, split.rows, name, retriever, cuts, absent=row)
            assert flipped[row] == original[row]
            assert deleted[row] == original[row]
            # nor a prompt of a row that was asked until the answer was known
            early = split.rows.filter(pl.col("timestamp") <= known[row])["row_id"]
            assert all(flipped[r] == original[r] for r in {*early} & {*original})
            changed_elsewhere += sum(flipped[r] != original[r] for r in original)
            lists_changed += sum(lists(flipped[r]) != lists(original[r]) for r in original)
        # the test can fail: other prompts do read the flipped answer
        assert changed_elsewhere > 0
    assert (lists_changed > 0) == (retriever.similar_every > 0)


@pytest.mark.slow
def test_a_list_that_stands_too_early_is_noticed(tiny_logs: Path) -> None:
    """A list right before the row that dates it shows the answer: then flipping the row changes its own prompt."""
    split, retriever = (
        split_of("user_time", tiny_logs),
        LightGCN(dim=8, epochs=1, similar_every=2),
    )
    cuts = cuts_of(split)
    original = prompts(split, split.rows, "train", retriever, cuts, absent=-1, leak=True)
    changed = 0
    for row in list(original)[-40::5]:
        flip = (
            pl.when(pl.col("row_id") == row)
            .then(1 - pl.col("label"))
            .otherwise("label")
            .cast(pl.Int8)
        )
        rows = split.rows.with_columns(label=flip)
        changed += (
            prompts(split, rows, "train", retriever, cuts, absent=-1, leak=True)[row]
            != original[row]
        )
    assert changed > 0


@pytest.mark.parametrize("kind", [*KINDS, "delayed"])
def test_no_answer_of_the_present_the_future_or_a_later_split(
    kind: str, tiny_logs: Path
) -> None:
    """Every answered segment in a prompt is of a split up to the target's, of the same user, and known before."""
    split = split_of(kind, tiny_logs)
    rows = split.rows
    titles = pl.DataFrame(
        {"item": rows["item"], "title": [f"<{r}>" for r in rows["row_id"]]}
    )
    for name in SPLITS:
        order = SPLITS.index(name)
        readable = rows.filter(pl.col("split").to_physical() <= order)
        # one item a row, so that a prompt names rows
        items = pl.DataFrame(
            {
                "item": rows["row_id"].cast(pl.Int32),
                "item_id": titles["title"],
                "title": titles["title"],
            }
        )
        encoder = PromptEncoder(Letters(), Prompt(segment="{title}:"), items)
        renamed = readable.with_columns(item=pl.col("row_id").cast(pl.Int32))
        streams = build_streams(renamed, no_retrieved(readable), name, encoder)
        time, user, code = (rows[c].to_numpy() for c in ("timestamp", "user", "split"))
        known = known_at(rows)
        checked = 0
        for s, w in streams.evaluation(300):
            for text in ("".join(map(chr, t)) for t in prompts_of(streams, s, w)):
                named = [int(i) for i in re.findall(r"<(\d+)>", text)]
                target, past = named[-1], named[:-1]
                assert text.endswith(":")
                assert (known[past] < time[target]).all()
                assert (user[past] == user[target]).all()
                assert all(SPLITS.index(code[p]) <= order for p in past)
                checked += 1
        expected = rows.filter((pl.col("split") == name) & (pl.col("role") == "target"))
        assert checked == len(expected)


HIDE = Protocol(split="given", label="rating > 3", minimum_history=1, hide_items=0.2)


def is_hidden(item_id: str) -> bool:
    digest = hashlib.sha256(f"hidden items:0:{item_id}".encode()).hexdigest()
    return int(digest[:16], 16) / 16**16 < HIDE.hide_items


def with_split_names(kind: str, logs: Path) -> RawLogs:
    """The log with the split of every row as `kind` cuts it, so that a changed log is cut as the original."""
    raw = TableLogs(str(logs / "interactions.csv"), str(logs / "items.csv")).read()
    split = split_of(kind, logs)
    rows = split.rows.join(split.interactions.users, on="user").join(
        split.interactions.items, on="item"
    )
    names = rows.select("user_id", "item_id", "timestamp", pl.col("split").cast(pl.String))
    named = raw.interactions.drop("split").join(
        names, on=["user_id", "item_id", "timestamp"], validate="1:1"
    )
    return replace(raw, interactions=named.select(raw.interactions.columns))


def everything(
    raw: RawLogs, rows: list[pl.DataFrame], cache: Path
) -> tuple[SplitInteractions, dict[str, Any]]:
    """The split log of `rows`, and all that is made of it: tables and snapshots as files, train prompts, targets."""
    split = apply_protocol(
        build_interactions(replace(raw, interactions=pl.concat(rows)), HIDE), HIDE
    )
    retriever = LightGCN(dim=4, epochs=1, neighbours=3, item_neighbours=3, similar_every=2)
    tables = RetrievedFeatures(
        split, retriever, 3, cache, MatrixFactorisation(dim=2)
    ).tables()
    prompt = Prompt(instruction="I\n", segment=SEGMENT, similar="[{titles}]")
    encoder = PromptEncoder(Letters(), prompt, split.interactions.items)
    streams = build_streams(split.rows, tables["train"], "train", encoder)
    made: dict[str, Any] = {
        str(p.relative_to(cache)): p.read_bytes() for p in cache.rglob("*.*")
    }
    made |= {
        "rows": split.rows.rows(),
        "users": split.interactions.users.rows(),
        "hash": split.hash,
    }
    made |= {
        "prompts": streams.tokens.values.tobytes(),
        "targets": streams.target.tobytes(),
    }
    made["manifest"] = split.manifest
    return split, made


@pytest.mark.parametrize("kind", KINDS)
def test_train_rows_of_hidden_items_change_nothing(
    kind: str, tiny_logs: Path, tmp_path: Path
) -> None:
    """Other answers or times, more rows or none: rows, tables, snapshots and prompts stay, byte for byte."""
    raw = with_split_names(kind, tiny_logs)
    absent = (pl.col("split") == "train") & pl.col("item_id").map_elements(
        is_hidden, pl.Boolean
    )
    kept, gone = raw.interactions.filter(~absent), raw.interactions.filter(absent)
    flipped = pl.when(pl.col("rating") > 3).then(1.0).otherwise(5.0)
    moved = gone["timestamp"].min() + gone["timestamp"].max() - pl.col("timestamp") + 0.5
    # a user whose id comes first, so that every other user would get another code
    more = gone.unique(["item_id", "timestamp"], maintain_order=True).with_columns(
        user_id=pl.lit("a")
    )
    split, original = everything(raw, [kept, gone], tmp_path / "original")
    assert gone.height > 0
    assert len([name for name in original if name.endswith("snapshots.npz")]) >= 1
    changed = gone.with_columns(rating=flipped, timestamp=moved)
    for place, rows in (
        ("changed", [kept, changed]),
        ("more", [kept, gone, more]),
        ("none", [kept]),
    ):
        found = everything(raw, rows, tmp_path / place)[1]
        assert {name for name in original if found.get(name) != original[name]} == set(), (
            place
        )
    # the test can fail: rows of other items are read
    other = (
        pl.when(absent.not_() & (pl.col("split") == "train"))
        .then(flipped)
        .otherwise("rating")
    )
    read = everything(
        raw, [raw.interactions.with_columns(rating=other)], tmp_path / "read"
    )[1]
    assert read["prompts"] != original["prompts"]
    # a protocol of the kind itself leaves the same rows
    if kind != "given":
        same = read_split(tiny_logs, replace(HIDE, split=kind)).rows  # type: ignore[arg-type]
        assert same.drop("given_split").equals(split.rows.drop("given_split"))
    # hidden items are scored in valid and test, and nobody has seen them in train
    assert split.rows.filter("hidden")["split"].unique().sort().to_list() == [
        "valid",
        "test",
    ]
