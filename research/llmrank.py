"""Models on LLMRank's fixed candidates: `python -m research.llmrank GAMES MOVIELENS [RUN_GAMES RUN_MOVIELENS]`.

The arguments are folders with candidates of Hou et al. (ECIR 2024, repository RUCAIBox/LLMRank): candidates_*.parquet,
and for Games interactions.parquet (user_id, item_id, timestamp in each user's order) beside them; MovieLens 1M is
fetched. The protocol is theirs: a user's last row is the truth among 19 random items, everything before it is known,
rows of other users included, whatever their date. Nothing is fitted on the last rows. Without runs, counts and LightGCN
are measured; the weights of their regression are fitted on the row before the last. With runs, which
`fit --config research/llmrank.yaml` makes, their exits and the project's own baselines, fitted on the three rows before
that; what was measured without runs stays.
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
from project.data.requests import Requests
from project.engine.engine import score_every_head
from project.engine.requests import prepare_requests
from project.evaluation.baselines import fit_baselines
from project.exits.criteria import HeadOutputs
from project.features import logistic_regression
from project.loading import open_run
from project.request import RankRequest
from project.retrieval.base import Edges
from project.retrieval.lightgcn import LightGCN, like_graph
from project.run import SCHEMA_VERSION, write_json

OUT = Path("results/llmrank.json")
CUTS = (1, 5, 10, 20)
NEGATIVES = 19
SAMPLE = 5000  # users whose row before the last the regression is fitted on
DRAWS = 1000
TARGETS = 3  # rows of a user before the last two: what a run is trained on
VALIDATION = 5000  # users whose row before the last is validation
PER_TARGET = 3  # unseen items beside each, as research/llmrank.yaml has it
COUNTED = ("popularity", "co-occurrence", "both", "LightGCN", "all three")
SCORED_TOGETHER = 500  # requests
OURS = ("lr_text", "gbdt_text")
BEST = "gbdt_text"  # what exits are compared with
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
    "The truth among 19 fixed random items; interval: of NDCG@10, 95 %, users resampled. Counts of all rows but the"
    " users' last. Popularity: how many users. Co-occurrence: summed cosine of the candidate's users with those of "
    "the user's items. Both: a logistic regression on the logarithms of the two, fitted on the rows before the last"
    " of 5,000 users, beside 19 items drawn of those that a user never had. LightGCN: dot product of user and item,"
    " {epochs} epochs, untuned. All three: the regression with that product, too. lr_text and gbdt_text: a "
    "regression and boosting on the features that every log gets, fitted on {targets} rows of each user before the "
    "last two, beside {each} unseen items each. Exits: the LLM trained on the same rows, calibrated with exit 0; "
    "plan: every candidate leaves where it is sure enough. Minus gbdt_text: of NDCG@10, paired, 95 %, users "
    "resampled. Trained: published rows are zero-shot but for UniSRec, which was trained on other logs."
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


def minus(scores: F64, base: F64) -> str:
    """NDCG@10 of scores (n, c) minus that of others, with its interval."""
    gap = ndcg(scores, 10) - ndcg(base, 10)
    return f"{gap.mean():+.3f}, {interval(gap)}"


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
    catalogue: pl.DataFrame,
    sets: Sequence[pl.DataFrame],
    run: Path | None,
    kept: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Rows of the table for one log, whose rows lie in each user's order, and sets of (user_id, candidates).

    Without a `run` counts and LightGCN are measured; with one, its exits and baselines, beside `kept` rows.
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
    if run is None:
        named = counted(user, item, len(names), len(items), who, lists)
    else:
        ids = [[items[k] for k in listed] for listed in lists]
        named = of_run(run, asked["user_id"].to_list(), ids)
    # 4. a row each set and model
    found = list[dict[str, Any]]()
    start = 0
    for table in sets:
        part = slice(start, start + table.height)
        start = part.stop
        found += [old for old in kept if old["users"] == table.height]
        for name, scores in named.items():
            gap = None
            if run is not None and name != BEST:
                gap = minus(scores[part], named[BEST][part])
            made = row(log, table.height, name, scores[part])
            found.append(made | {f"minus {BEST}": gap})
    for name, (first, tenth) in PUBLISHED[log].items():
        trained = "on other logs" if name == "UniSRec" else "no"
        found.append(
            {"log": log, "users": sets[0].height, "scores": f"{name}, published"}
            | {"trained": trained, "ndcg@1": first, "ndcg@5": None, "ndcg@10": tenth}
            | {"ndcg@20": None, "interval": None, f"minus {BEST}": None}
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


def clicks_of(folder: str | Path | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows in each user's order, and items, of a folder; without one, of MovieLens 1M."""
    if folder is None:
        raw = MovieLens1M().read()
        rows, items = raw.interactions, raw.items
    else:
        rows = pl.read_parquet(Path(folder) / "interactions.parquet")
        items = pl.read_parquet(Path(folder) / "items.parquet")
    return rows.sort("user_id", "timestamp", maintain_order=True), items


