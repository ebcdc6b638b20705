"""Result files as tables in Markdown, and the sentence that says what to deploy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple, TypeVar, cast

from project.errors import ConfigError
from project.report.format import environment, tidy
from project.results import (
    BaselineRow,
    CalibrateResult,
    Difference,
    EngineRow,
    ExitRow,
    MomentRow,
    PlanRow,
    Point,
    Result,
    ScoredResult,
    Where,
)
from project.run import read_result, replace_file

TOLERANCE = 0.002  # of AUC: as near as the static exit of equal accuracy is to the best one
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
    # lead is above TOLERANCE, but its interval holds 0
    how: Literal["", "as good", "better", "not better", "budget"] = ""
    layer: int | None = None  # exit: the one to deploy
    # what would be deployed (no_llm: the LLM's best) minus the best baseline
    gain: Difference | None = None
    # exit: whether `gain` is of the exit calibrated with exit 0, else as trained
    calibrated: bool = False


class Line(NamedTuple):
    """A row of the main table; None: no such number."""

    name: str
    auc: float | None
    interval: Sequence[float] | None = None
    inside: MomentRow | None = None  # of a user's rows at one moment
    log_loss: float | None = None
    gain: Difference | None = None  # over the best baseline
    own_gain: Difference | None = None  # over the ranker of the log's own_scores
    depth: float | None = None
    saved: float | None = None  # token-layers of full depth over its own
    clock: float | None = None  # the same in seconds, from a benchmark result


def decide(result: ScoredResult, rows: Sequence[Line] = ()) -> Answer:
    """The decision on a result of `fit`, `validate` or `test`; a clock in `rows` says what is faster."""
    if not result["exits"]:
        return Answer("baselines")
    plan = result["adaptive"]
    chosen = result["chosen_exit"]
    gain = result["baseline_difference"] if plan is None else plan["baseline_difference"]
    if gain is None or gain["interval"] is None or gain["value"] is None:
        return Answer("undecided", gain=gain)
    # 1. the plan runs no layer
    if plan is not None and plan["mean_depth"] == 0:
        loses = (plan["auc_drop"] or 0) > TOLERANCE and _above(plan["auc_drop_interval"])
        return Answer("no_llm", "exit 0", "budget" if loses else "as good", gain=gain)
    # 2. the plan is not shown better than the best baseline: maybe the best static exit is
    if not _above(gain["interval"]):
        for better in (result["with_exit_0"], result["baseline_difference"]):
            if better is not None and _above(better["interval"]):
                calibrated = better is result["with_exit_0"]
                return Answer("exit", layer=chosen, gain=better, calibrated=calibrated)
        if gain["interval"][1] < 0:
            return Answer("no_llm", gain["baseline"], "better", gain=gain)
        near = plan is not None and plan["static_exit"]["layer"] == 0
        how: Literal["as good", "not better"] = "not better"
        if gain["value"] <= TOLERANCE:
            how = "as good"
        return Answer("no_llm", "exit 0" if near else gain["baseline"], how, gain=gain)
    if plan is None:
        return Answer("exit", layer=chosen, gain=gain)
    if plan["criterion"] == "static_exit":
        return Answer("plan", gain=gain)
    # 3. the plan is better than the best baseline: it must beat the static exit of equal
    # accuracy, too
    bounds = plan["static_exit"]["auc_gain_interval"]
    if bounds is None:
        return Answer("undecided", gain=gain)
    static = plan["static_exit"]["layer"]
    clocks = {
        "plan" if row.name == "plan" else row.depth: row.clock
        for row in rows
        if row.clock is not None
    }
    faster = (plan["speedup_over_static"]["value"] or 0) > 1
    if clocks.keys() >= {"plan", static}:
        faster = clocks["plan"] > clocks[static]
    cheaper = faster and not bounds[1] < 0
    if _above(bounds) or (cheaper and static > 0):
        return Answer("plan", gain=gain)
    if static == 0:
        return Answer("no_llm", "exit 0", "as good", gain=gain)
    own = (r["baseline_difference"] for r in result["exits"] if r["layer"] == static)
    return Answer("exit", layer=static, gain=next(own, None))


def _above(bounds: Sequence[float] | None) -> bool:
    return bounds is not None and bounds[0] > 0


def _macros() -> Any:
    """Of the tables, by name."""
    return environment().get_template("tables.md.j2").module


def render(result: Result, folder: Path | None = None, short: bool = False) -> str:
    """Markdown of a result file of any command; a benchmark.json of the same protocol in `folder` adds times.

    `short`, of a run's scores: four rows, four columns and one sentence.
    """
    made = _macros()
    match result["command"]:
        case "calibrate":
            calibrated = cast("CalibrateResult", result)
            return tidy(made.calibrate(calibrated, criteria_rows(calibrated)))
        case "backtest" | "benchmark" | "compare" | "study" as command:
            return tidy(getattr(made, command)(result))
    scored = cast("ScoredResult", result)
    tested = any(row["split"] == "test" for row in scored["baselines"])
    where: tuple[str, str | None] = ("test", None) if tested else ("valid", "tune")
    timed = list[EngineRow]()
    if folder is not None and (path := folder / "benchmark.json").is_file():
        benchmark = read_result(path)
        if benchmark["protocol"]["hash"] == result["protocol"]["hash"]:
            timed = benchmark["rows"]
    lines = score_rows(scored, *where, timed)
    slices = [
        part
        for part in rows_of(scored["slices"], *where)
        if part["n"] and part["name"].startswith(("item_", "hidden_"))
    ]
    about = scored, decide(scored, lines), lines, slices, rows_in_words(where[0])
    return tidy(made.short(*about, list_rows(timed)) if short else made.scores(*about))


class Spread(NamedTuple):
    """Gains of runs of one folder and protocol by seed."""

    folder: str
    seeds: list[int]
    mean: float
    sd: float
    least: float
    most: float


def render_beside(results: Mapping[str, ScoredResult]) -> str:
    """Markdown of `test` results by name: a row a run, and a line for runs of one folder and protocol by seed."""
    groups: dict[tuple[str, str], list[ScoredResult]] = {}
    for name, result in results.items():
        if result["command"] != "test" or not result["exits"]:
            raise ConfigError(
                f"{name} is a result of {result['command']}: expected results/test.json of runs."
            )
        key = name.rpartition("/")[0], result["protocol"]["hash"]
        groups.setdefault(key, []).append(result)
    spreads = list[Spread]()
    for (folder, _), group in groups.items():
        seeds = [result["seed"] for result in group]
        if len(set(seeds)) > 1:
            gains = (result["baseline_difference"] for result in group)
            values = [gain["value"] for gain in gains if gain and gain["value"] is not None]
            ends = min(values), max(values)
            spreads.append(Spread(folder, seeds, mean(values), stdev(values), *ends))
    return tidy(_macros().beside(results, spreads))


def render_seconds(result: ScoredResult) -> str:
    """Markdown: where the seconds of a run went, longest first, with their sum."""
    return tidy(_macros().seconds(result))


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
    if not names or set(arguments) - {*names, "--stages", "--beside"}:
        raise ConfigError(
            "table needs result files, such as runs/quickstart/latest/results/test.json, with --stages or --beside, "
            f"or --into and a document; found {' '.join(arguments) or 'none'}."
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


def rows_in_words(split: str) -> str:
    """What the numbers are of."""
    return "test" if split == "test" else "the tune fold of validation"


Placed = TypeVar("Placed", bound=Where)


def rows_of(rows: Sequence[Placed], split: str, fold: str | None) -> list[Placed]:
    """Rows of a result file's list that are about one split, or one fold of validation."""
    return [row for row in rows if row["split"] == split and row["fold"] == fold]


