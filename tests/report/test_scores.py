"""The table of exits and floors on hand-made results: which rows and columns there are, and what stands in them."""

from project.report.scores import calibrated_line, prior_line, scores_table


def difference(value, log_loss):
    width = [value - 0.01, value + 0.01]
    less = {"value": log_loss, "interval": [log_loss - 0.002, log_loss + 0.002]}
    return {"floor": "din", "value": value, "interval": width, "log_loss": less}


def row(auc, **more):
    metrics = {"auc": auc, "log_loss": 0.6, "brier": 0.2, "ece": 0.05, "uauc": {"value": 0.65}, "n": 1200}
    return metrics | {"auc_interval": [0.7, 0.8]} | more


RESULT = {
    "exits": [
        row(0.74, layer=4, split="test", floor_difference=difference(-0.01, 0.004)),
        row(
            0.76,
            layer=6,
            split="test",
            floor_difference=difference(0.01, -0.003),
            calibrated={"log_loss": 0.59},
        ),
        row(0.99, layer=6, split="valid", fold="tune"),
    ],
    "chosen_exit": 6,
    "chosen_exit_by_prior": {
        "layer": 6,
        "counting": row(0.765, log_loss=0.57, floor_difference=difference(0.015, -0.006)),
        "none": row(0.76, log_loss=0.58, floor_difference=difference(0.01, -0.005)),
        "difference": {key: v for key, v in difference(0.005, -0.01).items() if key != "floor"},
    },
    "adaptive": row(0.755, floor_difference=difference(0.005, 0.0)),
    "floors": [
        row(0.7, name="mf", split="test"),
        row(0.75, name="din", split="test", calibrated={"log_loss": 0.58}),
    ],
    "best_floor": "din",
}


def cells(table):
    """Row name -> header -> cell."""
    header, _, *lines = ([c.strip() for c in line.strip("|").split("|")] for line in table.splitlines())
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_rows_in_order():
    """Exits, the chosen one with and without counting, the adaptive score, floors; of the asked split alone."""
    assert list(cells(scores_table(RESULT, "test", None))) == [
        "exit 4",
        "exit 6 (chosen)",
        "exit 6, calibrated, prior counting",
        "exit 6, calibrated, prior none",
        "adaptive",
        "floor mf",
        "floor din (best floor)",
    ]


def test_differences():
    """Every exit minus the best floor in AUC and in log loss, with intervals; a floor has none."""
    found = cells(scores_table(RESULT, "test", None))
    minus = {name: line["minus best floor"] for name, line in found.items()}
    assert minus["exit 4"] == "-.0100 [-.0200, +.0000]"
    assert minus["exit 6, calibrated, prior counting"] == "+.0150 [+.0050, +.0250]"
    assert minus["adaptive"] == "+.0050 [-.0050, +.0150]"
    assert minus["floor din (best floor)"] == "–"
    assert found["exit 4"]["minus best floor's"] == "+.0040 [+.0020, +.0060]"


def test_calibrated_log_loss():
    """As trained and calibrated stand apart; a score that is calibrated has the same in both; unknown is a dash."""
    found = cells(scores_table(RESULT, "test", None))
    pairs = {name: (line["log loss"], line["calibrated log loss"]) for name, line in found.items()}
    assert pairs["exit 4"] == (".6000", "–")
    assert pairs["exit 6 (chosen)"] == (".6000", ".5900")
    assert pairs["exit 6, calibrated, prior counting"] == (".5700", ".5700")
    assert pairs["floor din (best floor)"] == (".6000", ".5800")
    assert "fitted on the fold select" in calibrated_line(RESULT)


def test_what_is_unknown_has_no_column():
    """A result from before differences and calibrations is the table it was."""
    exits = [row(0.74, layer=4, split="test")]
    result = {"exits": exits, "floors": [row(0.7, name="mf", split="test")]}
    header = scores_table(result, "test", None).splitlines()[0]
    assert header == "| scores | AUC | 95 % interval | log loss | Brier | ECE | user-AUC | n |"
    assert calibrated_line(result) == prior_line(result) == ""


def test_undefined():
    """One class: the word in both differences."""
    nothing = {"value": None, "interval": None}
    exits = [
        row(None, layer=4, split="test", floor_difference={"floor": "mf", **nothing, "log_loss": nothing})
    ]
    (line,) = cells(scores_table({"exits": exits}, "test", None)).values()
    assert line["AUC"] == line["minus best floor"] == line["minus best floor's"] == "undefined"


def test_prior_line():
    """What counting adds is said with its interval."""
    assert prior_line(RESULT) == (
        "Exit 6 with counting in its calibration minus without: AUC +.0050 [-.0050, +.0150], log loss "
        "-.0100 [-.0120, -.0080] (paired, users resampled)"
    )
