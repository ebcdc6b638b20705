"""Several runs in one table: cells come from the results, a spread from runs of one folder and one protocol alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from project.errors import ConfigError, DataError
from project.headlines import render_headlines
from project.verbs import fill_tables, print_tables


def difference(value: float) -> dict[str, Any]:
    log_loss = {"value": -value, "interval": [-value - 0.001, -value + 0.001]}
    return {"value": value, "interval": [value - 0.002, value + 0.002], "log_loss": log_loss}


def result(gain: float, seed: int = 0, digest: str = "aaaa", name: str = "global_time") -> dict[str, Any]:
    """A test result whose chosen exit is `gain` above its floor alone, and .001 more with counting."""
    return {
        "schema_version": 1,
        "verb": "test",
        "config": "runs/a/version_0/config.yaml",
        "seed": seed,
        "protocol": {"name": name, "hash": digest},
        "exits": [{"layer": 0, "auc": 0.7}, {"layer": 6, "auc": 0.7 + gain}],
        "chosen_exit": 6,
        "best_floor": "lr_evidence",
        "floor_difference": difference(gain) | {"layer": 6, "floor": "lr_evidence"},
        "chosen_exit_by_prior": {
            "counting": {"auc": 0.701 + gain, "floor_difference": difference(gain + 0.001)}
        },
        "adaptive": {"auc": 0.7002, "auc_drop": 0.0008, "mean_depth": 3.0, "token_layer_speedup": 2.0},
    }


def test_a_row_a_result() -> None:
    """Cells in the order of the header; +.0100 - .002 = +.0080."""
    text = render_headlines({"a/test.json": result(0.01)})
    cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert cells == [
        "a/test.json",
        "runs/a/version_0/config.yaml",
        "0",
        "aaaa",
        "6",
        ".7100",
        "+.0100 [+.0080, +.0120]",
        ".7110",
        "+.0110 [+.0090, +.0130]",
        "-.0110 [-.0120, -.0100]",
        "lr_evidence",
        ".7002",
        "+.0008",
        "x2.00",
    ]
    assert "aaaa is global_time" in text
    assert "seeds" not in text


def test_spread_over_seeds() -> None:
    """.010, .012, .017: mean .013, deviations -.003, -.001, +.004, so sqrt(26e-6 / 2) = .0036."""
    runs = {f"a/test-{k}.json": result(gain, k) for k, gain in enumerate((0.010, 0.012, 0.017))}
    text = render_headlines({**runs, "b/test.json": result(0.5)})
    (line,) = (line for line in text.splitlines() if "seeds" in line)
    assert line.startswith("a, seeds 0, 1, 2: minus the best floor +.0130 on average, +.0100 to +.0170,")
    assert "standard deviation .0036; with counting +.0140 on average" in line


def test_other_weights_are_no_seed() -> None:
    """Two results of one seed in one folder, such as test.json and test-int8.json, have no spread."""
    assert "seeds" not in render_headlines({"a/test.json": result(0.01), "a/test-int8.json": result(0.011)})


def test_other_protocols_are_no_seeds() -> None:
    """Rows of another hash stand in the table with their hash, and in no spread."""
    runs = {"a/test.json": result(0.01), "a/user.json": result(0.02, digest="bbbb", name="user_time")}
    text = render_headlines(runs)
    assert "aaaa is global_time; bbbb is user_time" in text
    assert "seeds" not in text


def test_nothing_saved_or_not_calibrated() -> None:
    """Everyone at exit 0 is said in words; without a calibration its cells are empty."""
    nobody = result(0.01)
    nobody["adaptive"]["mean_depth"] = 0.0
    assert "| no layer runs |" in render_headlines({"a/test.json": nobody})
    bare = copy.deepcopy(nobody)
    del bare["adaptive"], bare["chosen_exit_by_prior"]
    assert render_headlines({"a/test.json": bare}).splitlines()[2].endswith("|  |  |  |")


def test_other_verbs_are_refused() -> None:
    """A result of `floors` has no exits: its name is said, and what was expected."""
    with pytest.raises(
        ConfigError, match=r"a/floors\.json is a result of floors: expected results/test\.json"
    ):
        render_headlines({"a/floors.json": {"verb": "floors"}})


def test_markers_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A marker that names two files and `table --beside` give the same table."""
    for k in (0, 1):
        (tmp_path / f"test-{k}.json").write_text(json.dumps(result(0.01 + k / 100, k)))
    text = "<!-- table test-0.json test-1.json -->\nold\n<!-- end of table -->"
    filled = fill_tables(text, tmp_path)
    print_tables(["--beside", *(str(tmp_path / f"test-{k}.json") for k in (0, 1))])
    printed = capsys.readouterr().out
    assert "| test-1.json | runs/a/version_0/config.yaml | 1 | aaaa |" in filled
    assert "seeds 0, 1" in filled
    assert printed.replace(str(tmp_path) + "/", "").splitlines()[3] == filled.splitlines()[4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--into"], "needs a Markdown file to renew; found none"),
        (["--into", "nosuch.md"], "found nosuch.md"),
        ([], r"table needs result files, such as .*test\.json.*found none"),
        (["--beside"], "table needs result files"),
        (["--stagess", "test.json"], "table knows --brief, --stages, --beside and --into; found --stagess"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: list[str], words: str) -> None:
    """What `table` cannot do is said in one line."""
    with pytest.raises(ConfigError, match=words):
        print_tables(arguments)


def test_a_result_without_a_verb(tmp_path: Path) -> None:
    """A file with nothing but a version names what it lacks, alone, beside others and in a document."""
    path = tmp_path / "a.json"
    path.write_text('{"schema_version": 1}')
    for arguments in ([str(path)], ["--beside", str(path)]):
        with pytest.raises(DataError, match=r"a\.json has no verb and no protocol"):
            print_tables(arguments)
    with pytest.raises(DataError, match=r"a\.json has no verb"):
        fill_tables("<!-- table a.json -->\nold\n<!-- end of table -->", tmp_path)