def score_rows(
    result: ScoredResult, split: str, fold: str | None, timed: Sequence[EngineRow] = ()
) -> list[Line]:
    """The main table: best baseline, exits, plan, and the static exits that the plan must beat."""
    exits = rows_of(result["exits"], split, fold)
    baselines = rows_of(result["baselines"], split, fold)
    best = result["best_baseline"]
    own_gains = result.get("own_differences", {})
    own = {gain["baseline"] for gain in own_gains.values()}
    moment = result.get("moment")
    inside = {} if moment is None else moment["scores"]

    def line(
        name: str, key: str, row: BaselineRow | ExitRow | PlanRow, **more: Any
    ) -> Line:
        """What is known of some scores, whose name in result files is `key`."""
        known = row["auc"], row["auc_interval"], inside.get(key), row["log_loss"]
        return Line(name, *known, own_gain=own_gains.get(key), **more)

    def cost(layer: int) -> dict[str, Any]:
        """Of an exit; the last one is full depth."""
        deepest = exits[-1]["layer"]
        engine = "packed" if layer == deepest else f"fixed_depth_{layer}"
        saved = deepest / layer if layer else None
        return {"depth": layer, "saved": saved, "clock": _clock(timed, engine)}

    found = list[Line]()
    for baseline in baselines:
        name = baseline["name"]
        if not exits or name in (best, *own):
            kind = "best baseline" if exits and name == best else "baseline"
            found.append(line(f"{kind} {name}", f"baseline {name}", baseline))
    for row in exits:
        k = row["layer"]
        notes = ["best static exit"] if k == result["chosen_exit"] else []
        notes += ["full depth"] if row is exits[-1] else []
        name = f"exit {k}" + (f" ({', '.join(notes)})" if notes else "")
        gain = row["baseline_difference"]
        found.append(line(name, f"exit {k}", row, gain=gain, **cost(k)))
    plan = result["adaptive"]
    if not exits or plan is None:
        return found
    found.append(
        line(
            "plan",
            "plan",
            plan,
            gain=plan["baseline_difference"],
            depth=plan["mean_depth"],
            saved=plan["token_layer_speedup"],
            clock=_clock(timed, "early_exit", f"budget: {plan['criterion']}"),
        )
    )
    if plan["mean_depth"] == 0:  # the plan is exit 0
        return found
    static, equal = plan["static_exit"], plan["equal_cost"]
    pairs = [(static, "accuracy"), (equal, "cost")]
    if static["layer"] == equal["layer"]:
        pairs = [(static, "accuracy and cost")]
    calibrated = {row["layer"]: row["calibrated"] for row in exits}
    for beside, of in pairs:
        k = beside["layer"]
        losses = calibrated.get(k)
        loss = losses["log_loss"] if losses else None
        name = f"exit {k}, of equal {of}"
        found.append(Line(name, beside["auc"], log_loss=loss, **cost(k)))
    return found


