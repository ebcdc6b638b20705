import copy
import io
import json

import pytest
from rich.console import Console

from project.artefacts import SCHEMA_VERSION
from project.tables import (
    difference_lines,
    exits_table,
    interval,
    kept_line,
    number,
    render_exits,
    render_stage_seconds,
    stage_seconds_table,
)
from project.verbs import fill_tables, print_tables


def metrics(auc, **more):
    scores = {"auc": auc, "auc_interval": [0.7, 0.8], "log_loss": 0.59014, "brier": 0.2, "ece": 0.0123}
    return scores | {"uauc": {"value": 0.65, "users": 144, "rows": 9401}, "n": 9453, "split": "test"} | more


RESULT = {
    "verb": "test",
    "protocol": {
        "name": "global_time-80-10-10-h5",
        "hash": "f45a216bc7435a87",
        "counts": {"train": 75599, "valid": 9447, "test": 9453},
    },
    "exits": [metrics(0.7434, layer=0), metrics(0.75, layer=4), metrics(0.75704, layer=6)],
    "chosen_exit": 6,
    "floors": [
        metrics(0.7098, name="item_rate"),
        metrics(0.7441, name="gbdt_evidence"),
        metrics(0.6, name="gbdt_evidence", split="valid"),
        metrics(0.5, name="gbdt_evidence", split="valid", fold="tune"),
    ],
    "best_floor": "gbdt_evidence",
    "floor_difference": {"floor": "gbdt_evidence", "layer": 6, "value": 0.01294, "interval": [-0.002, 0.02]},
    "stage_seconds": {"evidence": 25.0, "fit": 1150.0, "test": 75.0},
}


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (0.7423, False, ".7423"),
        (1.0, False, "1.0000"),
        (0.99996, False, "1.0000"),
        (0.011, True, "+.0110"),
        (-0.002, True, "-.0020"),
        (10.5, True, "+10.5000"),
        (None, True, "undefined"),
    ],
)
def test_number(value, signed, text):
    """No leading zero, four digits, a sign where asked, a word for None."""
    assert number(value, signed=signed) == text


def test_interval():
    """Both bounds in brackets; one word where undefined."""
    assert interval([-0.002, 0.02], signed=True) == "[-.0020, +.0200]"
    assert interval(None) == "undefined"


