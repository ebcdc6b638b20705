"""What a certificate costs: speed kept and promises broken, by certifier, on a generated table of per-exit losses.

Unusual here: the table is a population and a draw is 1,000 rows of it with replacement, so the risk of every step is
known exactly and "broken" is a fact, not an estimate. `naive` takes the fastest step whose mean loss on the draw
is within epsilon, as picking on validation does; `clipped` is Learn-then-Test on losses cut at 0 (Hoeffding-Bentkus).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from project.errors import ConfigError
from project.exits import betting
from project.exits.certify import last_that_passed
from project.exits.risks import Floats

EXITS = 12
POPULATION = 40_000
ROWS = 1000  # of a draw
EPSILON = 0.05
DELTA = 0.1
THRESHOLDS = np.linspace(6.0, -1.5, 121)


def exit_table(rows: int = POPULATION, seed: int = 0) -> tuple[Floats, Floats]:
    """Losses and confidences of a made-up classifier with 12 exits.

    A row has a difficulty from Beta(1.2, 4). At depth u = k / 12 a head has not understood it with chance
    sigmoid(20 (difficulty - u)); its confidence is minus that log-odds plus standard normal noise. The loss beside
    the full model is then +1 in half of the cases that are not understood (rare and large), -1 with chance
    .1 * (1 - u) * 12 / 11 (early heads are sometimes right where the full model is not), else uniform in
    [-.05, .05]; it is 0 at the last exit. The constants are one choice: over eight others that were tried, wsr
    kept 91 to 96 % of the naive speed-up and never broke more than 5.5 % of its promises.

    Args:
        rows: Number of rows.
        seed: Seed of everything.

    Returns:
        Losses in [-1, 1] and confidences, both (rows, 12).
    """
    rng = np.random.default_rng(seed)
    depth = np.arange(1, EXITS + 1) / EXITS
    log_odds = 20 * (rng.beta(1.2, 4, size=(rows, 1)) - depth)
    confidence = rng.normal(size=(rows, EXITS)) - log_odds
    fate, small = rng.random((rows, EXITS)), rng.uniform(-0.05, 0.05, (rows, EXITS))
    harmed = fate < 0.5 / (1 + np.exp(-log_odds))
    helped = fate > 1 - 0.1 * (1 - depth) * EXITS / (EXITS - 1)
    losses = np.where(harmed, 1.0, np.where(helped, -1.0, small))
    losses[:, -1] = 0.0
    return losses, confidence


def threshold_steps(losses: Floats, confidence: Floats) -> tuple[Floats, Floats]:
    """Losses (steps, rows) and mean layers (steps,) of one falling confidence threshold; step 0: nobody leaves."""
    rows = np.arange(losses.shape[0])
    steps, layers = [np.zeros(rows.size)], [float(EXITS)]
    for threshold in THRESHOLDS:
        stays = confidence < threshold
        stays[:, -1] = False
        leaves = stays.argmin(axis=1)
        steps.append(losses[rows, leaves])
        layers.append(float(leaves.mean()) + 1)
    return np.stack(steps), np.array(layers)


def power_table(draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """How often each certifier breaks its promise and the token-layer speed-up it keeps.

    Args:
        draws: Draws of 1,000 rows; all certifiers see the same ones.
        seed: Seed of the draws and of the table.

    Returns:
        Rows {`certifier`, `violation_rate`, `mean_speedup`, `share_of_naive_speedup`}; a draw is a violation
        where the returned step's population risk is above epsilon (.05), promised at delta (.1).
    """
    steps, layers = threshold_steps(*exit_table(seed=seed))
    risk, speedup = steps.mean(axis=1), EXITS / layers
    rng = np.random.default_rng(seed + 1)
    chosen: dict[str, list[int]] = {name: [] for name in CHOICES}
    for _ in range(draws):
        drawn = steps[:, rng.integers(0, steps.shape[1], ROWS)]
        for name, choose in CHOICES.items():
            chosen[name].append(choose(drawn))
    naive = float(speedup[chosen["naive"]].mean())
    return [
        {
            "certifier": name,
            "violation_rate": float((risk[picked] > EPSILON).mean()),
            "mean_speedup": float(speedup[picked].mean()),
            "share_of_naive_speedup": float(speedup[picked].mean()) / naive,
        }
        for name, picked in chosen.items()
    ]


def print_power_table(arguments: Sequence[str]) -> None:
    """`power [DRAWS]` prints `power_table`; 1,000 draws, the default, take about ten seconds."""
    if len(arguments) > 1 or not all(a.isdecimal() and int(a) > 0 for a in arguments):
        raise ConfigError(f"power takes the number of draws, 1 or more; found {' '.join(arguments)}.")
    draws = int(arguments[0]) if arguments else 1000
    table = Table(title=f"n = {ROWS:,}, epsilon {EPSILON}, delta {DELTA}, {draws:,} draws")
    for column in ("certifier", "promise broken", "speed-up (layers)", "share of naive"):
        table.add_column(column, justify="left" if column == "certifier" else "right")
    for row in power_table(draws):
        table.add_row(
            row["certifier"],
            f"{row['violation_rate']:.1%}",
            f"x{row['mean_speedup']:.2f}",
            f"{row['share_of_naive_speedup']:.0%}",
        )
    Console().print(table)


def _naive(losses: Floats) -> int:
    return int(np.flatnonzero(losses.mean(axis=1) <= EPSILON).max())


def _wsr(losses: Floats) -> int:
    return _last(betting.wsr_p_value((losses[1:] + 1) / 2, (EPSILON + 1) / 2, DELTA))


def _hoeffding_bentkus(losses: Floats) -> int:
    means = (losses[1:].mean(axis=1) + 1) / 2
    return _last(betting.hoeffding_bentkus_p_value(means, losses.shape[1], (EPSILON + 1) / 2))


def _clipped(losses: Floats) -> int:
    means = np.maximum(losses[1:], 0.0).mean(axis=1)
    return _last(betting.hoeffding_bentkus_p_value(means, losses.shape[1], EPSILON))


def _last(p_values: Floats) -> int:
    return last_that_passed(p_values, DELTA, first=1) or 0


CHOICES: dict[str, Callable[[Floats], int]] = {
    "naive": _naive,
    "wsr": _wsr,
    "hoeffding_bentkus": _hoeffding_bentkus,
    "clipped": _clipped,
}
"""Losses (steps, n) of a draw -> the step it returns; 0: nobody leaves."""
