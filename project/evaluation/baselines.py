"""Baselines: the accuracy of the same features without an LLM, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike, NDArray

from project.arrays import F64
from project.data.logs import OWN_SCORE
from project.errors import DataError
from project.evaluation.bootstrap import UserBootstrap
from project.exits.calibration import fit_calibration
from project.features import (
    FEATURES,
    TEXT_FEATURES,
    FeatureBaseline,
    feature_matrix,
    fit_terms,
    logistic_regression,
)
from project.metrics import auc, losses
from project.results import BaselineRow, Difference

CATEGORIES = 250  # values of a column that boosting tells apart; it takes 255
Part = tuple[str, str | None]  # a split, and one of valid's folds or None for the whole

SINGLE_FEATURE = {
    "item_rate": "item_log_odds",
    "user_rate": "user_log_odds",
    "neighbour_vote": "vote_log_odds",
    "mf_fold_in": "mf_log_odds",
}


class Platt(NamedTuple):
    """Platt's calibration (1999): slope * logit + offset."""

    slope: float
    offset: float

    def apply(self, logits: F64) -> F64:
        """Calibrated logits."""
        return self.slope * logits + self.offset


def platt(logits: F64, labels: NDArray[Any]) -> Platt | None:
    """By maximum likelihood on logits and labels (n,), the slope at least .001; None where a class is missing."""
    share = float(np.mean(labels)) if len(labels) else 0.0
    if not 0 < share < 1:
        return None
    if np.ptp(logits) == 0:  # equal logits determine an offset, not a slope
        return Platt(1.0, float(np.log(share) - np.log(1 - share) - logits[0]))
    found = fit_calibration(torch.from_numpy(logits)[:, None], labels, (0,), exit_0=False)
    slope, _, offset = found.values[0].tolist()
    return Platt(slope, offset)


@dataclass(frozen=True)
class Baseline:
    """One baseline's scores: row_id Int64, split String, logit Float64; `chosen` holds what was chosen on tune."""

    name: str
    scores: pl.DataFrame
    chosen: Mapping[str, Any] | None = None
    further: F64 | None = None  # logits of further rows, where it was asked for some

    def logits(self, row_ids: ArrayLike) -> F64:
        """Logits (n,) of these rows in this order; DataError where a row was not scored."""
        wanted = pl.DataFrame({"row_id": np.asarray(row_ids, dtype=np.int64)})
        found = wanted.join(self.scores, on="row_id", how="left", maintain_order="left")[
            "logit"
        ]
        if found.null_count():
            raise DataError(
                f"baseline {self.name} has no score for {found.null_count()} of {found.len()} rows: "
                "it was fitted under another protocol or for other splits"
            )
        return found.to_numpy().astype(np.float64)


