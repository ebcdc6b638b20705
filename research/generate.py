"""Generates a log of any size whose truth is known: each row's chance of a like, and so the AUC that can be reached.

Activity of users and popularity of items follow power laws, users and items arrive over time. A user's taste is a
vector that turns slowly, an item's is that of its topic plus its own, and a title's words name the topic. So earlier
labels, similar users and text each tell something, and what is new is told by text alone.

With --drift topics come into fashion and go out of it, so that what a title's words say of a like changes with time.

With --context or --users the log is one of clicks that depend on where and on what device an item is shown, on the
user's country and the item's category together, and weakly on popularity; hour, price and age tell nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.arrays import F32
from project.errors import ConfigError
from project.run import replace_file

DIM, TOPICS, WORDS = 8, 40, 6  # of taste; of items; of a topic
FASHIONS = 2 * np.pi  # turn of topics' fashion over the log's time
SPAN = 3 * 365 * 86_400  # seconds that the log takes
TURN = np.pi / 3  # of a user's taste over this time
# deviation of users' and items' log-odds, of taste's; the topic's share of it
BIAS, TASTE, TOPIC = (
    0.5,
    2.2,
    0.7,
)
CONFIG = """data:
  logs:
    class_path: project.data.logs.TableLogs
    init_args: {{interactions: {0}/interactions.parquet, items: {0}/items.parquet}}
  protocol: {{minimum_history: 5}}
"""


CLICKS = """data:
  logs:
    class_path: project.data.logs.TableLogs
    init_args:
      interactions: {0}/interactions.parquet
      items: {0}/items.parquet
{1}  protocol: {{minimum_history: 5}}
"""
CONTEXT = "      context: [device, placement, hour, price]\n"
USERS, ITEMS, DAYS = 400, 1500, 60  # of a log of clicks
DEVICES, PLACEMENTS = ("phone", "tablet", "pc"), ("home", "search", "mail", "sidebar")
COUNTRIES, CATEGORIES = 6, 8


def generate(
    rows: int, seed: int = 0, drift: float = 0.0
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Interactions (user_id, item_id, timestamp, label, chance), by time, and items (item_id, title).

    `chance` is the probability that `label` was drawn with; `drift` is the deviation of topics' log-odds at a time,
    which turn once over the log: a third of its time later they are others. There are rows / 50 users and 5 sqrt(rows)
    items. A user rates an item once, so a log of less than some thousand rows may be shorter.
    """
    rng = np.random.default_rng(seed)
    users, items = rows // 50, int(5 * rows**0.5)

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape, dtype=np.float32)

    # 1. who rates what: activity ~ rank^-1/2, popularity ~ rank^-4/5, ranks in no order of
    # codes
    def drawn(count: int, exponent: float, size: int) -> NDArray[np.int32]:
        weight = (rng.permutation(count) + 10.0) ** -exponent
        return np.searchsorted(
            np.cumsum(weight / weight.sum())[:-1], rng.random(size)
        ).astype(np.int32)

    pairs = pl.DataFrame(
        {"user_id": drawn(users, 0.5, 2 * rows), "item_id": drawn(items, 0.8, 2 * rows)}
    )
    # 2. when: a user comes at any time and stays for a while; half of the items are there
    # from the start
    came, stays = (
        rng.random(users, np.float32),
        rng.exponential(0.2, users).astype(np.float32),
    )
    released = np.maximum(0, 2 * rng.random(items, np.float32) - 1)
    user = pairs["user_id"].to_numpy()
    time = came[user] + np.minimum(stays, 1 - came)[user] * rng.random(
        user.size, np.float32
    )
    pairs = pairs.with_columns(time=time).filter(
        time >= released[pairs["item_id"].to_numpy()]
    )
    pairs = (
        pairs.unique(["user_id", "item_id"], keep="first", maintain_order=True)
        .head(rows)
        .sort("time")
    )
    user, item, time = (column.to_numpy() for column in pairs)
    # 3. tastes: users' are (cos, sin) mixtures of two directions, items' are their topic's
    # and their own
    topic = rng.integers(TOPICS, size=items)
    tastes = np.sqrt(TOPIC) * normal(TOPICS, DIM)[topic] + np.sqrt(1 - TOPIC) * normal(
        items, DIM
    )
    first, second = normal(users, DIM), normal(users, DIM)
    user_bias, item_bias = BIAS * normal(users), BIAS * normal(items)
    # numbers of its own, so that a log without drift is as it was
    fashion = np.random.default_rng([seed, 1]).standard_normal((2, TOPICS), np.float32)
    chance = np.empty(user.size, np.float32)
    for part in (slice(start, start + 2**20) for start in range(0, user.size, 2**20)):
        u, i, angle = user[part], item[part], TURN * time[part, None]
        now = np.cos(angle) * first[u] + np.sin(angle) * second[u]
        taste = TASTE / np.sqrt(DIM) * (now * tastes[i]).sum(1)
        turned = FASHIONS * time[part]
        of = fashion[:, topic[i]]
        mood = drift * (np.cos(turned) * of[0] + np.sin(turned) * of[1])
        chance[part] = 1 / (1 + np.exp(-(user_bias[u] + item_bias[i] + taste + mood)))
    # 4. titles: two words of the topic, one of any
    word = np.stack([WORDS * topic, WORDS * topic, np.zeros(items, int)]) + np.stack(
        [*rng.integers(WORDS, size=(2, items)), rng.integers(WORDS * TOPICS, size=items)]
    )
    names = np.array(
        [
            a + b + c
            for a in "bdfklmst"
            for b in "aeiou"
            for c in ("ra", "ne", "lo", "ti", "ku", "sh")
        ]
    )
    titles = [" ".join(names[w]) + f" {k}" for k, w in enumerate(word.T)]
    log = pairs.select("user_id", "item_id").with_columns(
        timestamp=pl.Series(np.floor(time.astype(np.float64) * SPAN)),
        label=pl.Series((rng.random(user.size, np.float32) < chance).astype(np.int8)),
        chance=pl.Series(chance),
    )
    return log, pl.DataFrame({"item_id": np.arange(items), "title": titles})


