from project.report.tables import (
    calibration_table,
    effect_table,
    policies_table,
    priors_table,
    slices_table,
)


def test_policies():
    """The chosen step of each criterion; of random and oracle the step of nearest cost (.4 to .45, not .9)."""
    path = [
        {"cost": c, "mean_depth": 6 * c, "auc": a, "auc_drop": 0.75 - a}
        for c, a in ((0.9, 0.75), (0.4, 0.74))
    ]
    chosen = {
        "criterion": "ratio",
        "mode": "budget",
        "chosen_step": 0,
        "pareto": [path[0] | {"cost": 0.45}],
    }
    other = {"criterion": "learned", "mode": "budget", "chosen_step": None, "pareto": path}
    controls = [
        {"name": "random", "pareto": path},
        {"name": "fixed_depth", "pareto": [path[1] | {"layer": 2}]},
    ]
    table = policies_table(
        {"policies": [chosen, other], "controls": controls, "chosen": "ratio"}
    ).splitlines()
    assert table[2] == "| ratio (chosen) | budget | .450 | 5.40 | x2.22 | .7500 | +.0000 |"
    assert table[3] == "| learned | budget | – | – | – | – | – |"
    assert table[4] == "| random | control | .400 | 2.40 | x2.50 | .7400 | +.0100 |"
    assert table[5].startswith("| fixed_depth 2 | control | .400 |")


def test_calibration():
    """A threshold is a number or a word; exits come by number, not by text."""
    terms = {"logit": 1.25, "prior": 0.5, "offset": -0.1}
    thresholds = {"10": "everyone", "2": "never", "4": -0.02}
    table = calibration_table({"thresholds": thresholds, "calibration": {"2": terms}}).splitlines()
    assert table[2:] == [
        "| exit 2 | 1.250 | .500 | -.100 | never |",
        "| exit 4 | – | – | – | -.0200 |",
        "| exit 10 | – | – | – | everyone |",
    ]


def test_priors():
    """One column a prior; an exit that a prior has not is a dash."""
    step = {"cost": 0.4, "mean_depth": 2.4, "auc": 0.74, "auc_drop": 0.001}
    row = {
        "criterion": "ratio",
        "chosen": step,
        "never_enter_trunk": 0.25,
        "exits": [step | {"layer": 2}],
    }
    none = row | {"never_enter_trunk": 0.0}
    counting = row | {"exits": [step | {"layer": 0, "auc": 0.73}, step | {"layer": 2}]}
    table = priors_table({"counting": counting, "none": none}).splitlines()
    assert table[0] == "| prior | counting | none |"
    assert table[-3:] == [
        "| never enter the trunk | 25.0 % | 0.0 % |",
        "| AUC of exit 0 for every row | .7300 | – |",
        "| AUC of exit 2 for every row | .7400 | .7400 |",
    ]


def test_effect():
    """Raw and calibrated side by side, by metric."""
    raw = {"layer": 2, "auc": 0.7, "log_loss": 0.6, "brier": 0.2, "ece": 0.05}
    table = effect_table([raw | {"calibrated": {"auc": 0.71, "log_loss": 0.59, "brier": 0.19, "ece": 0.01}}])
    assert table.splitlines()[2] == (
        "| exit 2 | .7000 | .7100 | .6000 | .5900 | .2000 | .1900 | .0500 | .0100 |"
    )


def test_slices():
    """A line a slice: every exit, the chosen one with its interval, of the floors the best; empty is "undefined"."""

    def row(value, **who):
        return who | {"auc": value, "auc_interval": value and [value - 0.01, value + 0.01]}

    def part(name, n, values):
        who = [{"layer": 0}, {"layer": 6}, {"name": "item_rate"}, {"name": "lr_rates"}]
        rows = [row(value, **w) for value, w in zip(values, who, strict=True)]
        return {
            "name": name,
            "split": "valid",
            "fold": "tune",
            "n": n,
            "users": 2,
            "positives": 1,
            "rows": rows,
        }

    slices = [
        part("warm_users", 1200, [0.7, 0.75, 0.6, 0.71]),
        part("history_20_99", 40, [0.6, 0.65, 0.5, 0.61]),
        part("history_100_plus", 0, [None] * 4),
    ]
    result = {"slices": slices, "chosen_exit": 6, "best_floor": "lr_rates"}
    assert slices_table(result, "valid", "tune").splitlines() == [
        "| slice | n | users | exit 0 (counting) | exit 6 (chosen) | 95 % interval | floor lr_rates |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| warm users | 1,200 | 2 | .7000 | .7500 | [.7400, .7600] | .7100 |",
        "| history 20 to 99 | 40 | 2 | .6000 | .6500 | [.6400, .6600] | .6100 |",
        "| history 100 and more | 0 | 2 | undefined | undefined | undefined | undefined |",
    ]
    assert slices_table(result, "test", None) == ""


def test_slices_of_floors_alone():
    """Without exits, as the verb floors writes it, every floor is a column."""
    rows = [{"name": name, "auc": 0.7, "auc_interval": [0.6, 0.8]} for name in ("item_rate", "lr_rates")]
    part = {"name": "cold_users", "split": "test", "n": 9, "users": 3, "positives": 1, "rows": rows}
    table = slices_table({"slices": [part], "best_floor": "lr_rates"}, "test", None).splitlines()
    assert table[0] == "| slice | n | users | floor item_rate | floor lr_rates |"
    assert table[2] == "| cold users | 9 | 3 | .7000 | .7000 |"
