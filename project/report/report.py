"""The report of a run: report.md, report.html and pictures, from result files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from project.report.tables import (
    criteria_rows,
    decide,
    plan_rows,
    rows_in_words,
    rows_of,
    score_rows,
    slice_rows,
)
from project.run import exit_layers_of, read_result, replace_file

Row = Mapping[str, Any]

COMMANDS = ("fit", "validate", "calibrate", "test", "baselines")
"""In the order in which the run's protocol is taken from them."""

USAGE = "python -m project report RUN_FOLDER"


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path  # as given
    # by command: fit, validate, calibrate, test, baselines
    results: dict[str, dict[str, Any]]
    benchmarks: list[dict[str, Any]]
    notes: list[str]  # what was left out, a sentence each
    # result with the reported rows: `exits`, `baselines`, `adaptive`, ...
    reported: dict[str, Any]
    split: str  # of the reported rows
    fold: str | None

    @property
    def name(self) -> str:
        """quickstart/version_0, also where the folder is a link."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def rows(self) -> str:
        """The reported rows in words."""
        return rows_in_words(self.split)

    @property
    def command(self) -> str:
        """The command that writes the reported rows' adaptive score."""
        return "test" if self.split == "test" else "calibrate"

    @property
    def calibrate(self) -> dict[str, Any]:
        """The calibrate result; empty where there is none."""
        return self.results.get("calibrate", {})

    @property
    def policy(self) -> Row:
        """The plan's criterion among the calibrated ones; empty where there is none."""
        policies = self.calibrate.get("policies", [])
        return next(
            (p for p in policies if p["criterion"] == self.calibrate.get("chosen")), {}
        )

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
        return (
            config
            if command == "fit"
            else f"{config} --ckpt_path {self.folder}/checkpoints/last.ckpt"
        )

    def missing(self, what: str, command: str) -> Markup:
        """A line of Markdown that says what is missing and the command that makes it."""
        return Markup(f"{escape(what)} Make it: {code(self.command_line(command))}")

    def baseline(self, split: str, fold: str | None) -> tuple[str, float] | None:
        """Name and AUC of the best baseline on some rows, from whichever result has it."""
        for result in (self.reported, *self.results.values()):
            for row in rows_of(result.get("baselines", []), split, fold):
                if (
                    row["name"] == result.get("best_baseline")
                    and row.get("auc") is not None
                ):
                    return row["name"], row["auc"]
        return None


def read_run(folder: Path) -> Run:
    """Read results/*.json of a run folder; results of another protocol, and second ones of a command, are left out."""
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise DataError(
            f"{folder} holds no result files (results/*.json); expected the folder of a run, such as "
            "runs/quickstart/latest. `python -m project fit --config FILE` makes one."
        )
    found = {path: read_result(path) for path in files}
    # 1. results/test.json before results/test-a.json: a tag is for keeping several apart
    first: dict[str, Path] = {}
    for command in COMMANDS:
        paths = [path for path, result in found.items() if result["command"] == command]
        if paths:
            first[command] = min(paths, key=lambda path: len(path.stem))
    # 2. one protocol, the first command's
    other = found[next(iter(first.values()), files[0])]
    protocol = other["protocol"]["hash"]
    notes = [
        f"Left out: results/{path.name} is of protocol hash {result['protocol']['hash']}, this run of {protocol}."
        for path, result in found.items()
        if result["protocol"]["hash"] != protocol
    ]
    same = {
        path: result
        for path, result in found.items()
        if result["protocol"]["hash"] == protocol
    }
    notes += [
        f"Not shown: results/{path.name} (a second result of `{result['command']}`)."
        for path, result in same.items()
        if first.get(result["command"], path) != path
    ]
    results = {command: same[path] for command, path in first.items() if path in same}
    benchmarks = [result for result in same.values() if result["command"] == "benchmark"]
    return Run(folder, results, benchmarks, notes, *_reported(results, other))


def _reported(
    results: dict[str, dict[str, Any]], other: dict[str, Any]
) -> tuple[dict[str, Any], str, str | None]:
    """The result with the rows to report, their split and fold."""
    if "test" in results:
        return results["test"], "test", None
    base = results.get("validate") or results.get("fit") or {}
    if calibrate := results.get("calibrate"):
        newer = {key: calibrate[key] for key in ("exits", "adaptive") if key in calibrate}
        old, new = base.get("adaptive"), newer.get("adaptive")
        if (
            old
            and new
            and all(
                old.get(key) == new.get(key) for key in ("criterion", "auc", "mean_depth")
            )
        ):
            # the same plan, which is compared with the best baseline, too
            newer["adaptive"] = old
        result = calibrate | base | newer
        # rows of the tune fold get the share that leaves there, where only `adaptive` has
        # it
        shares = (result.get("adaptive") or {}).get("exit_shares") or {}
        exits = [
            {"exit_share": shares[str(row["layer"])], **row}
            if row.get("fold") == "tune" and str(row["layer"]) in shares
            else row
            for row in result.get("exits", [])
        ]
        return result | {"exits": exits}, "valid", "tune"
    # a run of baselines alone shows validation
    return base or results.get("baselines", other), "valid", "tune"