class Backwards(Logs):
    """A log of clicks with times that count backwards from each user's last row, so all last rows have one time.

    The last row is test, `TARGETS` rows before the last two are train, and what is earlier history. The row before the
    last is valid for `VALIDATION` users, drawn by lot, and history for the others.

    Args:
        folder: Folder with interactions.parquet and items.parquet; null: MovieLens 1M, which is fetched.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def read(self) -> RawLogs:
        """See `Logs.read`."""
        clicks, items = clicks_of(self.folder)
        clicks = clicks.select("user_id", "item_id")
        place = pl.int_range(pl.len()).reverse().over("user_id")
        splits = {0: "test", 1: "valid"} | {2 + k: "train" for k in range(TARGETS)}
        users = clicks["user_id"].unique(maintain_order=True)
        drawn = users.sample(min(VALIDATION, len(users)), seed=0)
        unvalidated = (place == 1) & ~pl.col("user_id").is_in(drawn.implode())
        split = place.replace_strict(splits, default="history")
        rows = clicks.with_columns(
            split=pl.when(unvalidated).then(pl.lit("history")).otherwise(split),
            timestamp=pl.len() - place,
            rating=None,
            label=None,
            source_file=pl.lit("the log"),
            source_row=pl.int_range(1, pl.len() + 1),
        )
        digest = hashlib.sha256(clicks.write_csv().encode()).hexdigest()
        rows = rows.select(*RAW_SCHEMA).cast(RAW_SCHEMA)
        return RawLogs(rows, items, {"rows": digest})


def of_run(run: Path, users: list[str], candidates: list[list[str]]) -> dict[str, F64]:
    """Scores (n, c) by baselines, exits and plan of candidates (n, c) of users (n,): ids, as of the users' last row."""
    opened = open_run(run)
    data, plan = opened.data, opened.plan
    log = data.split.interactions
    code_of_user = dict(log.users.select("user_id", "user").iter_rows())
    code_of_item = dict(log.items.select("item_id", "item").iter_rows())
    shape = np.shape(candidates)
    # 1. baselines, which read features alone
    listed = [name for names in candidates for name in names]
    asked = pl.DataFrame(
        {
            "user": np.repeat([code_of_user[name] for name in users], shape[1]),
            "item": [code_of_item[name] for name in listed],
        }
    ).with_columns(timestamp=data.split.latest, label=-1, candidate=True)
    features = data.features.of_requests(asked)
    fitted = fit_baselines(data.split.rows, data.retrieved, ("valid",), further=features)
    scores = {
        b.name: b.further.reshape(shape)
        for b in fitted
        if b.name in OURS and b.further is not None
    }
    # 2. exits and the plan
    requests = [
        RankRequest(user, None, listed, time=data.split.latest, request_id=str(k))
        for k, (user, listed) in enumerate(zip(users, candidates, strict=True))
    ]
    logits = list[F64]()
    for start in range(0, len(requests), SCORED_TOGETHER):
        part = Requests(requests[start : start + SCORED_TOGETHER], log.items)
        prepared = prepare_requests(opened.model, data, part)
        table = score_every_head(opened.model.eval(), prepared)
        raw = table.select(f"logit_{layer}" for layer in plan.layers).to_torch()
        read = torch.from_numpy(np.concatenate([one.retrieved for one in prepared]))
        outputs = HeadOutputs(plan.layers, plan.calibration.apply(raw.double()), read)
        logits.append(np.column_stack([outputs.logits, plan.emitted(outputs)[1]]))
        print(f"{start + len(part.requests)} of {len(requests)} requests", flush=True)
    names = [f"exit {layer}" for layer in plan.layers] + ["plan"]
    columns = np.concatenate(logits).T
    return scores | {
        name: of.reshape(shape) for name, of in zip(names, columns, strict=True)
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


def main(games: str, movielens: str, *runs: str) -> None:
    """Both logs; the file is written after each. With runs the rows of a log without one stay."""
    rows = list[dict[str, Any]]()
    head = {
        "schema_version": SCHEMA_VERSION,
        "command": "study",
        "protocol": {"name": "LLMRank's candidates", "hash": "published"},
        "about": ABOUT.format(epochs=EPOCHS, targets=TARGETS, each=PER_TARGET),
    }
    old = json.loads(OUT.read_text(encoding="utf-8"))["rows"] if runs else []
    old = [of | {f"minus {BEST}": None} for of in old]
    asked = {"Games": (games, games), "MovieLens 1M": (movielens, None)}
    for k, (log, (folder, source)) in enumerate(asked.items()):
        sets = [pl.read_parquet(f) for f in Path(folder).glob("candidates_*.parquet")]
        sets.sort(key=lambda table: table.height)
        kept = [of for of in old if of["log"] == log]
        if not runs or k < len(runs):
            counted = [of for of in kept if of["scores"] in COUNTED]
            run = Path(runs[k]) if runs else None
            kept = study(log, *clicks_of(source), sets, run, counted)
        rows.extend(kept)
        write_json(OUT, head | {"rows": rows})


if __name__ == "__main__":
    main(*sys.argv[1:])
