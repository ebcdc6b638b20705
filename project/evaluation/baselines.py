"""Baselines: what the same features say without an LLM, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import ArrayLike, NDArray

from project.errors import DataError
from project.evaluation.bootstrap import UserBootstrap
from project.exits.calibration import fit_calibration
from project.features import FEATURES, TEXT_FEATURES, FeatureBaseline, feature_matrix, logistic_regression
from project.metrics import auc, brier, ece, head_metrics, log_loss, probabilities

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BaselineCalibration:
    """slope * logit + offset (Platt 1999).

    Attributes:
        slope: At least .001.
        offset: Added last.
    """

    slope: float
    offset: float

    @classmethod
    def fit(cls, logits: Floats, labels: NDArray[Any]) -> BaselineCalibration | None:
        """Maximum likelihood; None where a class is missing, so that nothing can be fitted.

        Args:
            logits: (n,) of the targets of `select`. Where all are equal the slope is 1: only the offset can be known.
            labels: (n,) 0 or 1.
        """
        share = float(np.mean(labels)) if len(labels) else 0.0
        if not 0 < share < 1:
            return None
        if np.ptp(logits) == 0:
            return cls(1.0, float(np.log(share) - np.log(1 - share) - logits[0]))
        found = fit_calibration(torch.from_numpy(logits)[:, None], labels, (0,), exit_0=False)
        slope, _, offset = found.values[0].tolist()
        return cls(slope, offset)

    def apply(self, logits: Floats) -> Floats:
        """Calibrated logits (n,)."""
        return self.slope * logits + self.offset

    def judged(self, logits: Floats, labels: ArrayLike) -> dict[str, Any]:
        """The `calibrated` part of a baseline's row: `log_loss`, `brier`, `ece` after it, `slope` and `offset`.

        Args:
            logits: (n,) before calibration.
            labels: (n,) 0 or 1.
        """
        chance = probabilities(self.apply(logits))
        metrics = {
            "log_loss": log_loss(chance, labels),
            "brier": brier(chance, labels),
            "ece": ece(chance, labels),
        }
        return metrics | {"slope": self.slope, "offset": self.offset}


Part = tuple[str, str | None]  # a split, and one of valid's folds or None for the whole

RATE_FEATURES = FEATURES[:4]
SINGLE_FEATURE = {
    "item_rate": "item_log_odds",
    "user_rate": "user_log_odds",
    "neighbour_vote": "vote_log_odds",
}
MF_FEATURE = {"mf_fold_in": "mf_log_odds"}


@dataclass(frozen=True)
class Baseline:
    """One baseline's scores.

    Args:
        name: item_rate, user_rate, neighbour_vote, mf_fold_in, lr_rates, lr_features, gbdt_features, lr_text,
            gbdt_text, one of `more_baselines` or of `networks`.
        scores: row_id Int64, split String, logit Float64; the targets of each scored split.
        chosen: What was chosen for it on tune, where something was.
    """

    name: str
    scores: pl.DataFrame
    chosen: Mapping[str, Any] | None = None

    def logits(self, row_ids: ArrayLike) -> Floats:
        """Logits of these rows in this order, shape (n,); DataError where a row was not scored."""
        wanted = pl.DataFrame({"row_id": np.asarray(row_ids, dtype=np.int64)})
        found = wanted.join(self.scores, on="row_id", how="left", maintain_order="left")["logit"]
        if found.null_count():
            raise DataError(
                f"baseline {self.name} has no score for {found.null_count()} of {found.len()} rows: "
                "it was fitted under another protocol or for other splits"
            )
        return found.to_numpy().astype(np.float64)

    def calibration(self, rows: pl.DataFrame) -> BaselineCalibration | None:
        """Offset and slope by the targets of valid's fold `select`; None where a class is missing there."""
        select = targets_of(rows, "valid", "select")
        return BaselineCalibration.fit(self.logits(select["row_id"]), select["label"].to_numpy())


