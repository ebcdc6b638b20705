"""The protocol: which rows have which label, split, fold and role, and the hash that names the answer."""

import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import polars as pl

from project.arrays import F64
from project.data.context import (
    CONTEXT,
    USER,
    coded_table,
    describe,
    telling_alone,
)
from project.data.logs import OWN_SCORE, SESSION, RawLogs, checked
from project.data.negatives import Negatives, draw_negatives, repeated
from project.data.tables import moment_of
from project.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
UNDATED_SPLITS = ("random", "given")  # what a log without timestamps can be split by
FOLDS = ("select", "tune", "certify")
ROLES = ("target", "context")
FOLD_SALT = "folds"  # of the hash that assigns validation users to folds
HIDE_SALT = "hidden items"  # of the hash that hides items
TRAIN_SALT = "train users"  # of the hash that chooses users whose train rows are targets

FURTHER = (OWN_SCORE, "session", "known_at")  # columns of rows, where a log has them

CLICKED = "clicked"  # the label rule of a log whose rows are all positive

_OPERATORS = {">": "gt", ">=": "ge", "<": "lt", "<=": "le", "==": "eq"}
_RULE = re.compile(r"\s*rating\s*(>=|<=|==|>|<)\s*([-+]?\d*\.?\d+)\s*")


@dataclass
class Protocol:
    """How a log is turned into targets and splits; two results are comparable if its hash agrees.

    Args:
        split: How rows are cut. global_time: two instants for all users; date: at two `dates`; user_time: two instants
            for each user; random: a seeded permutation; leave_last: each user's last row is test, the one before is
            valid; given: the log says it (a `split` column, or one file per split). A log without timestamps needs
            random or given: its rows are put in the order train, valid, test, at random inside each, and read those
            before them.
        shares: Shares of train, valid and test (not used by date, leave_last and given).
        minimum_history: A row is a target only if its user has at least this many strictly earlier rows; others are
            context.
        label: Rule for a positive answer, such as "rating > 3". Null: the log's own 0/1 column label. clicked: every
            row is positive, and negatives are sampled.
        drop_ratings: Rows with these ratings are removed before anything else.
        duplicates: What to do with rows that repeat a user, item and timestamp: error, or keep the first or last.
        seed: Seed of the random split, of the order of a log without timestamps, of hidden items, train's users and
            negatives.
        fold_shares: Shares of the users in the folds select, tune and certify.
        hide_items: Share of the items whose train rows are removed, so that they are new in validation and test: the
            experiment on cold items for a log where all are known. An item that is hidden at one share is hidden at
            every larger one.
        train_users: Share of the users whose train rows are targets, for learning curves: the other users' train rows
            are context, which histories, counts and graph hold as before. A user of one share is in every larger one.
        dates: Of split date: when validation begins and when test does, such as [2024-05-01, 2024-06-01]; without a
            zone they are UTC. Rows from a third date on are left out before anything reads them.
        answer_delay: Seconds after its row at which an answer is known: until then no other row reads it.
        negatives: Items with the answer 0 beside the clicks, for label clicked. They are scored and nothing else: no
            history, graph or count has them.
    """

    split: Literal["global_time", "date", "user_time", "random", "leave_last", "given"] = (
        "global_time"
    )
    shares: list[float] = field(default_factory=lambda: [0.8, 0.1, 0.1])
    minimum_history: int = 0
    label: str | None = None
    drop_ratings: list[float] = field(default_factory=list)
    duplicates: Literal["error", "first", "last"] = "error"
    seed: int = 0
    fold_shares: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.4])
    hide_items: float = 0.0
    train_users: float = 1.0
    negatives: Negatives | None = None
    dates: list[str] | None = None
    answer_delay: float = 0.0

    @property
    def name(self) -> str:
        """The name in tables, such as global_time-80-10-10-h5."""
        parts: list[str] = [self.split, *(self.dates or ())]
        if self.split in ("global_time", "user_time", "random"):
            parts += [f"{100 * share:g}" for share in self.shares]
        if self.split == "random":
            parts.append(f"seed{self.seed}")
        if self.minimum_history:
            parts.append(f"h{self.minimum_history}")
        if self.hide_items:
            parts.append(f"cold{100 * self.hide_items:g}")
        if self.train_users < 1:
            parts.append(f"users{100 * self.train_users:g}")
        if self.answer_delay:
            parts.append(f"delay{self.answer_delay:g}")
        if self.negatives is not None:
            parts.append(f"{self.negatives.by}{self.negatives.per_positive}")
        return "-".join(parts)

    @property
    def cuts(self) -> list[float] | None:
        """Seconds of the two or three dates; None where they are none, or do not ascend."""
        dates = self.dates or []
        seconds = [s for date in dates if (s := moment_of(date)) is not None]
        ascend = seconds == sorted({*seconds})
        return seconds if len(seconds) == len(dates) in (2, 3) and ascend else None

    def check(self) -> None:
        """Raise `ConfigError` for a value that cannot work; needs no data, so it can run before logs."""
        three = "3 shares ({}), none {}, that sum to 1"
        possible = {  # by key: whether its value can work, what was expected
            "shares": (
                _sum_to_one(self.shares),
                three.format(", ".join(SPLITS), "negative"),
            ),
            # a fold without users would be found out late
            "fold_shares": (
                _sum_to_one(self.fold_shares, 1e-9),
                three.format(", ".join(FOLDS), "0 or negative"),
            ),
            "minimum_history": (self.minimum_history >= 0, "0 or more"),
            "seed": (self.seed >= 0, "0 or more"),
            "dates": (
                self.cuts is not None if self.split == "date" else self.dates is None,
                "two ascending ISO dates such as [2024-05-01, 2024-06-01], or a third where test ends, where "
                "data.protocol.split is date, null elsewhere",
            ),
            "answer_delay": (0 <= self.answer_delay < math.inf, "seconds, 0 or more"),
            "hide_items": (
                0 <= self.hide_items < 1,
                "a share of the items, at least 0 and below 1",
            ),
            "train_users": (
                0 < self.train_users <= 1,
                "a share of the users, above 0 and at most 1",
            ),
            "negatives": (
                (self.label == CLICKED) == (self.negatives is not None),
                "negatives such as {per_positive: 1} where data.protocol.label is clicked, null elsewhere",
            ),
            "negatives.per_positive": (
                self.negatives is None or self.negatives.per_positive >= 1,
                "1 or more",
            ),
        }
        for key, (works, expected) in possible.items():
            if not works:
                raise ConfigError(
                    f"data.protocol.{key} is {getattr(self, key, self.negatives)}; expected {expected}."
                )
        label_expression(self.label)


