"""Raw logs become one typed, sorted, integer-coded table of interactions.

Unusual: a duplicate is a repeated (user, item, timestamp), not a repeated (user, item), for an item may be
rated again later; and every id that is an integer is ordered as a number, so that user 10 comes after user 9.
"""

from dataclasses import dataclass

import polars as pl

from project.data.contract import checked
from project.data.protocol import Protocol, label_expression
from project.data.readers import RawLogs
from project.errors import ConfigError, DataError

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
