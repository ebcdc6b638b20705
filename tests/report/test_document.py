"""The report of a run: its text, its pictures, and what is left out."""

import base64
import copy
import re

import numpy as np
import pytest
from example_run import results, write_run
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from project.report.format import number
from project.report.plots import (
    COLOURS,
    depth_figure,
    pareto_figure,
)
from project.report.report import read_run, write_report


@pytest.fixture(scope="module")
def example():
    return results()


@pytest.fixture
def blank_pictures(monkeypatch):
    """Figures are made in no time, for tests of the text."""
    for name in ("pareto", "depth"):
        monkeypatch.setattr(
            f"project.report.report.{name}_figure", lambda *_, **__: Figure((1, 1))
        )


@pytest.fixture
def run(example, tmp_path):
    """Writes the example run without some parts, or with some changed, and gives back its report's text."""

    def make(drop=(), keep=None, edit=None):
        files = copy.deepcopy(example)
        if edit:
            edit(files)
        files = {
            k: v for k, v in files.items() if k not in drop and (keep is None or k in keep)
        }
        write_run(tmp_path / "run", files)
        return write_report(tmp_path / "run").with_suffix(".md").read_text()

    return make


class TestWhole:
    @pytest.mark.usefixtures("blank_pictures")
    def test_numbers_are_the_files(self, run, example):

        def edit(files):
            for name, fold, value in (("test", None, 0.7123), ("fit", "tune", 0.1111)):
                where = {"split": "test" if name == "test" else "valid", "fold": fold}
                slices = {
                    "name": "item_0",
                    "n": 90,
                    "auc": {"exit 6": value, "plan": value},
                }
                files[name]["slices"] = [where | slices]
            files["test"]["warnings"] = ["no neighbours"]

        text = run(edit=edit)
        lines = [line for line in text.splitlines() if line]
        test = example["test"]
        adaptive, last = test["adaptive"], test["exits"][-1]
        assert lines[1].startswith("**D")
        assert lines[2].startswith("- On test the AUC of ")
        assert f"runs {number(adaptive['mean_depth'], 2)} of 6 layers" in lines[3]
        assert "* Warning: no neighbours" in lines
        assert (
            f"| {100 * adaptive['exit_shares']['6']:.1f} % | {number(last['auc_leaving'])} |"
            in text
        )
        raw = [last[key] for key in ("auc", "log_loss", "brier", "ece")]
        calibrated = [last["calibrated"][key] for key in ("auc", "log_loss", "ece")]
        assert f"| exit 6 | {' | '.join(map(number, raw + calibrated))} |" in text
        assert "| .7123 | .7123 |" in text
        assert ".1111" not in text
        assert not re.search(r"\b(nan|None)\b", text)

    @pytest.mark.usefixtures("blank_pictures")
    def test_names_bring_nothing(self, run, tmp_path):
        """A protocol's name that is an image and a tag makes neither, in no file: no request, no element."""
        evil = "![x](http://evil) <script>alert(1)</script> [y](http://evil)"

        def edit(files):
            for content in files.values():
                content["protocol"] = content["protocol"] | {"name": evil}
                for row in content.get("baselines", []):
                    row["name"] = evil if row["name"] == "gbdt_text" else row["name"]
                if "best_baseline" in content:
                    content["best_baseline"] = evil

        text = run(edit=edit)
        page = (tmp_path / "run" / "report" / "report.html").read_text()
        assert "<script" not in text + page
        assert "![x]" not in text
        assert not re.search(r'(src|href)="(?!data:)', page)
        assert page.count("<img ") == 2
        assert "alert(1)" in page

    def test_html_needs_nothing_else_and_is_the_same_twice(self, run, tmp_path):
        """Pictures are embedded byte for byte, nothing is linked; no clock, no counter, no order of a set."""
        run()
        folder = tmp_path / "run" / "report"
        page = (folder / "report.html").read_text()
        sources = re.findall('src="data:image/png;base64,([^"]*)"', page)
        assert {base64.b64decode(s) for s in sources} == {
            path.read_bytes() for path in folder.glob("*.png")
        }
        assert len(sources) == page.count("src=") == 2
        assert not re.search(r"https?://|href=|<script|@import|url\(", page)
        first = {path.name: path.read_bytes() for path in folder.iterdir()}
        write_report(tmp_path / "run")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == first

    def test_one_class(self, run):
        """AUCs that are undefined stay words through tables, sentences and pictures."""

        def edit(files):
            undefined = {"auc": None, "auc_interval": None, "auc_leaving": None}
            for row in files["test"]["exits"] + files["test"]["baselines"]:
                row.update(undefined)
                (row["calibrated"] or {}).update({"auc": None})
            adaptive = files["test"]["adaptive"]
            adaptive |= undefined | {"auc_drop": None, "auc_drop_interval": None}
            for static in ("static_exit", "equal_cost"):
                adaptive[static] = {
                    "layer": 4,
                    "auc": None,
                    "auc_gain": None,
                    "auc_gain_interval": None,
                }
            files["test"]["baseline_difference"] |= {"value": None, "interval": None}
            files["test"]["adaptive"]["baseline_difference"] |= {
                "value": None,
                "interval": None,
            }

        text = run(edit=edit)
        assert "**Nothing is decided:**" in text
        assert "None" not in text


