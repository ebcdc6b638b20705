"""The command `refit`: a run of the same configuration on its log and the events that a store has got since."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import yaml  # type: ignore[import-untyped]  # as in project.run

from project.config import open_run, warm_start
from project.data.protocol import CLICKED, answered
from project.errors import ConfigError
from project.run import (
    SEEN,
    label_rule,
    read_config,
    read_seen,
    read_yaml,
    replace_file,
    write_json,
)
from project.serve.store import Deleted, Event, EventStore


def run_refit(arguments: Sequence[str]) -> Path:
    """The command: `fit` in a process of its own; prints the new run's folder."""
    parser = argparse.ArgumentParser("python -m project refit", description=__doc__)
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the run that is served"
    )
    parser.add_argument(
        "--db", required=True, help="address of the store, such as sqlite:///events.db"
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="start from the run's weights, with a quarter of the steps",
    )
    given = parser.parse_args(arguments)
    run = given.run.resolve()
    config, last = grown_log(run, EventStore(given.db))
    words = ["--config", str(config)]
    if given.warm:
        over = yaml.safe_dump(warm_start(read_yaml(config), run))
        warm = replace_file(
            config.with_name("warm.yaml"),
            lambda part: part.write_text(over, encoding="utf-8"),
        )
        words += ["--config", str(warm)]
    subprocess.run([sys.executable, "-m", "project", "fit", *words], check=True)
    folder = (config.parent.parent / "latest").resolve()
    # the next refit reads this configuration: that of a warm run has fewer steps
    write_json(
        folder / SEEN,
        {"seq": last, "label": label_rule(given.run), "config": str(config)},
    )
    print(f"written: {folder}")
    return folder


def grown_log(run: Path, store: EventStore) -> tuple[Path, int]:
    """Write the log with its events as tables beside the run, and the configuration that reads them; and the `seq`."""
    _, data = open_run(run)
    if data.protocol.split == "given":
        raise ConfigError(
            "data.protocol.split is given, which knows no events; expected a split by time."
        )
    log = data.split.interactions
    more = list(log.columns)
    if log.own_scores is not None:
        more.append(log.own_scores)
    if "session" in data.split.rows.columns:
        more.append("session")
    if more:
        raise ConfigError(
            f"The run reads {', '.join(more)}, and refit writes users, items, times and answers alone. Add the events "
            "to your log and run fit."
        )
    # 1. the log without what was deleted, and the events, by ids; of a row that stands twice
    # the later
    last, arrived = store.arrivals(read_seen(run).get("seq", 0))
    rows = data.split.rows.filter(answered(data.split.rows))
    old = rows.join(log.users, on="user").join(
        log.items.select("item", "item_id"), on="item"
    )
    events = pl.DataFrame(
        [e for e in arrived if isinstance(e, Event)],
        {name: old.schema.get(name, pl.String) for name in Event._fields},
        orient="row",
    )
    for what in arrived:
        if isinstance(what, Deleted):
            # of label and time, where it is about one row
            same = {
                name: value for name, value in what._asdict().items() if value is not None
            }
            if what.label is None:
                del same["timestamp"]
            old = old.remove(pl.col("timestamp") <= what.timestamp, **same)
    columns = ["user_id", "item_id", "timestamp", "label", "rating"]
    interactions = pl.concat([old.sort("row_id").select(columns), events.select(columns)])
    interactions = interactions.unique(columns[:3], keep="last", maintain_order=True)
    label = CLICKED if data.protocol.label == CLICKED else None
    if label:
        interactions = interactions.filter(label=1).drop("label")
    # 2. items: of several versions the last; those of events that nobody described have
    # their id as title
    known = log.items.drop("item")
    named = interactions.select("item_id", title="item_id").unique(maintain_order=True)
    brought = pl.DataFrame(
        [what for what in arrived if isinstance(what, dict) and "item_id" in what],
        known.schema,
    )
    tables = [named.join(known, on="item_id", how="anti"), known, brought]
    items = pl.concat(tables, how="diagonal").fill_null("")
    items = items.unique("item_id", keep="last", maintain_order=True)
    # 3. files, and the run's configuration with these logs
    folder = run.parent / f"log_{last}"
    init_args = dict[str, str]()
    for name, table in {"interactions": interactions, "items": items}.items():
        file = replace_file(folder / f"{name}.parquet", table.write_parquet)
        init_args[name] = str(file)
    if "trainer" not in read_config(run):
        raise ConfigError(
            f"--run {run} was exported and cannot be fitted; expected the run that it came from."
        )
    # of a refitted run, which may be warm, that of a cold fit
    config = read_yaml(Path(read_seen(run).get("config", run / "config.yaml")))
    config["data"]["logs"] = {
        "class_path": "project.data.logs.TableLogs",
        "init_args": init_args,
    }
    config["data"]["protocol"] |= {"label": label, "drop_ratings": []}
    config["model"]["initial"] = None  # another run's weights are no longer wanted
    place = {"save_dir": str(run.parent.parent), "name": run.parent.name, "version": None}
    for logger in config["trainer"]["logger"]:
        if logger["class_path"].rpartition(".")[2] in ("CSVLogger", "RunLogger"):
            logger["init_args"] |= place
    text = yaml.safe_dump(config, sort_keys=False)
    return replace_file(
        folder / "config.yaml", lambda part: part.write_text(text, encoding="utf-8")
    ), last
