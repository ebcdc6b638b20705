"""Turns a candidate's retrieved features into numbers, and fits exit 0, a logistic regression on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from project.arrays import F64

PRIOR_ROWS = 5.0
"""A rate is mixed with so many rows at the train mean: best of 1, 2, 3, 5, 10, 20 on ML-100K's validation."""

FEATURES = (
    "item_log_odds",
    "item_rows",
    "user_log_odds",
    "user_rows",
    "vote_log_odds",
    "neighbours",
    "similarity",
    "weighted_vote_log_odds",
    "mf_log_odds",
    "mf_rating_log_odds",
    "item_similarity_log_odds",
    "text_log_odds",
    "text_rows",
)
"""Log-odds of shrunk rates, log(1 + count) of their rows, mean similarity (0 without neighbours), log-odds by matrix
factorisation of labels and of ratings (0 without them), and by the user's own answers on similar items, shrunk as if
their similarities were rows; four times the text similarity (the slope of log-odds at 1/2), and log(1 + its weight)."""

TEXT_FEATURES = FEATURES[-2:]
# of a retrieved features table, those that are numbers and read here or by prompts
COLUMNS = (
    "item_rate",
    "item_count",
    "user_rate",
    "user_count",
    "vote",
    "neighbour_count",
    "weighted_vote",
    "vote_weight",
    "similarity",
    "mf",
    "mf_rating",
    "item_similarity",
    "item_similarity_weight",
    "text",
    "text_weight",
)
# prefixes of columns that a table of a log with context or users' attributes has beside
RATE = "rate."
PREFIXES = ("context.", "user.", RATE)
FREQUENT = 20  # train targets of a category that gets a number of its own
MOST_VALUES = 64  # of a category
SKEWED = 2.0  # skewness from which on the logarithm of a number is read
WIDE = 5.0  # deviations that a number is clipped to
SUREST = 1e-4  # chances by factorisation are clipped to this distance from 0 and 1


@dataclass(frozen=True, eq=False)
class Retrieved:
    """Retrieved features of n rows as numbers: what a table of them holds, or an index answers."""

    columns: dict[str, F64]  # (n,) by the table's name; NaN where it has null

    @classmethod
    def of(cls, table: pl.DataFrame | Retrieved) -> Retrieved:
        """Of a table's rows, in their order."""
        if isinstance(table, Retrieved):
            return table
        return cls(
            {
                c: table[c].cast(pl.Float64).to_numpy()
                for c in table.columns
                if c in COLUMNS or c.startswith(PREFIXES)
            }
        )

    def column(self, name: str) -> F64:
        """(n,) of a column; NaN where the table does not have it."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def table(self) -> pl.DataFrame:
        """A table that `of` reads as this."""
        return pl.DataFrame(self.columns, nan_to_null=True)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def rows(self, part: slice) -> Retrieved:
        """Some of the rows."""
        return Retrieved({name: values[part] for name, values in self.columns.items()})


def feature_matrix(
    retrieved: pl.DataFrame | Retrieved, base: float, terms: Sequence[Term] = ()
) -> F64:
    """Rows of a retrieved features table as numbers: (n, len(FEATURES) + len(terms)), finite.

    `base` is the share of likes among train targets, to which rates of few rows shrink. Where the table has no
    factorisation, its feature is the sum of both rates' log-odds; where it has no item similarity, the train mean.
    """
    found = Retrieved.of(retrieved)

    def numbers(name: str) -> F64:
        values = found.column(name)
        return np.where(np.isnan(values), 0.0, values)

    def rate_and_rows(rate: str, count: str) -> tuple[F64, F64]:
        rows = numbers(count)
        return log_odds(numbers(rate) * rows, rows, base), np.log1p(rows)

    # 1. rates of the item and the user, the neighbours' vote, and this weighted by similarity
    item = rate_and_rows("item_rate", "item_count")
    user = rate_and_rows("user_rate", "user_count")
    vote = rate_and_rows("vote", "neighbour_count")
    weighted_vote = rate_and_rows("weighted_vote", "vote_weight")[0]

    # 2. matrix factorisation, and the user's own answers on similar items
    def by_factorisation(name: str, unknown: F64) -> F64:
        chance = np.clip(found.column(name), SUREST, 1.0 - SUREST)
        return np.where(np.isnan(chance), unknown, np.log(chance / (1.0 - chance)))

    mf = by_factorisation("mf", item[0] + user[0] - np.log(base / (1.0 - base)))
    # where nothing is known, the middle of all ratings
    mf_rating = by_factorisation("mf_rating", np.zeros(len(found)))
    item_similarity = rate_and_rows("item_similarity", "item_similarity_weight")[0]
    # 3. in the order of FEATURES, then terms
    columns = (
        *item,
        *user,
        *vote,
        numbers("similarity"),
        weighted_vote,
        mf,
        mf_rating,
        item_similarity,
        4.0 * numbers("text"),
        np.log1p(numbers("text_weight")),
        *(term.of(found) for term in terms),
    )
    return np.stack(columns, axis=1)


def log_odds(likes: F64, rows: F64, base: float) -> F64:
    """Log-odds of (likes + k base) / (rows + k): finite, and the train mean where there are no rows."""
    return np.log(likes + PRIOR_ROWS * base) - np.log(
        rows - likes + PRIOR_ROWS * (1.0 - base)
    )


class Term(NamedTuple):
    """One more feature of a log with context or users' attributes, made of a column of the table.

    `kind` is "is", 1 for one value of a category; "missing", 1 where there is none; "number" or "log" (of 1 + it),
    standardised; "rate", as it is.
    """

    column: str
    kind: str
    value: float = 0.0  # of a category; mean of a number; a rate of nothing
    scale: float = 1.0

    def of(self, retrieved: Retrieved) -> F64:
        """(n,) of n rows; a column that is not there is missing."""
        values = retrieved.column(self.column)
        match self.kind:
            case "is":
                return np.where(values == self.value, 1.0, 0.0)
            case "missing":
                return np.isnan(values).astype(np.float64)
            case "rate":
                return np.where(np.isnan(values), self.value, values)
        number = np.log1p(np.maximum(values, 0.0)) if self.kind == "log" else values
        scaled = (number - self.value) / self.scale
        known: F64 = np.where(np.isnan(scaled), 0.0, scaled)
        return np.minimum(np.maximum(known, -WIDE), WIDE)


def fit_terms(
    table: pl.DataFrame, kinds: Mapping[str, str], base: float
) -> tuple[Term, ...]:
    """Terms of train targets' rows of a table; `kinds` is number or category, by column of context and users."""
    nothing = float(np.log(base) - np.log1p(-base))
    terms = [Term(c, "rate", nothing) for c in table.columns if c.startswith(RATE)]
    for column, kind in kinds.items():
        values = table[column].drop_nulls()
        if kind == "category":
            counts = values.value_counts(sort=True).filter(pl.col("count") >= FREQUENT)
            frequent = counts.head(MOST_VALUES)[column].to_list()
            terms += [Term(column, "is", value) for value in frequent]
        elif values.n_unique() > 1:
            skewed = values.min() >= 0 and (values.skew() or 0.0) > SKEWED  # type: ignore[operator]
            number = values.log1p() if skewed else values
            mean, scale = number.mean(), number.std()
            terms.append(Term(column, "log" if skewed else "number", mean, scale))  # type: ignore[arg-type]
        if 0 < values.len() < table.height:
            terms.append(Term(column, "missing"))
    return tuple(terms)


