"""Is the budget kept on fresh users? Pipelines on simulated users, chosen on a tune fold, measured by the truth.

    python -m research.budget [--pipelines 30=60 80=40 300=30]

writes `results/budget.json`, one row per world, number of users and choice. A pipeline is `TuneFold` with its defaults:
calibration, every criterion's path, the choice. Heads below the last err the less the deeper they are. In two of the
four worlds 6 % of the users are served badly by early exits: the last head alone knows their rows, earlier ones see
something else. In two, numbers of rows are log-normal (mean 20, standard deviation of the log 1), else all have 20.
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
from project.exits.budget import Curve, TuneFold, cheapest
from project.exits.criteria import confidence_table
from project.exits.plan import ExitPlan, ExitSettings
from project.exits.policy import leave
from project.exits.search import budget_step
from project.features import FEATURES
from project.run import SCHEMA_VERSION, replace_file, score_table
from research.intervals import badly_served, users_of_rows

LAYERS = [4, 8, 12]
ITEM_ROWS = FEATURES.index("item_rows")
FRESH_USERS = 500
WORLDS = {
    "mild": (0.0, 0.0),
    "badly served": (0.0, 0.06),
    "skewed sizes": (1.0, 0.0),
    "both": (1.0, 0.06),
}
"""Standard deviation of the log of users' numbers of rows, and the share of users whom early exits serve badly."""
STUDY = {
    "schema_version": SCHEMA_VERSION,
    "command": "study",
    "protocol": {"name": "simulated users", "hash": "simulated"},
    "about": "Pipelines on simulated users. Kept: share whose AUC drop on fresh users is within the budget of .002. "
    "Drop, estimated: its mean on fresh users and on tune. Cost: share of full depth's token-layers. Estimate: no "
    "bound; bound alone: whatever the number of users; plan: the default; static exit: of equal accuracy, its drop "
    "against full depth.",
}
RESULT = Path(__file__).parents[1] / "results" / "budget.json"


@dataclass(frozen=True)
class World:
    """Rows of a score table, their features (n, F), and the probabilities that labels were drawn with (n,)."""

    scores: pl.DataFrame
    features: F64
    truth: F64


def make_world(
    users: int, world: str, rng: np.random.Generator, exact: bool = False
) -> World:
    """Users with all their rows; where `exact`, just the world's share of them is badly served."""
    spread, share = WORLDS[world]
    user = users_of_rows(users, spread, rng)
    n = len(user)
    # 1. what the last head sees, and what earlier ones see of badly served users
    latent, other = (
        0.25 + 0.5 * rng.normal(size=(2, users))[:, user] + 1.1 * rng.normal(size=(2, n))
    )
    badly = badly_served(users, share, rng, exact)
    early = np.where(badly[user], other, latent)
    # 2. noise of the heads, which fades with depth, at a speed of the row's own
    rows_of_item = rng.exponential(3.0, n)  # log(1 + rows): a known item is easy
    difficulty = rng.normal(size=n) - 0.5 * (rows_of_item - 3) / 3
    fade = 3.5 * np.exp(0.4 * difficulty + 0.5 * rng.normal(size=n))
    left = np.exp(-np.array([0, *LAYERS[:-1]]) / fade[:, None]) + 0.03
    noise = rng.normal(size=left.shape) * left * (0.33 * np.exp(0.6 * difficulty))[:, None]
    noise = noise[:, ::-1].cumsum(axis=1)[:, ::-1]
    heads = np.column_stack([early[:, None] + noise, latent]) + 0.05 * rng.normal(
        size=(n, 4)
    )
    # 3. labels, of which a part nobody sees
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


def choices(tune: TuneFold) -> dict[str, Curve]:
    """The estimate's choice, without a bound; the bound's, whatever the number of users; and the plan's."""
    made = {}
    budget = ExitSettings.max_auc_drop
    for name in ("estimate", "bound alone"):
        curves = []
        for curve in tune.curves:
            path = curve.path
            step = budget_step(path, curve.bounds, budget)
            if name == "estimate":
                expected = path[0].expected_auc - np.array([s.expected_auc for s in path])
                drops = np.array([s.auc_drop for s in path])
                kept = np.maximum(drops, expected) <= budget
                step = int(np.flatnonzero(kept | (np.arange(len(kept)) == 0))[-1])
            curves.append(replace(curve, chosen=path[step]))
        made[name] = cheapest(curves)
    return made | {"plan": tune.best}


def pipeline(users: int, world: str, seed: int, fresh: World) -> list[dict[str, Any]]:
    """One tune fold: what each choice is estimated to lose, loses on fresh users, and costs."""
    drawn = make_world(
        users, world, np.random.default_rng([seed, users, list(WORLDS).index(world)])
    )
    tune, rows = TuneFold(drawn.scores, drawn.features, ExitSettings()), []
    for name, made in choices(tune).items():
        drop = true_drop(tune.plan(made), fresh)
        chosen = made.chosen
        rows.append(
            {
                "choice": name,
                "drop": drop,
                "estimated": chosen.auc_drop,
                "cost": chosen.cost,
            }
        )
    # the static exit of equal accuracy, which is chosen without a bound
    outputs = tune.plan(tune.best).outputs(fresh.scores, fresh.features)
    head = tune.outputs.layers.index(tune.static_exit["layer"])
    full, static = (true_auc(outputs.logits[:, k].numpy(), fresh.truth) for k in (-1, head))
    about = {"estimated": tune.static_exit["auc_drop"], "cost": tune.static_exit["cost"]}
    return [*rows, {"choice": "static exit", "drop": full - static} | about]


def true_drop(plan: ExitPlan, fresh: World) -> float:
    """AUC of full depth minus the plan's, by the truth."""
    outputs = plan.outputs(fresh.scores, fresh.features)
    exits = leave(confidence_table(plan.criterion, outputs), plan.thresholds)
    full, adaptive = outputs.logits[:, -1], outputs.logits.gather(1, exits[:, None])[:, 0]
    return true_auc(full.numpy(), fresh.truth) - true_auc(adaptive.numpy(), fresh.truth)


def summary(world: str, users: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per choice: how often the budget is kept, and means."""
    found = []
    for name in dict.fromkeys(row["choice"] for row in rows):
        mine = [row for row in rows if row["choice"] == name]
        about = {"world": world, "users": users, "choice": name, "pipelines": len(mine)}
        about["kept"] = float(np.mean([row["drop"] <= 0.002 for row in mine]))
        for key in ("drop", "estimated", "cost"):
            about[key] = float(np.mean([row[key] for row in mine]))
        found.append(about)
    return found


def main() -> None:
    """Run every world with the numbers of users and pipelines that are given, then write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", nargs="+", default=["30=60", "80=40", "300=30"])
    torch.set_num_threads(1)
    found = []
    for users, pipelines in (
        map(int, part.split("=")) for part in parser.parse_args().pipelines
    ):
        for world in WORLDS:
            fresh = make_world(FRESH_USERS, world, np.random.default_rng(10**6), exact=True)
            rows = [
                row
                for seed in range(pipelines)
                for row in pipeline(users, world, seed, fresh)
            ]
            found += summary(world, users, rows)
            print(*found[-4:], f"{time.process_time():.0f} s", sep="\n", flush=True)
            text = json.dumps(STUDY | {"rows": found}, indent=1)
            replace_file(
                RESULT,
                lambda part, text=text: part.write_text(text + "\n", encoding="utf-8"),
            )


if __name__ == "__main__":
    main()
