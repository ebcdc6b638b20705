"""The public power table: its recipe, and what it has to show."""

import numpy as np
import pytest

from project.errors import ConfigError
from project.exits.power import EPSILON, EXITS, exit_table, power_table, print_power_table, threshold_steps


def test_table_is_what_its_recipe_says():
    """Losses in [-1, 1], 0 at the last exit; risk crosses epsilon on the way; step 0 costs all 12 layers.

    Gains at exit 1: chance .1 * (11 / 12) * 12 / 11 = .1, within three standard errors (.0045) of 40,000 rows.
    """
    losses, confidence = exit_table()
    steps, layers = threshold_steps(losses, confidence)
    risk = steps.mean(axis=1)
    assert np.abs(losses).max() == 1
    assert not losses[:, -1].any()
    assert (losses[:, 0] == -1).mean() == pytest.approx(0.1, abs=0.0045)
    assert (risk[0], layers[0]) == (0, EXITS)
    assert risk[-1] > 2 * EPSILON
    assert np.all(np.diff(layers) <= 0)


@pytest.mark.slow
def test_wsr_keeps_the_promise_and_the_speed():
    """1,000 draws: naive breaks the promise in about half, wsr in at most delta + 3 standard errors (.1285).

    wsr keeps >= 90 % of the naive speed-up, more than Hoeffding-Bentkus, which keeps more than clipped losses.
    """
    rows = {row["certifier"]: row for row in power_table(1000)}
    assert 0.35 < rows["naive"]["violation_rate"] < 0.65
    for name in ("wsr", "hoeffding_bentkus", "clipped"):
        assert rows[name]["violation_rate"] <= 0.1285
    shares = [rows[name]["share_of_naive_speedup"] for name in ("wsr", "hoeffding_bentkus", "clipped")]
    assert shares[0] >= 0.9
    assert shares[0] > shares[1] > shares[2]


def test_printed(capsys):
    """The command's table names every certifier."""
    print_power_table(["3"])
    text = capsys.readouterr().out
    for name in ("naive", "wsr", "hoeffding_bentkus", "clipped", "n = 1,000"):
        assert name in text


@pytest.mark.parametrize("arguments", [["x"], ["0"], ["-1"], ["3", "4"]], ids=str)
def test_bad_draws(arguments):
    """What is no number of draws is said in one line."""
    with pytest.raises(ConfigError, match=f"number of draws, 1 or more; found {' '.join(arguments)}"):
        print_power_table(arguments)
