"""The slower floors, which only the verb `floors` makes: last answers, summed rates, matrix factorisation, LightGCN.

Unusual here: all but one read strictly earlier rows of splits up to the row's own, as the evidence does. `mf` reads
all of train, also what is later than a row of it, so under a random or per-user split it knows other users' future.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from project.counting import FEATURES, PRIOR_ROWS, logistic_regression
from project.data.splits import SPLITS, SplitInteractions
from project.floors.quick import Floats, Floor, evidence_features, floor_scores, targets_of, train_labels
from project.retrieval import LightGCN
from project.retrieval.base import Retriever
from project.retrieval.cache import cached_folder
from project.retrieval.evidence import evidence_folder
from project.retrieval.factorisation import Factorisation
from project.retrieval.readable import reads_all_earlier
from project.retrieval.snapshots import Snapshots, block_cuts, fit_snapshots

LAST_ROWS = 10
"""K of the floor last_10: how many of the user's latest earlier rows it reads."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GraphSource:
    """Where LightGCN's item vectors of each time block come from.

    Attributes:
        retriever: The run's retriever; where it is not LightGCN, one with default settings is fitted instead.
        block_rows: The retriever is refitted every so many rows.
        cache_dir: Folder the evidence is kept in; what is fitted here is kept beside it.
    """

    retriever: Retriever
    block_rows: int
    cache_dir: Path

    @property
    def lightgcn(self) -> LightGCN:
        """The run's own, or one with default settings."""
        return self.retriever if isinstance(self.retriever, LightGCN) else LightGCN()

    def snapshots(self, split: SplitInteractions, name: str) -> Snapshots:
        """Item vectors by block, fitted on rows of splits up to `name`.

        Args:
            split: The log under its protocol.
            name: train, valid or test. The evidence keeps test's snapshots, so only those cost nothing.
        """
        lightgcn = self.lightgcn
        if lightgcn is self.retriever and name == SPLITS[-1]:
            folder = evidence_folder(split, lightgcn, self.block_rows, self.cache_dir)
            return Snapshots.load(folder / "snapshots.npz")
        content = {
            "files": split.interactions.files,
            "protocol": split.hash,
            "retriever": lightgcn.settings(),
            "block_rows": self.block_rows,
            "readable": name,
        }
        write = partial(_write_snapshots, split, lightgcn, self.block_rows, name)
        return Snapshots.load(cached_folder(self.cache_dir / "floors", content, write) / "snapshots.npz")


def more_floors(
    split: SplitInteractions,
    evidence: Mapping[str, pl.DataFrame],
    source: GraphSource,
    splits: Sequence[str] = ("valid", "test"),
    seed: int = 0,
) -> list[Floor]:
    """Fit on train and score the targets of `splits`: rates_summed, last_10, mf and lightgcn_dot, in this order.

    Args:
        split: The log under its protocol.
        evidence: Evidence table of each split.
        source: Of LightGCN's item vectors.
        splits: Splits to score. Leave test out while exploring.
        seed: Seed of the matrix factorisation.

    Raises:
        DataError: train targets lack a class, or evidence lacks a target's row.
    """
    rows = split.rows
    base = float(train_labels(rows).mean())
    logits = {
        "rates_summed": {s: rates_summed(evidence_features(rows, evidence, s, base), base) for s in splits},
        f"last_{LAST_ROWS}": {s: last_answers(rows, s, base) for s in splits},
        "mf": _factorised(rows, splits, seed),
        "lightgcn_dot": _graph_logits(split, source, splits),
    }
    return [Floor(name, floor_scores(rows, by_split)) for name, by_split in logits.items()]


def rates_summed(features: Floats, base: float) -> Floats:
    """Log-odds of the item's and of the user's rate, summed; the base rate, which is in both, counted once.

    Args:
        features: (n, len(FEATURES)) of `counting_features`.
        base: Share of likes among train targets.

    Returns:
        Logits (n,): naive Bayes, with the two rates independent given the answer.
    """
    both = features[:, FEATURES.index("item_log_odds")] + features[:, FEATURES.index("user_log_odds")]
    return np.asarray(both - np.log(base / (1.0 - base)), dtype=np.float64)


def last_answers(rows: pl.DataFrame, split: str, base: float, last: int = LAST_ROWS) -> Floats:
    """Log-odds of the like-share of the user's last rows, shrunk to `base` as the other rates are.

    Args:
        rows: Rows of a split, in time order.
        split: Whose targets are scored; rows of later splits are not read.
        base: Share of likes among train targets.
        last: How many strictly earlier rows are read, context rows too; of one second the later in the log's order.

    Returns:
        Logits (n,), in the order of the targets.
    """
    readable, earlier = readable_rows(rows, split)
    label = readable["label"].to_numpy().astype(np.int64)
    liked, read = np.zeros((2, label.size))
    for own in _rows_by_user(readable["user"].to_numpy()):
        likes = np.concatenate([[0], np.cumsum(label[own])])
        end = earlier[own]
        start = np.maximum(end - last, 0)
        liked[own], read[own] = likes[end] - likes[start], end - start
    odds: Floats = np.log(liked + PRIOR_ROWS * base) - np.log(read - liked + PRIOR_ROWS * (1.0 - base))
    scored = (readable["split"] == split) & (readable["role"] == "target")
    return np.asarray(odds[scored.to_numpy()], dtype=np.float64)


