"""The answer, tables and their cells hold the files' numbers, formatted."""

import copy
import json
import re
from pathlib import Path

import pytest
from example_result import ABOVE, AROUND, BELOW, result
from markupsafe import Markup

from project.errors import ConfigError
from project.report.format import (
    COVERED,
    code,
    difference,
    environment,
    escape,
    few_users,
    number,
    percent,
    ratio,
    times,
)
from project.report.tables import (
    TABLE,
    Line,
    criteria_rows,
    decide,
    fill_tables,
    list_rows,
    print_tables,
    render,
    render_beside,
)
from project.run import read_result

CASES = {
    "cheaper at equal accuracy": ({}, ("plan", "", "")),
    "more accurate, not cheaper": ({"static": 0.01, "static_interval": ABOVE, "faster": 0.9}, ("plan", "", "")),
    "cheaper, less accurate": ({"static_interval": BELOW}, ("exit", "", "")),
    "neither": ({"faster": 0.9}, ("exit", "", "")),
    "baseline better": ({"gain": BELOW}, ("no_llm", "gbdt", "better")),
    "baseline as good": ({"gain": AROUND}, ("no_llm", "gbdt", "as good")),
    "not shown better": ({"gain": [-0.001, 0.02]}, ("no_llm", "gbdt", "not better")),
    "exit 0 near the best static exit": ({"gain": AROUND, "static_exit": 0}, ("no_llm", "exit 0", "as good")),
    "exit 0 as good as the plan": ({"static_exit": 0}, ("no_llm", "exit 0", "as good")),
    "plan better than exit 0": ({"static_exit": 0, "static_interval": ABOVE}, ("plan", "", "")),
    "no layer runs": ({"depth": 0.0}, ("no_llm", "exit 0", "as good")),
    "no layer runs for a loss": (
        {"depth": 0.0, "drop": 0.01, "drop_interval": ABOVE}, ("no_llm", "exit 0", "budget")),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), CASES.values(), ids=CASES)
def test_decision(changes, expected):
    """Which decision follows from which numbers; the rendered answer is the first line."""
    made = result(**changes)
    answer = decide(made)
    assert (answer.kind, answer.instead, answer.how) == expected
    first = render(made).splitlines()[0]
    assert ("Do not deploy the LLM" in first) == (answer.kind == "no_llm")


def test_the_clock_decides_what_is_faster():
    """The plan runs fewer token-layers than the static exit of equal accuracy; a clock may say otherwise."""
    made = result()
    layer = made["adaptive"]["static_exit"]["layer"]
    assert decide(made).kind == "plan"
    for clock, kind in ((1.4, "plan"), (1.6, "exit")):
        rows = [
            Line("plan", 0.7, depth=3.0, clock=1.5),
            Line("static", 0.7, depth=layer, clock=clock),
        ]
        assert decide(made, rows).kind == kind


def test_best_static_exit_where_only_that_is_better():
    """The plan is not shown better, exit 6 with exit 0 in its calibration is: that is deployed."""
    made = result(gain=AROUND)
    made["with_exit_0"] = {"baseline": "gbdt", "value": 0.01, "interval": ABOVE}
    answer = decide(made)
    assert (answer.kind, answer.layer, answer.calibrated) == ("exit", 6, True)
    assert answer.gain["value"] == 0.01


def test_before_calibration_and_without_exits():
    made = result()
    made["adaptive"] = None
    assert decide(made).kind == "no_llm"
    made["baseline_difference"]["interval"] = ABOVE
    assert (decide(made).kind, decide(made).layer) == ("exit", 6)
    undefined = copy.deepcopy(made)
    undefined["baseline_difference"] |= {"value": None, "interval": None}
    assert decide(undefined).kind == "undecided"
    assert decide(made | {"exits": []}).kind == "baselines"


@pytest.mark.parametrize("depth", [3.0, 0.0])
def test_what_a_certificate_says_stands_there_once_where_layers_run(depth):
    words = "The certificate passed: the gap is at most .02."
    made = result(depth=depth) | {"certificate": {"passed": True, "words": words}}
    assert render(made).count(words) == (depth > 0)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (number(0.74231), ".7423"),
        (number(-0.002, signed=True), "-.0020"),
        (number(1.03124), "1.0312"),
        (number(10.0, 2), "10.00"),
        (number(None), "undefined"),
        (
            difference({"value": 0.011, "interval": [-0.002, 0.02]}),
            "+.0110 [-.0020, +.0200]",
        ),
        (difference(None), "–"),
        (times(2.314, [2.2, 2.41]), "x2.31 [x2.20, x2.41]"),
        (percent(0.8538), "85.4 %"),
        (
            ratio(1.34, "fewer", "more", [1.2, 1.5]),
            "x1.34 [x1.20, x1.50] fewer",
        ),
        (
            ratio(0.8, "fewer", "more", [0.5, 1.25]),
            "x1.25 [x0.80, x2.00] more",
        ),
    ],
)
def test_numbers(made, said):
    """Below one they lose their zero; what is undefined says so; nothing here is escaped again."""
    assert made == said
    assert isinstance(made, Markup)


