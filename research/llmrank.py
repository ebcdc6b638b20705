"""Models without an LLM on LLMRank's fixed candidates: `python -m research.llmrank GAMES MOVIELENS [own]`.

The arguments are folders with candidates of Hou et al. (ECIR 2024, repository RUCAIBox/LLMRank): candidates_*.parquet,
and for Games interactions.parquet (user_id, item_id, timestamp in each user's order) beside them; MovieLens 1M is
fetched. The protocol is theirs: a user's last row is the truth among 19 random items, everything before it is known,
rows of other users included, whatever their date. Nothing is fitted on the last rows; the weights of the regression are
fitted on the row before, the project's own baselines on the three rows before that; `own` measures these alone.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.sparse import csr_array

from project.arrays import F64, I64, Bool
from project.data.logs import RAW_SCHEMA, Logs, MovieLens1M, RawLogs
from project.data.negatives import Negatives
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.evaluation.baselines import fit_baselines
from project.features import logistic_regression
from project.retrieval.base import Edges
from project.retrieval.lightgcn import LightGCN, like_graph
from project.run import SCHEMA_VERSION, write_json

OUT = Path("results/llmrank.json")
CUTS = (1, 5, 10, 20)
NEGATIVES = 19
SAMPLE = 5000  # users whose row before the last the regression is fitted on
DRAWS = 1000
TARGETS = (
    3  # rows of a user before the last two: what the project's baselines are fitted on
)
PER_TARGET = 3  # unseen items, drawn uniformly, beside each
OURS = ("lr_text", "gbdt_text")
# NDCG@1 and @10 on 200 users, as published; None where only one of them is known here
PUBLISHED: dict[str, dict[str, tuple[float | None, float]]] = {
    "Games": {
        "GPT-4": (0.3950, 0.6288),
        "GPT-3.5": (0.2383, 0.5031),
        "UniSRec": (0.1895, 0.4071),
        "LLaMA-2-70B": (0.2150, 0.3783),
        "BM25": (0.1392, 0.3461),
    },
    "MovieLens 1M": {
        "GPT-3.5": (None, 0.4880),
        "GPT-4": (None, 0.4674),
        "LLaMA-2-70B": (None, 0.3119),
        "UniSRec": (None, 0.2667),
        "BM25": (None, 0.1788),
    },
}
ABOUT = (
    "The truth among 19 fixed random items; interval: of NDCG@10, 95 %, users resampled. Counts of all "
    "rows but the users' last. Popularity: how many users. Co-occurrence: summed cosine of the candidate's users with "
    "those of the user's items. Both: a logistic regression on the logarithms of the two, fitted on the rows before "
    "the last of 5,000 users, beside 19 items drawn of those that a user never had. LightGCN: dot product of user and "
    "item, {epochs} epochs, untuned. All three: the regression with that product, too. lr_text and gbdt_text: exit 0 "
    "and boosting on the features that every log gets, fitted on {targets} rows of each user before the last two, "
    "beside {each} unseen items each. Trained: published rows are zero-shot but for UniSRec, which was trained on "
    "other logs."
)
EPOCHS = 10


class Counts:
    """What is known of users and items before the rows that are ranked."""

    def __init__(self, user: I64, item: I64, users: int, items: int) -> None:
        self.user, self.item = user, item
        ones = np.ones(user.size, np.float32)
        own = csr_array((ones, (user, item)), shape=(users, items))
        own.data[:] = 1  # a pair that repeats counts once
        self.own = own  # (users, items) 1 where a user has an item
        self.popularity = np.asarray(own.sum(axis=0)).astype(np.float64)  # (items,)
        norm = np.sqrt(np.maximum(self.popularity, 1)).astype(np.float32)
        scaled = csr_array(
            (own.data / norm[own.indices], own.indices, own.indptr), own.shape
        )
        cosine = (scaled.T @ scaled).tocsr()  # (items, items)
        cosine.setdiag(0)
        self.cosine = cosine

    def features(self, user: I64, candidates: I64) -> tuple[F64, F64]:
        """Popularity and summed cosine (n, c) of candidates (n, c) of users (n,)."""
        summed = np.zeros(candidates.shape)
        for start in range(0, len(user), 500):  # bounds the memory
            part = slice(start, start + 500)
            every = (self.own[user[part]] @ self.cosine).toarray()
            summed[part] = np.take_along_axis(every, candidates[part], axis=1)
        return self.popularity[candidates], summed


def ndcg(scores: F64, cut: int) -> F64:
    """(n,) of scores (n, c) whose last column is the truth; of equal scores the truth stands last."""
    rank = (scores[:, :-1] >= scores[:, -1:]).sum(axis=1)
    found: F64 = np.where(rank < cut, 1 / np.log2(rank + 2), 0.0)
    return found


def row(log: str, users: int, name: str, scores: F64) -> dict[str, Any]:
    """A row of the table."""
    means = {f"ndcg@{cut}": float(ndcg(scores, cut).mean()) for cut in CUTS}
    return {
        "log": log,
        "users": users,
        "scores": name,
        "trained": "on this log",
        **means,
    } | {"interval": interval(ndcg(scores, 10))}


def interval(of_user: F64) -> str:
    """Of the mean of a number of each user (n,), 95 %, users resampled."""
    drawn = np.random.default_rng(0).integers(len(of_user), size=(DRAWS, len(of_user)))
    low, high = np.quantile(of_user[drawn].mean(axis=1), [0.025, 0.975])
    return f"{low:.3f} to {high:.3f}"


def logs_of(positions: F64) -> F64:
    """(n * c, 2) popularity and cosine as the regression reads them, from (2, n, c)."""
    popularity, cosine = positions
    return np.stack([np.log1p(popularity).ravel(), np.log(cosine + 1e-3).ravel()], axis=1)


def study(
    log: str,
    rows: pl.DataFrame,
    sets: Sequence[pl.DataFrame],
    catalogue: pl.DataFrame,
    kept: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of the table for one log, whose rows lie in each user's order, and sets of (user_id, candidates).

    `kept` are rows of counts and LightGCN that were measured before; without any they are measured now.
    """
    # 1. codes; place of each row counted from its user's last
    items = catalogue["item_id"].to_list()
    item_of = {name: code for code, name in enumerate(items)}
    names = rows["user_id"].unique(maintain_order=True).to_list()
    user_of = {name: code for code, name in enumerate(names)}
    user = rows["user_id"].replace_strict(user_of, return_dtype=pl.Int64).to_numpy()
    item = rows["item_id"].replace_strict(item_of, return_dtype=pl.Int64).to_numpy()
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    ends = np.cumsum(np.bincount(user))
    # 2. users (n,) and candidates (n, c) of all sets, the truth last
    asked = pl.concat([table.select("user_id", "candidates") for table in sets])
    who = np.array([user_of[name] for name in asked["user_id"]])
    last = item[ends[who] - 1]
    lists = np.stack(
        [
            [*[item_of[c] for c in listed if item_of[c] != end][:NEGATIVES], end]
            for listed, end in zip(asked["candidates"].to_list(), last, strict=True)
        ]
    )
    # 3. scores (n, c) by model
    named = dict[str, F64]()
    if not kept:
        named |= counted(user, item, len(names), len(items), who, lists)
    ids = [[items[k] for k in listed] for listed in lists]
    named |= own_baselines(rows, catalogue, asked["user_id"].to_list(), ids)
    # 4. a row each set and model
    found = list[dict[str, Any]]()
    start = 0
    for table in sets:
        part = slice(start, start + table.height)
        start = part.stop
        found += [old for old in kept if old["users"] == table.height]
        found += [row(log, table.height, name, of[part]) for name, of in named.items()]
    for name, (first, tenth) in PUBLISHED[log].items():
        trained = "on other logs" if name == "UniSRec" else "no"
        found.append(
            {"log": log, "users": sets[0].height, "scores": f"{name}, published"}
            | {"trained": trained, "ndcg@1": first, "ndcg@5": None, "ndcg@10": tenth}
            | {"ndcg@20": None, "interval": None}
        )
    return found


