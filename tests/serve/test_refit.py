"""Tests `refit`: the new run's log has the events, once, and a server of it goes on behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from project.config import open_run
from project.model.initial import read_initial
from project.request import RankRequest
from project.run import read_config, read_yaml
from project.serve.ranker import Ranker
from project.serve.refit import grown_log
from project.serve.store import Event, EventStore

pytestmark = pytest.mark.slow
EVENTS = [
    Event("a", "u1", "i7", 1, 2000.0),
    Event("b", "u1", "i7", 0, 2000.0),  # the same row, answered again
    Event("c", "somebody", "new", 1, 2001.0),
    Event("d", "somebody", "no title", 1, 2002.0),
]


def test_a_refit_has_the_events(
    served_run: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    """Log and events are the new log; what came later is observed by a server of the new run."""
    address = f"sqlite:///{tmp_path}/events.db"
    store = EventStore(address)
    store.put_items(
        [
            {"item_id": "new", "title": "a city"},
            {"item_id": "new", "title": "a city at night"},
        ]
    )
    store.add(EVENTS)
    run("refit", "--run", served_run, "--db", address)
    folder = (served_run.parent / "latest").resolve()
    assert folder != served_run
    old, new = (open_run(of)[1].split for of in (served_run, folder))
    assert new.rows.height == old.rows.height + 3
    added = (
        new.rows.tail(3)
        .join(new.interactions.items, on="item")
        .join(new.interactions.users, on="user")
        .sort("timestamp")
    )
    assert added.select("user_id", "title", "label", "timestamp").rows() == [
        ("u1", old.interactions.items.filter(item_id="i7")["title"][0], 0, 2000.0),
        ("somebody", "a city at night", 1, 2001.0),
        ("somebody", "no title", 1, 2002.0),
    ]
    same = pl.exclude("row_id", "user", "item", "rating", "split", "fold", "role")
    assert new.rows.head(old.rows.height).select(same).equals(old.rows.select(same))
    ranker = Ranker.load(folder, audit_share=0.0)
    store.add([Event("e", "u1", "new", 1, 2003.0)])
    ranker.follow(store)
    assert [row["item_id"] for row in ranker.user("u1")["history"][-2:]] == ["i7", "new"]
    assert (
        ranker.rank_after_log([RankRequest("u1", None, ["new"])])[0].features["item_count"][
            0
        ]
        == 2
    )
    # again from the new run: only what its log has not
    config, last = grown_log(folder, store)
    assert last == ranker.seq
    assert (
        pl.read_parquet(config.parent / "interactions.parquet").height
        == new.rows.height + 1
    )
    made, data = open_run(config.parent)
    # the log grew, so its validation begins after the run's last train row
    read_initial(str(folder), made.exit_layers, made.backbone_name, data.split)
    # a warm one, and what a refit of that reads: no fewer steps, nobody's weights
    run("refit", "--run", folder, "--db", address, "--warm")
    warm = (served_run.parent / "latest").resolve()
    made = read_config(warm)
    assert made["model"]["initial"] == str(folder)
    assert made["trainer"]["limit_train_batches"] == 0.25
    cold, _ = grown_log(warm, store)
    assert open_run(cold.parent)[0].initial is None
    assert read_yaml(cold)["trainer"] == read_config(folder)["trainer"]
    # what was deleted is left out
    store.delete("u2")
    store.delete(event_id="c")
    left = pl.read_parquet(grown_log(folder, store)[0].parent / "interactions.parquet")
    users = new.rows.join(new.interactions.users, on="user")["user_id"]
    assert left.filter(user_id="somebody")["item_id"].to_list() == ["no title"]
    assert left.filter(user_id="u2").height == 0 < users.eq("u2").sum()
    assert left.height == new.rows.height - users.eq("u2").sum() - 1 + 1
    # of a corrected row the correction is left
    row = left.filter(user_id="u1").row(0, named=True)
    found = Event("x", "u1", row["item_id"], 1 - row["label"], row["timestamp"])
    store.add([found], replacing={"x"})
    again = pl.read_parquet(grown_log(folder, store)[0].parent / "interactions.parquet")
    own = again.filter(user_id="u1", item_id=row["item_id"], timestamp=row["timestamp"])
    assert own["label"].to_list() == [found.label]
    assert again.height == left.height