@pytest.mark.usefixtures("blank_pictures")
class TestMissing:
    @pytest.mark.parametrize("drop", ["calibrate", "test", "benchmark"])
    def test_what_is_missing_is_said_and_the_rest_stands(self, run, drop):
        text = run([drop])
        assert "Make it: `python -m project" in text
        assert "## Reproduce" in text

    def test_what_cannot_be_calibrated_is_proposed_no_command_that_fails(self, run):
        text = run(
            ["calibrate", "benchmark"],
            edit=lambda files: files["fit"].update(not_calibrated="no users"),
        )
        assert "* Not calibrated, so no row leaves early: no users" in text
        assert not re.findall(r"project (calibrate|benchmark)", text)

    def test_validation_without_test(self, run, example):
        """Without test the tune fold of validation is shown, who leaves where included, never another fold."""

        def edit(files):
            for fold in ("select", "certify", None):
                row = files["fit"]["exits"][0] | {"fold": fold, "auc": 0.1111, "layer": 99}
                files["fit"]["exits"].append(row)

        text = run(["test"], edit=edit)
        assert "On the tune fold of validation" in text
        assert ".1111" not in text
        share = example["calibrate"]["adaptive"]["exit_shares"]["6"]
        leaving = example["fit"]["exits"][-1]["auc_leaving"]
        assert f"| {100 * share:.1f} % | {number(leaving)} |" in text


@pytest.mark.usefixtures("blank_pictures")
class TestInput:
    def test_other_protocol_is_left_out(self, run):

        def edit(files):
            files["test"]["protocol"] = files["test"]["protocol"] | {"hash": "other"}
            files["test"]["baseline_difference"]["value"] = 0.4321

        text = run(edit=edit)
        assert "Left out: results/test.json is of protocol hash other" in text
        assert ".4321" not in text

    def test_tagged_results(self, run):
        """The result without a tag is the run's; a second one is named, not mixed in."""
        text = run(
            edit=lambda files: files.update({"test-a": files["test"] | {"chosen_exit": 2}})
        )
        assert "exit 6 (best static exit" in text
        assert "Not shown: results/test-a.json" in text


@pytest.mark.usefixtures("blank_pictures")
def test_best_baseline_of_the_same_rows(run, tmp_path, example):
    """The baseline line of the Pareto picture is the tune fold's, that of the depth picture is test's."""
    run()
    read = read_run(tmp_path / "run")
    for command, part in (("fit", ("valid", "tune")), ("test", ("test", None))):
        name = example[command]["best_baseline"]
        aucs = {row["name"]: row["auc"] for row in example[command]["baselines"]}
        assert read.baseline(*part) == (name, aucs[name])
    assert read.baseline("valid", "select") is None


def axes_of(figure):
    return figure.axes[0]


def lines_by_colour(figure, colour):
    return [
        line for line in axes_of(figure).lines if to_hex(line.get_color()) == colour.lower()
    ]


class TestPareto:
    def test_curves_are_the_steps(self, example):
        """The line of a criterion holds exactly its steps, by cost, in its colour; the oracle's is dashed."""
        found = example["calibrate"]
        figure = pareto_figure(found)
        for policy in found["policies"]:
            (line,) = (
                line
                for line in axes_of(figure).lines
                if line.get_label() == policy["criterion"]
            )
            steps = sorted((step["cost"], step["auc"]) for step in policy["pareto"])
            np.testing.assert_allclose(line.get_xydata(), steps)
        assert lines_by_colour(figure, COLOURS["oracle"])[0].get_linestyle() == "--"


class TestOthers:
    def test_depth(self):
        """Bars reach from low to high of the paired difference to the baseline, the plan stands at its mean depth."""

        def above(value, low, high):
            return {
                "auc": 0.7,
                "baseline_difference": {"value": value, "interval": [low, high]},
            }

        exits = [
            {"layer": 0} | above(0.002, -0.001, 0.004),
            {
                "layer": 2,
                "auc": None,
                "baseline_difference": {"value": None, "interval": None},
            },
            {"layer": 4} | above(0.013, 0.005, 0.025),
        ]
        axes = axes_of(
            depth_figure(
                exits, ("item_rate", 0.69), {"mean_depth": 1.5} | above(0.012, 0.003, 0.024)
            )
        )
        bars = [path for c in axes.containers[0].lines[2] for path in c.get_segments()]
        np.testing.assert_allclose(
            bars, [[(0, -0.001), (0, 0.004)], [(4, 0.005), (4, 0.025)]]
        )
        np.testing.assert_allclose(axes.containers[1].lines[0].get_xydata(), [(1.5, 0.012)])
        assert next(x.get_ydata()[0] for x in axes.lines if x.get_linestyle() == "--") == 0
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "4"]
