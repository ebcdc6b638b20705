"""Tables hold the files' numbers, formatted; speed-ups stand beside the static exit of equal accuracy."""

import copy
import json
import re
from pathlib import Path

import pytest
from example_result import AROUND, result

from project.errors import ConfigError, DataError
from project.report.format import difference, interval, number, times
from project.report.tables import (
    criteria_rows,
    fill_tables,
    print_tables,
    render,
    render_beside,
    render_seconds,
)
from project.run import read_result

RESULTS = Path(__file__).parents[2] / "results"


def tables(text):
    """Every table of a Markdown text: rows of cells, header first."""
    found, lines = [], text.splitlines()
    for k, line in enumerate(lines):
        if line.startswith("| ---"):
            end = next((n for n in range(k, len(lines)) if not lines[n].startswith("|")), len(lines))
            rows = [lines[k - 1], *lines[k + 1 : end]]
            found.append([[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows])
            assert len({len(row) for row in found[-1]}) == 1
    return found


def test_main_table_is_the_file():
    """Cells of every exit, the best baseline and the plan equal the file's formatted values; no other baseline."""
    path = RESULTS / "whole_backbone_alone" / "test.json"
    file, timed = read_result(path), read_result(path.parent / "benchmark.json")
    header, *rows = tables(render(file, path.parent))[0]
    assert len(header) <= 9
    by_name = {row[0]: row for row in rows}
    best = next(row for row in file["baselines"] if row["name"] == file["best_baseline"])
    assert by_name[f"best baseline {best['name']}"][1:4] == [
        number(best["auc"]), interval(best["auc_interval"]), number(best["log_loss"])]  # fmt: skip
    assert not any("lr_rates" in name for name in by_name)
    for row in file["exits"]:
        shown = next(
            cells for name, cells in by_name.items() if name.split(" (")[0] == f"exit {row['layer']}"
        )
        assert shown[1:6] == [number(row["auc"]), interval(row["auc_interval"]), number(row["log_loss"]),
                              difference(row["baseline_difference"]), str(row["layer"])]  # fmt: skip
        assert shown[6] == (times(30 / row["layer"]) if row["layer"] else "")
    plan, static_exit = file["adaptive"], file["adaptive"]["static_exit"]
    clock = {row["engine"]: times(row["measured_speedup"]) for row in reversed(timed["rows"])
             if (row["prefix_cached"], row["history"]) == (False, None) and "learned" not in row["policy"]
             and (row["engine"] != "early_exit" or row["policy"].startswith("budget: "))}  # fmt: skip
    assert by_name["plan"][1] == number(plan["auc"])
    assert by_name["plan"][5:] == [
        number(plan["mean_depth"], 2),
        times(plan["token_layer_speedup"]),
        clock["early_exit"],
    ]
    after = rows[rows.index(by_name["plan"]) + 1]  # the row next to a speed-up
    assert after[0] == f"exit {static_exit['layer']}, of equal accuracy"
    assert after[5:] == [
        str(static_exit["layer"]),
        times(30 / static_exit["layer"]),
        clock[f"fixed_depth_{static_exit['layer']}"],
    ]


def test_clock_of_another_protocol_is_not_shown(tmp_path):
    """A benchmark of another hash beside the file gives no column."""
    path = RESULTS / "whole_backbone_alone" / "benchmark.json"
    timed = read_result(path)
    timed["protocol"]["hash"] = "other"
    (tmp_path / "benchmark.json").write_text(json.dumps(timed))
    file = read_result(path.parent / "test.json")
    assert "on a clock" in render(file, path.parent)
    assert "on a clock" not in render(file, tmp_path)


def test_slices_by_item():
    """n, AUC of baseline, exit 0, deepest exit and plan, and its depth; a slice without rows says undefined."""

    def part(name, n, auc, depth):
        who = [
            {"layer": 0},
            {"layer": 6},
            {"name": "gbdt"},
            {"name": "other"},
            {"plan": True, "mean_depth": depth},
        ]
        return {"name": name, "split": "test", "n": n, "rows": [w | {"auc": auc} for w in who]}

    made = result() | {"slices": [part("warm_users", 9, 0.1, 1), part("item_1_5", 1200, 0.71, 2.5),
                                  part("item_21_plus", 0, None, None)]}  # fmt: skip
    header, *rows = tables(render(made))[1]
    assert header[1:] == ["n", "best baseline (gbdt)", "exit 0", "deepest exit", "plan", "its mean depth"]
    assert rows == [
        ["item rated 1 to 5 times before", "1,200", ".7100", ".7100", ".7100", ".7100", "2.50"],
        ["item rated 21 or more times before", "0", "undefined", "undefined", "undefined", "undefined", "–"],
    ]


def test_baselines_alone_and_warnings():
    """A result of `baselines` shows all of them; warnings of a file stand under the answer."""
    made = {
        k: v
        for k, v in result().items()
        if k in ("command", "protocol", "baselines", "best_baseline", "schema_version")
    }
    made |= {"command": "baselines", "warnings": ["every vote is .5 *always*"]}
    made["baselines"] = [*made["baselines"], made["baselines"][0] | {"name": "item_rate"}]
    text = render(made)
    assert [row[0] for row in tables(text)[0][1:]] == ["baseline gbdt", "baseline item_rate"]
    assert text.splitlines()[2] == "* Warning: every vote is .5 \\*always\\*"


def test_criteria_beside_static_exits():
    """At AUC .745 the shallowest static exit of no lower AUC is 4; none reaches .76; the oracle at .4, not .9."""
    step = {"mean_depth": 3.0, "auc_drop": 0.0}
    static = [step | {"layer": k, "cost": k / 6, "auc": a} for k, a in ((0, 0.7), (4, 0.75), (6, 0.75))]
    oracle = [step | {"cost": c, "auc": 0.76} for c in (0.9, 0.4)]
    used = {"criterion": "ratio", "chosen_step": 1, "pareto": [{}, step | {"cost": 0.45, "auc": 0.745}]}
    policies = [used, {"criterion": "learned", "pareto": []}]
    controls = [{"name": "fixed_depth", "pareto": static}, {"name": "oracle", "pareto": oracle}]
    rows = criteria_rows({"policies": policies, "chosen": "ratio", "controls": controls})
    assert [row["name"] for row in rows] == ["ratio (the plan's)", "learned", "oracle (control)"]
    assert [row["static"] and row["static"]["layer"] for row in rows] == [4, None, None]
    assert rows[2]["step"]["cost"] == 0.4


def seeded(gain, seed=0, digest="h"):
    made = result()
    made["seed"], made["protocol"]["hash"] = seed, digest
    made["baseline_difference"] = {
        "value": gain,
        "interval": [gain - 0.002, gain + 0.002],
        "baseline": "gbdt",
        "layer": 6,
    }
    return made


def test_beside():
    """A row a run; the spread over seeds of one folder and hash: .010, .012, .017 have mean .013 and sd sqrt(13e-6)."""
    runs = {f"a/test-{k}.json": seeded(gain, k) for k, gain in enumerate((0.010, 0.012, 0.017))}
    text = render_beside(runs | {"b/test.json": seeded(0.5), "a/user.json": seeded(0.1, digest="bbbb")})
    header, *rows = tables(text)[0]
    assert len(header) == 9
    assert [row[4] for row in rows][:2] == ["+.0100 [+.0080, +.0120]", "+.0120 [+.0100, +.0140]"]
    assert rows[0][-1] == "exit 4: x1.50"
    (line,) = (line for line in text.splitlines() if "seeds" in line)
    assert "+.0130 on average, +.0100 to +.0170, standard deviation .0036" in line
    bare = seeded(0.01)
    del bare["adaptive"]
    assert tables(render_beside({"a/test.json": bare}))[0][1][5:] == ["–"] * 4
    with pytest.raises(ConfigError, match=r"a/baselines\.json is a result of baselines"):
        render_beside({"a/baselines.json": {"command": "baselines", "protocol": {"hash": "h"}}})


@pytest.mark.parametrize(
    "name",
    [
        "whole_backbone_alone/benchmark.json",
        "retrieval/benchmark.json",
        "ml100k_quickstart/benchmark-packing.json",
        "no_neighbours/compare.json",
        "ml100k_quickstart/fit.json",
        "ml100k_quickstart/calibrate.json",
        "ml100k_quickstart/test-seed-1.json",
    ],
)
def test_every_kind_of_file(name):
    """At least one table of at most nine columns, no number missing, the protocol's hash below."""
    file = read_result(RESULTS / name)
    text = render(file, (RESULTS / name).parent)
    assert all(len(table[0]) <= 9 for table in tables(text))
    assert tables(text)
    assert "None" not in text
    assert text.splitlines()[-1].startswith("Protocol ")


def test_benchmark_cells():
    """Measured and over the static exit of equal accuracy stand in one row; policies of another question do not."""
    file = read_result(RESULTS / "whole_backbone_alone" / "benchmark.json")
    _, *rows = tables(render(file))[0]
    row = next(r for r in file["rows"] if r["policy"] == "budget: drift_head")
    assert [
        f"{row['candidates']}, {'cached' if row['prefix_cached'] else 'not cached'}",
        "early_exit, budget: drift_head",
        number(row["auc"]),
        number(row["mean_depth"], 2),
        times(row["token_layer_speedup"]),
        times({"value": row["measured_speedup"], "interval": row["measured_speedup_interval"]}),
        times(row["speedup_over_static"]["value"]),
        number(row["efficiency"], 2),
        number(row["p95_ms"], 0),
    ] in rows
    statics = {row[1] for row in rows if row[1].startswith("static")}
    assert statics == {"static exit 24 (of equal accuracy)"}
    assert not any("leave at each exit" in row[1] for row in rows)


def test_seconds():
    """Longest first, shares of 1,250 s: 92, 6 and 2 %; nothing measured divides nothing."""
    text = render_seconds({"stage_seconds": {"test": 75.0, "fit": 1150.0, "retrieved": 25.0}})
    shares = [["fit", "1,150.0", "92.0 %"], ["test", "75.0", "6.0 %"], ["retrieved", "25.0", "2.0 %"]]
    assert tables(text)[0][1:] == [*shares, ["total", "1,250.0", ""]]
    assert tables(render_seconds({"stage_seconds": {}}))[0][1:] == [["total", "0.0", ""]]


def test_markers_and_command_line(tmp_path, capsys):
    """A marker with a file, or with several, is filled with what `table` and `table --beside` print."""
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
        (["--into"], "needs a Markdown file to renew; found none"),
        ([], r"table needs result files, such as .*test\.json.*found none"),
        (["--stagess", "test.json"], "found --stagess"),
    ],
)
def test_bad_arguments(arguments, words):
    """What `table` cannot do is said in one line."""
    with pytest.raises(ConfigError, match=words):
        print_tables(arguments)


def test_a_result_without_a_command(tmp_path):
    """A file with nothing but a version names what it lacks."""
    (tmp_path / "a.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match=r"a\.json has no command and no protocol"):
        print_tables([str(tmp_path / "a.json")])


def test_markup_in_names_is_text():
    """Names of protocol, baseline and run cannot bring an image, a tag or a cell."""
    evil = "![x](http://evil) <script> |"
    made = copy.deepcopy(result(gain=AROUND))
    made["protocol"]["name"] = made["best_baseline"] = made["baselines"][0]["name"] = evil
    made["adaptive"]["baseline_difference"]["baseline"] = evil
    text = render(made)
    assert "<script" not in text
    assert "![" not in text
    assert tables(text)
