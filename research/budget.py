"""Is the budget kept on fresh users? Pipelines on simulated users, chosen on a tune fold, measured by the truth.

    python research/budget.py [--pipelines 500] [--users 80] [--world harsh]

writes `results/budget.json`, one row per world, number of users and alpha. A pipeline is `TuneFold` with its defaults:
calibration, every criterion's path, the choice. In both worlds users have log-normal numbers of rows (mean 20, standard
deviation of the log 1) and heads below the last err the less the deeper they are. In the harsh one, 15 % of the users
are served badly: heads are wrong about all rows of such a user in the same direction, and the last one has not mended
all of it, so that only labels show what an early exit loses.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from project.arrays import F64
from project.exits.budget import TuneFold
from project.exits.criteria import confidence_table
from project.exits.criteria import name as name_of
from project.exits.plan import ExitPlan, ExitSettings
from project.exits.policy import leave
from project.features import FEATURES
from project.run import SCHEMA_VERSION, replace_file, score_table

LAYERS = [4, 8, 12]
ITEM_ROWS = FEATURES.index("item_rows")
ALPHAS = (0.5, 0.2, 0.1, 0.05)
FRESH_USERS = 800
STUDY = {
    "schema_version": SCHEMA_VERSION,
    "command": "study",
    "protocol": {"name": "simulated users", "hash": "simulated"},
    "about": "Pipelines on simulated users. Above: share whose AUC drop on fresh users exceeds the budget of .002. "
    "Drop, estimated, corrected: its mean on fresh users, as estimated on tune, and corrected for the choice. Covered: "
    "how often the corrected interval holds the true drop. Cost: share of full depth's token-layers.",
}
RESULT = Path(__file__).parents[1] / "results" / "budget.json"


@dataclass(frozen=True)
class World:
    """Rows of a score table, their features (n, F), and the probabilities that labels were drawn with (n,)."""

    scores: pl.DataFrame
    features: F64
    truth: F64


def make_world(users: int, harsh: bool, rng: np.random.Generator) -> World:
    """Users with all their rows. In the mild world full depth has an AUC of .763, exit 0 one of .74."""
    size = np.maximum(1, np.round(rng.lognormal(np.log(20) - 0.5, 1.0, users))).astype(int)
    user = np.repeat(np.arange(users), size)
    n = len(user)
    latent = 0.25 + 0.5 * rng.normal(size=users)[user] + 1.1 * rng.normal(size=n)
    rows_of_item = rng.exponential(3.0, n)  # log(1 + rows): a known item is easy
    difficulty = rng.normal(size=n) - 0.5 * (rows_of_item - 3) / 3
    fade = 3.5 * np.exp(0.4 * difficulty + 0.5 * rng.normal(size=n))
    share = np.exp(-np.array([0, *LAYERS[:-1]]) / fade[:, None]) + 0.03
    noise = rng.normal(size=share.shape) * share * (0.33 * np.exp(0.6 * difficulty))[:, None]
    noise = noise[:, ::-1].cumsum(axis=1)[:, ::-1]
    badly = harsh & (rng.random(users) < 0.15)
    wrong = (2.0 * badly * rng.normal(size=users))[user, None] * np.array([1.0, 0.8, 0.6, 0.4])
    heads = latent[:, None] + np.column_stack([noise, np.zeros(n)]) + wrong + 0.05 * rng.normal(size=(n, 4))
    truth = 1 / (1 + np.exp(-latent - 0.45 * rng.normal(size=n)))
    columns = {
        "user": user,
        "label": rng.random(n) < truth,
        "target_tokens": rng.integers(15, 35, n),
        "stream_tokens": rng.integers(100, 750, n),
        "logit_0": heads[:, 0],
    }
    features = np.zeros((n, ITEM_ROWS + 2))
    features[:, ITEM_ROWS] = rows_of_item
    features[:, ITEM_ROWS + 1] = -difficulty + 0.8 * rng.normal(size=n)
    return World(score_table(columns, heads[:, 1:], LAYERS), features, truth)


def true_auc(scores: F64, truth: F64) -> float:
    """Share of pairs in order where row i is positive with probability truth_i."""
    positive = truth[scores.argsort()]
    negative = 1 - positive
    pairs = positive.sum() * negative.sum() - positive @ negative
    return float(positive @ (negative.cumsum() - negative) / pairs)


def choices(tune: TuneFold) -> list[tuple[str, float, TuneFold]]:
    """The choice by each alpha; and `estimate`, without a bound: the fastest step that keeps the budget on tune."""
    found = []
    for name, alpha in [("estimate", 0.5), *((f"alpha {alpha}", alpha) for alpha in ALPHAS)]:
        made = object.__new__(TuneFold)
        made.__dict__ |= tune.__dict__ | {"settings": replace(tune.settings, alpha=alpha)}
        made.curves = []
        for curve in tune.curves:
            step = int(made._steps(curve, curve.drops[None])[0])
            if name == "estimate":
                expected = curve.path[0].expected_auc - np.array([s.expected_auc for s in curve.path])
                kept = np.maximum(curve.drops, expected) <= (tune.settings.max_auc_drop or 0.0)
                step = int(np.flatnonzero(kept | (np.arange(len(kept)) == 0))[-1])
            made.curves.append(replace(curve, step=step))
        made.best = max(made.curves, key=made._preference)
        found.append((name, alpha, made))
    return found


def pipeline(users: int, harsh: bool, seed: int, fresh: World) -> list[dict[str, Any]]:
    """One tune fold: what each choice is estimated to lose, loses on fresh users, and costs."""
    world, settings = make_world(users, harsh, np.random.default_rng([seed, users, harsh])), ExitSettings()
    tune, rows = TuneFold(world.scores, world.features, settings, exit_0=True), []
    known = dict[tuple[str, int], float]()
    for name, alpha, made in choices(tune):
        policy = name_of(made.best.criterion), made.best.step
        if policy not in known:
            known[policy] = true_drop(made.plan(made.best.step), fresh)
        corrected, drop = made.corrected(), known[policy]
        low, high = corrected["auc_drop_corrected_interval"]
        rows.append({
            "choice": name, "alpha": alpha, "criterion": policy[0], "drop": drop,
            "estimated": made.best.chosen.auc_drop, "corrected": corrected["auc_drop_corrected"],
            "covered": low <= drop <= high, "cost": made.best.chosen.cost,
        })  # fmt: skip
    return rows


def true_drop(plan: ExitPlan, fresh: World) -> float:
    """AUC of full depth minus the plan's, by the truth."""
    outputs = plan.outputs(fresh.scores, fresh.features)
    exits = leave(confidence_table(plan.policy.criterion, outputs), plan.policy.thresholds)
    full, adaptive = outputs.logits[:, -1], outputs.logits.gather(1, exits[:, None])[:, 0]
    return true_auc(full.numpy(), fresh.truth) - true_auc(adaptive.numpy(), fresh.truth)


