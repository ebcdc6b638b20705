"""The protocol: which rows have which label, split, fold and role, and the hash that names the answer."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from project.data.logs import RawLogs, checked
from project.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
FOLDS = ("select", "tune", "certify")
ROLES = ("target", "context")

_RULE = re.compile(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass
class Protocol:
    """How a log is turned into targets and splits; two results are comparable if its hash agrees.

    Args:
        name: Name in tables. Null: made from the fields, such as global_time-80-10-10-h5.
        split: How rows are cut. global_time: two instants for all users; user_time: two instants for each
            user; random: a seeded permutation; leave_last: each user's last row is test, the one before is
            valid; given: the log says it (a `split` column, or one file per split).
        shares: Shares of train, valid and test (not used by leave_last and given).
        minimum_history: A row is a target only if its user has at least this many strictly earlier rows;
            others are context.
        label: Rule for a positive answer, such as "rating > 3". Null: the log's own 0/1 column label.
        drop_ratings: Rows with these ratings are removed before anything else.
        duplicates: What to do with rows that repeat a user, item and timestamp: error, or keep the first or
            last.
        seed: Seed of the random split.
        fold_salt: Salt of the user hash that assigns validation users to folds.
        fold_shares: Shares of the users in the folds select, tune and certify.
    """

    name: str | None = None
    split: Literal["global_time", "user_time", "random", "leave_last", "given"] = "global_time"
    shares: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    minimum_history: int = 0
    label: str | None = None
    drop_ratings: list[float] = field(default_factory=list)
    duplicates: Literal["error", "first", "last"] = "error"
    seed: int = 0
    fold_salt: str = "folds"
    fold_shares: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.4])

    def resolved_name(self) -> str:
        """The name in tables: `name`, or one made from the fields."""
        if self.name is not None:
            return self.name
        parts: list[str] = [self.split]
        if self.split in ("global_time", "user_time", "random"):
            parts += [f"{100 * share:g}" for share in self.shares]
        if self.split == "random":
            parts.append(f"seed{self.seed}")
        if self.minimum_history:
            parts.append(f"h{self.minimum_history}")
        return "-".join(parts)

    def check(self) -> None:
        """Raise `ConfigError` for a value that cannot work; needs no data, so it can run before logs."""
        _check_shares("shares", self.shares, SPLITS)
        _check_shares("fold_shares", self.fold_shares, FOLDS)
        if min(self.fold_shares) == 0:
            raise ConfigError(
                f"data.protocol.fold_shares is {self.fold_shares}; expected a share above 0 for each of "
                f"{', '.join(FOLDS)}: one chooses the checkpoint, one the exits, one certifies them."
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(
                f"data.protocol.seed is {self.seed}; expected a whole number from 0 to 2^32 - 1."
            )
        if not all(map(math.isfinite, self.drop_ratings)):
            raise ConfigError(f"data.protocol.drop_ratings is {self.drop_ratings}; expected finite numbers.")
        label_expression(self.label)
        if self.minimum_history < 0:
            raise ConfigError(
                f"data.protocol.minimum_history is {self.minimum_history}; it must be 0 or more."
            )


def label_expression(rule: str | None) -> pl.Expr:
    """Polars expression for the 0/1 label: a rule on `rating`, or the log's own labels (rule None).

    Raises:
        ConfigError: The rule is not of the form "rating > 3".
    """
    if rule is None:
        return pl.col("label")
    match = _RULE.fullmatch(rule)
    fix = 'Write it as "rating > 3" (operators > >= < <= ==), or null for a log with a 0/1 label column.'
    if match is None or match[1] != "rating":
        raise ConfigError(f"data.protocol.label: cannot read the rule {rule!r}. {fix}")
    try:
        number = float(match[3])
        if not math.isfinite(number):
            raise ValueError
    except ValueError:
        raise ConfigError(f"data.protocol.label: {match[3]!r} in {rule!r} is not a number. {fix}") from None
    rating = pl.col("rating")
    positive = {
        ">": rating > number,
        ">=": rating >= number,
        "<": rating < number,
        "<=": rating <= number,
        "==": rating == number,
    }[match[2]]
    return positive.cast(pl.Int8)


def _check_shares(key: str, shares: list[float], names: tuple[str, ...]) -> None:
    wrong = len(shares) != len(names) or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6)
    if wrong:
        raise ConfigError(
            f"data.protocol.{key} is {shares}; expected {len(names)} shares ({', '.join(names)}), none "
            "negative, that sum to 1."
        )


_KEY = ["user_id", "item_id", "timestamp"]
_SHOWN = 3  # examples in an error message


@dataclass(frozen=True)
class Interactions:
    """Coded interactions of one log.

    Attributes:
        rows: One row per interaction, sorted by (timestamp, user, item): `row_id` Int64 (the position,
            0..n-1), `user` and `item` Int32, `timestamp` Float64 (seconds), `label` Int8 (0 or 1), `rating`
            Float64 (null where the log has only labels), `given_split` String (null unless the log names it).
        users: `user` Int32 (0..), `user_id` String: the users with at least one row.
        items: `item` Int32 (0..), `item_id`, `title`, then attribute columns (String, "" = unknown): the
            whole catalogue, rated or not.
        files: File name -> SHA-256 of what was read.
        duplicates: Rows removed because they repeat the (user, item, timestamp) of another row.
        dropped: Rows removed by the protocol's `drop_ratings`.
        items_without_title: Items that have their id as title, since the log has none.
    """

    rows: pl.DataFrame
    users: pl.DataFrame
    items: pl.DataFrame
    files: dict[str, str]
    duplicates: int = 0
    dropped: int = 0
    items_without_title: int = 0


def build_interactions(raw: RawLogs, protocol: Protocol) -> Interactions:
    """Check what a reader returned, apply the protocol's row rules (dropped ratings, labels, duplicates), code ids.

    Ratings are dropped before duplicates are looked for, both in file order.

    Args:
        raw: What a reader returned.
        protocol: Gives `label`, `drop_ratings` and `duplicates`.

    Returns:
        The coded table; its `row_id` is final.

    Raises:
        ConfigError: The label rule cannot be parsed, or `drop_ratings` is set for a log without ratings.
        DataError: The reader broke its contract, a rating or label that the protocol needs is missing, a row is
            a duplicate under `duplicates: error`, no row is left, or all labels are equal.
    """
    label = label_expression(protocol.label)
    given, raw = raw, checked(raw)
    _check_read(raw, protocol)
    kept = _drop_ratings(raw.interactions, protocol.drop_ratings)
    labelled = _with_label(kept, label, protocol.label)
    distinct = _without_duplicates(labelled, protocol.duplicates)
    _check_labels(distinct, protocol.label)
    users = _coded(distinct["user_id"].unique(), "user")
    items = _coded(raw.items["item_id"], "item").join(raw.items, on="item_id", maintain_order="left")
    rows = (
        distinct.join(users, on="user_id")
        .join(items.select("item_id", "item"), on="item_id")
        .sort("timestamp", "user", "item")
        .with_row_index("row_id")
        .select(
            pl.col("row_id").cast(pl.Int64),
            "user",
            "item",
            "timestamp",
            "label",
            "rating",
            pl.col("split").alias("given_split"),
        )
    )
    return Interactions(
        rows,
        users,
        items,
        dict(raw.files),
        duplicates=labelled.height - distinct.height,
        dropped=raw.interactions.height - kept.height,
        items_without_title=given.items.filter(
            pl.col("title").cast(pl.String).fill_null("").str.strip_chars() == ""
        ).height,
    )


def _check_read(raw: RawLogs, protocol: Protocol) -> None:
    """Refuse a rating or label that could not be read, where the protocol needs it."""
    if "label" in raw.unread and protocol.label is None:
        raise DataError(f'{raw.unread["label"]} Or set data.protocol.label to a rule such as "rating > 3".')
    if "rating" in raw.unread and (protocol.label is not None or protocol.drop_ratings):
        fix = "Or use the log's 0/1 labels alone: data.protocol.label: null, drop_ratings: []."
        raise DataError(f"{raw.unread['rating']} {fix}")


def _drop_ratings(rows: pl.DataFrame, ratings: list[float]) -> pl.DataFrame:
    if not ratings:
        return rows
    if rows["rating"].is_null().all():
        raise ConfigError(
            f"data.protocol.drop_ratings is {ratings}, but the log has no ratings. Set it to [], or map the "
            "rating column under data.logs.init_args.columns."
        )
    return rows.filter(~pl.col("rating").is_in([float(rating) for rating in ratings]).fill_null(False))


def _with_label(rows: pl.DataFrame, label: pl.Expr, rule: str | None) -> pl.DataFrame:
    labelled = rows.with_columns(label=label)
    missing = labelled.filter(pl.col("label").is_null())
    if missing.is_empty():
        return labelled
    where = f"{missing['source_file'][0]}, row {missing['source_row'][0]}"
    if rule is None:
        raise DataError(
            f"{where}: no label ({missing.height:,} of {rows.height:,} rows have none), and no rule that makes one "
            'of the rating. Say what a positive answer is, for example data.protocol.label: "rating > 3", or map the '
            "log's 0/1 column under data.logs.init_args.columns.label."
        )
    raise DataError(
        f"{where}: no rating ({missing.height:,} of {rows.height:,} rows have none), but data.protocol.label "
        f"is {rule!r}. Set data.protocol.label: null for a log with a 0/1 label column, or map the column "
        "under data.logs.init_args.columns.rating."
    )


def _without_duplicates(rows: pl.DataFrame, policy: str) -> pl.DataFrame:
    if policy not in ("error", "first", "last"):
        raise ConfigError(f"data.protocol.duplicates is {policy!r}; use error, first or last.")
    distinct = rows.unique(subset=_KEY, keep="last" if policy == "last" else "first", maintain_order=True)
    extra = rows.height - distinct.height
    if policy != "error" or extra == 0:
        return distinct
    groups = (
        rows.group_by(_KEY, maintain_order=True)
        .agg(pl.format("{} row {}", "source_file", "source_row").alias("places"))
        .filter(pl.col("places").list.len() > 1)
        .head(_SHOWN)
    )
    shown = "; ".join(
        f"user {user!r}, item {item!r}, timestamp {time:.15g}: {', '.join(places)}"
        for user, item, time, places in groups.iter_rows()
    )
    raise DataError(
        f"{extra:,} duplicate rows (same user, item and timestamp), for example {shown}. Remove them, or set "
        "data.protocol.duplicates to first or last (in file order)."
    )


def _check_labels(rows: pl.DataFrame, rule: str | None) -> None:
    if rows.is_empty():
        raise DataError("No interaction is left after data.protocol.drop_ratings.")
    if rows["label"].n_unique() == 1:
        source = "the label column" if rule is None else f"data.protocol.label {rule!r}"
        raise DataError(
            f"All {rows.height:,} labels are {rows['label'][0]} ({source}): nothing can be learned or "
            "ranked. Change the rule. Clicks alone need rows with label 0 too: what was shown and not clicked, or "
            "negatives of your own."
        )


def _coded(ids: pl.Series, code: str) -> pl.DataFrame:
    """Column `code` (Int32, 0..) and the ids: in numeric order if all are integers, else as strings."""
    name = ids.name
    number = ids.cast(pl.Int64, strict=False)
    order = ["number", name] if number.null_count() == 0 else [name]
    ordered = pl.DataFrame({name: ids, "number": number}).sort(order).with_row_index(code)
    return ordered.select(pl.col(code).cast(pl.Int32), name)


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
    """Indices baseline(s1 n) and baseline((s1 + s2) n), rounded first: in binary .7 + .1 is less than .8."""
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
