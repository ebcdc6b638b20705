"""Result files as tables in Markdown, and the sentence that says what to deploy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich.markdown import Markdown

from project.errors import ConfigError
from project.report.format import environment, tidy
from project.run import read_result, replace_file

Row = Mapping[str, Any]
Result = Mapping[str, Any]

TOLERANCE = 0.002  # of AUC: as near as the static exit of equal accuracy is to the best one
# other commands show validation's tune fold
REPORTED = {"test": ("test", None), "baselines": ("test", None)}
TABLE = re.compile(
    r"(?P<start><!-- table (?P<short>short )?(?P<files>\S+(?: \S+)*?) -->)\n.*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)
BESIDE = 64  # candidates of the timed requests that stand beside AUCs


@dataclass(frozen=True)
class Answer:
    """The decision: "plan" and "exit" deploy the LLM, "no_llm" does not, "undecided" where a number is missing."""

    # baselines: no exit was scored
    kind: Literal["plan", "exit", "no_llm", "undecided", "baselines"]
    instead: str = ""  # no_llm: what to deploy, "exit 0" or the best baseline's name
    # no_llm: `instead` is as good, better or within the budget; "not better": the LLM's
    # lead is above TOLERANCE, but
    # its interval holds 0
    how: Literal["", "as good", "better", "not better", "budget"] = ""
    layer: int | None = None  # exit: the one to deploy
    # what would be deployed (no_llm: the LLM's best) minus the best baseline
    gain: Row | None = None
    # exit: whether `gain` is of the exit calibrated with exit 0, else as trained
    calibrated: bool = False


def decide(result: Result, rows: Sequence[Row] = ()) -> Answer:
    """The decision on a result of `fit`, `validate`, `test` or `calibrate`; a clock in `rows` says what is faster."""
    if not result.get("exits"):
        return Answer("baselines")
    plan: Row = result.get("adaptive") or {}
    gain = (plan or result).get("baseline_difference")
    if not gain or not gain["interval"]:
        return Answer("undecided", gain=gain)
    static: Row = plan.get("static_exit") or {}
    # 1. the plan runs no layer
    if plan and plan["mean_depth"] == 0:
        loses = (plan.get("auc_drop") or 0) > TOLERANCE and _above(
            plan.get("auc_drop_interval")
        )
        return Answer("no_llm", "exit 0", "budget" if loses else "as good", gain=gain)
    # 2. the plan is not shown better than the best baseline: maybe the best static exit is
    if not _above(gain["interval"]):
        with_exit_0: Row = (result.get("chosen_exit_by_exit_0") or {}).get(
            "with_exit_0"
        ) or {}
        for of, calibrated in ((with_exit_0, True), (result, False)):
            if _above((better := of.get("baseline_difference") or {}).get("interval")):
                return Answer(
                    "exit", layer=result["chosen_exit"], gain=better, calibrated=calibrated
                )
        if gain["interval"][1] < 0:
            return Answer("no_llm", gain["baseline"], "better", gain=gain)
        instead = "exit 0" if static.get("layer") == 0 else gain["baseline"]
        return Answer(
            "no_llm",
            instead,
            "as good" if gain["value"] <= TOLERANCE else "not better",
            gain=gain,
        )
    if not plan:
        return Answer("exit", layer=result["chosen_exit"], gain=gain)
    # 3. the plan is better than the best baseline: it must beat the static exit of equal
    # accuracy, too
    bounds = static.get("auc_gain_interval")
    if bounds is None:
        return Answer("undecided", gain=gain)
    clocks = {
        row["depth"] if row["name"] != "plan" else "plan": row["clock"]
        for row in rows
        if row.get("clock")
    }
    timed = clocks.keys() >= {"plan", static["layer"]}
    faster = (
        clocks["plan"] > clocks[static["layer"]]
        if timed
        else plan["speedup_over_static"]["value"] > 1
    )
    cheaper = faster and not bounds[1] < 0
    if _above(bounds) or (cheaper and static["layer"] > 0):
        return Answer("plan", gain=gain)
    if static["layer"] == 0:
        return Answer("no_llm", "exit 0", "as good", gain=gain)
    own: Row = next((row for row in result["exits"] if row["layer"] == static["layer"]), {})
    return Answer("exit", layer=static["layer"], gain=own.get("baseline_difference"))


def _above(bounds: Sequence[float] | None) -> bool:
    return bounds is not None and bounds[0] > 0


def render(result: Result, folder: Path | None = None, short: bool = False) -> str:
    """Markdown of a result file of any command; a benchmark.json of the same protocol in `folder` adds times.

    `short`, of a run's scores: four rows, four columns and one sentence.
    """
    made: Any = environment().get_template("tables.md.j2").module
    if result["command"] in ("benchmark", "compare", "study"):
        return tidy(getattr(made, result["command"])(result))
    split, fold = REPORTED.get(result["command"], ("valid", "tune"))
    timed: Sequence[Row] = ()
    if folder is not None and (path := folder / "benchmark.json").is_file():
        benchmark = read_result(path)
        if benchmark["protocol"]["hash"] == result["protocol"]["hash"]:
            timed = benchmark.get("rows", [])
    parts: dict[str, Any] = {
        "rows": score_rows(result, split, fold, timed),
        "slices": [
            s
            for s in slice_rows(result, split, fold)
            if s["name"].startswith(("item_", "hidden_"))
        ],
        "rows_are": rows_in_words(split),
    }
    form = made.short if short else made.scores
    return tidy(form(result, decide(result, parts["rows"]), parts))


def render_beside(results: Mapping[str, Result]) -> str:
    """Markdown of `test` results by name: a row a run, and a line for runs of one folder and protocol by seed."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for name, result in results.items():
        if result["command"] != "test" or not result.get("exits"):
            raise ConfigError(
                f"{name} is a result of {result['command']}: expected results/test.json of runs."
            )
        groups.setdefault((name.rpartition("/")[0], result["protocol"]["hash"]), []).append(
            result
        )
    several = {
        folder: rs for (folder, _), rs in groups.items() if len({r["seed"] for r in rs}) > 1
    }
    spreads = [
        {
            "folder": folder,
            "seeds": [r["seed"] for r in rs],
            "mean": mean(values),
            "sd": stdev(values),
        }
        | {"range": [min(values), max(values)]}
        for folder, rs in several.items()
        for values in [[r["baseline_difference"]["value"] for r in rs]]
    ]
    made: Any = environment().get_template("tables.md.j2").module
    return tidy(made.beside(results, spreads))


