"""A test result made by hand, as far as the answer and the tables read it."""

from typing import Any

ABOVE, AROUND, BELOW = [0.002, 0.02], [-0.004, 0.006], [-0.02, -0.002]


def result(
    gain: list[float] = ABOVE,
    static: float = 0.0,
    static_interval: list[float] = AROUND,
    faster: float = 1.5,
    depth: float = 3.0,
    static_exit: int = 4,
    drop: float = 0.001,
    drop_interval: list[float] = AROUND,
) -> dict[str, Any]:
    """A test result; defaults: better than the best baseline, cheaper than the static exit and as accurate."""
    middle = (gain[0] + gain[1]) / 2
    difference = {"baseline": "gbdt", "value": middle, "interval": gain}
    users = {"value": 0.7, "users": 400}
    head = {
        "split": "test", "fold": None, "n": 900, "auc": 0.75, "auc_interval": [0.73, 0.77], "log_loss": 0.58,
        "uauc": users,
    }  # fmt: skip
    plan = head | {
        "criterion": "learned", "mean_depth": depth, "auc_drop": drop, "auc_drop_interval": drop_interval,
        "token_layer_speedup": 6 / depth if depth else None, "baseline_difference": difference,
        "speedup_over_static": {"value": faster if depth else None, "interval": None},
        "static_exit": {"layer": static_exit, "auc": 0.75, "auc_gain": static, "auc_gain_interval": static_interval},
        "equal_cost": {"layer": 2, "auc": 0.74, "auc_gain": 0.01, "auc_gain_interval": ABOVE},
    }  # fmt: skip
    last = {"baseline_difference": difference, "calibrated": None, "auc_leaving": None}
    exits = [head | last | {"layer": k} for k in (0, 2, 4, 6)]
    return {
        "schema_version": 2, "command": "test", "config": "c.yaml", "seed": 0, "exits": exits, "chosen_exit": 6,
        "baselines": [head | {"name": "gbdt", "calibrated": None, "chosen": None}], "best_baseline": "gbdt",
        "adaptive": plan,
        "baseline_difference": {"baseline": "gbdt", "value": 0.0, "interval": AROUND},
        "protocol": {"name": "p", "hash": "h", "counts": {"test": 900}},
        "certificate": {"passed": True, "words": "The gap is at most .02."}, "with_exit_0": None, "slices": [],
        "own_metric": None, "warnings": [], "not_calibrated": None, "stage_seconds": {},
    }  # fmt: skip