def summary(world: str, users: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per choice: how often the budget is broken, and means."""
    budget, found = ExitSettings().max_auc_drop, []
    for name in dict.fromkeys(row["choice"] for row in rows):
        mine = [row for row in rows if row["choice"] == name]
        means = {
            key: float(np.mean([row[key] for row in mine]))
            for key in ("drop", "estimated", "corrected", "covered", "cost")
        }
        above = float(np.mean([row["drop"] > budget for row in mine]))
        found.append(
            {"world": world, "users": users, "choice": name, "pipelines": len(mine), "above": above} | means
        )
    return found


def main() -> None:
    """Run the worlds and numbers of users that are given; the result file keeps the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", type=int, default=500)
    parser.add_argument("--users", type=int, nargs="+", default=[80, 300])
    parser.add_argument("--world", nargs="+", default=["harsh", "mild"], choices=["harsh", "mild"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.world:
        fresh = make_world(FRESH_USERS, name == "harsh", np.random.default_rng(10**6))
        for users in given.users:
            rows = list[dict[str, Any]]()
            for seed in range(given.pipelines):
                rows += pipeline(users, name == "harsh", seed, fresh)
                if seed % 10 == 9 or seed + 1 == given.pipelines:
                    write(name, users, rows)
                    print(name, users, seed + 1, f"{time.process_time():.0f} s", flush=True)


def write(world: str, users: int, rows: list[dict[str, Any]]) -> None:
    """Replace one world's rows of the result file."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    others = [row for row in known if (row["world"], row["users"]) != (world, users)]
    content = STUDY | {"rows": [*others, *summary(world, users, rows)]}
    text = json.dumps(content, indent=1)
    replace_file(RESULT, lambda part: part.write_text(text + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
