"""Lists of what similar users liked: the definition by brute force, their dates, requests, and that off is off."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from project.errors import ConfigError
from project.retrieval import LightGCN, VectorRetriever, request_retrieved, retrieved_tables
from project.retrieval.base import Edges, FloatArray
from project.retrieval.walk import WalkRows, fit_snapshots, walk

Retrieved = Callable[..., pl.DataFrame]
CUTS = np.array([20.0, 45.0])
LISTS = {"similar_every": 3, "similar_users": 3, "similar_items": 2}


class UnitItems(VectorRetriever):
    """Items 0, 1, 2 and 3 are (1, 0), (0, 1), (1, 0) and (1, 0)."""

    def item_table(self, edges: Edges, block: int) -> FloatArray:
        return np.eye(2, dtype=np.float32)[[0, 1, 0, 0]]


GOLDEN = [  # timestamp, user, item, label; block 1 begins at 10 and no item has more than one like before
    (1, 1, 0, 1),  # v1 = (1, 0)
    (2, 2, 1, 1),
    (3, 2, 2, 1),  # v2 = (1, 1)
    (10, 0, 0, 1),  # row 3: user 0 has 1 row of 2
    (11, 3, 3, 1),  # v3 = (1, 0)
    (12, 0, 3, 0),  # row 5: 2 rows, a list is due; v0 = (1, 0) - .5 (1, 0)
    (12, 1, 2, 1),  # row 6: the same second; 2 rows, a list is due
    (13, 2, 2, 0),  # row 7: 3 rows, none is due; user 2 likes item 2 no more
    (14, 0, 1, 0),
    (14, 0, 1, 1),  # row 9: rows 3 and 4 in one second, a list is due after both
]


def golden(**settings: int) -> list[list[int] | None]:
    """Lists after each row of the golden log, of every second row."""
    columns = ["timestamp", "user", "item", "label"]
    rows = pl.DataFrame(GOLDEN, columns, orient="row").with_columns(
        row_id=pl.int_range(pl.len(), dtype=pl.Int64), timestamp=pl.col("timestamp").cast(pl.Float64)
    )
    retriever, cuts, items = (
        UnitItems(similar_every=2, **settings),
        np.array([10.0]),
        pl.DataFrame({"item": range(4)}),
    )
    fitted = fit_snapshots(rows, retriever, 4, items, cuts).fitted
    found: list[list[int] | None] = walk(WalkRows.from_log(rows), retriever, items, cuts, fitted)[
        "similar_after"
    ].to_list()
    return found


def test_golden() -> None:
    """Row 5: cosines 1 (users 1, 3), sqrt(1/2) (user 2); item 2 has 1 + .71 by row 6, item 1 has .71; 0, 3 are rated.

    Row 6: v1 = (2, 0), so user 3 with item 3 has 1, user 0 with item 0 1, user 2 .71 for items 1 and 2; 0, 2 are rated.
    Row 2 is in block 0 and has none. Row 9: v0 = (.5, .5); all of 0, 1 and 3 are rated, item 2 is liked by user 1 only.
    """
    assert golden() == [None] * 5 + [[2, 1], [3, 1], None, None, [2]]


def test_fewer_users_and_items() -> None:
    """Of equal cosines the later rating counts: user 1 before 3 in row 5; user 0 before 3 in row 6, no news."""
    assert golden(similar_users=1)[5:7] == [[2], None]
    assert golden(similar_items=1)[5:7] == [[2], [3]]


def make(retriever: VectorRetriever, **settings: int) -> VectorRetriever:
    return type(retriever)(neighbours=4, **(LISTS | settings))


def brute_force(rows: pl.DataFrame, row: dict, retriever: VectorRetriever) -> list[int] | None:
    """The list after a row, by filters on the log alone."""
    now = row["timestamp"]
    own = rows.filter(pl.col("user") == row["user"], pl.col("timestamp") <= now)
    before = own.filter(pl.col("timestamp") < now).height
    starts = CUTS[now >= CUTS]
    if not starts.size or own.height // 3 == before // 3 or own["row_id"][-1] != row["row_id"]:
        return None
    likes = np.zeros((12, 9))
    for edge in rows.filter(pl.col("timestamp") < starts[-1]).to_dicts():
        likes[edge["user"], edge["item"]] += edge["label"]
    weighted = likes.T @ likes / np.sqrt(np.maximum(likes.sum(0), 1))[:, None]
    vectors, latest, liked = np.zeros((12, 9)), {}, {}
    for earlier in rows.filter(pl.col("timestamp") <= now).to_dicts():
        user, item = earlier["user"], earlier["item"]
        vectors[user] += (1 if earlier["label"] else -0.5) * weighted[item]
        liked[user, item], latest[user] = earlier["label"], earlier["row_id"]
    norms = np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)
    cosine = (vectors @ vectors[row["user"]] / norms / norms[row["user"]]).round(5)
    others = [
        u for u in latest if u != row["user"] and cosine[u] > 0 and any(liked.get((u, i)) for i in range(9))
    ]
    nearest = sorted(others, key=lambda u: (-cosine[u], -latest[u]))[: retriever.similar_users]
    score = {i: sum(cosine[u] for u in nearest if liked.get((u, i))) for i in range(9)}
    new = [i for i in score if score[i] > 0 and i not in own["item"].to_list()]
    return sorted(new, key=lambda i: (-round(score[i], 4), i))[: retriever.similar_items] or None


@pytest.mark.parametrize("seed", range(5))
def test_lists_equal_brute_force(
    log_of: Retrieved, retrieved_of: Retrieved, co_likes: VectorRetriever, seed: int
) -> None:
    """Every row's list equals the definition: rows up to its second, one table a block, nothing rated already."""
    rows, retriever = log_of(seed), make(co_likes)
    found = retrieved_of(rows, retriever, CUTS)["similar_after"].to_list()
    assert found == [brute_force(rows, row, retriever) for row in rows.to_dicts()]
    assert sum(x is not None for x in found) > 5