def _sum_to_one(shares: list[float], least: float = 0) -> bool:
    return (
        len(shares) == 3
        and min(shares) >= least
        and math.isclose(sum(shares), 1, abs_tol=1e-6)
    )


def label_expression(rule: str | None) -> pl.Expr:
    """Polars expression for the 0/1 label: a rule such as "rating > 3", the log's own labels (None), or clicked."""
    if rule is None:
        return pl.col("label")
    if rule == CLICKED:
        return pl.lit(1, pl.Int8)
    match = _RULE.fullmatch(rule)
    if match is None:
        raise ConfigError(
            f'data.protocol.label: cannot read the rule {rule!r}. Write it as "rating > 3" (operators > >= < <= ==), '
            "or null for a log with a 0/1 label column, or clicked."
        )
    compared: pl.Expr = _compared(pl.col("rating"), match)
    return compared.cast(pl.Int8)


def _compared(rating: Any, rule: re.Match[str]) -> Any:
    """What a rule says of a rating, or of a column of ratings."""
    return getattr(operator, _OPERATORS[rule[1]])(rating, float(rule[2]))


def label_of(rating: float | None, label: int | None, rule: str | None, place: str) -> int:
    """The 0/1 label of an answer that stands at `place`: its own, or by the rule; `DataError` if these differ."""
    if label is not None and (rating is None or rule in (None, CLICKED)):
        return int(label)
    if rule == CLICKED:
        return 1
    if rating is None:
        raise DataError(f"{place} has neither rating nor label; give one.")
    match = _RULE.fullmatch(rule or "")
    if match is None:
        raise DataError(
            f"{place} has a rating, but this run's log has labels 0 and 1; give a label."
        )
    by_rule = int(_compared(rating, match))
    if label not in (None, by_rule):
        raise DataError(
            f"{place} has label {label}, but {rule} makes label {by_rule} of its rating {rating}; give one of them."
        )
    return by_rule