def fit_baselines(
    rows: pl.DataFrame,
    retrieved: Mapping[str, pl.DataFrame],
    splits: Sequence[str] = ("valid", "test"),
    kinds: Mapping[str, str] | None = None,
    own_scores: str | None = None,
    further: pl.DataFrame | None = None,
) -> list[Baseline]:
    """Fit every baseline on train targets and score the targets of `splits`, each from its own retrieved features.

    `kinds` is number or category, by column of context and users' attributes; where a log has any, two baselines more
    read them: exit 0 (lr_context), and boosting, which gets categories as such. `own_scores` is the name of the
    baseline whose scores the log has. `further` are retrieved features of other rows, which all others score, too.
    """
    from threadpoolctl import threadpool_limits  # no type information published

    labels = train_labels(rows)
    base = float(labels.mean())
    tables = {s: targets_table(rows, retrieved, s) for s in ("train", *splits)}
    if further is not None:
        tables["further"] = further
    features = {s: feature_matrix(table, base) for s, table in tables.items()}
    train = features["train"]

    def fitted(model: Any, features: Mapping[str, F64]) -> dict[str, F64]:
        model.fit(features["train"], labels)
        return {
            split: np.asarray(model.decision_function(x), np.float64)
            if len(x)
            else np.zeros(0)
            for split, x in features.items()
            if split in ("further", *splits)
        }

    def learned(model: Any, columns: slice) -> dict[str, F64]:
        return fitted(model, {s: x[:, columns] for s, x in features.items()})

    logits = {} if own_scores is None else {own_scores: _own_logits(rows, splits)}
    # 1. single features
    for name, feature in SINGLE_FEATURE.items():
        if name != "mf_fold_in" or "mf" in retrieved["train"].columns:
            column = FEATURES.index(feature)
            logits[name] = {s: x[:, column] for s, x in features.items()}
    # 2. models of several features; of two that are equally accurate `best_baseline` takes
    # the first, so the simpler model stands first. One thread: thousands of short parallel
    # loops cost 30 s instead of 1 s on busy cores.
    rates = slice(FEATURES.index("vote_log_odds"))
    no_text = slice(-len(TEXT_FEATURES))
    with threadpool_limits(1):
        logits["lr_rates"] = learned(logistic_regression(), rates)
        logits["lr_features"] = learned(logistic_regression(), no_text)
        logits["gbdt_features"] = learned(boosting(), no_text)
        exit_0 = FeatureBaseline.fit_features(train, labels, base)
        logits["lr_text"] = {split: exit_0.of_features(x) for split, x in features.items()}
        logits["gbdt_text"] = learned(boosting(), slice(None))
        # 3. the two of all features with context, too
        if kinds:
            terms = fit_terms(tables["train"], kinds, base)
            wide = {s: feature_matrix(table, base, terms) for s, table in tables.items()}
            logits["lr_context"] = fitted(logistic_regression(), wide)
            numbers = [*range(len(FEATURES))]
            numbers += [k for k, t in enumerate(terms, len(FEATURES)) if t.kind != "is"]
            known = known_categories(tables["train"], kinds)
            wide = {
                s: np.concatenate([x[:, numbers], category_codes(tables[s], known)], axis=1)
                for s, x in wide.items()
            }
            model = boosting([len(numbers) + k for k in range(len(known))])
            logits["gbdt_context"] = fitted(model, wide)
    return [
        Baseline(
            name,
            baseline_scores(rows, {split: of[split] for split in splits}),
            further=of.get("further"),
        )
        for name, of in logits.items()
    ]


def _own_logits(rows: pl.DataFrame, splits: Sequence[str]) -> dict[str, F64]:
    """Scores of the ranker that runs today, of any scale, as logits that keep their order; fitted on train."""
    scores = {s: targets_of(rows, s)[OWN_SCORE].to_numpy() for s in ("train", *splits)}
    mean = scores["train"].mean()
    spread = scores["train"].std() or 1.0
    standard = {split: (values - mean) / spread for split, values in scores.items()}
    calibration = platt(standard["train"], train_labels(rows))
    assert calibration is not None  # both labels are among train's
    return {split: calibration.apply(standard[split]) for split in splits}


def known_categories(table: pl.DataFrame, kinds: Mapping[str, str]) -> dict[str, F64]:
    """By column of a category its most frequent values in a table of train, ascending, as many as boosting takes."""
    return {
        column: table[column]
        .drop_nulls()
        .value_counts(sort=True)[column][:CATEGORIES]
        .sort()
        .to_numpy()
        for column, kind in kinds.items()
        if kind == "category"
    }


def category_codes(table: pl.DataFrame, known: Mapping[str, F64]) -> F64:
    """(n, columns) place of each value among the known ones; NaN where it is missing or none of them."""
    codes = np.full((table.height, len(known)), np.nan)
    for k, (column, values) in enumerate(known.items()):
        of = table[column].to_numpy()
        place = np.searchsorted(values, of)
        found = np.append(values, np.nan)[place] == of
        codes[found, k] = place[found]
    return codes


