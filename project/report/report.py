"""The report of a run: report.md, report.html and pictures, from result files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from project.errors import DataError
from project.report.format import code, environment, escape, tidy
from project.report.plots import (
    depth_figure,
    exit_share_figure,
    pareto_figure,
    png,
    reliability_figure,
    reliability_scores,
)
from project.report.tables import criteria_rows, decide, plan_rows, rows_of, score_rows, slice_rows
from project.run import exit_layers_of, read_result, replace_file

COMMANDS = ("fit", "validate", "calibrate", "test", "baselines")
"""In the order in which the run's protocol is taken from them."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        folder: The folder, as given.
        results: Result by command: fit, validate, calibrate, test, baselines.
        benchmarks: Every benchmark result.
        notes: What was left out, a sentence each.
        reported: Result with the reported rows: `exits`, `baselines`, `adaptive`, ...
        split: Their split.
        fold: Their fold.
    """

    folder: Path
    results: dict[str, dict[str, Any]]
    benchmarks: list[dict[str, Any]]
    notes: list[str]
    reported: dict[str, Any]
    split: str
    fold: str | None

    @property
    def name(self) -> str:
        """quickstart/version_0, also where the folder is a link."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def rows(self) -> str:
        """The reported rows in words."""
        return "test" if self.split == "test" else "the tune fold of validation"

    @property
    def command(self) -> str:
        """The command that writes the reported rows' adaptive score."""
        return "test" if self.split == "test" else "calibrate"

    @property
    def calibrate(self) -> dict[str, Any]:
        """The calibrate result; empty where there is none."""
        return self.results.get("calibrate", {})

    @property
    def benchmark_rows(self) -> list[dict[str, Any]]:
        """Rows of every benchmark result."""
        return [row for result in self.benchmarks for row in result.get("rows", [])]

    def command_line(self, command: str) -> str:
        """The command line of a command for this run."""
        base = f"python -m project {command}"
        if command == "report":
            return f"{base} {self.folder}"
        config = f"{base} --config {self.folder}/config.yaml"
        return config if command == "fit" else f"{config} --ckpt_path {self.folder}/checkpoints/last.ckpt"

    def missing(self, what: str, command: str) -> Markup:
        """A line of Markdown that says what is missing and the command that makes it."""
        return Markup(f"{escape(what)} Make it: {code(self.command_line(command))}")

    def baseline(self, split: str, fold: str | None) -> tuple[str, float] | None:
        """Name and AUC of the best baseline on some rows, from whichever result has it."""
        for result in (self.reported, *self.results.values()):
            for row in result.get("baselines", []):
                same = (row["split"], row.get("fold")) == (split, fold)
                if same and row["name"] == result.get("best_baseline") and row.get("auc") is not None:
                    return row["name"], row["auc"]
        return None


def read_run(folder: Path) -> Run:
    """Read the result files of a run folder.

    Args:
        folder: With results/*.json.

    Raises:
        DataError: There are none, or one is not a result file of this version.
    """
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise DataError(
            f"{folder} holds no result files (results/*.json); expected the folder of a run, such as "
            "runs/quickstart/latest. `python -m project fit --config FILE` makes one."
        )
    found = {path: read_result(path) for path in files}
    by_command: dict[str, list[Path]] = {}
    for path, result in found.items():
        by_command.setdefault(result["command"], []).append(path)
    # results/test.json before results/test-a.json: a tag is for keeping several apart
    first = {
        command: min(by_command[command], key=lambda path: len(path.stem))
        for command in COMMANDS
        if command in by_command
    }
    known = [found[path] for path in first.values()] or list(found.values())
    protocol = known[0]["protocol"]["hash"]
    results = {v: found[p] for v, p in first.items() if found[p]["protocol"]["hash"] == protocol}
    benchmarks = [
        r for r in found.values() if r["command"] == "benchmark" and r["protocol"]["hash"] == protocol
    ]
    notes = [
        f"Left out: results/{path.name} is of protocol hash {result['protocol']['hash']}, this run of {protocol}."
        for path, result in found.items()
        if result["protocol"]["hash"] != protocol
    ]
    notes += [
        f"Not shown: results/{path.name} (a second result of `{command}`)."
        for command, paths in by_command.items()
        for path in paths
        if command in first and path != first[command] and found[path]["protocol"]["hash"] == protocol
    ]
    return Run(folder, results, benchmarks, notes, *_reported(results, known[0]))


