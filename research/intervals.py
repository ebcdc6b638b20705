"""How often does a 95 % interval of a difference of two AUCs hold the truth? Samples of simulated users.

    python -m research.intervals [--users 30 80 300] [--samples 400]

writes `results/intervals.json`, one row per number of users and world. A sample is rows of users with two scores,
as full depth and an early exit are, compared on the same rows. The truth: mean of three samples of 20,000 users.
In two of the four worlds 4 % of the users are badly served: the second score knows nothing of them. In two, numbers of
rows are log-normal (mean 20, standard deviation of the log 1), else all have 20.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from project.arrays import F64, I64, Bool
from project.evaluation.bootstrap import UserBootstrap
from project.exits.search import auc_components
from project.run import SCHEMA_VERSION, replace_file

DRAWS = 400  # resamples of users behind an interval
WORLDS = {
    "mild": (0.0, 0.0),
    "badly served": (0.0, 0.04),
    "skewed sizes": (1.0, 0.0),
    "both": (1.0, 0.04),
}
"""Standard deviation of the log of users' numbers of rows, and the share of badly served users."""
STUDY = {
    "schema_version": SCHEMA_VERSION,
    "command": "study",
    "protocol": {"name": "simulated users", "hash": "simulated"},
    "about": "How often 95 % intervals of a paired difference of AUCs over users hold the true difference, by method "
    "(users resampled), and their mean width. Percentile is the one that is used. Badly served: 4 % of the users.",
}
RESULT = Path(__file__).parents[1] / "results" / "intervals.json"


class Sample(NamedTuple):
    """Two scores of n rows, their labels and users, each (n,)."""

    full: F64
    early: F64
    label: I64
    user: I64


def users_of_rows(users: int, spread: float, rng: np.random.Generator) -> I64:
    """(n,) the user of each row: numbers of rows are log-normal of mean 20, `spread` their log's deviation."""
    drawn = rng.lognormal(np.log(20) - spread**2 / 2, spread, users)
    return np.repeat(np.arange(users), np.maximum(1, np.round(drawn)).astype(int))


def badly_served(users: int, share: float, rng: np.random.Generator, exact: bool) -> Bool:
    """(users,) whether early exits serve a user badly; where `exact`, just this share of them."""
    if exact:
        return rng.permutation(users) < round(share * users)
    return rng.random(users) < share


def make_sample(
    users: int, world: str, rng: np.random.Generator, exact: bool = False
) -> Sample:
    """Users with all their rows; where `exact`, just the world's share of them is badly served."""
    spread, share = WORLDS[world]
    user = users_of_rows(users, spread, rng)
    n = len(user)
    latent = 0.25 + 0.5 * rng.normal(size=users)[user] + 1.1 * rng.normal(size=n)
    other = 0.25 + 0.5 * rng.normal(size=users)[user] + 1.1 * rng.normal(size=n)
    badly = badly_served(users, share, rng, exact)
    full = latent + 0.05 * rng.normal(size=n)
    early = np.where(badly[user], other, latent) + 0.3 * rng.normal(size=n)
    label = rng.random(n) < 1 / (1 + np.exp(-latent - 0.45 * rng.normal(size=n)))
    return Sample(full, early, label.astype(np.int64), user)


def difference(sample: Sample) -> tuple[float, F64]:
    """AUC of the full score minus that of the early one, and each user's influence on it (DeLong), shape (users,)."""
    positive = sample.label == 1
    gap = auc_components(sample.full, positive) - auc_components(sample.early, positive)
    value = float(gap[positive].mean())
    of_class = np.where(positive, positive.sum(), (~positive).sum())
    return value, np.bincount(sample.user, weights=(gap - value) / of_class)


def intervals(sample: Sample, seed: int) -> dict[str, tuple[float, float]]:
    """[low, high] by method."""
    value, influence = difference(sample)
    users = len(influence)
    # 1. percentile, as results have it
    bootstrap = UserBootstrap(sample.user, DRAWS, seed)
    found = bootstrap.difference_interval(sample.full, sample.early, sample.label)
    made = {"percentile": tuple(found["interval"])}
    # 2. BCa (Efron 1987) of the same draws: corrected for bias and for skewness
    drawn = bootstrap._auc_draws(sample.full, sample.label) - bootstrap._auc_draws(
        sample.early, sample.label
    )
    bias = norm.ppf(np.clip((drawn < value).mean(), 0.5 / DRAWS, 1 - 0.5 / DRAWS))
    skew = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    shifted = bias + norm.ppf([0.025, 0.975])
    made["bca"] = tuple(np.quantile(drawn, norm.cdf(bias + shifted / (1 - skew * shifted))))
    # 3. bootstrap-t of the influences: each draw's error over the draw's own standard error
    times = np.random.default_rng(seed).multinomial(
        users, np.full(users, 1 / users), size=1000
    )
    error = times @ influence
    spread = np.sqrt(np.maximum(times @ influence**2 - error**2 / users, 1e-30))
    high, low = np.quantile(error / spread, [0.025, 0.975]) * np.sqrt((influence**2).sum())
    made["bootstrap_t"] = (value - low, value - high)
    return made


def coverage(
    users: int, world: str, samples: int, truth: float
) -> dict[str, int | float | str]:
    """A row of the table: how often each method's interval holds the truth, and how wide it is on average."""
    found = [
        intervals(make_sample(users, world, np.random.default_rng([seed, users])), seed)
        for seed in range(samples)
    ]
    row: dict[str, int | float | str] = {"users": users, "world": world, "samples": samples}
    for method in found[0]:
        row[method] = float(
            np.mean([made[method][0] <= truth <= made[method][1] for made in found])
        )
    for method in found[0]:
        row[f"{method}_width"] = float(
            np.mean([made[method][1] - made[method][0] for made in found])
        )
    return row


def main() -> None:
    """Run every world with the numbers of users that are given, then write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", nargs="+", type=int, default=[30, 80, 300])
    parser.add_argument("--samples", type=int, default=400)
    asked = parser.parse_args()
    truth = {}
    for world in WORLDS:
        large = [
            make_sample(20_000, world, np.random.default_rng(10**6 + k), exact=True)
            for k in range(3)
        ]
        truth[world] = float(np.mean([difference(sample)[0] for sample in large]))
    rows = []
    for users in asked.users:
        for world in WORLDS:
            rows.append(coverage(users, world, asked.samples, truth[world]))
            print(rows[-1], f"{time.process_time():.0f} s", flush=True)
            text = json.dumps(STUDY | {"rows": rows}, indent=1) + "\n"
            replace_file(
                RESULT, lambda part, text=text: part.write_text(text, encoding="utf-8")
            )


if __name__ == "__main__":
    main()
