"""The protocol: every choice that decides which rows are targets and in which split.

Unusual: it says nothing about data, so all of it can be checked before a log is read.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from project.errors import ConfigError

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