class TestExits:
    def test_golden(self):
        """Heads, then floors of the reported split, marks, paired difference, protocol and counts."""
        tail = " | [.7000, .8000] | .5901 | .2000 | .0123 | .6500 | 9,453 |"
        assert render_exits(RESULT).splitlines() == [
            "| scores | AUC | 95 % interval | log loss | Brier | ECE | user-AUC | n |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            "| exit 0 (counting) | .7434" + tail,
            "| exit 4 | .7500" + tail,
            "| exit 6 (chosen) | .7570" + tail,
            "| floor item_rate | .7098" + tail,
            "| floor gbdt_evidence (best floor) | .7441" + tail,
            "",
            "LLM exit 6 minus best floor (gbdt_evidence): AUC +.0129 [-.0020, +.0200] "
            "(paired, users resampled)",
            "",
            "Protocol global_time-80-10-10-h5 (hash f45a216bc7435a87); "
            "targets: train 75,599, valid 9,447, test 9,453",
        ]

    def test_brief(self):
        """All heads, of the floors the best one and those named below the table, and fewer columns."""
        gap = {"floor": "gbdt_evidence", "value": 0.0059, "interval": [-0.001, 0.012]}
        more = RESULT["floor_difference"] | {"floor": "lr_rates", "value": 0.02, "interval": [0.01, 0.03]}
        result = RESULT | {
            "exits": [metrics(0.75, layer=4, floor_difference=gap)],
            "floors": [*RESULT["floors"], metrics(0.74, name="lr_rates", calibrated={"log_loss": 0.58})],
            "floor_differences": [RESULT["floor_difference"], more],
        }
        tail = " | [.7000, .8000] | .5901 | .6500 |"
        table, *below = render_exits(result, brief=True).split("\n\n")
        assert table.splitlines() == [
            "| scores | AUC | 95 % interval | log loss | user-AUC | minus best floor |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            f"| exit 4 | .7500{tail} +.0059 [-.0010, +.0120] |",
            f"| floor gbdt_evidence (best floor) | .7441{tail}  |",
            f"| floor lr_rates | .7400{tail}  |",
        ]
        assert below == render_exits(result).split("\n\n")[1:]

    def test_brief_marker(self, tmp_path, capsys):
        """A marker with --brief and `table --brief` give the short table of one file."""
        (tmp_path / "test.json").write_text(json.dumps(RESULT | {"schema_version": SCHEMA_VERSION}))
        short = render_exits(RESULT, brief=True)
        marked = "<!-- table --brief test.json -->\n{}<!-- end of table -->"
        assert fill_tables(marked.format("old\n"), tmp_path) == marked.format(short)
        print_tables(["--brief", str(tmp_path / "test.json")])
        assert capsys.readouterr().out == f"### test\n\n{short}\n"

    def test_same_from_a_file(self):
        """Going through JSON changes nothing, and the input is left as it was."""
        before = copy.deepcopy(RESULT)
        assert render_exits(json.loads(json.dumps(RESULT))) == render_exits(RESULT)
        assert before == RESULT

    def test_undefined_is_said(self):
        """None becomes the word, in a cell and in the headline; no None, nan or 0 is printed."""
        empty = dict.fromkeys(("auc", "auc_interval", "log_loss", "brier", "ece"))
        nobody = {"uauc": {"value": None, "users": 0, "rows": 0}}
        undefined = {"floor": "gbdt_evidence", "layer": 6, "value": None, "interval": None}
        result = RESULT | {"exits": [metrics(None, layer=6) | empty | nobody], "floor_difference": undefined}
        cells = render_exits(result).splitlines()[2]
        assert cells == "| exit 6 (chosen) |" + " undefined |" * 6 + " 9,453 |"
        assert difference_lines(result) == ["LLM exit 6 minus best floor (gbdt_evidence): undefined"]
        assert "None" not in render_exits(result)

    def test_other_floors_are_named(self):
        """Below the best floor's line stands one for every other floor that was compared, without that title."""
        more = RESULT["floor_difference"] | {"floor": "lr_rates", "value": 0.02, "interval": [0.01, 0.03]}
        result = RESULT | {"floor_differences": [RESULT["floor_difference"], more]}
        assert difference_lines(result) == [
            "LLM exit 6 minus best floor (gbdt_evidence): AUC +.0129 [-.0020, +.0200] (paired, users resampled)",
            "LLM exit 6 minus floor (lr_rates): AUC +.0200 [+.0100, +.0300] (paired, users resampled)",
        ]

    def test_every_exit_minus_the_best_floor(self):
        """A column says what each exit is over the best floor; in the terminal, which is narrow, without interval."""
        gap = {"floor": "gbdt_evidence", "value": 0.0059, "interval": [-0.001, 0.012]}
        result = RESULT | {"exits": [metrics(0.75, layer=4, floor_difference=gap)]}
        lines = render_exits(result).splitlines()
        assert lines[0].endswith(" n | minus best floor |")
        assert lines[2].endswith(" 9,453 | +.0059 [-.0010, +.0120] |")
        assert lines[3].endswith(" 9,453 |  |")
        table = exits_table(result)
        assert next(iter(table.columns[-1].cells)).plain == "+.0059"

    def test_fits_a_terminal(self):
        """120 columns hold a row a line, the longest name and a count of five digits included."""
        gap = {"floor": "gbdt_evidence", "value": 0.0059, "interval": [-0.001, 0.012]}
        long = metrics(0.75, name="gbdt_evidence", calibrated={"log_loss": 0.58})
        for exits in ([metrics(0.75, layer=4, floor_difference=gap)], []):
            console = Console(width=120, file=io.StringIO())
            console.print(exits_table(RESULT | {"exits": exits, "floors": [long]}))
            lines = console.file.getvalue().splitlines()
            assert any("floor gbdt_evidence (best floor)" in line and "9,453" in line for line in lines)

    def test_calibrated_log_loss_of_floors(self):
        """Where floors have one it is a column of its own, .5800 beside the raw .5901."""
        floors = [metrics(0.7, name="din", calibrated={"log_loss": 0.58})]
        lines = render_exits(RESULT | {"floors": floors}).splitlines()
        assert lines[0].endswith(" n | calibrated log loss |")
        assert lines[-5].startswith("| floor din")
        assert lines[-5].endswith(" .5800 |")

    def test_log_loss_in_the_headline(self):
        """The log loss stands beside the AUC where a file has it."""
        less = {"value": -0.004, "interval": [-0.006, -0.001]}
        result = RESULT | {"floor_difference": RESULT["floor_difference"] | {"log_loss": less}}
        assert difference_lines(result) == [
            "LLM exit 6 minus best floor (gbdt_evidence): AUC +.0129 [-.0020, +.0200], log loss "
            "-.0040 [-.0060, -.0010] (paired, users resampled)"
        ]

    @pytest.mark.parametrize(
        ("kept", "said"),
        [
            (
                [],
                "No floors kept from before. `python -m project floors --config c.yaml --peers true` adds more.",
            ),
            (
                ["mf"],
                "Floors kept from before: mf. `python -m project floors --config c.yaml --peers true` adds more.",
            ),
            (["mf", "deepfm", "dcn_v2", "din"], "Floors kept from before: mf, deepfm, dcn_v2, din."),
        ],
    )
    def test_kept_floors(self, kept, said):
        """One line for the terminal; none for a file that does not say."""
        result = RESULT | {"config": "c.yaml", "kept_floors": kept}
        assert kept_line(result) == said
        assert kept_line(RESULT) == ""
        assert said in str(exits_table(result).caption)

    def test_warnings(self):
        """What was wrong with the features stands below the scores, in Markdown and in the terminal."""
        result = RESULT | {"warnings": ["LightGCN was never fitted."]}
        assert "\n\nWarning: LightGCN was never fitted.\n\n" in render_exits(result)
        assert "Warning: LightGCN was never fitted." in str(exits_table(result).caption)

    def test_without_heads(self):
        """A `floors` file has no heads and no difference: every split is shown and named, folds are not."""
        result = {key: RESULT[key] for key in ("protocol", "floors")} | {"verb": "floors"}
        rows = render_exits(result).splitlines()
        assert rows[2].startswith("| floor item_rate, test |")
        assert rows[4].startswith("| floor gbdt_evidence, valid | .6000")
        assert rows[5] == ""
        assert "LLM" not in "".join(rows)

    def test_validate_shows_validation(self):
        """`validate` files show the tune fold of valid; an explicit split overrides the verb."""
        assert "| .5000 |" in render_exits(RESULT | {"verb": "validate"})
        assert "| .7441 |" not in render_exits(RESULT | {"verb": "validate"})
        assert render_exits(RESULT | {"verb": "validate"}, split="test") == render_exits(RESULT)

    def test_terminal(self):
        """The terminal's table holds the same cells, brackets of intervals included."""
        console = Console(width=200, file=io.StringIO())
        console.print(exits_table(RESULT))
        text = console.file.getvalue()
        for line in render_exits(RESULT).splitlines():
            for cell in line.strip("| ").split(" | "):
                assert cell.startswith("---") or cell in text


class TestStages:
    def test_golden(self):
        """Longest first, shares of 1,250 s: 92, 6 and 2 %, the sum below."""
        assert render_stage_seconds(RESULT).splitlines()[2:] == [
            "| fit | 1,150.0 | 92 % |",
            "| test | 75.0 | 6 % |",
            "| evidence | 25.0 | 2 % |",
            "| total | 1,250.0 |  |",
        ]

    def test_nothing_measured(self):
        """Without stages, or with zero seconds, there is a total of 0.0 and no division by zero."""
        assert render_stage_seconds({}).splitlines()[2:] == ["| total | 0.0 |  |"]
        assert "| fit | 0.0 |  |" in render_stage_seconds({"stage_seconds": {"fit": 0.0}})

    def test_terminal(self):
        """The terminal's table has a row a stage and the total."""
        assert stage_seconds_table(RESULT).row_count == 4