def dots(split: SplitInteractions, snapshots: Snapshots, dislike_weight: float, name: str) -> pl.DataFrame:
    """LightGCN's score of every row of splits up to `name`: the user's vector at the row's time times the item's.

    The user's vector is the retriever's, LightGCN's own propagation (He et al. 2020, equation 3) over the items the
    user rated strictly earlier, from the block's item vectors, divided by the root of their number.

    Args:
        split: The log under its protocol.
        snapshots: Fitted on rows of splits up to `name`; `weighted` is e_i / sqrt(likes of i before the block).
        dislike_weight: Weight of a disliked item in a user's vector.
        name: train, valid or test.

    Returns:
        row_id and dot, Float64: 0 where the user has no earlier row, the item no vector, or before the first block.
    """
    table, earlier = readable_rows(split.rows, name)
    user, item, label = (table[c].to_numpy().astype(np.int64) for c in ("user", "item", "label"))
    weight = np.where(label == 1, 1.0, dislike_weight)[:, None]
    block_of = np.searchsorted(snapshots.cuts, table["timestamp"].to_numpy(), side="right")
    dot = np.zeros(table.height)
    for block, snapshot in enumerate(snapshots.fitted, 1):
        start, stop = np.searchsorted(block_of, [block, block + 1])
        weighted = snapshot["weighted"].astype(np.float64)
        likes = np.bincount(item[:start][label[:start] == 1], minlength=len(weighted))
        vectors = weighted * np.sqrt(np.maximum(likes, 1))[:, None]
        past = np.flatnonzero(np.isin(user[:stop], user[start:stop]))
        for own in (past[rows] for rows in _rows_by_user(user[past])):
            asked = own[own >= start]
            sums = np.cumsum(weighted[item[own]] * weight[own], axis=0)
            sums = np.concatenate([np.zeros_like(sums[:1]), sums])[earlier[asked]]
            dot[asked] = np.einsum("nd,nd->n", sums, vectors[item[asked]])
    return pl.DataFrame({"row_id": table["row_id"], "dot": dot / np.sqrt(np.maximum(earlier, 1))})


def readable_rows(rows: pl.DataFrame, split: str) -> tuple[pl.DataFrame, Ints]:
    """Rows of splits up to `split`, and how many of them each row's user has strictly earlier, (rows,)."""
    later = SPLITS[SPLITS.index(split) + 1 :]
    readable = rows.filter(~pl.col("split").cast(pl.String).is_in(later))
    earlier = readable.select(pl.col("timestamp").rank("min").over("user").cast(pl.Int64) - 1)
    return readable, earlier.to_series().to_numpy()


def _rows_by_user(user: Ints) -> list[NDArray[np.intp]]:
    """Positions of each user's rows, in their order."""
    order = np.argsort(user, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(user[order])) + 1) if user.size else []


def _factorised(rows: pl.DataFrame, splits: Sequence[str], seed: int) -> dict[str, Floats]:
    train = rows.filter(pl.col("split") == "train")
    model = Factorisation.fit(train["user"], train["item"], train["label"], seed=seed)
    scored = {split: targets_of(rows, split) for split in splits}
    return {split: model.logits(part["user"], part["item"]) for split, part in scored.items()}


def _graph_logits(split: SplitInteractions, source: GraphSource, splits: Sequence[str]) -> dict[str, Floats]:
    """The dot products as log-odds, by a logistic regression of one number, fitted on train targets."""
    rows, wanted = split.rows, ("train", *splits)
    code = rows["split"].cast(pl.String).replace_strict({name: k for k, name in enumerate(SPLITS)})
    # under a split by time all rows read alike, so the scores of test's log serve all
    alike = reads_all_earlier(rows["timestamp"].to_numpy(), code.to_numpy())
    reading = {name: SPLITS[-1] if alike else name for name in wanted}
    weight = source.lightgcn.dislike_weight
    tables = {
        name: dots(split, source.snapshots(split, name), weight, name)
        for name in dict.fromkeys(reading.values())
    }
    numbers = {
        name: targets_of(rows, name)
        .select("row_id")
        .join(tables[reading[name]], on="row_id", how="left", maintain_order="left")
        .select("dot")
        .to_numpy()
        for name in wanted
    }
    model = logistic_regression()
    model.fit(numbers["train"], train_labels(rows))
    return {name: np.asarray(model.decision_function(numbers[name]), dtype=np.float64) for name in splits}


def _write_snapshots(
    split: SplitInteractions, retriever: Retriever, block_rows: int, name: str, folder: Path
) -> None:
    readable, _ = readable_rows(split.rows, name)
    log = split.interactions
    cuts = block_cuts(readable["timestamp"].to_numpy(), block_rows)
    fit_snapshots(readable, retriever, log.users.height, log.items, cuts).save(folder / "snapshots.npz")
