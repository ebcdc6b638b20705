"""Models without an LLM on LLMRank's fixed candidates: `llmrank.py GAMES MOVIELENS` writes results/llmrank.json.

The arguments are folders with candidates of Hou et al. (ECIR 2024, repository RUCAIBox/LLMRank): candidates_*.parquet,
and for Games interactions.parquet (user_id, item_id, timestamp in each user's order) beside them; MovieLens 1M is
fetched. The protocol is theirs: a user's last row is the truth among 19 random items, everything before it is known,
rows of other users included, whatever their date. Nothing is fitted on the last rows; the weights of the regression are
fitted on the row before.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.sparse import csr_array

from project.arrays import F64, I64, Bool
from project.data.logs import MovieLens1M
from project.features import logistic_regression
from project.retrieval.base import Edges
from project.retrieval.lightgcn import LightGCN, like_graph
from project.run import SCHEMA_VERSION, write_json

CUTS = (1, 5, 10, 20)
NEGATIVES = 19
SAMPLE = 5000  # users whose row before the last the regression is fitted on
DRAWS = 1000
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
    "The truth among 19 fixed random items; interval: of NDCG@10, 95 %, users resampled. Counts of all rows but the "
    "users' last. "
    "Popularity: how many users. Co-occurrence: summed cosine of the candidate's users with those of the user's items. "
    "Both: a logistic regression on the logarithms of the two, fitted on the rows before the last of 5,000 "
    "users, beside 19 items drawn of those that a user never had. LightGCN: dot product of user and item, "
    "{epochs} epochs, untuned. All three: the regression with that product, too. These rows are trained on "
    "the log; published ones are zero-shot but for UniSRec, which was trained on other logs."
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
    of_user = ndcg(scores, 10)
    drawn = np.random.default_rng(0).integers(len(of_user), size=(DRAWS, len(of_user)))
    interval = np.quantile(of_user[drawn].mean(axis=1), [0.025, 0.975]).tolist()
    means = {f"ndcg@{cut}": float(ndcg(scores, cut).mean()) for cut in CUTS}
    return {
        "log": log,
        "users": users,
        "scores": name,
        **means,
        "interval": "{:.3f} to {:.3f}".format(*interval),
    }


def logs_of(positions: F64) -> F64:
    """(n * c, 2) popularity and cosine as the regression reads them, from (2, n, c)."""
    popularity, cosine = positions
    return np.stack([np.log1p(popularity).ravel(), np.log(cosine + 1e-3).ravel()], axis=1)


def study(
    log: str, rows: pl.DataFrame, sets: Sequence[pl.DataFrame], items: list[str]
) -> list[dict[str, Any]]:
    """Rows of the table for one log, whose rows lie in each user's order, and sets of (user_id, candidates)."""
    # 1. codes; place of each row counted from its user's last
    item_of = {name: code for code, name in enumerate(items)}
    names = rows["user_id"].unique(maintain_order=True).to_list()
    user_of = {name: code for code, name in enumerate(names)}
    user = rows["user_id"].replace_strict(user_of, return_dtype=pl.Int64).to_numpy()
    item = rows["item_id"].replace_strict(item_of, return_dtype=pl.Int64).to_numpy()
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    ends = np.cumsum(np.bincount(user))
    from_last = ends[user] - 1 - np.arange(user.size)
    # 2. the regression, on the rows before the last
    before = Counts(*(of[from_last > 1] for of in (user, item)), len(names), len(items))
    asked = user[from_last == 1]
    sample = np.random.default_rng(0).permutation(asked.size)[:SAMPLE]
    whole = csr_array((np.ones(user.size), (user, item)), shape=before.own.shape)
    listed = np.column_stack(
        [unseen(whole[asked[sample]].toarray() > 0), item[from_last == 1][sample]]
    )
    first = light_gcn(before.user, before.item, len(names), len(items))
    known = np.stack(before.features(asked[sample], listed))
    dots = dot_products(first, len(items), asked[sample], listed)
    truth = np.tile(np.arange(NEGATIVES + 1) == NEGATIVES, sample.size)
    both = logistic_regression().fit(logs_of(known), truth)
    three = logistic_regression().fit(
        np.column_stack([logs_of(known), dots.ravel()]), truth
    )
    # 3. everything before the last rows: counts and LightGCN
    past = from_last > 0
    counts = Counts(user[past], item[past], len(names), len(items))
    vectors = light_gcn(user[past], item[past], len(names), len(items))
    # 4. a row each set and model
    found = list[dict[str, Any]]()
    for table in sets:
        who = np.array([user_of[name] for name in table["user_id"]])
        last = item[ends[who] - 1]
        lists = np.stack(
            [
                [*[item_of[c] for c in listed if item_of[c] != end][:NEGATIVES], end]
                for listed, end in zip(table["candidates"].to_list(), last, strict=True)
            ]
        )
        popularity, cosine = counts.features(who, lists)
        read = logs_of(np.stack([popularity, cosine]))
        dot = dot_products(vectors, len(items), who, lists)
        all_three = three.decision_function(np.column_stack([read, dot.ravel()]))
        for name, scores in {
            "popularity": popularity,
            "co-occurrence": cosine,
            "both": both.decision_function(read).reshape(lists.shape),
            "LightGCN": dot,
            "all three": all_three.reshape(lists.shape),
        }.items():
            found.append(row(log, table.height, name, scores))
            print(found[-1], flush=True)
    published = PUBLISHED[log].items()
    found += [
        {"log": log, "users": sets[0].height, "scores": f"{name}, published"}
        | {"ndcg@1": first, "ndcg@5": None, "ndcg@10": tenth, "ndcg@20": None}
        | {"interval": None}
        for name, (first, tenth) in published
    ]
    return found


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


def main(games: Path, movielens: Path, out: Path = Path("results/llmrank.json")) -> None:
    """Both logs; the file is written after each."""
    rows = list[dict[str, Any]]()

    def keep(log: str, table: pl.DataFrame, folder: Path, items: pl.DataFrame) -> None:
        sets = [pl.read_parquet(f) for f in sorted(folder.glob("candidates_*.parquet"))]
        sets.sort(key=lambda table: table.height)
        rows.extend(study(log, table, sets, items["item_id"].to_list()))
        head = {
            "schema_version": SCHEMA_VERSION,
            "command": "study",
            "protocol": {"name": "LLMRank's candidates", "hash": "published"},
            "about": ABOUT.format(epochs=EPOCHS),
        }
        write_json(out, head | {"rows": rows})

    clicks = pl.read_parquet(games / "interactions.parquet")
    clicks = clicks.sort("user_id", "timestamp", maintain_order=True)
    keep("Games", clicks, games, pl.read_parquet(games / "items.parquet"))
    raw = MovieLens1M().read()
    films = raw.interactions.sort("user_id", "timestamp", maintain_order=True)
    keep("MovieLens 1M", films, movielens, raw.items)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
