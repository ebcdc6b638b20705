"""Scores of one split, simulated: deeper heads see the truth with less noise, and settle as they go deeper."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from project.evaluation.bootstrap import UserBootstrap
from project.metrics import auc, head_metrics, probabilities
from project.run import score_table


def terms(layer: int) -> dict[str, float]:
    """Calibration of one exit."""
    return {
        "logit": 1.0 + 0.02 * layer,
        "exit_0": 0.3 - 0.02 * layer if layer else 0.0,
        "offset": 0.01 * layer,
    }


class Example:
    """Scores of one split and what policies do with them.

    Args:
        split: valid (its tune fold) or test.
        rows: Number of rows.
        layers: Heads, exit 0 first.
        seed: Seed of the scores.
    """

    def __init__(self, split: str, rows: int, layers: tuple[int, ...], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.split, self.layers = split, layers
        self.user = rng.integers(0, max(2, rows // 45), rows)
        truth = 1.1 * rng.normal(size=rows) + 0.5 * rng.normal(size=rows // 45 + 2)[self.user]
        self.label = (rng.random(rows) < 1 / (1 + np.exp(-truth - 0.25))).astype(int)
        noise = rng.normal(size=(len(layers), rows))
        shared = 0.25 * rng.normal(size=rows)
        size = np.array([1.0 * np.exp(-1.6 * k / layers[-1]) - 0.18 for k in layers])
        # what a head still misses it shares with the heads before it, so scores settle with depth
        drift = np.cumsum(noise[::-1] * np.diff(size[::-1], prepend=0)[:, None], axis=0)[::-1]
        self.logits = (0.72 * (truth + shared) + 1.3 * drift + 0.25).T
        self.baseline = self.logits[:, 0] + 0.12 * rng.normal(size=rows)

    @property
    def p(self) -> np.ndarray[Any, Any]:
        """(n, K) probabilities."""
        return np.stack([probabilities(column) for column in self.logits.T], axis=1)

    @property
    def raw(self) -> np.ndarray[Any, Any]:
        """(n, K) logits before calibration: score_k = a * raw_k + b * raw_0 + c."""
        columns = [self.logits[:, 0]]
        for j, layer in enumerate(self.layers[1:], start=1):
            t = terms(layer)
            columns.append((self.logits[:, j] - t["exit_0"] * columns[0] - t["offset"]) / t["logit"])
        return np.stack(columns, axis=1)

    def confidence(self, criterion: str) -> np.ndarray[Any, Any]:
        """(n, K), higher is safer."""
        p, gap = self.p, np.abs(np.diff(self.p, axis=1, prepend=np.nan))
        gap[:, 0] = np.inf
        rng = np.random.default_rng(3)
        drift = np.abs(p - p[:, -1:])
        return {
            "ratio": np.abs(self.logits),
            "consistency": -gap,
            "ratio_consistency": np.where(np.isinf(gap), -9, np.minimum(2 * np.abs(p - 0.5), 1 - 5 * gap)),
            "learned": -drift - 0.11 * rng.random(p.shape),
            "random": rng.random(p.shape),
            "oracle": -drift,
        }[criterion]

    def leave(self, criterion: str, threshold: float) -> np.ndarray[Any, Any]:
        """(n,) index of the head where each row leaves."""
        open_ = self.confidence(criterion) >= threshold
        open_[:, -1] = True
        return np.argmax(open_, axis=1)

    def step(self, exits: np.ndarray[Any, Any]) -> dict[str, Any]:
        """A step of a Pareto list."""
        score, depth = self.logits[np.arange(len(exits)), exits], np.array(self.layers)[exits].mean()
        value, full = auc(score, self.label), auc(self.logits[:, -1], self.label)
        assert value is not None
        assert full is not None
        return {
            "cost": float(depth / self.layers[-1]),
            "mean_depth": float(depth),
            "auc": value,
            "auc_drop": full - value,
        }

    def pareto(self, criterion: str, steps: int = 20) -> tuple[list[dict[str, Any]], list[float]]:
        """Steps from safest to fastest and their thresholds."""
        values = self.confidence(criterion)[:, :-1]
        levels = np.quantile(values[np.isfinite(values)], np.linspace(1, 0, steps))
        path = [self.step(np.full(len(values), len(self.layers) - 1))]
        return path + [self.step(self.leave(criterion, t)) for t in levels[1:]], [np.inf, *levels[1:]]

    def exits(self, left: np.ndarray[Any, Any] | None, fold: str | None) -> list[dict[str, Any]]:
        """The `exits` list of a result file."""
        bootstrap = UserBootstrap(self.user, 200)
        rows = []
        for k, layer in enumerate(self.layers):
            row = {"layer": layer, "split": self.split} | ({"fold": fold} if fold else {})
            row |= head_metrics(self.raw[:, k], self.label, self.user)
            row["auc_interval"] = bootstrap.auc_interval(self.raw[:, k], self.label)
            if left is not None:
                here, found = left == k, head_metrics(self.logits[:, k], self.label, self.user)
                row["calibrated"] = {name: found[name] for name in ("auc", "log_loss", "brier", "ece")}
                row["exit_share"] = float(here.mean())
                row["auc_leaving"] = auc(self.logits[here, k], self.label[here])
            rows.append(row)
        return rows

    def baselines(self, fold: str | None) -> list[dict[str, Any]]:
        """The `baselines` list of a result file."""
        rng, found = np.random.default_rng(5), []
        bootstrap = UserBootstrap(self.user, 200)
        for name, noise in (
            ("item_rate", 0.9),
            ("lr_rates", 0.3),
            ("lr_features", 0.2),
            ("gbdt_features", 0.0),
        ):
            logits = self.baseline + noise * rng.normal(size=len(self.baseline))
            row = {"name": name, "split": self.split} | ({"fold": fold} if fold else {})
            row |= head_metrics(logits, self.label, self.user)
            found.append(row | {"auc_interval": bootstrap.auc_interval(logits, self.label)})
        return found

    def adaptive(self, left: np.ndarray[Any, Any], static_exit: int) -> dict[str, Any]:
        """The `adaptive` dictionary of a result file."""
        score, depth = self.logits[np.arange(len(left)), left], np.array(self.layers)[left].astype(float)
        bootstrap = UserBootstrap(self.user, 200)
        drop = bootstrap.difference_interval(self.logits[:, -1], score, self.label)
        saved = bootstrap.ratio_interval(np.full(len(left), float(self.layers[-1])), depth)

        def against(layer: int) -> dict[str, Any]:
            static = self.logits[:, self.layers.index(layer)]
            gain = bootstrap.difference_interval(score, static, self.label)
            own = {"layer": layer, "auc": auc(static, self.label)}
            return own | {"auc_gain": gain["value"], "auc_gain_interval": gain["interval"]}

        return {
            "split": self.split,
            "criterion": "consistency",
            **head_metrics(score, self.label, self.user),
            "auc_interval": bootstrap.auc_interval(score, self.label),
            "mean_depth": float(depth.mean()),
            "exit_shares": {str(k): float((left == i).mean()) for i, k in enumerate(self.layers)},
            "auc_drop": drop["value"],
            "auc_drop_interval": drop["interval"],
            "token_layer_speedup": saved["value"],
            "token_layer_speedup_interval": saved["interval"],
            "speedup_over_static": bootstrap.ratio_interval(np.full(len(left), float(static_exit)), depth),
            "static_exit": against(static_exit),
            "equal_cost": against(max(k for k in self.layers if k <= depth.mean())),
            "baseline_difference": {"baseline": "gbdt_features"}
            | bootstrap.difference_interval(score, self.baseline, self.label),
        }

    def table(self, left: np.ndarray[Any, Any] | None = None) -> pl.DataFrame:
        """Score table of these rows, with what the policy did where it is given."""
        n = len(self.label)
        columns = {
            "row_id": np.arange(n),
            "user": self.user,
            "split": [self.split] * n,
            "fold": ["tune" if self.split == "valid" else None] * n,
            "label": self.label,
            "logit_0": self.raw[:, 0],
            "target_tokens": np.full(n, 25),
            "stream_tokens": np.full(n, 700),
        }
        table = score_table(columns, self.raw[:, 1:], list(self.layers[1:]))
        if left is None:
            return table
        return table.with_columns(
            exit_layer=pl.Series(np.array(self.layers)[left]),
            adaptive_logit=pl.Series(self.logits[np.arange(n), left]),
        )