def _reported(
    results: dict[str, dict[str, Any]], other: dict[str, Any]
) -> tuple[dict[str, Any], str, str | None]:
    """The result with the rows to report, their split and fold."""
    if "test" in results:
        return results["test"], "test", None
    base = results.get("validate") or results.get("fit") or {}
    if calibrate := results.get("calibrate"):
        newer = {key: calibrate[key] for key in ("exits", "adaptive") if key in calibrate}
        if _same_plan(base.get("adaptive"), newer.get("adaptive")):
            newer["adaptive"] = base["adaptive"]  # which is compared with the best baseline, too
        return _with_shares(calibrate | base | newer), "valid", "tune"
    if base:
        return base, "valid", "tune"
    # baselines alone: they were scored on both splits, exploring shows validation
    return results.get("baselines", other), "valid", "tune"


def _same_plan(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    keys = ("criterion", "auc", "mean_depth")
    return bool(one and other and all(one.get(key) == other.get(key) for key in keys))


def _with_shares(result: dict[str, Any]) -> dict[str, Any]:
    """Exit rows of the tune fold with the share that leaves there, where only `adaptive.exit_shares` has it."""
    shares = (result.get("adaptive") or {}).get("exit_shares") or {}
    known = [
        {"exit_share": shares[str(row["layer"])], **row}
        if row.get("fold") == "tune" and str(row["layer"]) in shares
        else row
        for row in result.get("exits", [])
    ]
    return result | {"exits": known}


Row = Mapping[str, Any]

USAGE = "python -m project report RUN_FOLDER"
STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #222; background: #fff;
       max-width: 68rem; margin: 2.5rem auto; padding: 0 1.25rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #ddd; }
h1 + p { font-size: 1.1rem; padding: .8rem 1rem; background: #f1f5f9; border-left: 4px solid #0072b2; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { border-bottom: 1.5px solid #888; font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; } td:nth-child(2) { white-space: normal; } tbody tr:hover { background: #f7f9fb; }
img { max-width: min(100%, 52rem); height: auto; display: block; margin: 1.4rem 0 .2rem; }
code { font: .86em ui-monospace, Menlo, Consolas, monospace; background: #f3f3f3; padding: .1em .3em; }
pre { background: #f3f3f3; padding: .8rem 1rem; overflow-x: auto; } pre code { padding: 0; }
@media print { body { margin: 0; max-width: none; } h2 { break-after: avoid; } table, img { break-inside: avoid; } }
"""


def run_report(arguments: Sequence[str]) -> Path:
    """The command: write the report of a run folder and say where it is.

    Args:
        arguments: One run folder, such as runs/quickstart/latest.

    Raises:
        DataError: Not one argument, or a folder without result files.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise DataError(f"report takes one run folder, found {list(arguments)}. Usage: {USAGE}")
    path = write_report(Path(arguments[0]))
    print(f"written: {path}\nwritten: {path.with_suffix('.md')}")
    return path


def write_report(folder: Path) -> Path:
    """Write report/report.md, report/report.html and report/*.png of a run; returns the HTML's path.

    Args:
        folder: Run folder with results/*.json and maybe scores/*.parquet.

    Raises:
        DataError: It holds no result files, or one that cannot be read.
    """
    run = read_run(folder)
    drawn = pictures(run)
    target = folder / "report"
    images: dict[str, bytes] = {}
    for name, figure in drawn.items():
        path = target / f"{name}.png"
        if isinstance(figure, Figure):
            images[path.name] = png(figure)
            replace_file(path, partial(_fill, images[path.name]))
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    text = render_report(run, drawn)
    replace_file(target / "report.md", partial(_fill, text.encode()))
    page = render_html(text, f"Report: {run.name}", images)
    return replace_file(target / "report.html", partial(_fill, page.encode()))


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def render_report(run: Run, drawn: Mapping[str, Figure | str]) -> str:
    """The report's Markdown, pictures by file name.

    Args:
        run: What was read.
        drawn: The pictures, or why there is none.
    """
    result = run.reported | {
        "certificate": run.reported.get("certificate") or run.calibrate.get("certificate")
    }
    result["warnings"] = list(dict.fromkeys(w for r in run.results.values() for w in r.get("warnings", [])))
    exits = rows_of(result.get("exits", []), run.split, run.fold)
    without = (result.get("adaptive") or {}).get("without_exit_0")
    policies = run.calibrate.get("policies", [])
    text = environment().get_template("report.md.j2").render(
        run=run,
        result=result,
        exits=exits,
        baselines=rows_of(result.get("baselines", []), run.split, run.fold),
        answer=decide(result),
        rows=score_rows(result, run.split, run.fold, run.benchmark_rows),
        slices=slice_rows(result, run.split, run.fold),
        without=plan_rows(without, exits, name="plan without exit 0") if without and exits else [],
        criteria=criteria_rows(run.calibrate),
        policy=next((p for p in policies if p["criterion"] == run.calibrate.get("chosen")), {}),
        missing={name: made for name, made in drawn.items() if not isinstance(made, Figure)},
    )  # fmt: skip
    return tidy(text)


def render_html(text: str, title: str, images: Mapping[str, bytes]) -> str:
    """The page: pictures embedded, wide tables in a box of their own that scrolls, nothing fetched.

    Args:
        text: Markdown with tables; HTML in it is escaped.
        title: Of the page.
        images: File name, as the Markdown names it -> PNG bytes. Any other image is left out.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in tokens:
        children = token.children or []
        for child in children:
            if child.type == "image" and (content := images.get(str(child.attrs["src"]))) is not None:
                child.attrSet("src", f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}")
        if token.type == "inline":
            token.children = [
                c for c in children if c.type != "image" or str(c.attrs["src"]).startswith("data:")
            ]
    body = str(markdown.renderer.render(tokens, markdown.options, {}))
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def pictures(run: Run) -> dict[str, Figure | str]:
    """The four pictures by name; where one cannot be drawn, why not ("" where another line says so)."""
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    plan = run.reported.get("adaptive")
    found: dict[str, Figure | str] = {"depth": "", "exit_share": "", "pareto": "", "reliability": ""}
    if exits:
        found["depth"] = depth_figure(exits, run.baseline(run.split, run.fold), plan, run.rows)
    if any(row.get("exit_share") is not None for row in exits):
        found["exit_share"] = exit_share_figure(exits, (plan or {}).get("mean_depth"))
    if run.calibrate.get("policies"):
        found["pareto"] = pareto_figure(run.calibrate, run.baseline("valid", "tune"))
    found["reliability"] = _reliability(run, exits)
    return found


def _reliability(run: Run, exits: Sequence[Row]) -> Figure | str:
    path = run.folder / "scores" / f"{run.split}.parquet"
    command = "test" if run.split == "test" else "validate"
    if not path.is_file():
        return run.missing(f"No reliability diagrams: scores/{path.name} is missing.", command)
    table = pl.read_parquet(path, glob=False)
    if lacking := [
        c for c in ("split", "fold", "label", *(f"logit_{r['layer']}" for r in exits)) if c not in table
    ]:
        return run.missing(
            f"No reliability diagrams: scores/{path.name} has no column {', '.join(lacking)}.", command
        )
    part = table.filter(pl.col("split") == run.split)
    part = part if run.fold is None else part.filter(pl.col("fold") == run.fold)
    if not len(part) or any(row["n"] != len(part) for row in exits):
        counts = f"{len(part):,} rows of {run.rows}, the result {max((r['n'] for r in exits), default=0):,}"
        return run.missing(f"No reliability diagrams: scores/{path.name} holds {counts}.", command)
    chosen: Row = next(
        (p for p in run.calibrate.get("policies", []) if p["criterion"] == run.calibrate.get("chosen")), {}
    )
    layers = [row["layer"] for row in exits] or exit_layers_of(table)
    calibration = chosen.get("calibration") or {}
    return reliability_figure(reliability_scores(part, layers, calibration, f"scores/{path.name}"))
