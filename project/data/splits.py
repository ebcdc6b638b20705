"""The protocol: which rows are targets, in which split and fold, hashed so that results can be compared.

Unusual: time cuts are taken from the targets, not from all rows; rows with too little history are not removed
but stay as context; and validation is cut by users into three folds (select, tune, certify), so that what
chooses a threshold is never what certifies it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from project.data.interactions import Interactions
from project.data.protocol import FOLDS, ROLES, SPLITS, Protocol
from project.errors import DataError

__all__ = ["FOLDS", "ROLES", "SPLITS", "Protocol", "SplitInteractions", "apply_protocol"]

Codes = npt.NDArray[np.int8]  # one split per row, as an index into SPLITS


@dataclass(frozen=True)
class SplitInteractions:
    """Interactions with a split, a fold and a role for every row.

    Attributes:
        interactions: What was split.
        rows: `interactions.rows` (same order) and `hist` Int32 (the user's strictly earlier rows), `split`
            Enum(SPLITS), `fold` Enum(FOLDS) (null outside valid), `role` Enum(ROLES).
        protocol: The rules that were applied.
        manifest: What was found, ready for JSON; see `apply_protocol`.
        hash: First 16 hex digits of the SHA-256 over protocol, file checksums and (row id, split, fold, role,
            label).
    """

    interactions: Interactions
    rows: pl.DataFrame
    protocol: Protocol
    manifest: dict[str, Any]
    hash: str


def apply_protocol(interactions: Interactions, protocol: Protocol) -> SplitInteractions:
    """Assign splits, folds and roles.

    A row of split S may later read rows of splits up to S (train < valid < test) with a strictly earlier
    timestamp.

    Args:
        interactions: The coded log.
        protocol: The rules.

    Returns:
        The split log. Its manifest has `name`, `hash`, `fields`, `files`, `rows`, `times` (first and last),
        `counts` and `positives` (targets by split), `context` (other rows by split), `folds` (targets, users
        and positives), `cold_user_share` and `cold_item_share` (share of valid and of test targets whose user
        or item has no train target), `tie_share` (rows that share user and timestamp with another),
        `duplicates` and `dropped` (rows removed) and `items_without_title`.

    Raises:
        ConfigError: Shares that are negative or do not sum to 1, a negative minimum history, a bad label
            rule.
        DataError: `given` without splits in the log, a split without targets, train or valid with one class
            only.
    """
    protocol.check()
    hist = pl.col("timestamp").rank("min").over("user").cast(pl.Int32) - 1
    enough = pl.col("hist") >= protocol.minimum_history
    is_target = enough & (pl.col("given_split").fill_null("") != "history")
    rows = interactions.rows.with_columns(hist=hist).with_columns(
        role=pl.when(is_target).then(pl.lit("target")).otherwise(pl.lit("context")).cast(pl.Enum(ROLES))
    )
    rows = rows.with_columns(_split_column(rows, protocol))
    rows = rows.with_columns(_fold_column(rows, interactions.users, protocol))
    rows = rows.select(*interactions.rows.columns, "hist", "split", "fold", "role")
    _check_targets(rows, protocol)
    digest = _digest(rows, interactions, protocol)
    return SplitInteractions(
        interactions, rows, protocol, _manifest(rows, interactions, protocol, digest), digest
    )


def _cuts(size: int | npt.NDArray[np.int64], shares: list[float]) -> tuple[Any, Any]:
    """Indices floor(s1 n) and floor((s1 + s2) n), rounded first: in binary .7 + .1 is less than .8."""
    first, second = shares[0], shares[0] + shares[1]
    return np.floor(np.round(first * size, 6)), np.floor(np.round(second * size, 6))


def _split_column(rows: pl.DataFrame, protocol: Protocol) -> pl.Series:
    if protocol.split == "given":
        return _given(rows)
    by_kind = {
        "global_time": _global_time,
        "user_time": _user_time,
        "random": _random,
        "leave_last": _leave_last,
    }
    codes = by_kind[protocol.split](rows, protocol)
    return pl.Series("split", codes).replace_strict(dict(enumerate(SPLITS)), return_dtype=pl.Enum(SPLITS))


def _global_time(rows: pl.DataFrame, protocol: Protocol) -> Codes:
    times = rows.filter(pl.col("role") == "target")["timestamp"].to_numpy()
    if len(times) == 0:
        raise DataError(
            f"No row has the {protocol.minimum_history} strictly earlier rows of its user that make it a "
            "target. Lower data.protocol.minimum_history."
        )
    padded = np.append(times, np.inf)  # a share of 0 cuts after the last target
    first, second = (padded[int(cut)] for cut in _cuts(len(times), protocol.shares))
    time: npt.NDArray[np.float64] = rows["timestamp"].to_numpy()
    codes: Codes = (time >= first).astype(np.int8) + (time >= second).astype(np.int8)
    return codes


def _user_time(rows: pl.DataFrame, protocol: Protocol) -> Codes:
    user, time = rows["user"].to_numpy(), rows["timestamp"].to_numpy()
    order = np.argsort(user, kind="stable")  # by user, then by time, as the rows are
    sizes = np.bincount(user)
    starts = np.cumsum(sizes) - sizes
    codes = np.zeros(len(user), np.int8)
    for cut in _cuts(sizes, protocol.shares):
        inside = cut < sizes  # also false for codes without a row
        threshold = np.full(len(sizes), np.inf)
        threshold[inside] = time[order][(starts + cut)[inside].astype(np.int64)]
        codes += time >= threshold[user]
    return codes


def _random(rows: pl.DataFrame, protocol: Protocol) -> Codes:
    permutation = np.random.default_rng(protocol.seed).permutation(rows.height)
    codes = np.zeros(rows.height, np.int8)
    for cut in _cuts(rows.height, protocol.shares):
        codes[permutation[int(cut) :]] += 1
    return codes


def _leave_last(rows: pl.DataFrame, _: Protocol) -> Codes:
    after = pl.int_range(pl.len()).reverse().over("user")  # the user's later rows in the sorted order
    remaining: npt.NDArray[np.int64] = rows.select(after).to_series().to_numpy()
    return np.clip(2 - remaining, 0, 2).astype(np.int8)


def _given(rows: pl.DataFrame) -> pl.Series:
    missing = rows["given_split"].null_count()
    if missing:
        raise DataError(
            f"data.protocol.split is given, but {missing:,} of {rows.height:,} rows name no split. Map a "
            "column with train, valid, test or history under data.logs.init_args.columns.split, give one "
            "file per split under data.logs.init_args.interactions, or choose another data.protocol.split."
        )
    return rows["given_split"].replace("history", "train").cast(pl.Enum(SPLITS)).alias("split")


def _fold_column(rows: pl.DataFrame, users: pl.DataFrame, protocol: Protocol) -> pl.Expr:
    bounds = np.cumsum(protocol.fold_shares)[:-1]
    folds = [
        FOLDS[int(np.searchsorted(bounds, _uniform(f"{protocol.fold_salt}:{user_id}"), side="right"))]
        for user_id in users["user_id"]
    ]
    of_user = pl.Series(folds, dtype=pl.Enum(FOLDS))
    return pl.when(pl.col("split") == "valid").then(of_user.gather(rows["user"])).alias("fold")


def _uniform(text: str) -> float:
    """A number in [0, 1) from the first 8 bytes of the SHA-256 of `text`: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _check_targets(rows: pl.DataFrame, protocol: Protocol) -> None:
    targets = rows.filter(pl.col("role") == "target")
    counts = {split: targets.filter(pl.col("split") == split).height for split in SPLITS}
    found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    empty = [split for split, count in counts.items() if count == 0]
    if empty:
        raise DataError(
            f"Split {' and '.join(empty)} has no targets under {protocol.resolved_name()} (targets: "
            f"{found}). Change data.protocol.shares, lower data.protocol.minimum_history, give more data, or "
            "choose another data.protocol.split: a cut moves to the next instant when many rows share one "
            "timestamp."
        )
    for split in ("train", "valid"):
        labels = targets.filter(pl.col("split") == split)["label"]
        if labels.n_unique() == 1:
            raise DataError(
                f"All {len(labels):,} targets of {split} have label {labels[0]} under "
                f"{protocol.resolved_name()} (targets: {found}). Change data.protocol.label, "
                "data.protocol.shares or data.protocol.split."
            )


def _digest(rows: pl.DataFrame, interactions: Interactions, protocol: Protocol) -> str:
    fields = asdict(protocol) | {"name": protocol.resolved_name()}
    digest = hashlib.sha256(json.dumps([fields, list(interactions.files.values())], sort_keys=True).encode())
    codes = rows.select(
        "row_id", "label", pl.col("split", "fold", "role").to_physical().cast(pl.Int8).fill_null(-1)
    )
    for column in ("row_id", "split", "fold", "role", "label"):
        kind = "<i8" if column == "row_id" else "i1"
        digest.update(codes[column].to_numpy().astype(kind).tobytes())
    return digest.hexdigest()[:16]


def _manifest(
    rows: pl.DataFrame, interactions: Interactions, protocol: Protocol, digest: str
) -> dict[str, Any]:
    targets = rows.filter(pl.col("role") == "target")
    by_split = {split: targets.filter(pl.col("split") == split) for split in SPLITS}
    train = by_split["train"]

    def cold(column: str) -> dict[str, float]:
        seen = pl.col(column).is_in(train[column].unique().implode())
        return {split: by_split[split].select((~seen).mean()).item() for split in SPLITS[1:]}

    return {
        "name": protocol.resolved_name(),
        "hash": digest,
        "fields": asdict(protocol),
        "files": dict(interactions.files),
        "rows": rows.height,
        "times": [str(np.datetime64(int(time), "s")) for time in rows["timestamp"].to_numpy()[[0, -1]]],
        "counts": {split: part.height for split, part in by_split.items()},
        "positives": {split: int(part["label"].sum()) for split, part in by_split.items()},
        "context": {
            split: rows.filter((pl.col("role") == "context") & (pl.col("split") == split)).height
            for split in SPLITS
        },
        "folds": {fold: _fold_counts(targets.filter(pl.col("fold") == fold)) for fold in FOLDS},
        "cold_user_share": cold("user"),
        "cold_item_share": cold("item"),
        "tie_share": float(rows.select(pl.struct("user", "timestamp").is_duplicated().mean()).item()),
        "duplicates": interactions.duplicates,
        "dropped": interactions.dropped,
        "items_without_title": interactions.items_without_title,
    }


def _fold_counts(targets: pl.DataFrame) -> dict[str, int]:
    return {
        "targets": targets.height,
        "users": targets["user"].n_unique(),
        "positives": int(targets["label"].sum()),
    }