def render_seconds(result: Result) -> str:
    """Markdown: where the seconds of a run went, longest first, with their sum."""
    made: Any = environment().get_template("tables.md.j2").module
    return tidy(made.seconds(result))


def print_tables(arguments: list[str]) -> None:
    """The command `table`.

    `table FILE... [--stages]` prints result files as Markdown, with --stages also where the time went; `--beside` makes
    one table of several runs; `table --into README.md` renews a document's tables.
    """
    if arguments[:1] == ["--into"]:
        document = Path(*arguments[1:2])
        if not document.is_file():
            raise ConfigError(
                f"table --into needs a Markdown file to renew; found {' '.join(arguments[1:]) or 'none'}."
            )
        text = fill_tables(document.read_text(encoding="utf-8"), document.parent)
        replace_file(document, lambda part: part.write_text(text, encoding="utf-8"))
        return
    names = [a for a in arguments if not a.startswith("--")]
    if unknown := set(arguments) - {*names, "--stages", "--beside"}:
        raise ConfigError(
            f"table knows --stages, --beside and --into; found {' '.join(sorted(unknown))}."
        )
    if not names:
        raise ConfigError(
            "table needs result files, such as runs/quickstart/latest/results/test.json, or --into and a document; "
            "found none."
        )
    if "--beside" in arguments:
        print(render_beside({name: read_result(Path(name)) for name in names}))
        return
    for path in map(Path, names):
        result = read_result(path)
        print(f"### {result['command']}\n\n{render(result, path.parent)}")
        if "--stages" in arguments and "stage_seconds" in result:
            print(render_seconds(result))