def generate_clicks(
    rows: int, seed: int = 0
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Clicks (user_id, item_id, timestamp, label, context, chance) by time; items with a category; users.

    A price is unknown in every tenth row, a country that of every twentieth user.
    """
    rng = np.random.default_rng(seed)
    # 1. users, and items whose popularity is ~ rank^-1/2
    country = rng.integers(COUNTRIES, size=USERS)
    category = rng.integers(CATEGORIES, size=ITEMS)
    weight = (rng.permutation(ITEMS) + 10.0) ** -0.5
    # 2. what is shown to whom, when and where
    user = rng.integers(USERS, size=rows)
    item = rng.choice(ITEMS, size=rows, p=weight / weight.sum())
    time = np.sort(rng.random(rows)) * DAYS * 86_400
    device = rng.integers(len(DEVICES), size=rows)
    placement = rng.integers(len(PLACEMENTS), size=rows)
    # 3. chances
    taste = 1.7 * rng.normal(size=(COUNTRIES, CATEGORIES))
    popular = np.log(weight)
    odds = np.array([-0.8, 0.0, 0.8])[device] + np.array([0.2, 1.4, -0.2, -1.4])[placement]
    odds += taste[country[user], category[item]]
    odds += 0.3 * ((popular - popular.mean()) / popular.std())[item]
    chance = 1 / (1 + np.exp(-(odds - 0.5)))
    log = pl.DataFrame(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": np.floor(1.7e9 + time),
            "label": (rng.random(rows) < chance).astype(np.int8),
            "device": np.array(DEVICES)[device],
            "placement": np.array(PLACEMENTS)[placement],
            "hour": (time // 3600 % 24).astype(int),
            "price": np.where(
                rng.random(rows) < 0.1, np.nan, np.exp(rng.normal(3, 1, rows)).round(2)
            ),
            "chance": chance,
        }
    )
    items = pl.DataFrame(
        {
            "item_id": np.arange(ITEMS),
            "title": [f"item {k}" for k in range(ITEMS)],
            "category": [f"category {k}" for k in category],
        }
    )
    known = rng.random(USERS) >= 0.05
    users = pl.DataFrame(
        {
            "user_id": np.arange(USERS),
            "country": np.where(
                known, np.array([f"c{k}" for k in range(COUNTRIES)])[country], ""
            ),
            "age": rng.integers(18, 80, USERS),
        }
    )
    # a user sees an item once a second
    key = ["user_id", "item_id", "timestamp"]
    return log.unique(key, keep="first", maintain_order=True), items, users


def reachable_auc(chance: F32) -> float:
    """AUC of the true chances (n,), over all labels that they could have drawn: no score's is higher."""
    likes = np.sort(chance.astype(np.float64))
    dislikes = 1 - likes
    above = likes @ (np.cumsum(dislikes) - dislikes)  # a row is no pair with itself
    return float(above / (likes.sum() * dislikes.sum() - likes @ dislikes))


def run_generate(arguments: Sequence[str]) -> None:
    """Write interactions, their true chances, items and a configuration into a folder."""
    parser = argparse.ArgumentParser("generate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--rows", type=float, default=1e5, help="interactions, such as 1e6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--drift", type=float, default=0.0, help="of topics' log-odds, such as 1.5"
    )
    parser.add_argument("--context", action="store_true", help="clicks with context")
    parser.add_argument(
        "--users", action="store_true", help="clicks with users' attributes"
    )
    given = parser.parse_args(arguments)
    if not given.rows >= 1000:
        raise ConfigError(f"--rows is {given.rows:g}; expected 1000 or more.")
    config = CONFIG.format(given.out)
    more = {}
    if given.context or given.users:
        log, items, users = generate_clicks(int(given.rows), given.seed)
        lines = CONTEXT if given.context else ""
        if given.users:
            lines += f"      users: {given.out}/users.parquet\n"
            more["users"] = users
        config = CLICKS.format(given.out, lines)
    else:
        log, items = generate(int(given.rows), given.seed, given.drift)
    tables = {
        "interactions": log.drop("chance"),
        "truth": log.select("chance"),
        "items": items,
        **more,
    }
    for name, table in tables.items():
        replace_file(given.out / f"{name}.parquet", table.write_parquet)
    (given.out / "config.yaml").write_text(config)
    print(
        f"written: {given.out}, {log.height:,} interactions of {log['user_id'].n_unique():,} users; AUC reachable over "
        f"all rows {reachable_auc(log['chance'].to_numpy()):.4f}; try --config {given.out / 'config.yaml'}"
    )


if __name__ == "__main__":
    run_generate(sys.argv[1:])
