"""`report RUN_FOLDER`: what a run's result files say, as report.md, a self-contained report.html, and pictures.

No metric is computed here: result files in, one template (report.md.j2) and four pictures out. What is missing is
said in one line with the command that makes it.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from project.artefacts import exit_layers_of, replace_file
from project.errors import DataError
from project.report.answer import decide
from project.report.format import environment, tidy
from project.report.plots import (
    depth_figure,
    exit_share_figure,
    pareto_figure,
    png,
    reliability_figure,
    reliability_scores,
)
from project.report.run import Run, read_run
from project.report.tables import criteria_rows, plan_rows, rows_of, score_rows, slice_rows

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
        baselines=rows_of(result.get("floors", []), run.split, run.fold),
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
        found["depth"] = depth_figure(exits, run.floor(run.split, run.fold), plan, run.rows)
    if any(row.get("exit_share") is not None for row in exits):
        found["exit_share"] = exit_share_figure(exits, (plan or {}).get("mean_depth"))
    if run.calibrate.get("policies"):
        found["pareto"] = pareto_figure(run.calibrate, run.floor("valid", "tune"))
    found["reliability"] = _reliability(run, exits)
    return found


def _reliability(run: Run, exits: Sequence[Row]) -> Figure | str:
    path = run.folder / "scores" / f"{run.split}.parquet"
    verb = "test" if run.split == "test" else "validate"
    if not path.is_file():
        return run.missing(f"No reliability diagrams: scores/{path.name} is missing.", verb)
    table = pl.read_parquet(path, glob=False)
    if lacking := [
        c for c in ("split", "fold", "label", *(f"logit_{r['layer']}" for r in exits)) if c not in table
    ]:
        return run.missing(
            f"No reliability diagrams: scores/{path.name} has no column {', '.join(lacking)}.", verb
        )
    part = table.filter(pl.col("split") == run.split)
    part = part if run.fold is None else part.filter(pl.col("fold") == run.fold)
    if not len(part) or any(row["n"] != len(part) for row in exits):
        counts = f"{len(part):,} rows of {run.rows}, the result {max((r['n'] for r in exits), default=0):,}"
        return run.missing(f"No reliability diagrams: scores/{path.name} holds {counts}.", verb)
    chosen: Row = next(
        (p for p in run.calibrate.get("policies", []) if p["criterion"] == run.calibrate.get("chosen")), {}
    )
    layers = [row["layer"] for row in exits] or exit_layers_of(table)
    calibration = chosen.get("calibration") or {}
    return reliability_figure(reliability_scores(part, layers, calibration, f"scores/{path.name}"))
