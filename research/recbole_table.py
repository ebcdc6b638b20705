"""Models without an LLM in RecBole's table of MovieLens 1M: `python -m research.recbole_table OUT.json`.

Settings of the table: benchmark/md/ml-1m_context.md in RecBole's repository; numbers: benchmark/hyper/context. Ratings
of 3 are dropped, 4 and 5 are likes, and 739,012 rows are cut 8:1:1 at random, as RecBole's code cuts them with its
seed. What is chosen here is chosen on valid, as there.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.arrays import F64, I64
from project.data.logs import Logs, MovieLens1M, RawLogs
from project.data.protocol import Protocol
from project.datamodule import InteractionData
from project.evaluation.baselines import Baseline, fit_baselines, targets_of
from project.evaluation.bootstrap import UserBootstrap
from project.metrics import auc
from project.retrieval.factorisation import BIAS_PENALTY, ITERATIONS, Factorisation
from project.run import SCHEMA_VERSION, write_json

SEED = 2020
# model -> AUC and log loss on test, of the settings that were best on valid
PUBLISHED = {
    "FFM": (0.9007, 0.3103),
    "DCN-V2": (0.8998, 0.3119),
    "DeepFM": (0.8997, 0.3150),
    "FiGNN": (0.8976, 0.3325),
    "FM": (0.8935, 0.3262),
    "LR": (0.8699, 0.3488),
}
BEST = PUBLISHED["FFM"][0]
OURS = ("mf_fold_in", "lr_text", "gbdt_text", "lr_context", "gbdt_context")
LATEST = (1.0, 0.2)  # shares of train's rows that models of features are fitted on
# vector's length and penalty; 16 numbers are worse on valid, at penalties of 5 and 8
GRID = ((8, 5.0), (8, 8.0))
ABOUT = (
    "739,012 ratings cut at random by RecBole's own code, seed 2020; AUC and log loss on test, 95 %, users resampled. "
    "Published models learn all of train at once, so a row of train has read those that stand after it in any order. "
    "Features here are made of rows that stand earlier in RecBole's order: of valid and test all of train, as there, "
    "of train half of it on average. Factorisation: this project's, fitted on all of train at once, without "
    "attributes."
)


class RecBoleSplit(Logs):
    """MovieLens 1M as RecBole cuts it, with users' age, gender and occupation.

    A random cut has no times: a row of train gets its place in RecBole's order, and all rows of valid and test the one
    moment after. So these read all of train, and nothing of each other.
    """

    def read(self) -> RawLogs:
        """See `Logs.read`."""
        raw = MovieLens1M(users=True).read()
        assert raw.users is not None
        rows = raw.interactions.filter(pl.col("rating") != 3)
        drawn = torch.Generator().manual_seed(SEED)
        rows = rows[torch.randperm(rows.height, generator=drawn).numpy()]
        tenth = int(0.1 * rows.height)
        train = rows.height - 2 * tenth
        split = np.repeat(["train", "valid", "test"], [train, tenth, tenth])
        place = np.minimum(np.arange(rows.height), train).astype(np.float64)
        return replace(
            raw,
            interactions=rows.with_columns(timestamp=place, split=split),
            users=raw.users.drop("zip_code"),
            kinds={"occupation": "category"},
            files=raw.files | {"cut by RecBole": str(SEED)},
        )


Scores = dict[str, F64]  # split -> logits of its targets


def of_features(data: InteractionData, latest: float) -> dict[str, Scores]:
    """The project's baselines, fitted on the latest rows of train, whose features are most like those of test."""
    rows = data.split.rows
    train = pl.col("split") == "train"
    first = (1 - latest) * rows.filter(train).height
    early = train & (pl.col("timestamp") < first)
    role = pl.when(early).then(pl.lit("context", rows["role"].dtype)).otherwise("role")
    found = fit_baselines(
        rows.with_columns(role=role), data.retrieved, kinds=data.split.interactions.columns
    )
    return {baseline.name: scores_of(baseline, rows) for baseline in found}