def test_a_list_is_dated_by_its_second(
    log_of: Retrieved, retrieved_of: Retrieved, co_likes: VectorRetriever
) -> None:
    """Canary: flipping or deleting a row changes no list of an earlier second, and some of its own second or later."""
    changed = dict.fromkeys(("flipped", "deleted"), 0)
    for seed in range(3):
        rows, retriever = log_of(seed), make(co_likes)
        before = retrieved_of(rows, retriever, CUTS)["similar_after"]
        for row in rows.filter(pl.col("timestamp") > 20).sample(4, seed=seed).to_dicts():
            here, earlier = pl.col("row_id") == row["row_id"], rows["timestamp"] < row["timestamp"]
            flip = rows.with_columns(label=pl.when(here).then(1 - pl.col("label")).otherwise("label"))
            for how, found in (
                ("flipped", retrieved_of(flip, retriever, CUTS)),
                ("deleted", retrieved_of(rows, retriever, CUTS, (row["row_id"],))),
            ):
                after = found["similar_after"]
                assert after.filter(earlier).equals(before.filter(earlier))
                changed[how] += not after.equals(before)
    assert min(changed.values()) > 3


def test_only_the_latest_raters_are_compared(
    log_of: Retrieved, retrieved_of: Retrieved, co_likes: VectorRetriever
) -> None:
    """With max_raters 1 a list holds likes of the user, other than the asking one, who rated last."""
    rows, retriever = log_of(0), make(co_likes)
    retriever.max_raters = 1
    found = retrieved_of(rows, retriever, CUTS)
    checked = 0
    for row in rows.join(found, on="row_id").drop_nulls("similar_after").to_dicts():
        past = rows.filter(pl.col("timestamp") <= row["timestamp"], pl.col("user") != row["user"])
        by_pair = past.group_by("user", "item").agg(pl.col("label", "row_id").last())
        likers = by_pair.filter(pl.col("label") == 1)["user"].implode()
        last = past.filter(pl.col("user").is_in(likers))["user"][-1]
        liked = by_pair.filter(pl.col("user") == last, pl.col("label") == 1)["item"].to_list()
        assert set(row["similar_after"]) <= set(liked)
        checked += 1
    assert checked > 5


def test_off_changes_nothing(log_of: Retrieved, retrieved_of: Retrieved, co_likes: VectorRetriever) -> None:
    """Lists add one column and change no other; without them neither the table nor the cache's key knows of them."""
    rows, every = log_of(1), make(co_likes)
    off, on = (retrieved_of(rows, retriever, CUTS) for retriever in (co_likes, every))
    assert on.drop("similar_after").equals(off)
    assert on.schema["similar_after"] == pl.List(pl.Int32)
    assert not [name for name in LightGCN(similar_users=7).settings()["init_args"] if "similar" in name]
    assert LISTS.items() <= every.settings()["init_args"].items()


@pytest.mark.parametrize("kind", ["co_likes", "lightgcn"])
def test_a_history_has_the_lists_of_the_log(
    log_of: Retrieved, split_of: Callable, co_likes: VectorRetriever, tmp_path: Path, kind: str
) -> None:
    """Users' rows as history, in any order, with candidates: the lists of the log, and none after a candidate."""
    retriever = make(co_likes) if kind == "co_likes" else LightGCN(dim=4, epochs=1, **LISTS)
    rows = log_of(2)
    split = split_of(rows, np.digitize(rows["timestamp"].to_numpy(), [40, 60]))
    log = retrieved_tables(split, retriever, 4, tmp_path)["test"]
    asked = rows.filter(pl.col("user").is_in([1, 4, 7])).sample(fraction=1, shuffle=True, seed=0)
    n = asked.height
    columns = (np.tile(asked[name].to_numpy(), 2) for name in ("user", "item"))
    late = np.append(asked["timestamp"].to_numpy(), np.full(n, 1e3))
    label = np.append(asked["label"].to_numpy(), np.full(n, -1))
    found = request_retrieved(split, retriever, 4, tmp_path, *columns, late, label, np.arange(2 * n) < n)
    history, candidates = found["similar_after"].head(n), found["similar_after"].tail(n)
    joined = asked.join(
        rows.select("row_id").with_columns(log["similar_after"]), on="row_id", maintain_order="left"
    )
    groups = ["user", "timestamp"]  # the order inside a second is free: a list belongs to its end
    lists = [
        t.drop_nulls("similar_after").sort(groups).select(*groups, "similar_after")
        for t in (joined, asked.with_columns(history))
    ]
    assert lists[0].equals(lists[1])
    assert lists[0].height > 3
    assert candidates.null_count() == n


@pytest.mark.parametrize(
    ("name", "value"), [("similar_every", -1), ("similar_users", 0), ("similar_items", 0)]
)
def test_impossible_settings_are_refused(name: str, value: int) -> None:
    """The error names the YAML key."""
    with pytest.raises(ConfigError, match=rf"data\.retriever\.init_args\.{name} is {value}"):
        LightGCN(**{name: value})