@dataclass(frozen=True)
class FeatureBaseline:
    """Exit 0: a logistic regression on features, fitted on train targets."""

    base: float  # share of likes among train targets
    offset: float
    # (len(FEATURES) + len(terms),) on features as they are, not standardised
    weights: F64
    terms: tuple[Term, ...] = ()  # features beside `FEATURES`

    @classmethod
    def fit(
        cls, retrieved: pl.DataFrame, labels: ArrayLike, kinds: Mapping[str, str]
    ) -> FeatureBaseline:
        """Fit on train targets: their n rows of train's retrieved features table and labels (n,), both classes.

        `kinds` as of `fit_terms`.
        """
        answers = np.asarray(labels)
        base = float(answers.mean())
        terms = fit_terms(retrieved, kinds, base)
        features = feature_matrix(retrieved, base, terms)
        return cls.fit_features(features, answers, base, terms)

    @classmethod
    def fit_features(
        cls,
        features: F64,
        labels: NDArray[Any],
        base: float,
        terms: tuple[Term, ...] = (),
    ) -> FeatureBaseline:
        """`fit` for features (n, F) that were made with this `base` and these `terms`."""
        scaler, regression = logistic_regression().fit(features, labels)
        weights = regression.coef_[0] / scaler.scale_
        offset = float(regression.intercept_[0] - weights @ scaler.mean_)
        return cls(base, offset, weights, terms)

    @property
    def names(self) -> list[str]:
        """(F,) of the features."""
        return [*FEATURES, *(":".join(map(str, term[:3])) for term in self.terms)]

    def logits(self, retrieved: pl.DataFrame | Retrieved) -> F64:
        """Logits (n,) of n rows of retrieved features."""
        return self.of_features(feature_matrix(retrieved, self.base, self.terms))

    def of_features(self, features: F64) -> F64:
        """Logits (n,) of features (n, F) that were made with this `base` and these `terms`."""
        return features @ self.weights + self.offset

    def to_array(self) -> F64:
        """(2 + F,): base, offset, weights."""
        return np.concatenate([[self.base, self.offset], self.weights])

    @classmethod
    def from_array(cls, values: ArrayLike, terms: tuple[Term, ...] = ()) -> FeatureBaseline:
        """The baseline that `to_array` wrote."""
        array = np.asarray(values, dtype=np.float64)
        return cls(float(array[0]), float(array[1]), array[2:], terms)


def logistic_regression() -> Any:
    """Standardised features into scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