def test_characters_and_templates():
    assert escape("a\n# b\x1b[31m") == "a # b \\[31m"
    assert code("a`b\n|c") == "`a b \\|c`"
    template = environment().from_string(
        "{{ name }} {{ value | number }} {{ nothing.auc | number }}"
    )
    assert template.render(name="*a*", value=0.5, nothing={}) == "\\*a\\* .5000 –"


RESULTS = Path(__file__).parents[2] / "results"
DOCUMENTS = [RESULTS.parent / "README.md", RESULTS / "README.md", RESULTS / "archive.md"]
DOCUMENTS += [RESULTS.parent / "docs" / name for name in ("exits.md", "results.md")]


def tables(text):
    """Every table of a Markdown text: rows of cells, header first."""
    found, lines = [], text.splitlines()
    for k, line in enumerate(lines):
        if line.startswith("| ---"):
            end = next(
                (n for n in range(k, len(lines)) if not lines[n].startswith("|")),
                len(lines),
            )
            rows = [lines[k - 1], *lines[k + 1 : end]]
            found.append(
                [
                    [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
                    for row in rows
                ]
            )
            assert len({len(row) for row in found[-1]}) == 1
    return found


def test_the_ranker_that_runs_today_has_a_row_and_a_column():
    """Where the log has its scores; the differences are the file's."""
    made = result()
    own = copy.deepcopy(made["baselines"][0]) | {"name": "my_ranker", "auc": 0.61}
    made["baselines"].append(own)
    gap = {"baseline": "my_ranker", "value": 0.0321, "interval": ABOVE}
    made["own_differences"] = {"exit 6": gap, "plan": gap, "baseline gbdt": gap}
    heading, *rows = tables(render(made))[0]
    assert heading[-1] == "minus my_ranker"
    shown = {row[0].split(" (")[0]: row[-1] for row in rows}
    assert shown.pop("baseline my_ranker") == ""
    beside = {name for name, cell in shown.items() if cell == difference(gap)}
    assert beside == {"exit 6", "plan", "best baseline gbdt"}


def test_metrics_by_session():
    row = {"sessions": 1234, "ndcg": 0.5, "mrr": 0.25, "hits": 0.75, "gauc": None}
    text = render(result() | {"sessions": {"plan": row}})
    assert "| plan | .5000 | .2500 | .7500 | undefined |" in text
    assert "the 1,234 sessions" in text


def test_clock_of_another_protocol_is_not_shown(tmp_path):
    path = RESULTS / "whole_backbone_alone" / "benchmark.json"
    timed = read_result(path)
    timed["protocol"]["hash"] = "other"
    (tmp_path / "benchmark.json").write_text(json.dumps(timed))
    file = read_result(path.parent / "test.json")
    assert "on a clock" in render(file, path.parent)
    assert "on a clock" not in render(file, tmp_path)


def test_slices_by_item():
    """n, AUC of baseline, exit 0, deepest exit and plan; a slice without rows is left out."""

    def part(name, n, auc):
        scores = dict.fromkeys(("exit 0", "exit 6", "baseline gbdt", "plan"), auc)
        return {"name": name, "split": "test", "fold": None, "n": n, "auc": scores}

    made = result() | {
        "slices": [
            part("warm_users", 9, 0.1),
            part("item_1_5", 1200, 0.71),
            part("item_21_plus", 0, None),
        ]
    }
    _, *rows = tables(render(made))[1]
    assert [row[1:] for row in rows] == [["1,200", *[".7100"] * 4]]


def test_criteria_beside_static_exits():
    """At AUC .745 the shallowest static exit of no lower AUC is 4; none reaches .76; the oracle at .4, not .9."""
    step = {"mean_depth": 3.0, "auc_drop": 0.0}
    static = [
        step | {"layer": k, "cost": k / 6, "auc": a}
        for k, a in ((0, 0.7), (4, 0.75), (6, 0.75))
    ]
    oracle = [step | {"cost": c, "auc": 0.76} for c in (0.9, 0.4)]
    used = {
        "criterion": "ratio",
        "chosen_step": 1,
        "pareto": [{}, step | {"cost": 0.45, "auc": 0.745}],
    }
    controls = {"fixed_depth": static, "oracle": oracle}
    rows = criteria_rows({"policies": [used], "chosen": "ratio", "controls": controls})
    assert [row.name for row in rows] == ["ratio (the plan's)", "oracle (control)"]
    assert [row.static and row.static["layer"] for row in rows] == [4, None]
    assert rows[1].step["cost"] == 0.4


def seeded(gain, seed=0, digest="h"):
    made = result()
    made["seed"], made["protocol"]["hash"] = seed, digest
    made["baseline_difference"] = {
        "value": gain,
        "interval": [gain - 0.002, gain + 0.002],
        "baseline": "gbdt",
    }
    return made


def test_seeds_beside_each_other():
    """A row a run; the spread over seeds of one folder and hash: .010, .012, .017 have mean .013 and sd sqrt(13e-6)."""
    runs = {
        f"a/test-{k}.json": seeded(gain, k) for k, gain in enumerate((0.010, 0.012, 0.017))
    }
    text = render_beside(
        runs | {"b/test.json": seeded(0.5), "a/user.json": seeded(0.1, digest="bbbb")}
    )
    _, *rows = tables(text)[0]
    assert [row[3] for row in rows][:2] == [
        "+.0100 [+.0080, +.0120]",
        "+.0120 [+.0100, +.0140]",
    ]
    (line,) = (line for line in text.splitlines() if "on average" in line)
    assert "+.0130 on average, +.0100 to +.0170, standard deviation .0036" in line
    with pytest.raises(ConfigError, match=r"a/baselines\.json is a result of baselines"):
        render_beside(
            {"a/baselines.json": {"command": "baselines", "protocol": {"hash": "h"}}}
        )


KINDS = [
    "whole_backbone_alone/benchmark.json",
    "no_neighbours/compare.json",
    "ml100k_quickstart/fit.json",
    "ml100k_quickstart/calibrate.json",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(name):
    text = render(read_result(RESULTS / name), (RESULTS / name).parent)
    assert all(len(table[0]) <= 9 for table in tables(text))
    assert tables(text)
    assert "None" not in text
    assert "Protocol " in text.splitlines()[-1]


def test_few_users_are_said_to_cover_what_was_measured():
    """The worst of four worlds by number of users; more than these users need no sentence."""
    rows = read_result(RESULTS / "intervals.json")["rows"]
    for users, share in COVERED.items():
        assert (
            round(min(row["percentile"] for row in rows if row["users"] == users), 2)
            == share
        )
    assert few_users(301) == ""
    assert "of 300 users" in few_users(300)
    assert "intervals of 79 users cover less" in few_users(79)
    assert "of at most 300 users" in few_users(None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_show_what_result_files_hold(document):
    text = document.read_text()
    assert TABLE.search(text)
    assert fill_tables(text, document.parent) == text
    assert not re.search(r"^\|.*\.\d", TABLE.sub("", text), re.MULTILINE)


def test_the_headline_is_the_best_ten_of_64(tmp_path):
    """Beside full depth and every static exit, one request and eight at once; else none."""
    about = {
        "candidates": 64,
        "prefix_cached": True,
        "history": None,
        "at_once": 1,
        "dtype": "float32",
    }
    made = [
        about
        | {
            "engine": name,
            "overlap": overlap,
            "ndcg": 0.3,
            "mean_depth": depth,
            "measured_speedup": 6 / depth,
            "measured_speedup_interval": None,
        }
        for name, overlap, depth in (
            ("packed", 1.0, 6),
            ("fixed_depth_2", 0.9, 2),
            ("fixed_depth_4", 0.976, 4),
            ("fixed_depth_5", 0.99, 5),
            ("early_exit", 1.0, 6),
            ("top_k", 0.98, 1.5),
        )
    ]
    eight = made[-1] | {"at_once": 8, "measured_speedup": 5.0}
    rows = list_rows([*made, eight])
    names = [row["engine"] for row, _ in rows]
    assert names == ["packed", "fixed_depth_5", "fixed_depth_4", "fixed_depth_2", "top_k"]
    assert [more for _, more in rows] == [None] * 4 + [eight]
    assert list_rows([eight, made[-1] | {"candidates": 100}, *made[:5]]) == []
    own = result()
    file = {
        "schema_version": own["schema_version"],
        "command": "benchmark",
        "protocol": own["protocol"],
        "rows": [*made, eight],
    }
    (tmp_path / "benchmark.json").write_text(json.dumps(file))
    found = render(own, tmp_path, short=True)
    assert "| **lists** | .980 | .300 | x4.00 | x5.00 |" in found
    assert "| exit 4 | .976 | .300 | x1.50 |" in found


def test_markers_and_command_line(tmp_path, capsys):
    for k in (0, 1):
        (tmp_path / f"test-{k}.json").write_text(json.dumps(seeded(0.01 + k / 100, k)))
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- table test-0.json -->\nold\n<!-- end of table -->\nb\n"
                        "<!-- table test-0.json test-1.json -->\nold\n<!-- end of table -->\n")  # fmt: skip
    print_tables(["--into", str(document)])
    filled = document.read_text()
    assert "old" not in filled
    assert fill_tables(filled, tmp_path) == filled
    print_tables([str(tmp_path / "test-0.json"), "--stages"])
    print_tables(["--beside", *(str(tmp_path / f"test-{k}.json") for k in (0, 1))])
    printed = capsys.readouterr().out.replace(f"{tmp_path}/", "")
    assert all(table in tables(printed) for table in tables(filled))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--into"], "Markdown file"),
        ([], "found none"),
        (["--stagess", "test.json"], "--stagess"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ConfigError, match=words):
        print_tables(arguments)