def counted(
    user: I64, item: I64, users: int, items: int, who: I64, lists: I64
) -> dict[str, F64]:
    """Scores (n, c) by counts and LightGCN of candidates (n, c) of users (n,), from rows in each user's order."""
    ends = np.cumsum(np.bincount(user))
    from_last = ends[user] - 1 - np.arange(user.size)
    # 1. the regression, on the rows before the last
    before = Counts(*(of[from_last > 1] for of in (user, item)), users, items)
    asked = user[from_last == 1]
    sample = np.random.default_rng(0).permutation(asked.size)[:SAMPLE]
    whole = csr_array((np.ones(user.size), (user, item)), shape=before.own.shape)
    listed = np.column_stack(
        [unseen(whole[asked[sample]].toarray() > 0), item[from_last == 1][sample]]
    )
    first = light_gcn(before.user, before.item, users, items)
    known = np.stack(before.features(asked[sample], listed))
    dots = dot_products(first, items, asked[sample], listed)
    truth = np.tile(np.arange(NEGATIVES + 1) == NEGATIVES, sample.size)
    both = logistic_regression().fit(logs_of(known), truth)
    three = logistic_regression().fit(
        np.column_stack([logs_of(known), dots.ravel()]), truth
    )
    # 2. everything before the last rows: counts and LightGCN
    past = from_last > 0
    counts = Counts(user[past], item[past], users, items)
    vectors = light_gcn(user[past], item[past], users, items)
    popularity, cosine = counts.features(who, lists)
    read = logs_of(np.stack([popularity, cosine]))
    dot = dot_products(vectors, items, who, lists)
    all_three = three.decision_function(np.column_stack([read, dot.ravel()]))
    return {
        "popularity": popularity,
        "co-occurrence": cosine,
        "both": both.decision_function(read).reshape(lists.shape),
        "LightGCN": dot,
        "all three": all_three.reshape(lists.shape),
    }


