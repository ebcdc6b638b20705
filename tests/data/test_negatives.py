"""Sampled negatives are unseen items that are scored; nothing else reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from world import Letters

from project.data.batch import Batch, pack
from project.data.logs import RAW_SCHEMA, RawLogs
from project.data.negatives import Negatives
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import (
    Protocol,
    SplitInteractions,
    answered,
    apply_protocol,
    build_interactions,
)
from project.data.stream import build_streams
from project.evaluation.networks import earlier_rows
from project.metrics import auc
from project.report.format import environment
from project.retrieval import LightGCN, MatrixFactorisation, RetrievedFeatures

ROWS, USERS, ITEMS = 240, 8, 40
SPLITS = ("train", "valid", "test")
SEGMENT = "{title} all {item_percent} user {user_percent} near {vote_percent}:"


def clicks(seed: int = 0, **changes: Any) -> SplitInteractions:
    """A log of clicks with ties and repeated clicks, most of them on few items; two negatives each."""
    rng = np.random.default_rng(1)
    log = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in rng.integers(0, USERS, ROWS)],
            "item_id": [f"i{i}" for i in (ITEMS * rng.random(ROWS) ** 3).astype(int)],
            "timestamp": np.sort(rng.integers(0, ROWS // 2, ROWS)).astype(float),
        }
    )
    fields = {
        "negatives": Negatives(2),
        "minimum_history": 2,
        "duplicates": "first",
    } | changes
    return split_of(log, ITEMS, Protocol(label="clicked", seed=seed, **fields))


def split_of(log: pl.DataFrame, items: int, protocol: Protocol) -> SplitInteractions:
    """A log of user_id, item_id (i0, i1, ...) and timestamp under a protocol."""
    absent = [
        pl.lit(None, kind).alias(name)
        for name, kind in RAW_SCHEMA.items()
        if name not in log.columns
    ]
    names = pl.DataFrame(
        {
            "item_id": [f"i{i}" for i in range(items)],
            "title": [f"t{i}" for i in range(items)],
        }
    )
    raw = RawLogs(log.with_columns(absent), names, {})
    return apply_protocol(build_interactions(raw, protocol), protocol)


def parts(split: SplitInteractions) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The log's rows and the sampled ones."""
    return split.rows.filter(answered(split.rows)), split.rows.filter(~answered(split.rows))


def arrays(rows: pl.DataFrame) -> list[np.ndarray]:
    """User, time, split (0, 1, 2) and item."""
    coded = rows.with_columns(pl.col("split").to_physical())
    return [coded[name].to_numpy() for name in ("user", "timestamp", "split", "item")]


@pytest.mark.parametrize("by", ["uniform", "popularity"])
@pytest.mark.parametrize("kind", ["global_time", "random"])
def test_each_target_has_unseen_items_beside_it(kind: Any, by: Any) -> None:
    """Of its user, second, split and fold; none that a row of the user up to its second and split has."""
    split = clicks(split=kind, negatives=Negatives(2, by))
    log, drawn = parts(split)
    at = ["user", "timestamp", "split", "fold", "hist", "role"]
    clicked = log.filter(pl.col("role") == "target")
    assert (
        drawn.select(at).sort(at).equals(pl.concat([clicked, clicked]).select(at).sort(at))
    )
    assert set(log["label"]) == {1}
    assert set(drawn["label"]) == {0}
    user, time, part, item = arrays(log)
    for u, t, k, i in zip(*arrays(drawn), strict=True):
        assert i not in item[(user == u) & (time <= t) & (part <= k)]
    assert not drawn.select("user", "timestamp", "split", "item").is_duplicated().any()
    assert split.rows["row_id"].to_list() == list(range(split.rows.height))
    manifest = split.manifest
    assert (manifest["rows"], manifest["negatives"]) == (log.height, 2 * clicked.height)
    assert sum(manifest["positives"].values()) == clicked.height


def test_popular_items_are_drawn_in_proportion_to_earlier_clicks() -> None:
    """Earlier clicks of what is drawn: expected is the sum over free items of c (c + 1), over that of c + 1."""
    log, drawn = parts(clicks(negatives=Negatives(1, "popularity")))
    user, time, _, item = arrays(log)
    popular, uniform, found = 0.0, 0.0, 0
    for u, t, k, i in zip(*arrays(drawn), strict=True):
        if k == 0:
            clicked = np.bincount(item[time < t], minlength=ITEMS)
            c = np.delete(clicked, np.unique(item[(user == u) & (time <= t)]))
            popular += (c * (c + 1)).sum() / (c + 1).sum()
            uniform += c.mean()
            found += clicked[i]
    assert popular > 1.3 * uniform
    assert found == pytest.approx(popular, rel=0.1)


