"""How often certificates break their promise and how often they pass, on generated users: results/certificates.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from project.arrays import F64, I64
from project.exits.certificate import (
    ROWS_OF_A_USER,
    CertificateSettings,
    UserPairs,
    certify,
    p_value,
)
from project.run import SCHEMA_VERSION

Users = tuple[F64, F64, I64, I64]

ABOUT = (
    "Passed, not enough users: shares of the draws with that answer. Bets alone: share that passes without a least "
    "number of users. At epsilon: the true gap is epsilon, so whoever passes is wrong."
)
SETTINGS = CertificateSettings(epsilon=0.02, delta=0.1)
DROPS = {"at_epsilon": SETTINGS.epsilon, "quarter": SETTINGS.epsilon / 4, "none": 0.0}
WIDTH = ROWS_OF_A_USER  # rows of a user that are drawn: a certificate reads no more


def _lognormal(rng: np.random.Generator, users: int) -> I64:
    """Mean 20 rows, standard deviation of the log 1."""
    return np.maximum(1, np.exp(rng.normal(np.log(20) - 0.5, 1, users)).round()).astype(
        np.int64
    )


def _giant(rng: np.random.Generator, users: int) -> I64:
    """The first user has as many rows as all others."""
    sizes = _lognormal(rng, users)
    sizes[0] = sizes[1:].sum()
    return sizes


WORLDS: dict[str, tuple[Callable[[np.random.Generator, int], I64], float]] = {
    "log-normal sizes": (_lognormal, 0.15),
    "equal sizes": (lambda rng, users: np.full(users, 20), 0.15),
    "one giant user": (_giant, 0.15),
    "rare bad users": (_lognormal, 0.025),
}
"""Sizes of users and the share of users whom early exits serve badly."""


def draw(world: str, users: int, strength: float, rng: np.random.Generator) -> Users:
    """Full and adaptive scores, labels and user of each row.

    A user's part (standard deviation .7) and a row's own part (1.1) make the log-odds of the label. Both
    scores see them through noise (.7, correlated .8), so they are equally good. Badly served users' adaptive scores
    are moreover off by `strength` times a shift of the user and noise of the row; rare bad users' are turned round
    instead.
    """
    sizes, bad_share = WORLDS[world]
    real = np.arange(WIDTH) < sizes(rng, users)[:, None]
    truth = rng.normal(0, 0.7, (users, 1)) + rng.normal(0, 1.1, (users, WIDTH))
    labels = (rng.random(truth.shape) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    noise = rng.normal(0, 0.7, (2, *truth.shape))
    noise[1] = 0.8 * noise[0] + 0.6 * noise[1]
    bad = rng.random((users, 1)) < bad_share
    shift = (
        -truth
        if world == "rare bad users"
        else rng.normal(size=(users, 1)) + rng.normal(size=truth.shape)
    )
    full, adaptive = truth + noise[0], truth + noise[1] + bad * strength * shift
    return full[real], adaptive[real], labels[real], np.nonzero(real)[0]


def strength_of(world: str, drop: float, users: int = 15_000) -> tuple[float, float]:
    """The strength at which the AUC gap between users is `drop`, by bisection on a large draw, and the gap there."""
    low, high, gap = 0.0, 6.0, 0.0
    if drop == 0:
        return 0.0, 0.0
    for _ in range(9):
        middle = (low + high) / 2
        full, adaptive, labels, user = draw(world, users, middle, np.random.default_rng(1))
        pairs = UserPairs(labels, user)
        gap = float(np.nanmean(pairs.auc(full) - pairs.auc(adaptive)))
        low, high = (middle, high) if gap < drop else (low, middle)
    return middle, gap


def rates(
    world: str, users: int, strength: float, most: int, seed: int = 0
) -> dict[str, float]:
    """Shares of draws that pass, whose answer is "not enough users", and that bets alone would let pass.

    Where users are too few the answer is known before a draw, so bets alone are tried on a quarter of the draws: the
    row says how many there were.
    """
    rng, answers, bets = np.random.default_rng(seed), [], []
    enough = users >= (SETTINGS.users_needed() or 0)
    draws = most if enough else most // 4
    for _ in range(draws):
        full, adaptive, labels, user = draw(world, users, strength, rng)
        if enough:
            answers.append(certify(adaptive, full, labels, user, SETTINGS)["passed"])
            bets.append(bool(answers[-1]))
        else:  # whether bets alone keep delta here, too
            pairs = UserPairs(labels, user)
            losses = SETTINGS.rescale(pairs.auc(full) - pairs.auc(adaptive))
            answers.append(None)
            bets.append(
                p_value(losses, float(SETTINGS.rescale(SETTINGS.epsilon)), SETTINGS.delta)
                <= SETTINGS.delta
            )
    return {
        "draws": draws,
        "passed": float(np.mean([a is True for a in answers])),
        "not_enough_users": float(np.mean([a is None for a in answers])),
        "bets_alone": float(np.mean(bets)),
    }


def main(draws: int = 1000) -> None:
    """Print and write the table; about five minutes of one core."""
    head = {
        "schema_version": SCHEMA_VERSION, "command": "study",
        "protocol": {"name": "simulated users", "hash": "simulated"},
        "about": ABOUT, "risk": "auc_gap", "epsilon": SETTINGS.epsilon, "delta": SETTINGS.delta,
        "estimand": SETTINGS.estimand, "users_needed": SETTINGS.users_needed(),
    }  # fmt: skip
    target = Path(__file__).parents[1] / "results" / "certificates.json"
    strengths = {
        world: {name: strength_of(world, drop) for name, drop in DROPS.items()}
        for world in WORLDS
    }
    rows: list[dict[str, Any]] = []
    for users, times in ((300, draws), (80, draws), (30, draws), (600, draws // 4)):
        for world, drops in strengths.items():
            for name, (strength, gap) in drops.items():
                about = {
                    "world": world,
                    "users": users,
                    "drop": name,
                    "true_gap": round(gap, 5),
                }
                rows.append(about | rates(world, users, strength, times))
                print(rows[-1], flush=True)
                part = target.with_suffix(".part")
                part.write_text(
                    json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8"
                )
                part.replace(target)


if __name__ == "__main__":
    main()