class Criterion(NamedTuple):
    """A criterion or control on tune."""

    name: str
    step: Point
    static: Point | None  # the shallowest static exit of no lower AUC


def criteria_rows(calibrate: CalibrateResult) -> list[Criterion]:
    """Every criterion at its chosen step on tune, beside the shallowest static exit of no lower AUC.

    The oracle stands at the step whose cost is nearest to the plan's.
    """
    steps = dict[str, Point]()
    cost = 1.0
    for policy in calibrate["policies"]:
        step = policy["pareto"][policy["chosen_step"]]
        used = policy["criterion"] == calibrate["chosen"]
        steps[policy["criterion"] + (" (the plan's)" if used else "")] = step
        cost = step["cost"] if used else cost
    for name, points in calibrate["controls"].items():
        if name != "fixed_depth":
            nearest = min(points, key=lambda point: abs(point["cost"] - cost))
            steps[f"{name} (control)"] = nearest

    def as_accurate(auc: float | None) -> Point | None:
        static = calibrate["controls"]["fixed_depth"]
        if auc is None:
            return None
        return next((s for s in static if s["auc"] is not None and s["auc"] >= auc), None)

    return [Criterion(name, s, as_accurate(s["auc"])) for name, s in steps.items()]


def list_rows(timed: Sequence[EngineRow]) -> list[tuple[EngineRow, EngineRow | None]]:
    """Full depth, every static exit and lists on requests of 64 candidates, histories cached.

    Each is timed on one request, and on several at once (None: not timed). Empty where no list was timed.
    """
    one = dict[str, EngineRow]()  # by engine
    more = dict[str, EngineRow]()
    for row in timed:
        if (row["candidates"], row["prefix_cached"]) == (BESIDE, True):
            (one if row["at_once"] == 1 else more)[row["engine"]] = row
    if not one.keys() >= {"packed", "top_k"}:
        return []
    static = sorted((name for name in one if name.startswith("fixed_depth_")), reverse=True)
    return [(one[name], more.get(name)) for name in ("packed", *static, "top_k")]


def _clock(
    timed: Sequence[EngineRow], engine: str, policy: str | None = None
) -> float | None:
    """Seconds of full depth over this configuration's: a request of 64 candidates (else the most), not cached."""
    plain = [
        row
        for row in timed
        if (row["history"], row["dtype"], row["prefix_cached"], row["at_once"])
        == (None, timed[0]["dtype"], False, 1)
    ]
    sizes = {row["candidates"] for row in plain}
    size = BESIDE if BESIDE in sizes else max(sizes, default=0)
    found = (
        row["measured_speedup"]
        for row in plain
        if (row["candidates"], row["engine"]) == (size, engine)
        and policy in (None, row["policy"])
    )
    return next(found, None)