def random_clicks() -> SplitInteractions:
    """6,000 clicks of 200 users on 60 items at random: no score can tell a click from what was not clicked."""
    rng = np.random.default_rng(0)
    log = pl.DataFrame(
        {
            "user_id": [f"u{u}" for u in rng.integers(0, 200, 6000)],
            "item_id": [f"i{i}" for i in rng.integers(0, 60, 6000)],
            "timestamp": np.arange(6000.0),
        }
    )
    return split_of(log, 60, Protocol(label="clicked", negatives=Negatives()))


def test_a_click_does_not_tell_itself_by_having_been_there(tmp_path: Path) -> None:
    """AUC on random clicks: of having had the item before, and of how much the user's own items resemble it.

    Targets are first clicks, so it is .5, with a standard error of 1 / sqrt(6 * 700) = .015 for 700 clicks and as many
    negatives.
    """
    split = random_clicks()
    retriever = LightGCN(item_neighbours=10, dim=4, epochs=1)
    tables = RetrievedFeatures(split, retriever, 4, tmp_path, None).tables()
    log, _ = parts(split)
    first = log.group_by("user", "item").agg(first=pl.col("timestamp").min())
    targets = split.rows.filter(pl.col("role") == "target").join(
        first, on=["user", "item"], how="left"
    )
    features = pl.concat(
        [
            targets.filter(pl.col("split") == name).join(
                tables[name], on="row_id", maintain_order="left"
            )
            for name in SPLITS[1:]
        ]
    )
    label = features["label"].to_numpy()
    assert label.sum() > 700
    before = (features["timestamp"] > features["first"]).fill_null(False)
    for scores in (before, features["text_weight"], features["item_similarity_weight"]):
        assert 0.46 < auc(scores.cast(pl.Float64).fill_null(0).to_numpy(), label) < 0.54


def test_hidden_items_are_not_drawn_for_train() -> None:
    split = clicks(hide_items=0.3)
    hidden = parts(split)[1].filter("hidden")
    assert set(hidden["split"]) == {"valid", "test"}


def test_the_hash_sees_negatives() -> None:
    made = [Negatives(), Negatives(2), Negatives(1, "popularity")]
    hashes = {
        clicks(seed, negatives=negatives).hash for negatives in made for seed in (0, 1)
    }
    assert len(hashes) == 6
    assert clicks().manifest["name"] == "global_time-80-10-10-h2-uniform2"
    line = (
        environment()
        .get_template("tables.md.j2")
        .module.protocol({"protocol": clicks().manifest})
    )
    assert "negatives are sampled: 2 per positive, uniform" in line


@pytest.mark.slow
def test_another_draw_changes_nothing_that_is_read(
    tmp_path: Path, hidden: Callable[[Batch], dict[int, torch.Tensor]]
) -> None:
    """Rows, features and hidden states of clicks stay; a negative counts and shows the clicks before it."""
    retriever, mf = (
        LightGCN(neighbours=3, dim=4, epochs=1, item_neighbours=3),
        MatrixFactorisation(dim=2),
    )
    draws = [clicks(seed) for seed in (0, 1)]
    logs, drawn = zip(*map(parts, draws), strict=True)
    assert logs[0].equals(logs[1])
    assert not drawn[0]["item"].equals(drawn[1]["item"])
    tables = [
        RetrievedFeatures(split, retriever, 4, tmp_path, mf).tables() for split in draws
    ]
    clicked = logs[0]["row_id"].implode()
    for name in SPLITS:
        one, other = (
            table[name].filter(pl.col("row_id").is_in(clicked)) for table in tables
        )
        assert one.equals(other)
        states = []
        for split, table in zip(draws, tables, strict=True):
            encoder = PromptEncoder(
                Letters(), Prompt("I\n", SEGMENT), split.interactions.items
            )
            streams = build_streams(split.rows, table[name], name, encoder)
            states.append(hidden(pack(streams, streams.evaluation(150))))
        assert set(states[0]) == set(states[1]) > set(clicked.explode()) & set(states[0])
        for row in set(clicked.explode()) & set(states[0]):
            torch.testing.assert_close(states[0][row], states[1][row])
    user, time, _, item = arrays(logs[0])
    shown = drawn[0].join(tables[0]["test"], on="row_id", maintain_order="left")
    for u, t, i, of_item, of_user in shown.select(
        "user", "timestamp", "item", "item_count", "user_count"
    ).iter_rows():
        assert of_item == ((item == i) & (time < t)).sum()
        assert of_user == ((user == u) & (time < t)).sum()


def test_the_networks_histories_are_of_clicks() -> None:
    """The last clicks before a target's second, of a negative those of its click."""
    split = clicks()
    log = parts(split)[0]
    items, answers = earlier_rows(split.rows, "test", 3)
    targets = split.rows.filter(pl.col("split") == "test", pl.col("role") == "target")
    assert set(answers.ravel()) == {1}
    user, time, _, item = arrays(log)
    for u, t, found in zip(
        targets["user"], targets["timestamp"], items.tolist(), strict=True
    ):
        assert found == item[(user == u) & (time < t)][-3:].tolist()
