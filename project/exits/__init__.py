"""When a row may leave the backbone early: criteria, thresholds, calibration, cost and certificates."""

from project.exits.criteria import (
    Consistency,
    Criterion,
    HeadOutputs,
    Learned,
    Ratio,
    RatioConsistency,
    StaticExit,
    confidence_table,
    out_of_fold_confidence,
)
from project.exits.search import threshold_path

__all__ = [
    "Consistency",
    "Criterion",
    "HeadOutputs",
    "Learned",
    "Ratio",
    "RatioConsistency",
    "StaticExit",
    "confidence_table",
    "out_of_fold_confidence",
    "threshold_path",
]