def fit_baselines(
    rows: pl.DataFrame,
    retrieved: Mapping[str, pl.DataFrame],
    splits: Sequence[str] = ("valid", "test"),
    seed: int = 0,
) -> list[Baseline]:
    """Fit every baseline on train targets and score the targets of `splits`.

    Args:
        rows: Rows of a split (row_id, user, label, split, role).
        retrieved: Retrieved features table of each split; train's is used for fitting only, so nothing later is seen.
        splits: Splits to score. Leave test out while exploring.
        seed: Seed of the gradient boosting.

    Raises:
        DataError: train targets lack a class, or retrieved features lacks a target's row.
    """
    labels = train_labels(rows)
    base = float(labels.mean())
    train = retrieved_features(rows, retrieved, "train", base)
    features = {split: retrieved_features(rows, retrieved, split, base) for split in splits}
    singles = SINGLE_FEATURE | (MF_FEATURE if "mf" in retrieved["train"].columns else {})
    logits = {name: {s: x[:, FEATURES.index(f)] for s, x in features.items()} for name, f in singles.items()}
    logits |= _learned_logits(train, labels, features, base, seed)
    return [Baseline(name, baseline_scores(rows, by_split)) for name, by_split in logits.items()]


def baseline_rows(
    baselines: Sequence[Baseline],
    rows: pl.DataFrame,
    draws: int = 1000,
    seed: int = 0,
    parts: Sequence[Part] | None = None,
) -> list[dict[str, Any]]:
    """The `baselines` list of a result file: one entry per baseline and part.

    Args:
        baselines: From `fit_baselines`.
        rows: The same rows.
        draws: Resamples of users behind `auc_interval`.
        seed: Seed of the resampling.
        parts: Splits and folds of valid; None: every scored split, then valid's folds select and tune (the certify
            fold gets no entry of its own: it is for certificates only).

    Returns:
        Metrics of the logits, and of the calibrated ones under `calibrated` where that was fitted on other rows.
    """
    calibrations = [baseline.calibration(rows) for baseline in baselines]
    found = []
    for split, fold in _comparable(baselines) if parts is None else parts:
        part = targets_of(rows, split, fold)
        labels, users = part["label"].to_numpy(), part["user"].to_numpy()
        bootstrap = UserBootstrap(users, draws, seed)
        for baseline, calibration in zip(baselines, calibrations, strict=True):
            logits = baseline.logits(part["row_id"])
            row: dict[str, Any] = {"name": baseline.name, "split": split} | ({"fold": fold} if fold else {})
            row |= head_metrics(logits, labels, users)
            row["auc_interval"] = bootstrap.auc_interval(logits, labels)
            if calibration is not None and fold != "select":
                row["calibrated"] = calibration.judged(logits, labels)
            found.append(row | ({"chosen": dict(baseline.chosen)} if baseline.chosen else {}))
    return found


def _comparable(baselines: Sequence[Baseline]) -> list[Part]:
    splits = baselines[0].scores["split"].unique(maintain_order=True).to_list()
    return [(split, None) for split in splits] + [
        ("valid", fold) for fold in ("select", "tune") if "valid" in splits
    ]


def best_baseline(baselines: Sequence[Baseline], rows: pl.DataFrame) -> Baseline | None:
    """The baseline of highest AUC on valid's tune fold (the first of equals), None where that is undefined."""
    tune = targets_of(rows, "valid", "tune")
    labels = tune["label"].to_numpy()
    scored = [(auc(baseline.logits(tune["row_id"]), labels), baseline) for baseline in baselines]
    defined = [(value, baseline) for value, baseline in scored if value is not None]
    return max(defined, key=lambda pair: pair[0])[1] if defined else None


def targets_of(rows: pl.DataFrame, split: str, fold: str | None = None) -> pl.DataFrame:
    """Targets of a split, or of one fold of validation, in the order of `rows`."""
    chosen = (pl.col("role") == "target") & (pl.col("split") == split)
    return rows.filter(chosen if fold is None else chosen & (pl.col("fold") == fold))


def train_labels(rows: pl.DataFrame) -> NDArray[Any]:
    """Labels (n,) of train's targets; DataError where a class is missing."""
    labels = targets_of(rows, "train")["label"].to_numpy()
    if np.unique(labels).size < 2:
        raise DataError(
            f"baselines need train targets of both classes, found {labels.size} targets, {int(labels.sum())} "
            "positive: check data.protocol.label and data.protocol.minimum_history"
        )
    return labels


def retrieved_features(
    rows: pl.DataFrame, retrieved: Mapping[str, pl.DataFrame], split: str, base: float
) -> Floats:
    """Counting features (n, len(FEATURES)) of a split's targets, from that split's own retrieved features table.

    Args:
        rows: Rows of a split.
        retrieved: Retrieved features table of each split.
        split: train, valid or test.
        base: Share of likes among train targets.

    Raises:
        DataError: No table of the split, or one that lacks a target.
    """
    targets = targets_of(rows, split).select("row_id")
    if split not in retrieved:
        raise DataError(f"baselines need the retrieved features table of {split}, found {sorted(retrieved)}")
    table = targets.join(retrieved[split], on="row_id", how="inner", maintain_order="left")
    if table.height != targets.height:
        raise DataError(
            f"the retrieved features table of {split} has {table.height} rows for its {targets.height} targets, "
            "expected one each: it was made under another protocol"
        )
    return feature_matrix(table, base)