class Backwards(Logs):
    """A log of clicks with times that count backwards from each user's last row, so all last rows have one time.

    The last row is test, the one before it valid, `TARGETS` rows before these train, and what is earlier history.
    """

    def __init__(self, rows: pl.DataFrame, items: pl.DataFrame) -> None:
        self.rows, self.items = rows.select("user_id", "item_id"), items

    def read(self) -> RawLogs:
        """See `Logs.read`."""
        place = pl.int_range(pl.len()).reverse().over("user_id")
        splits = {0: "test", 1: "valid"} | {2 + k: "train" for k in range(TARGETS)}
        rows = self.rows.with_columns(
            split=place.replace_strict(splits, default="history"),
            timestamp=pl.len() - place,
            rating=None,
            label=None,
            source_file=pl.lit("the log"),
            source_row=pl.int_range(1, pl.len() + 1),
        )
        digest = hashlib.sha256(self.rows.write_csv().encode()).hexdigest()
        rows = rows.select(*RAW_SCHEMA).cast(RAW_SCHEMA)
        return RawLogs(rows, self.items, {"rows": digest})


def own_baselines(
    rows: pl.DataFrame, items: pl.DataFrame, users: list[str], candidates: list[list[str]]
) -> dict[str, F64]:
    """Scores (n, c) by the project's baselines of candidates (n, c) of users (n,): ids, as of the users' last row."""
    data = InteractionData(
        Backwards(rows, items),
        protocol=Protocol(
            split="given",
            label="clicked",
            minimum_history=1,
            negatives=Negatives(per_positive=PER_TARGET),
        ),
    )
    log = data.split.interactions
    code_of_user = dict(log.users.select("user_id", "user").iter_rows())
    code_of_item = dict(log.items.select("item_id", "item").iter_rows())
    shape = np.shape(candidates)
    user = np.repeat([code_of_user[name] for name in users], shape[1])
    asked = pl.DataFrame(
        {
            "user": user,
            "item": [code_of_item[name] for listed in candidates for name in listed],
        }
    ).with_columns(timestamp=data.split.latest, label=-1, candidate=True)
    features = data.features.of_requests(asked)
    found = fit_baselines(data.split.rows, data.retrieved, ("valid",), further=features)
    return {
        b.name: b.further.reshape(shape)
        for b in found
        if b.name in OURS and b.further is not None
    }


def unseen(seen: Bool) -> I64:
    """(n, NEGATIVES) items drawn for users of whom `seen` (n, items) says which items they have."""
    drawn = np.random.default_rng(1).random(seen.shape, np.float32)
    drawn[seen] = 2  # behind all others
    found: I64 = np.argpartition(drawn, NEGATIVES, axis=1)[:, :NEGATIVES]
    return found


def dot_products(vectors: F64, items: int, user: I64, candidates: I64) -> F64:
    """(n, c) of users (n,) and candidates (n, c)."""
    found: F64 = np.einsum("nd,ncd->nc", vectors[items + user], vectors[candidates])
    return found


def light_gcn(user: I64, item: I64, users: int, items: int) -> F64:
    """Vectors (items + users, d) of the project's LightGCN, fitted once on all of these rows."""
    retriever = LightGCN(epochs=EPOCHS)
    retriever.begin(users, pl.DataFrame({"item": np.arange(items)}))
    edges = Edges(user, item, np.ones(user.size, np.int64))
    retriever.item_table(edges, 1)
    assert retriever._model is not None
    with torch.no_grad():
        adjacency = like_graph(edges, users, items).adjacency
        found: F64 = retriever._model.get_embedding(adjacency).double().numpy()
    return found


def main(games: str, movielens: str, part: str = "all") -> None:
    """Both logs; the file is written after each. Part `own`: counts and LightGCN stay as the file has them."""
    rows = list[dict[str, Any]]()
    old = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if part == "own" else []
    old = [
        {"trained": "on this log"} | of
        for of in old
        if of["scores"] not in OURS and not of["scores"].endswith("published")
    ]

    def keep(log: str, table: pl.DataFrame, folder: Path, items: pl.DataFrame) -> None:
        sets = [pl.read_parquet(f) for f in sorted(folder.glob("candidates_*.parquet"))]
        sets.sort(key=lambda table: table.height)
        kept = [of for of in old if of["log"] == log]
        rows.extend(study(log, table, sets, items, kept))
        head = {
            "schema_version": SCHEMA_VERSION,
            "command": "study",
            "protocol": {"name": "LLMRank's candidates", "hash": "published"},
            "about": ABOUT.format(epochs=EPOCHS, targets=TARGETS, each=PER_TARGET),
        }
        write_json(OUT, head | {"rows": rows})

    clicks = pl.read_parquet(Path(games) / "interactions.parquet")
    clicks = clicks.sort("user_id", "timestamp", maintain_order=True)
    keep("Games", clicks, Path(games), pl.read_parquet(Path(games) / "items.parquet"))
    raw = MovieLens1M().read()
    films = raw.interactions.sort("user_id", "timestamp", maintain_order=True)
    keep("MovieLens 1M", films, Path(movielens), raw.items)


if __name__ == "__main__":
    main(*sys.argv[1:])