def run_report(arguments: Sequence[str]) -> Path:
    """The command `report RUN_FOLDER`: write the report and print where it is."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise DataError(
            f"report takes one run folder, found {list(arguments)}. Usage: {USAGE}"
        )
    path = write_report(Path(arguments[0]))
    print(f"written: {path}\nwritten: {path.with_suffix('.md')}")
    return path


def write_report(folder: Path) -> Path:
    """Write report/report.md, report/report.html and report/*.png of a run folder; returns the HTML's path."""
    run = read_run(folder)
    drawn = pictures(run)
    target = folder / "report"
    images: dict[str, bytes] = {}
    for name, figure in drawn.items():
        path = target / f"{name}.png"
        if isinstance(figure, Figure):
            images[path.name] = png(figure)
            _write(path, images[path.name])
        else:
            path.unlink(missing_ok=True)  # from an earlier report
    text = render_report(run, drawn)
    _write(target / "report.md", text.encode())
    page = render_html(text, f"Report: {run.name}", images)
    return _write(target / "report.html", page.encode())


def _write(path: Path, content: bytes) -> Path:
    return replace_file(path, lambda part: part.write_bytes(content))


def render_report(run: Run, drawn: Mapping[str, Figure | str]) -> str:
    """The report's Markdown, with pictures by file name, or why there is none."""
    certificate = run.reported.get("certificate") or run.calibrate.get("certificate")
    result = run.reported | {"certificate": certificate}
    result["warnings"] = list(
        dict.fromkeys(w for r in run.results.values() for w in r.get("warnings", []))
    )
    exits = rows_of(result.get("exits", []), run.split, run.fold)
    without = (result.get("adaptive") or {}).get("without_exit_0")
    rows = score_rows(result, run.split, run.fold, run.benchmark_rows)
    text = environment().get_template("report.md.j2").render(
        run=run,
        result=result,
        exits=exits,
        baselines=rows_of(result.get("baselines", []), run.split, run.fold),
        answer=decide(result, rows),
        rows=rows,
        slices=slice_rows(result, run.split, run.fold),
        without=plan_rows(without, exits, name="plan without exit 0") if without and exits else [],
        criteria=criteria_rows(run.calibrate),
        policy=run.policy,
        refused=next((r["not_calibrated"] for r in run.results.values() if r.get("not_calibrated")), None),
        missing={name: made for name, made in drawn.items() if not isinstance(made, Figure)},
    )  # fmt: skip
    return tidy(text)


def render_html(text: str, title: str, images: Mapping[str, bytes]) -> str:
    """The page of Markdown: HTML in it is escaped, wide tables scroll, nothing is fetched.

    `images`: file name, as the Markdown names it -> PNG bytes, which are embedded. Any other image is left out.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in tokens:
        children = token.children or []
        for child in children:
            if (
                child.type == "image"
                and (content := images.get(str(child.attrs["src"]))) is not None
            ):
                child.attrSet(
                    "src",
                    f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}",
                )
        if token.type == "inline":
            token.children = [
                c
                for c in children
                if c.type != "image" or str(c.attrs["src"]).startswith("data:")
            ]
    body = str(markdown.renderer.render(tokens, markdown.options, {}))
    body = body.replace("<table>", '<div class="wide"><table>').replace(
        "</table>", "</table></div>"
    )
    page = environment().get_template("page.html.j2")
    return page.render(title=Markup(html.escape(title)), body=Markup(body)) + "\n"


def pictures(run: Run) -> dict[str, Figure | str]:
    """The four pictures by name; where one cannot be drawn, why not ("" where another line says so)."""
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    plan = run.reported.get("adaptive")
    found: dict[str, Figure | str] = {
        "depth": "",
        "exit_share": "",
        "pareto": "",
        "reliability": "",
    }
    if exits:
        found["depth"] = depth_figure(
            exits, run.baseline(run.split, run.fold), plan, run.rows
        )
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
        return run.missing(
            f"No reliability diagrams: scores/{path.name} is missing.", command
        )
    table = pl.read_parquet(path, glob=False)
    part = table.filter(pl.col("split") == run.split)
    part = part if run.fold is None else part.filter(pl.col("fold") == run.fold)
    if not len(part) or any(row["n"] != len(part) for row in exits):
        counts = f"{len(part):,} rows of {run.rows}, the result {max((r['n'] for r in exits), default=0):,}"
        return run.missing(
            f"No reliability diagrams: scores/{path.name} holds {counts}.", command
        )
    layers = [row["layer"] for row in exits] or exit_layers_of(table)
    calibration = run.policy.get("calibration") or {}
    return reliability_figure(
        reliability_scores(part, layers, calibration, f"scores/{path.name}")
    )
