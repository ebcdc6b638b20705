from __future__ import annotations

from pathlib import Path

from project.ablations.table import render_ablation
from project.artefacts import write_json
from project.verbs import fill_tables

GAP = {"value": -0.0021, "interval": [-0.006, 0.0004]}
RESULT = {
    "schema_version": 1,
    "verb": "ablate",
    "steps": 60,
    "protocol": {"name": "global_time", "hash": "f45a", "counts": {"valid": 9447}},
    "rows": [
        {
            "name": "base",
            "seconds": {"train": 290.4, "all": 400.0},
            "early_exit": {"token_layer_speedup": 1.85, "auc": 0.7493, "mean_depth": 3.1},
            "exits": [
                {"layer": 2, "n": 3943, "auc": 0.7382, "log_loss": 0.5915},
                {
                    "layer": 6,
                    "n": 3943,
                    "auc": 0.7489,
                    "log_loss": 0.58,
                    "calibrated": {"auc": 0.7512, "log_loss": 0.57},
                },
            ],
        },
        {
            "name": "linear",
            "early_exit": {"token_layer_speedup": None, "auc": 0.7412, "mean_depth": 0.0},
            "seconds": {"train": 291.0, "all": 400.0},
            "exits": [
                {"layer": 3, "n": 3943, "auc": 0.73, "log_loss": 0.6},
                {
                    "layer": 6,
                    "n": 3943,
                    "auc": None,
                    "log_loss": 0.58,
                    "difference": {"auc": GAP, "calibrated_auc": GAP},
                },
            ],
        },
        {"name": "broken", "error": "failed: ConfigError: no (exit status 2; fit.log)"},
    ],
}


def test_golden() -> None:
    """A line a head; what is about a run stands at its deepest; nothing measured is a dash, no class "undefined"."""
    text = render_ablation(RESULT)
    lines = text.splitlines()
    assert lines[2:7] == [
        "| base | 2 | .7382 | .5915 | – | – | – | – |  |  |",
        "| base | 6 | .7489 | .5800 | .7512 | .5700 | – | – | x1.85 at .7493 | 290 |",
        "| linear | 3 | .7300 | .6000 | – | – | – | – |  |  |",
        "| linear | 6 | undefined | .5800 | – | – | -.0021 [-.0060, +.0004] | -.0021 [-.0060, +.0004] | "
        "no layer runs at .7412 | 291 |",
        "| broken | – | – | – | – | – | – | – | – | – |",
    ]
    assert "No numbers of broken: failed: ConfigError: no (exit status 2; fit.log)" in lines
    assert (
        "Validation's tune fold (3,943 rows); test is not read. Each variant is trained once, on 60 batches."
        in text
    )
    assert "With 4 heads compared" in text
    assert lines[-1] == "Protocol global_time (hash f45a); targets: valid 9,447"


def test_in_a_document(tmp_path: Path) -> None:
    """`table --into` renews an ablation's table from its result file, as any other's."""
    write_json(tmp_path / "ablation-losses.json", RESULT)
    text = "a\n<!-- table ablation-losses.json -->\nold\n<!-- end of table -->\nb\n"
    assert fill_tables(text, tmp_path).splitlines()[2] == render_ablation(RESULT).splitlines()[0]