@dataclass(frozen=True)
class Interactions:
    """Coded interactions of one log.

    `rows` has one row an interaction, sorted by (timestamp, user, item): `row_id` Int64 (the position, 0..n-1), `user`
    and `item` Int32, `timestamp` Float64 (seconds; null where the log has none, until `apply_protocol` gives each row
    its position), `label` Int8 (0 or 1), `rating` Float64 (null where the log has only labels), `given_split` String
    (null unless the log names it), and of each context column `context.NAME` Float64, as `project.data.context` has it.
    A log with sessions has `session` Int32, and `timestamp` is when the session began; `known_at` Float64, when a row's
    answer is known, is there with sessions or the protocol's answer_delay.
    """

    rows: pl.DataFrame
    # user Int32 (0..), user_id, then `user.NAME` Float64: those with at least one row
    users: pl.DataFrame
    # item Int32 (0..), item_id, title (or the id), then attributes: the whole catalogue
    items: pl.DataFrame
    files: dict[str, str]  # file name -> SHA-256 of what was read
    not_read: tuple[str, ...] = ()  # columns that nothing reads
    # number or category, by `context.NAME` of rows and `user.NAME` of users
    columns: Mapping[str, str] = field(default_factory=dict)
    # text of a category's value, by its code
    texts: Mapping[float, str] = field(default_factory=dict)
    # the column whose scores, of the ranker that runs today, are `OWN_SCORE` of rows
    own_scores: str | None = None
    rule: str | None = None  # of the protocol: makes ratings labels


def build_interactions(raw: RawLogs, protocol: Protocol) -> Interactions:
    """Check what a reader returned, apply the protocol's row rules (dropped ratings, labels, duplicates), code ids."""
    # 1. read
    raw = checked(raw)
    log = raw.interactions
    columns = f"; there are {', '.join(raw.columns)}" if raw.columns else ""  # of the file
    undated = log["timestamp"].null_count() == log.height > 0
    if undated and (protocol.split not in UNDATED_SPLITS or protocol.answer_delay):
        raise ConfigError(
            f"The log has no column timestamp, but data.protocol has split {protocol.split} and answer_delay "
            f"{protocol.answer_delay:g}{columns}. Map the column under data.logs.init_args.columns.timestamp, or set "
            "split: random (or given) and answer_delay: 0."
        )
    # 2. a log as of the third date: nothing reads later rows
    for end in (protocol.cuts or [])[2:]:
        log = log.filter(pl.col("timestamp") < end)
        if log.is_empty():
            raise DataError(
                f"data.protocol.dates end at {moment(end)} (UTC), before the log begins. Give later dates."
            )
    # 3. drop ratings, before duplicates are looked for, both in file order
    if protocol.drop_ratings and log["rating"].is_null().all():
        raise ConfigError(
            f"data.protocol.drop_ratings is {protocol.drop_ratings}, but the log has no ratings. Set it to [], or map "
            "the column under data.logs.init_args.columns.rating."
        )
    rated = log.filter(
        ~pl.col("rating").is_in(list(map(float, protocol.drop_ratings))).fill_null(False)
    )
    # 4. label
    shown = rated.filter(pl.col("label") == 0)
    if protocol.label == CLICKED and not shown.is_empty():
        raise DataError(
            f"{shown['source_file'][0]}, row {shown['source_row'][0]}: label is 0 ({shown.height:,} of "
            f"{rated.height:,} rows), but data.protocol.label is clicked, which makes every row a positive. Set "
            "data.protocol.label: null and data.protocol.negatives: null, since what was shown and not clicked says "
            "more than a draw, or remove these rows."
        )
    labelled = rated.with_columns(label=label_expression(protocol.label))
    missing = labelled.filter(pl.col("label").is_null())
    if not missing.is_empty():
        column = "label" if protocol.label is None else "rating"
        raise DataError(
            f"{missing['source_file'][0]}, row {missing['source_row'][0]}: no {column} ({missing.height:,} of "
            f"{rated.height:,} rows have none that can be read{columns}). Set data.protocol.label: null for a log of "
            '0/1 labels, data.protocol.label: "rating > 3" for one of ratings, clicked for one of clicks alone, or '
            f"map the column under data.logs.init_args.columns.{column}."
        )
    # 5. remove duplicates, then context as numbers
    distinct = _without_duplicates(labelled, protocol.duplicates)
    context, columns_of, texts = coded_table(
        distinct.select(raw.context), CONTEXT, raw.kinds, "interactions"
    )
    distinct = distinct.drop(raw.context).hstack(context)
    if SESSION in log.columns:
        distinct = _with_sessions(distinct)
    if protocol.answer_delay:
        seconds = known_at(distinct) + protocol.answer_delay
        distinct = distinct.with_columns(known_at=seconds)
    further = [name for name in FURTHER if name in distinct.columns]
    # 6. code ids
    users = _coded(distinct["user_id"].unique(), "user")
    if raw.users is not None:
        known = users.join(raw.users, on="user_id", how="left", maintain_order="left")
        attributes, kinds, texts_of_users = coded_table(
            known.drop("user", "user_id"), USER, raw.kinds, "users"
        )
        users = users.hstack(attributes)
        columns_of |= kinds
        texts |= texts_of_users
    items = _coded(raw.items["item_id"], "item").join(
        raw.items, on="item_id", maintain_order="left"
    )
    untitled = pl.col("title").str.strip_chars() == ""
    # 7. sort
    rows = distinct.join(users, on="user_id").join(
        items.select("item_id", "item"), on="item_id"
    )
    rows = rows.sort("timestamp", "user", "item")
    return Interactions(
        rows.select(
            pl.int_range(pl.len()).alias("row_id"),
            "user",
            "item",
            "timestamp",
            "label",
            "rating",
            *context.columns,
            *further,
            given_split="split",
        ),
        users,
        items.with_columns(title=pl.when(untitled).then("item_id").otherwise("title")),
        dict(raw.files),
        not_read=raw.not_read,
        columns=columns_of,
        texts=texts,
        own_scores=raw.own_scores,
        rule=protocol.label,
    )