def boosting(categories: Sequence[int] = ()) -> Any:
    """Scikit-learn's histogram gradient boosting, seeded; `categories` are columns of codes."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    # iterations, rate and leaf size were chosen on ML-100K's validation; no early stopping,
    # which would hold out rows at random although the log is ordered by time
    return HistGradientBoostingClassifier(
        max_leaf_nodes=15,
        learning_rate=0.03,
        max_iter=150,
        min_samples_leaf=100,
        l2_regularization=1.0,
        early_stopping=False,
        categorical_features=[*categories] or None,
        random_state=0,
    )


def baseline_rows(
    baselines: Sequence[Baseline],
    rows: pl.DataFrame,
    draws: int = 1000,
    parts: Sequence[Part] | None = None,
) -> list[BaselineRow]:
    """The `baselines` list of a result file: one entry per baseline and part, `draws` resamples behind each interval.

    Without `parts` these are all scored splits and valid's folds select and tune; the certify fold is for certificates
    only. Metrics of calibrated logits stand under `calibrated`, but not on select, where the calibration was fitted.
    """
    if parts is None:
        splits = baselines[0].scores["split"].unique(maintain_order=True).to_list()
        folds = ("select", "tune") if "valid" in splits else ()
        parts = [*((split, None) for split in splits), *(("valid", fold) for fold in folds)]
    select = targets_of(rows, "valid", "select")
    liked = select["label"].to_numpy()
    calibrations = [platt(b.logits(select["row_id"]), liked) for b in baselines]
    found = list[BaselineRow]()
    for split, fold in parts:
        part = targets_of(rows, split, fold)
        labels = part["label"]
        bootstrap = UserBootstrap(part["user"], draws)
        for baseline, calibration in zip(baselines, calibrations, strict=True):
            logits = baseline.logits(part["row_id"])
            row: BaselineRow = {
                "name": baseline.name,
                "split": split,
                "fold": fold,
                **bootstrap.metrics(logits, labels),
                "calibrated": None,
                "chosen": baseline.chosen,
            }
            if calibration is not None and fold != "select":
                row["calibrated"] = losses(calibration.apply(logits), labels)
            found.append(row)
    return found


def best_baseline(baselines: Sequence[Baseline], rows: pl.DataFrame) -> Baseline | None:
    """The baseline of highest AUC on valid's tune fold (the first of equals), None where that is undefined."""
    tune = targets_of(rows, "valid", "tune")
    scored = [(auc(b.logits(tune["row_id"]), tune["label"]), b) for b in baselines]
    defined = [(value, baseline) for value, baseline in scored if value is not None]
    return max(defined, key=lambda pair: pair[0])[1] if defined else None


def targets_of(rows: pl.DataFrame, split: str, fold: str | None = None) -> pl.DataFrame:
    """Targets of a split, or of one fold of validation, in the order of `rows`."""
    return part_of(rows.filter(role="target"), split, fold)


def part_of(table: pl.DataFrame, split: str, fold: str | None) -> pl.DataFrame:
    """Rows of one split, or of one fold of validation."""
    part = table.filter(split=split)
    return part if fold is None else part.filter(fold=fold)


def train_labels(rows: pl.DataFrame) -> NDArray[Any]:
    """Labels (n,) of train's targets; DataError where a class is missing."""
    labels = targets_of(rows, "train")["label"].to_numpy()
    if np.unique(labels).size < 2:
        raise DataError(
            f"baselines need train targets of both classes, found {labels.size} targets, {int(labels.sum())} "
            "positive: check data.protocol.label and data.protocol.minimum_history"
        )
    return labels


def targets_table(
    rows: pl.DataFrame, retrieved: Mapping[str, pl.DataFrame], split: str
) -> pl.DataFrame:
    """The rows of a split's targets in that split's own retrieved features table."""
    targets = targets_of(rows, split).select("row_id")
    if split not in retrieved:
        raise DataError(
            f"baselines need the retrieved features table of {split}, found {sorted(retrieved)}"
        )
    table = targets.join(retrieved[split], on="row_id", how="inner", maintain_order="left")
    if table.height != targets.height:
        raise DataError(
            f"the retrieved features table of {split} has {table.height} rows for its {targets.height} targets, "
            "expected one each: it was made under another protocol"
        )
    return table


def baseline_scores(rows: pl.DataFrame, logits: Mapping[str, F64]) -> pl.DataFrame:
    """The `scores` of a Baseline, from logits (n,) of each split's targets in the order of `rows`."""
    return pl.concat(
        targets_of(rows, split).select(
            "row_id", pl.lit(split).alias("split"), pl.Series("logit", values)
        )
        for split, values in logits.items()
    )


class AgainstBaseline:
    """A baseline on the n rows that heads scored, in their order; users are drawn once, for all heads."""

    def __init__(self, baseline: Baseline, row_ids: ArrayLike, rows: pl.DataFrame) -> None:
        wanted = pl.DataFrame({"row_id": np.asarray(row_ids, dtype=np.int64)})
        known = rows.select("row_id", "user", "label")
        part = wanted.join(known, on="row_id", how="left", maintain_order="left")
        self.name = baseline.name
        self._labels = part["label"]
        self._bootstrap = UserBootstrap(part["user"])
        self._logits = baseline.logits(row_ids)

    def difference(self, logits: ArrayLike) -> Difference:
        """A head's logits (n,) minus the baseline, in AUC; None where a class is missing."""
        gap = self._bootstrap.difference_interval(logits, self._logits, self._labels)
        return {"baseline": self.name, **gap}