def _learned_logits(
    train: Floats, labels: NDArray[Any], features: Mapping[str, Floats], base: float, seed: int
) -> dict[str, dict[str, Floats]]:
    from threadpoolctl import threadpool_limits  # no type information published

    rates, untold = slice(len(RATE_FEATURES)), slice(len(FEATURES) - len(TEXT_FEATURES))
    found = {}
    # one thread: thousands of short parallel loops cost 30 s instead of 1 s where the other cores are busy
    with threadpool_limits(1):
        for name, model, columns in (
            ("lr_rates", logistic_regression(), rates),
            ("lr_features", logistic_regression(), untold),
            ("gbdt_features", _boosting(seed), untold),
            ("gbdt_text", _boosting(seed), slice(None)),
        ):
            model.fit(train[:, columns], labels)
            found[name] = {split: _decide(model, x[:, columns]) for split, x in features.items()}
        exit_0 = FeatureBaseline.fit_features(train, labels, base)
    found["lr_text"] = {split: exit_0.of_features(x) for split, x in features.items()}
    found["gbdt_text"] = found.pop("gbdt_text")  # of equals the simpler one is the best baseline
    return found


def _boosting(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    # iterations, rate and leaf size were chosen on ML-100K's validation; no early stopping, which would hold
    # out rows at random although the log is ordered by time
    return HistGradientBoostingClassifier(
        max_leaf_nodes=15,
        learning_rate=0.03,
        max_iter=150,
        min_samples_leaf=100,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=seed,
    )


def _decide(model: Any, features: Floats) -> Floats:
    if not features.shape[0]:
        return np.zeros(0)
    return np.asarray(model.decision_function(features), dtype=np.float64)


def baseline_scores(rows: pl.DataFrame, logits: Mapping[str, Floats]) -> pl.DataFrame:
    """The `scores` of a Baseline.

    Args:
        rows: Rows of a split.
        logits: Split -> (n,) of its targets, in the order of `rows`.
    """
    parts = [
        targets_of(rows, split).select("row_id", pl.lit(split).alias("split"), pl.Series("logit", values))
        for split, values in logits.items()
    ]
    return pl.concat(parts)


class AgainstBaseline:
    """A baseline on the rows that heads scored; users are drawn once, for all heads.

    Args:
        baseline: Usually the best baseline.
        row_ids: (n,) the rows, in the order of every head's logits.
        rows: Rows of the split (row_id, user, label, split, fold, role).
        draws: Resamples of users.
        seed: Seed of the resampling.

    Raises:
        DataError: The baseline lacks one of the rows.
    """

    def __init__(
        self, baseline: Baseline, row_ids: ArrayLike, rows: pl.DataFrame, draws: int = 1000, seed: int = 0
    ) -> None:
        wanted = pl.DataFrame({"row_id": np.asarray(row_ids, dtype=np.int64)})
        part = wanted.join(
            rows.select("row_id", "user", "label"), on="row_id", how="left", maintain_order="left"
        )
        self.name, self.labels, self.users = baseline.name, part["label"].to_numpy(), part["user"].to_numpy()
        self.bootstrap = UserBootstrap(self.users, draws, seed)
        self._logits, self._calibration = baseline.logits(row_ids), baseline.calibration(rows)

    def difference(self, logits: ArrayLike) -> dict[str, Any]:
        """Head minus baseline: {`baseline`, `value`, `interval`, `log_loss` {`value`, `interval`}}.

        `value` is the difference in AUC; in log loss less is better. Undefined is None: a class is missing here, or in
        `select` for the log loss.

        Args:
            logits: (n,) the head's.
        """
        less: dict[str, Any] = {"value": None, "interval": None}
        if self._calibration is not None:
            mine = self._calibration.apply(self._logits)
            less = self.bootstrap.log_loss_difference_interval(logits, mine, self.labels)
        auc = self.bootstrap.difference_interval(logits, self._logits, self.labels)
        return {"baseline": self.name} | auc | {"log_loss": less}
