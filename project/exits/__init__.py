"""When a row may leave the backbone early: criteria, policies, calibration, cost, the path of thresholds.

Certificates (`project.exits.certificate`) and the command that puts all together are imported from their modules.
"""

from project.exits.calibration import Calibration, fit_calibration
from project.exits.criteria import (
    Consistency,
    Criterion,
    HeadOutputs,
    ItemCount,
    Learned,
    Ratio,
    RatioConsistency,
    confidence_table,
    out_of_fold_confidence,
)
from project.exits.policy import FixedDepth, Oracle, Policy, RandomExit, leave
from project.exits.search import Path, Step, threshold_path
from project.exits.top_k import TopK

__all__ = [
    "Calibration",
    "Consistency",
    "Criterion",
    "FixedDepth",
    "HeadOutputs",
    "ItemCount",
    "Learned",
    "Oracle",
    "Path",
    "Policy",
    "RandomExit",
    "Ratio",
    "RatioConsistency",
    "Step",
    "TopK",
    "confidence_table",
    "fit_calibration",
    "leave",
    "out_of_fold_confidence",
    "threshold_path",
]