def fill_tables(text: str, folder: Path) -> str:
    """The document with every `<!-- table FILE -->...<!-- end of table -->` made anew from result files in `folder`.

    Where a marker names several files, they stand beside each other, a row each. `table short FILE` makes four rows.
    """

    def block(found: re.Match[str]) -> str:
        results = {name: read_result(folder / name) for name in found["files"].split()}
        (name, first), *more = results.items()
        text = (
            render_beside(results)
            if more
            else render(first, (folder / name).parent, bool(found["short"]))
        )
        return f"{found['start']}\n{text}{found['end']}"

    return TABLE.sub(block, text)


def shown(text: str) -> Markdown:
    """Markdown for a terminal."""
    return Markdown(text)


def rows_in_words(split: str) -> str:
    """What the numbers are of."""
    return "test" if split == "test" else "the tune fold of validation"


def rows_of(rows: Sequence[Row], split: str, fold: str | None) -> list[Row]:
    """Rows of a result file's list that are about one split, or one fold of validation."""
    return [row for row in rows if row["split"] == split and row.get("fold") == fold]


def score_rows(
    result: Result, split: str, fold: str | None, timed: Sequence[Row] = ()
) -> list[Row]:
    """The main table: best baseline, exits, plan, and the static exits that the plan must beat.

    Rows of `name`, `auc`, `interval`, `log_loss`, `gain` ({`value`, `interval`} over the best baseline), `depth`,
    `saved` (token-layers of full depth over its own), `clock` (the same in seconds, from the rows of a benchmark
    result); None: no such number.
    """
    exits = rows_of(result.get("exits", []), split, fold)
    baselines = rows_of(result.get("baselines", []), split, fold)
    kind, best = "baseline", baselines
    if exits:
        kind, best = (
            "best baseline",
            [r for r in baselines if r["name"] == result.get("best_baseline")],
        )
    found: list[Row] = [
        {"name": f"{kind} {row['name']}", **_scores_of(row)} for row in best
    ]
    deepest = max((row["layer"] for row in exits), default=0)
    for row in exits:
        k = row["layer"]
        notes = ["best static exit"] if k == result.get("chosen_exit") else []
        notes += ["full depth"] if k == deepest else []
        name = f"exit {k}" + (f" ({', '.join(notes)})" if notes else "")
        found.append({"name": name, **_scores_of(row), **_static_cost(k, deepest, timed)})
    if exits and (plan := result.get("adaptive")):
        found += plan_rows(plan, exits, timed)
    return found


def plan_rows(
    plan: Row, exits: Sequence[Row], timed: Sequence[Row] = (), name: str = "plan"
) -> list[Row]:
    """A plan (`adaptive`, or its `without_exit_0`), then the static exits of equal accuracy and of equal cost."""
    deepest = max(row["layer"] for row in exits)
    clock = _clock(timed, "early_exit", plan["criterion"])
    cost = {
        "depth": plan["mean_depth"],
        "saved": plan["token_layer_speedup"],
        "clock": clock,
    }
    found: list[Row] = [{"name": name, **_scores_of(plan), **cost}]
    if plan["mean_depth"] == 0:  # the plan is exit 0
        return found
    static: dict[int, dict[str, float | None]] = {}  # layer -> what is equal: its AUC
    for key, of in (("static_exit", "accuracy"), ("equal_cost", "cost")):
        if plan.get(key):
            static.setdefault(plan[key]["layer"], {})[of] = plan[key]["auc"]
    for k, aucs in static.items():
        calibrated = next(
            (row.get("calibrated") or {} for row in exits if row["layer"] == k), {}
        )
        scores = {"auc": next(iter(aucs.values())), "log_loss": calibrated.get("log_loss")}
        made = {"name": f"exit {k}, of equal {' and '.join(aucs)}", **_scores_of(scores)}
        found.append({**made, **_static_cost(k, deepest, timed)})
    return found


