"""The report of a run: report.md, report.html and pictures, from result files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from project.errors import DataError
from project.report.format import code, environment, escape, tidy
from project.report.plots import depth_figure, pareto_figure, png
from project.report.tables import (
    criteria_rows,
    decide,
    rows_in_words,
    rows_of,
    score_rows,
)
from project.results import (
    CalibrateResult,
    EngineResult,
    EngineRow,
    PolicyRow,
    ScoredResult,
)
from project.run import read_result, replace_file

SCORED = ("fit", "validate", "test", "baselines")
"""Commands with scores, in the order in which the run's protocol is taken from them."""

USAGE = "python -m project report RUN_FOLDER"


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path  # as given
    scored: dict[str, ScoredResult]  # by command: fit, validate, test, baselines
    calibrate: CalibrateResult | None
    benchmarks: list[EngineResult]
    notes: list[str]  # what was left out, a sentence each
    reported: ScoredResult  # the reported rows, with the plan and certificate in use
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
    def policy(self) -> PolicyRow | None:
        """The plan's criterion among the calibrated ones."""
        if self.calibrate is None:
            return None
        chosen = self.calibrate["chosen"]
        return next(p for p in self.calibrate["policies"] if p["criterion"] == chosen)

    @property
    def benchmark_rows(self) -> list[EngineRow]:
        """Rows of every benchmark result."""
        return [row for result in self.benchmarks for row in result["rows"]]

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
        for result in (self.reported, *self.scored.values()):
            for row in rows_of(result["baselines"], split, fold):
                if row["name"] == result["best_baseline"] and row["auc"] is not None:
                    return row["name"], row["auc"]
        return None


def read_run(folder: Path) -> Run:
    """Read results/*.json of a run folder; results of another protocol, and second ones of a command, are left out."""
    found = {path: read_result(path) for path in (folder / "results").glob("*.json")}
    # 1. results/test.json before results/test-a.json: a tag is for keeping several apart
    first: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: (len(path.stem), path)):
        first.setdefault(found[path]["command"], path)
    scored = [command for command in SCORED if command in first]
    if not scored:
        raise DataError(
            f"{folder} holds no result files (results/*.json) of {', '.join(SCORED)}; expected the folder of a run, "
            "such as runs/quickstart/latest. `python -m project fit --config FILE` makes one."
        )
    # 2. one protocol, the first command's
    protocol = found[first[scored[0]]]["protocol"]["hash"]
    same = dict[str, Any]()  # by command
    benchmarks = []
    notes = []
    for path, result in sorted(found.items()):
        command = result["command"]
        other = result["protocol"]["hash"]
        if other != protocol:
            notes.append(
                f"Left out: results/{path.name} is of protocol hash {other}, this run of {protocol}."
            )
        elif command == "benchmark" and "rows" in result:
            benchmarks.append(result)
        elif first[command] == path:
            same[command] = result
        elif command != "benchmark":
            notes.append(
                f"Not shown: results/{path.name} (a second result of `{command}`)."
            )
    results = {command: same[command] for command in SCORED if command in same}
    calibrate = same.get("calibrate")
    split, reported = _reported(results, calibrate)
    return Run(
        folder,
        results,
        calibrate,
        benchmarks,
        notes,
        reported,
        split,
        "tune" if split == "valid" else None,
    )


def _reported(
    results: Mapping[str, ScoredResult], calibrate: CalibrateResult | None
) -> tuple[str, ScoredResult]:
    """The split and the result with the rows to report, with the latest plan and certificate."""
    command = next(c for c in ("test", "validate", "fit", "baselines") if c in results)
    split = "test" if command == "test" else "valid"
    found = results[command]
    if calibrate is None:
        return split, found
    found = {**found, "certificate": found["certificate"] or calibrate["certificate"]}
    if split == "valid":
        old, new = found["adaptive"], calibrate["adaptive"]
        keys: tuple[Literal["criterion", "auc", "mean_depth"], ...]
        keys = ("criterion", "auc", "mean_depth")
        # else the same plan was compared with the best baseline, too
        if old is None or any(old[key] != new[key] for key in keys):
            found["adaptive"] = new
    return split, found


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
    target = folder / "report"
    images = {f"{name}.png": png(figure) for name, figure in pictures(run).items()}
    for path in (target / "depth.png", target / "pareto.png"):
        path.unlink(missing_ok=True)  # from an earlier report
    for name, image in images.items():
        _write(target / name, image)
    text = render_report(run, images)
    _write(target / "report.md", text.encode())
    page = render_html(text, f"Report: {run.name}", images)
    return _write(target / "report.html", page.encode())


def _write(path: Path, content: bytes) -> Path:
    return replace_file(path, lambda part: part.write_bytes(content))


def render_report(run: Run, images: Mapping[str, bytes]) -> str:
    """The report's Markdown, with these pictures by file name."""
    result = run.reported
    exits = rows_of(result["exits"], run.split, run.fold)
    rows = score_rows(result, run.split, run.fold, run.benchmark_rows)
    said = (warning for scored in run.scored.values() for warning in scored["warnings"])
    text = environment().get_template("report.md.j2").render(
        run=run,
        result={**result, "warnings": list(dict.fromkeys(said))},
        exits=exits,
        baselines=rows_of(result["baselines"], run.split, run.fold),
        answer=decide(result, rows),
        rows=rows,
        slices=[s for s in rows_of(result["slices"], run.split, run.fold) if s["n"]],
        criteria=[] if run.calibrate is None else criteria_rows(run.calibrate),
        policy=run.policy,
        refused=next(filter(None, (r["not_calibrated"] for r in run.scored.values())), None),
        images=images,
    )  # fmt: skip
    return tidy(text)


def render_html(text: str, title: str, images: Mapping[str, bytes]) -> str:
    """The page of Markdown: HTML in it is escaped, wide tables scroll, nothing is fetched.

    `images`: file name, as the Markdown names it -> PNG bytes, which are embedded.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="wide"><table>')
    body = body.replace("</table>", "</table></div>")
    for name, content in images.items():
        data = base64.b64encode(content).decode("ascii")
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    page = environment().get_template("page.html.j2")
    return page.render(title=Markup(html.escape(title)), body=Markup(body)) + "\n"


def pictures(run: Run) -> dict[str, Figure]:
    """The pictures by name that can be drawn."""
    exits = rows_of(run.reported["exits"], run.split, run.fold)
    found = dict[str, Figure]()
    if exits:
        best = run.baseline(run.split, run.fold)
        found["depth"] = depth_figure(exits, best, run.reported["adaptive"], run.rows)
    if run.calibrate is not None:
        found["pareto"] = pareto_figure(run.calibrate, run.baseline("valid", "tune"))
    return found