def _with_sessions(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows, each asked when its session began; its answer is `known_at` its own time. `session` is a code.

    Sessions of one user that overlap begin together, so that a history never holds an answer that came later. A row
    without a session is one by itself.
    """
    if rows["timestamp"].null_count():
        raise DataError(
            "The log has a column session_id and no timestamp, so nothing says when a session began. Map the column "
            "under data.logs.init_args.columns.timestamp, or give session_id another name."
        )
    alone = pl.format("row {}", pl.int_range(pl.len()))
    named = rows.with_columns(of=pl.format("session {}", SESSION).fill_null(alone))
    time = pl.col("timestamp")
    sessions = named.group_by("user_id", "of").agg(start=time.min(), end=time.max())
    sessions = sessions.sort("user_id", "start", "end", "of").with_row_index("session")
    ended = pl.col("end").cum_max().shift(1).over("user_id")
    begins = (pl.col("start") > ended).fill_null(True).cum_sum()
    sessions = sessions.with_columns(asked_at=pl.col("start").min().over(begins))
    found = named.join(sessions, on=["user_id", "of"], maintain_order="left")
    return found.with_columns(
        pl.col("session").cast(pl.Int32), known_at="timestamp", timestamp="asked_at"
    )


def known_at(rows: pl.DataFrame) -> F64:
    """(n,) seconds at which each row's answer is known: its time, where a log has neither sessions nor a delay."""
    column = "known_at" if "known_at" in rows.columns else "timestamp"
    return rows[column].to_numpy().astype(np.float64)


def until_known(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows in order of user and time as prompts show them, with other `timestamp` and `known_at`.

    Rows that are asked before a user's earlier answers are known form one group: it has the first row's time, and is
    known when the last one is. So what stands earlier in a stream is known.
    """
    ended = pl.col("known_at").cum_max().shift(1).over("user")
    begins = (pl.col("timestamp") > ended).fill_null(True).cum_sum()
    return rows.with_columns(
        pl.col("timestamp").min().over(begins), pl.col("known_at").max().over(begins)
    )


def _without_duplicates(
    rows: pl.DataFrame, policy: Literal["error", "first", "last"]
) -> pl.DataFrame:
    key = ["user_id", "item_id", "timestamp"]
    distinct = rows.unique(
        key, keep="last" if policy == "last" else "first", maintain_order=True
    )
    if policy != "error" or distinct.height == rows.height:
        return distinct
    repeated = rows.filter(rows.select(key).is_duplicated())
    first = repeated.join(repeated.head(1), on=key, how="semi", nulls_equal=True)
    places = first.select(pl.format("{} row {}", "source_file", "source_row")).to_series()
    raise DataError(
        f"{rows.height - distinct.height:,} duplicate rows (same user, item and timestamp), for example user "
        f"{first['user_id'][0]!r}, item {first['item_id'][0]!r}: {', '.join(places)}. Remove them, or set "
        "data.protocol.duplicates to first or last (in file order)."
    )


def _coded(ids: pl.Series, code: str) -> pl.DataFrame:
    """Column `code` (Int32, 0..) and the ids: in numeric order if all are integers, else as strings."""
    number = ids.cast(pl.Int64, strict=False)
    order = [number, ids] if number.null_count() == 0 else [ids]
    place = pl.int_range(pl.len(), dtype=pl.Int32).alias(code)
    return ids.to_frame().sort(order).select(place, ids.name)


@dataclass(frozen=True)
class SplitInteractions:
    """Interactions with a split, a fold and a role for every row.

    `rows` are `interactions.rows` (same order) and `hist` Int32 (the user's rows known strictly before), `split`
    Enum(SPLITS), `fold` Enum(FOLDS) (null outside valid), `role` Enum(ROLES), `hidden` Boolean (its item is hidden).
    Train rows of hidden items are in neither. Where the protocol has negatives they are among the rows, and `sampled`
    says which: `answered` rows are the others.
    """

    interactions: Interactions
    rows: pl.DataFrame
    protocol: Protocol
    manifest: dict[str, Any]  # what results and reports show of the log, ready for JSON
    # 16 hex digits of the SHA-256 over protocol, file checksums and (row id, split, fold,
    # role, label)
    hash: str

    @cached_property
    def latest(self) -> float:
        """Seconds at which the log's last answer is known."""
        return float(known_at(self.rows).max())

    @cached_property
    def train_ratings(self) -> F64:
        """(n,) ratings of train's rows; empty where there are not three kinds, which tell no more than labels."""
        rows = self.rows.filter(answered(self.rows), split="train")
        ratings = rows["rating"].filter(rows["rating"].is_finite())
        return ratings.to_numpy() if ratings.n_unique() > 2 else np.empty(0)

    @property
    def warnings(self) -> list[str]:
        """What a reader of results has to know of the log, a line each."""
        found = []
        if self.interactions.not_read:
            found.append(
                f"of the interactions not read: {', '.join(self.interactions.not_read)}; list under "
                "data.logs.init_args.context what is known before the answer."
            )
        targets = self.rows.filter(role="target", split="train")
        log = self.interactions
        found += [
            f"{name} alone tells train's labels (AUC {value:.3f}): it is probably known only after the answer. "
            "Leave it out."
            for name, value in telling_alone(targets, log.users, log.columns).items()
        ]
        if log.own_scores is not None and (missing := log.rows[OWN_SCORE].null_count()):
            found.append(
                f"{missing:,} of {log.rows.height:,} rows have no {log.own_scores} (own_scores): they count as its "
                "median on train."
            )
        if negatives := self.protocol.negatives:
            found.append(
                f"labels 0 are drawn ({negatives.by}), nobody saw and left these items: results say how well clicks "
                "are told from such draws. How often an item was clicked tells them apart, since that decides what is "
                "clicked and what is drawn."
            )
        return found


def apply_protocol(interactions: Interactions, protocol: Protocol) -> SplitInteractions:
    """Assign splits, folds and roles; take the train rows of hidden items out of the log.

    A row of split S may later read rows of splits up to S (train < valid < test) that were known strictly before its
    timestamp.

    Rows are cut as without `hide_items`. Then train rows of hidden items leave the log, before anything reads it, and
    what is counted is counted without them: `row_id`, codes of users (one without another row is gone), `hist`, roles.
    Rows of hidden items in valid and test stay, so a test row may read earlier ones of valid and test.
    """
    protocol.check()
    at = _uniform(f"{HIDE_SALT}:{protocol.seed}", interactions.items["item_id"])
    items_hidden = pl.Series(at < protocol.hide_items)
    # 1. split; rows of a log without times get an order first
    dated = interactions.rows["timestamp"].null_count() == 0
    if not dated:
        interactions, split = _ordered(interactions, protocol)
    else:
        split = _splits(_with_roles(interactions.rows, protocol), protocol)
    # 2. train rows of hidden items leave the log
    if protocol.hide_items:
        stays = (split != "train") | ~items_hidden.gather(interactions.rows["item"])
        interactions = _with_only(interactions, stays)
        split = split.filter(stays)
    rows = _with_roles(interactions.rows, protocol)
    rows = rows.with_columns(split=split, hidden=items_hidden.gather(rows["item"]))
    # 3. train rows of users who are not taken are context
    at = _uniform(f"{TRAIN_SALT}:{protocol.seed}", interactions.users["user_id"])
    taken = pl.Series(at < protocol.train_users)
    rows = _as_context(rows, (pl.col("split") == "train") & ~taken.gather(rows["user"]))
    # 4. folds of validation
    folds = _folds(interactions.users["user_id"], protocol).gather(rows["user"])
    rows = rows.with_columns(fold=pl.when(pl.col("split") == "valid").then(folds))
    if interactions.own_scores is not None:
        rows = _with_own_scores(rows, interactions.own_scores, protocol)
    # 5. negatives beside the targets
    if protocol.negatives is not None:
        rows = _as_context(rows, repeated(rows))
        drawn = draw_negatives(rows, protocol.negatives, items_hidden, protocol.seed)
        rows = pl.concat([rows.with_columns(sampled=pl.lit(False)), drawn])
        rows = rows.sort("timestamp", "user", "sampled", "item")
        rows = rows.with_columns(row_id=pl.int_range(pl.len()))
        interactions = replace(interactions, rows=rows.select(interactions.rows.columns))
    # 6. check and describe
    _check_targets(rows, protocol)
    digest = _digest(rows, interactions, protocol)
    manifest = _manifest(rows, interactions, protocol, digest, dated)
    return SplitInteractions(interactions, rows, protocol, manifest, digest)


def _as_context(rows: pl.DataFrame, where: pl.Expr | pl.Series) -> pl.DataFrame:
    """The rows, of which some are no targets."""
    return rows.with_columns(
        role=pl.when(where).then(pl.lit("context", pl.Enum(ROLES))).otherwise("role")
    )


def _with_own_scores(rows: pl.DataFrame, column: str, protocol: Protocol) -> pl.DataFrame:
    """The rows with a score each: where the log has none it is the median of train's."""
    median = rows.filter(split="train")[OWN_SCORE].median()
    if median is None or protocol.negatives is not None:
        why = "no row of train has one" if median is None else "drawn negatives have none"
        raise DataError(
            f"data.logs.init_args.own_scores is {column}, but {why}. Give rows of all splits the score that your "
            "ranker gave them, or leave own_scores out."
        )
    return rows.with_columns(pl.col(OWN_SCORE).fill_null(median))


def answered(rows: pl.DataFrame) -> pl.Series:
    """Whether each row is an answer of its user (Boolean): sampled negatives are not, so nothing may read them."""
    if "sampled" in rows.columns:
        return ~rows["sampled"]
    return pl.repeat(True, rows.height, eager=True)


def _ordered(
    interactions: Interactions, protocol: Protocol
) -> tuple[Interactions, pl.Series]:
    """A log without timestamps in an order of its own, and the split of each row.

    History, train, valid, test, and inside each by a seeded permutation of the rows sorted by user and item; of the
    random split it is that split's. Timestamps are positions.
    """
    rows = interactions.rows
    place = np.argsort(np.random.default_rng(protocol.seed).permutation(rows.height))
    keyed = rows.with_columns(split=_splits(rows, protocol), place=place)
    late = pl.col("given_split").ne_missing("history")
    position = pl.int_range(pl.len())
    keyed = keyed.sort("split", late, "place").with_columns(
        row_id=position, timestamp=position.cast(pl.Float64)
    )
    return replace(interactions, rows=keyed.select(rows.columns)), keyed["split"]


def _with_roles(rows: pl.DataFrame, protocol: Protocol) -> pl.DataFrame:
    known = pl.col("known_at" if "known_at" in rows.columns else "timestamp")
    earlier = known.sort().search_sorted(pl.col("timestamp"), side="left")
    rows = rows.with_columns(
        hist=earlier.over("user").cast(pl.Int32), role=pl.lit("target", pl.Enum(ROLES))
    )
    is_history = pl.col("given_split") == "history"
    return _as_context(rows, (pl.col("hist") < protocol.minimum_history) | is_history)


def _with_only(interactions: Interactions, kept: pl.Series) -> Interactions:
    """The log with some of its rows (a Boolean each) and their users, coded anew in the same order."""
    rows = interactions.rows.filter(kept)
    users = interactions.users.filter(pl.col("user").is_in(rows["user"].unique().implode()))
    codes = pl.Series(range(users.height), dtype=pl.Int32)
    return replace(
        interactions,
        rows=rows.with_columns(
            row_id=pl.int_range(pl.len()),
            user=pl.col("user").replace_strict(users["user"], codes),
        ),
        users=users.with_columns(user=codes),
    )


def _splits(rows: pl.DataFrame, protocol: Protocol) -> pl.Series:
    """Split of each row."""
    place = pl.int_range(pl.len())
    match protocol.split:
        case "given":
            missing = rows["given_split"].null_count()
            if missing:
                raise DataError(
                    f"data.protocol.split is given, but {missing:,} of {rows.height:,} rows name no split. Map a "
                    "column with train, valid, test or history under data.logs.init_args.columns.split, give one file "
                    "per split under data.logs.init_args.interactions, or choose another data.protocol.split."
                )
            return rows["given_split"].replace("history", "train").cast(pl.Enum(SPLITS))
        case "global_time":
            # a cut is a time; a share of 0 cuts after the last target
            times = rows.filter(role="target")["timestamp"].append(pl.Series([np.inf]))
            behind = [
                pl.col("timestamp") >= times[cut]
                for cut in _cuts(len(times) - 1, protocol.shares)
            ]
        case "date":
            first = rows["timestamp"][0]
            last = rows["timestamp"][-1]
            seconds = (protocol.cuts or [])[:2]
            if not first < seconds[0] < seconds[1] <= last:
                raise DataError(
                    f"data.protocol.dates are {' and '.join(protocol.dates or ())}, but the log's rows are from "
                    f"{moment(first)} to {moment(last)} (UTC). Give dates between, so that each split has rows."
                )
            behind = [pl.col("timestamp") >= second for second in seconds]
        case "user_time":
            # the time of a user's row at the cut; a user without one has all rows before it
            at = [
                pl.when(place >= (share * pl.len()).round(6).floor()).then("timestamp")
                for share in np.cumsum(protocol.shares)[:2]
            ]
            behind = [pl.col("timestamp") >= time.min().over("user") for time in at]
        case "random":
            # place of each row
            shuffled = np.argsort(
                np.random.default_rng(protocol.seed).permutation(rows.height)
            )
            behind = [
                pl.Series(shuffled >= cut) for cut in _cuts(rows.height, protocol.shares)
            ]
        case "leave_last":
            # the user's later rows in the sorted order
            later = place.reverse().over("user")
            behind = [later < 2, later < 1]
    # how many of the two cuts each row lies behind; null is none
    passed = rows.select(pl.sum_horizontal(behind)).to_series()
    return passed.replace_strict(dict(enumerate(SPLITS)), return_dtype=pl.Enum(SPLITS))


def moment(seconds: float) -> str:
    """An ISO date, in UTC."""
    return str(np.datetime64(int(seconds), "s"))


def _cuts(size: int, shares: list[float]) -> list[int]:
    """Indices floor(s1 n) and floor((s1 + s2) n), rounded first: in binary .7 + .1 is less than .8."""
    return [int(round(share * size, 6)) for share in (shares[0], shares[0] + shares[1])]


def _folds(user_ids: pl.Series, protocol: Protocol) -> pl.Series:
    """Fold of each user."""
    at = _uniform(FOLD_SALT, user_ids)
    folds = np.searchsorted(np.cumsum(protocol.fold_shares)[:-1], at, side="right")
    return pl.Series([FOLDS[fold] for fold in folds], dtype=pl.Enum(FOLDS))


def _uniform(salt: str, names: pl.Series) -> F64:
    """(n,) numbers in [0, 1) that look random: salted hashes of names, the same on every machine and in any log."""
    digests = (hashlib.sha256(f"{salt}:{name}".encode()).digest() for name in names)
    return np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])


def _check_targets(rows: pl.DataFrame, protocol: Protocol) -> None:
    targets = rows.filter(role="target")
    labels = {split: targets.filter(split=split)["label"] for split in SPLITS}
    found = ", ".join(f"{split} {len(values):,}" for split, values in labels.items())
    empty = [split for split, values in labels.items() if values.is_empty()]
    if empty:
        raise DataError(
            f"Split {' and '.join(empty)} has no targets under {protocol.name} (targets: "
            f"{found}). Change data.protocol.shares, lower data.protocol.minimum_history, give more data, or "
            "choose another data.protocol.split: a cut moves to the next instant when many rows share one "
            "timestamp."
        )
    for split in ("train", "valid"):
        if labels[split].n_unique() == 1:
            raise DataError(
                f"All {len(labels[split]):,} targets of {split} have label {labels[split][0]} under "
                f"{protocol.name} (targets: {found}). Change data.protocol.label, data.protocol.shares or "
                "data.protocol.split. Clicks alone need rows with label 0 too: what was shown and not "
                "clicked, or data.protocol.label: clicked with data.protocol.negatives."
            )


def _digest(rows: pl.DataFrame, interactions: Interactions, protocol: Protocol) -> str:
    fields = asdict(protocol) | {"name": protocol.name, "fold_salt": FOLD_SALT}
    # what published hashes cover, though it is no setting any more
    if protocol.negatives is not None:
        fields["negatives"] |= {"repeats": "context"}
    # at their defaults the hash is that of versions which did not have them
    added = {
        "hide_items": 0.0,
        "train_users": 1.0,
        "negatives": None,
        "dates": None,
        "answer_delay": 0.0,
    }
    fields = {
        name: value for name, value in fields.items() if value != added.get(name, ...)
    }
    content: list[object] = [fields, list(interactions.files.values())]
    if interactions.columns:
        content.append(interactions.columns)
    if "session" in rows.columns:
        content.append("session")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    codes = rows.with_columns(
        pl.col("split", "fold", "role").to_physical().cast(pl.Int8).fill_null(-1)
    )
    for column in ("row_id", "split", "fold", "role", "label"):
        kind = "<i8" if column == "row_id" else "i1"
        digest.update(codes[column].to_numpy().astype(kind).tobytes())
    return digest.hexdigest()[:16]


def _manifest(
    rows: pl.DataFrame,
    interactions: Interactions,
    protocol: Protocol,
    digest: str,
    dated: bool,
) -> dict[str, Any]:
    """What results and reports show of a log, ready for JSON.

    `rows` are the log's and `negatives` the sampled ones; `counts` and `positives` are of targets, `context` of other
    rows; `cold_user_share` and `cold_item_share` are shares of targets whose user or item has no train target of the
    log; `order` is "shuffled" where the log has no timestamps, and `times` (first and last) is empty then; `tie_share`
    is that of rows that share user and timestamp with another; `not_read` are the columns of interactions that nothing
    reads, `columns` what `describe` says of context and users' attributes.
    """
    log = rows.filter(answered(rows))
    targets = rows.filter(role="target")
    by_split = {split: targets.filter(split=split) for split in SPLITS}
    by_fold = {fold: targets.filter(fold=fold) for fold in FOLDS}

    def cold(column: str) -> dict[str, float]:
        train = by_split["train"].filter(answered(by_split["train"]))
        seen = pl.col(column).is_in(train[column].unique().implode())
        return {
            split: by_split[split].select((~seen).mean()).item() for split in SPLITS[1:]
        }

    return {
        "name": protocol.name,
        "hash": digest,
        "fields": asdict(protocol),
        "files": dict(interactions.files),
        "rows": log.height,
        "negatives": rows.height - log.height,
        "order": "by time" if dated else "shuffled",
        "times": [moment(rows["timestamp"][k]) for k in (0, -1) if dated],
        "counts": {split: part.height for split, part in by_split.items()},
        "positives": {split: part["label"].sum() for split, part in by_split.items()},
        "context": {
            split: rows.filter(role="context", split=split).height for split in SPLITS
        },
        "folds": {
            fold: {
                "targets": part.height,
                "users": part["user"].n_unique(),
                "positives": part["label"].sum(),
            }
            for fold, part in by_fold.items()
        },
        "cold_user_share": cold("user"),
        "cold_item_share": cold("item"),
        "tie_share": log.select(
            pl.struct("user", "timestamp").is_duplicated().mean()
        ).item(),
        "not_read": list(interactions.not_read),
    } | (
        {"columns": describe(targets, interactions.users, interactions.columns)}
        if interactions.columns
        else {}
    )