def slice_rows(result: Result, split: str, fold: str | None) -> list[Row]:
    """AUC by slice: `name`, `n`, `baseline`, `exit_0`, `deepest`, `plan`, and `depth`, the plan's mean depth there."""
    found: list[Row] = []
    for part in rows_of(result.get("slices", []), split, fold):
        if part["n"] == 0:  # nothing is defined there
            continue
        layers = {row["layer"]: row for row in part["rows"] if "layer" in row}
        named = {row["name"]: row for row in part["rows"] if "name" in row}
        plan: Row = next((row for row in part["rows"] if row.get("plan")), {})
        found.append(
            {
                "name": part["name"],
                "n": part["n"],
                "baseline": named.get(result.get("best_baseline")),
                "exit_0": layers.get(0),
                "deepest": layers[max(layers)] if max(layers, default=0) else None,
                "plan": plan,
                "depth": plan.get("mean_depth"),
            }
        )
    return found


def criteria_rows(calibrate: Result) -> list[Row]:
    """Every criterion at its chosen step on tune, beside the shallowest static exit of no lower AUC (`static`).

    Random and oracle stand at the step whose cost is nearest to the plan's. Rows of `name`, `step` ({`cost`,
    `mean_depth`, `auc`, `auc_drop`}) and `static`, such a step of a static exit.
    """
    controls = {
        control["name"]: control["pareto"] for control in calibrate.get("controls", [])
    }
    static = controls.pop("fixed_depth", [])
    found, cost = [], 1.0
    for policy in calibrate.get("policies", []):
        step, used = step_of(policy), policy["criterion"] == calibrate.get("chosen")
        cost = step.get("cost", 1.0) if used else cost
        found.append(
            {"name": policy["criterion"] + (" (the plan's)" if used else ""), "step": step}
        )
    for name, steps in controls.items():
        if steps:
            nearest = min(steps, key=lambda s: abs(s["cost"] - cost))
            found.append({"name": f"{name} (control)", "step": nearest})

    def as_accurate(auc: float | None) -> Row | None:
        return next(
            (
                s
                for s in static
                if auc is not None and s["auc"] is not None and s["auc"] >= auc
            ),
            None,
        )

    return [{**row, "static": as_accurate(row["step"].get("auc"))} for row in found]


def step_of(policy: Row) -> Row:
    """The step that a criterion was set to; empty where none was."""
    index = policy.get("chosen_step")
    return policy["pareto"][index] if index is not None else {}


def _scores_of(row: Row) -> dict[str, Any]:
    by_rows, by_users = (row.get(name) or {} for name in ("gauc_impressions", "uauc"))
    return {
        "auc": row.get("auc"),
        "interval": row.get("auc_interval"),
        "user_aucs": (by_rows.get("value"), by_users.get("value")) if by_rows else None,
        "log_loss": row.get("log_loss"),
        "gain": row.get("baseline_difference"),
        "depth": None,
        "saved": None,
        "clock": None,
    }


def _static_cost(layer: int, deepest: int, timed: Sequence[Row]) -> dict[str, Any]:
    engine = "packed" if layer == deepest else f"fixed_depth_{layer}"
    return {
        "depth": layer,
        "saved": deepest / layer if layer else None,
        "clock": _clock(timed, engine),
    }


def _clock(timed: Sequence[Row], engine: str, criterion: str | None = None) -> float | None:
    """Seconds of full depth over this contender's: one request of 64 candidates (else the most), not cached."""
    keys = ("at_once", "history", "dtype", "prefix_cached")
    plain = [
        row
        for row in timed
        if tuple(row[key] for key in keys) == (1, None, "float32", False)
    ]
    sizes = {row["candidates"] for row in plain}
    size = BESIDE if BESIDE in sizes else max(sizes, default=0)
    found = (
        row["measured_speedup"]
        for row in plain
        if (row["candidates"], row["engine"]) == (size, engine)
        and (criterion is None or row["policy"] == f"budget: {criterion}")
    )
    return next(found, None)
