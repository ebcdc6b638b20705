"""A candidate's retrieved features as a few numbers, and a logistic regression on them, which is exit 0.

The numbers exist before the first layer of the LLM runs. The same regression is the baseline `lr_text` and exit 0 of a
calibrated run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

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
    "item_similarity_log_odds",
    "text_log_odds",
    "text_rows",
)
"""Log-odds of shrunk rates, log(1 + count) of their rows, mean similarity (0 without neighbours), log-odds by matrix
factorisation and by the user's own answers on similar items, shrunk as if their similarities were rows; four times the
text similarity (the slope of log-odds at 1/2), and log(1 + its weight)."""

TEXT_FEATURES = FEATURES[-2:]

SUREST = 1e-4  # a factorisation closer to 0 or 1 counts as this close


def feature_matrix(retrieved: pl.DataFrame, base: float) -> Floats:
    """Rows of an retrieved features table as numbers.

    Args:
        retrieved: n rows of an retrieved features table, with or without the columns factorisation, alike and text.
        base: Share of likes among train targets, to which rates of few rows shrink.

    Returns:
        (n, len(FEATURES)), finite. Where there is no factorisation, it is a factorisation's biases alone: rates
        summed; where nothing is alike, the train mean.
    """
    weights = _similarity_weights(retrieved)
    similarity = retrieved["similarities"].list.mean().fill_null(0.0).to_numpy().astype(np.float64)
    item, user = (_rate_and_rows(retrieved, f"{of}_rate", f"{of}_count", base) for of in ("item", "user"))
    columns = [
        *item,
        *user,
        *_rate_and_rows(retrieved, "vote", "neighbour_count", base),
        similarity,
        _log_odds(weights["likes"].to_numpy(), weights["weight"].to_numpy(), base),
        _mf(retrieved, item[0] + user[0] - np.log(base / (1.0 - base))),
        _item_similarity(retrieved, base),
        *_text(retrieved),
    ]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class FeatureBaseline:
    """Exit 0: a logistic regression on features, fitted on train targets.

    Attributes:
        base: Share of likes among train targets.
        offset: Intercept.
        weights: (len(FEATURES),) on features as they are, not standardised.
    """

    base: float
    offset: float
    weights: Floats

    @classmethod
    def fit(cls, retrieved: pl.DataFrame, labels: ArrayLike) -> FeatureBaseline:
        """Fit on train targets.

        Args:
            retrieved: Their n rows of train's retrieved features table.
            labels: (n,) 0 or 1, both present.
        """
        answers = np.asarray(labels)
        base = float(answers.mean())
        return cls.fit_features(feature_matrix(retrieved, base), answers, base)

    @classmethod
    def fit_features(cls, features: Floats, labels: NDArray[Any], base: float) -> FeatureBaseline:
        """`fit` for features that exist already.

        Args:
            features: (n, len(FEATURES)) of `feature_matrix`.
            labels: (n,) 0 or 1.
            base: What the features were made with.
        """
        model = logistic_regression()
        model.fit(features, labels)
        scaler, regression = model[0], model[1]
        weights = regression.coef_[0] / scaler.scale_
        return cls(base, float(regression.intercept_[0] - weights @ scaler.mean_), weights)

    def logits(self, retrieved: pl.DataFrame) -> Floats:
        """Logits (n,) of n rows of an retrieved features table."""
        return self.of_features(feature_matrix(retrieved, self.base))

    def of_features(self, features: Floats) -> Floats:
        """Logits (n,) of features (n, len(FEATURES)) made with this exit 0's base."""
        scores: Floats = features @ self.weights + self.offset
        return scores

    def to_array(self) -> Floats:
        """(2 + len(FEATURES),): base, offset, weights."""
        return np.concatenate([[self.base, self.offset], self.weights])

    @classmethod
    def from_array(cls, values: ArrayLike) -> FeatureBaseline:
        """From what `to_array` gave."""
        array = np.asarray(values, dtype=np.float64)
        return cls(float(array[0]), float(array[1]), array[2:])


def logistic_regression() -> Any:
    """Standardised features into scikit-learn's logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _rate_and_rows(table: pl.DataFrame, rate: str, count: str, base: float) -> tuple[Floats, Floats]:
    rows = table[count].fill_null(0).to_numpy().astype(np.float64)
    return _log_odds(table[rate].fill_null(0.0).to_numpy() * rows, rows, base), np.log1p(rows)


def _log_odds(likes: NDArray[Any], rows: NDArray[Any], base: float) -> Floats:
    """Log-odds of (likes + k base) / (rows + k): finite, and the train mean where there are no rows."""
    liked = likes.astype(np.float64) + PRIOR_ROWS * base
    disliked = rows.astype(np.float64) - likes + PRIOR_ROWS * (1.0 - base)
    odds: Floats = np.log(liked) - np.log(disliked)
    return odds


def _mf(retrieved: pl.DataFrame, otherwise: Floats) -> Floats:
    """Log-odds of the column factorisation; `otherwise` where it is absent or null."""
    if "mf" not in retrieved.columns:
        return otherwise
    found = retrieved["mf"].cast(pl.Float64)
    chance = found.fill_null(0.5).clip(SUREST, 1.0 - SUREST).to_numpy()
    return np.where(found.is_null().to_numpy(), otherwise, np.log(chance / (1.0 - chance)))


def _item_similarity(retrieved: pl.DataFrame, base: float) -> Floats:
    """Log-odds of the column alike, shrunk to the train mean; that mean where the column is absent."""
    if "item_similarity" not in retrieved.columns:
        return _log_odds(np.zeros(len(retrieved)), np.zeros(len(retrieved)), base)
    weight = retrieved["item_similarity_weight"].to_numpy().astype(np.float64)
    return _log_odds(retrieved["item_similarity"].fill_null(0.0).to_numpy() * weight, weight, base)


def _text(retrieved: pl.DataFrame) -> tuple[Floats, Floats]:
    """Text similarity as log-odds, and the log of its weight; 0 where the columns are absent."""
    if "text" not in retrieved.columns:
        return np.zeros(len(retrieved)), np.zeros(len(retrieved))
    similarity, weight = (retrieved[name].fill_null(0.0).to_numpy() for name in ("text", "text_weight"))
    return 4.0 * similarity.astype(np.float64), np.log1p(weight.astype(np.float64))


def _similarity_weights(table: pl.DataFrame) -> pl.DataFrame:
    """Sum of similarities (weight), the likers' part of it (likes), one row a target; below 0 counts as 0."""
    weight = pl.col("similarities").clip(lower_bound=0.0).cast(pl.Float64)
    pairs = table.select("row_id", "similarities", "answers").filter(pl.col("answers").list.len() > 0)
    sums = (
        pairs.explode("similarities", "answers")
        .group_by("row_id")
        .agg(weight=weight.sum(), likes=(weight * pl.col("answers")).sum())
    )
    found = table.select("row_id").join(sums, on="row_id", how="left", maintain_order="left")
    return found.with_columns(pl.col("weight", "likes").fill_null(0.0))