def scores_of(baseline: Baseline, rows: pl.DataFrame) -> Scores:
    """Its logits on valid and test."""
    return {s: baseline.logits(targets_of(rows, s)["row_id"]) for s in ("valid", "test")}


def factorised(rows: pl.DataFrame, dim: int, penalty: float) -> Scores:
    """Matrix factorisation of all of train at once, which no row's features can be made of."""
    read = targets_of(rows, "train")
    fitted = Factorisation.fit(
        read["user"], read["item"], read["label"], dim, BIAS_PENALTY, penalty, ITERATIONS
    )

    # a user or an item without a row has bias 0 and vector 0
    def values(codes: pl.Series, known: I64, of_known: F64) -> F64:
        found = np.zeros((codes.to_numpy().max() + 1, *of_known.shape[1:]))
        found[known] = of_known
        return found

    user_bias = values(rows["user"], fitted.users, fitted.user_bias)
    item_bias = values(rows["item"], fitted.items, fitted.item_bias)
    user_vectors = values(rows["user"], fitted.users, fitted.user_vectors)
    item_vectors = values(rows["item"], fitted.items, fitted.item_vectors)
    found = Scores()
    for split in ("valid", "test"):
        user, item = (targets_of(rows, split)[n].to_numpy() for n in ("user", "item"))
        dot = np.einsum("nd,nd->n", user_vectors[user], item_vectors[item])
        found[split] = fitted.offset + user_bias[user] + item_bias[item] + dot
    return found


def main(out: Path) -> None:
    """Write the table; the file is written twice, since features take longer than a factorisation."""
    data = InteractionData(
        RecBoleSplit(), protocol=Protocol(split="given", label="rating > 3")
    )
    rows = data.split.rows
    truth = {s: targets_of(rows, s)["label"].to_numpy() for s in ("valid", "test")}
    bootstrap = UserBootstrap(targets_of(rows, "test")["user"].to_numpy())
    found = list[dict[str, Any]]()
    for name, (value, loss) in PUBLISHED.items():
        found.append(
            {"scores": f"{name}, published", "chosen on valid": None, "valid auc": None}
            | {"auc": value, "interval": None, "log loss": loss, "minus FFM": value - BEST}
        )

    def add(name: str, tried: dict[str, Scores]) -> None:
        """A row of the setting that is best on valid, which `tried` has by name."""
        valid = {of: auc(tried[of]["valid"], truth["valid"]) or 0.0 for of in tried}
        print(name, valid, flush=True)
        best = max(valid, key=lambda of: valid[of])
        metrics = bootstrap.metrics(tried[best]["test"], truth["test"])
        value = metrics["auc"] or 0.0
        low, high = metrics["auc_interval"] or (np.nan, np.nan)
        found.append(
            {"scores": name, "chosen on valid": best, "valid auc": valid[best]}
            | {"auc": value, "interval": f"{low:.4f} to {high:.4f}"}
            | {"log loss": metrics["log_loss"], "minus FFM": value - BEST}
        )

    def write() -> None:
        head = {
            "schema_version": SCHEMA_VERSION,
            "command": "study",
            "protocol": {"name": data.split.protocol.name, "hash": data.split.hash},
            "about": ABOUT,
        }
        ordered = sorted(found, key=lambda row: -float(row["auc"]))
        write_json(out, head | {"rows": ordered})

    # 1. a factorisation of all of train
    add(
        "factorisation",
        {
            f"{dim} numbers, penalty {penalty:g}": factorised(rows, dim, penalty)
            for dim, penalty in GRID
        },
    )
    write()
    # 2. models of the project's features
    shares = {f"latest {share:.0%} of train": of_features(data, share) for share in LATEST}
    for name in OURS:
        add(name, {share: of[name] for share, of in shares.items()})
    write()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
