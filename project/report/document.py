"""Verb `report RUN_FOLDER`: everything a run knows as report.md, a self-contained report.html, and pictures.

Unusual here: the report computes no metric. Every number is read from results/*.json (the reliability diagrams from
the score table), what is missing is said in one line with the command that makes it, and a result of another protocol
than the run's is left out and named.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from project.artefacts import replace_file
from project.benchmark.table import render_rows
from project.errors import DataError
from project.report import words
from project.report.figures import Picture, pictures
from project.report.html import render_html
from project.report.run import Run, read_run
from project.report.scores import calibrated_line, prior_line, scores_table
from project.report.style import png
from project.report.tables import (
    calibration_table,
    chosen_policy,
    effect_table,
    pareto_table,
    percent,
    plain,
    policies_table,
    priors_table,
    rows_of,
    slices_table,
)
from project.tables import difference_lines, kept_line, number, protocol_line, render_stage_seconds

UNCALIBRATED = "None before the calibration, see above."
USAGE = "python -m project report RUN_FOLDER"


def run_report(arguments: Sequence[str]) -> Path:
    """The verb: write the report of a run folder and say where it is.

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
    for name, picture in drawn.items():
        path = target / f"{name}.png"
        if picture.figure is None:
            path.unlink(missing_ok=True)  # of an earlier report
        else:
            images[path.name] = png(picture.figure)
            replace_file(path, partial(_fill, images[path.name]))
    text = render_markdown(run, drawn)
    replace_file(target / "report.md", partial(_fill, text.encode()))
    page = render_html(text, f"Report: {run.name}", images)
    return replace_file(target / "report.html", partial(_fill, page.encode()))


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def render_markdown(run: Run, drawn: dict[str, Picture]) -> str:
    """The report's text, pictures by file name.

    Args:
        run: What was read.
        drawn: The pictures, or why there is none.
    """
    sections = {
        f"# Report: {run.name}": _opening(run),
        "## What early exit saved and cost": _savings(run),
        "## Certificate": _certificate(run),
        "## Exits and floors": [*_exits(run), *map(_image, (drawn["depth"], drawn["exit_share"]))],
        "## Slices": _slices(run),
        "## Policies": [_image(drawn["pareto"]), *_policies(run)],
        "## Calibration": [*_calibration(run), _image(drawn["reliability"])],
        "## Measured speed": _speed(run),
        "## Protocol": _protocol(run),
        "## Where the time went": _stages(run),
        "## Machine": [_machine(run.reported["machine"])],
        "## Reproduce": _commands(run),
    }
    return "\n\n".join(part for title, body in sections.items() for part in (title, *body) if part) + "\n"


def _opening(run: Run) -> list[str]:
    floor = run.floor(run.split, run.fold)
    lines = [f"**{words.headline(run.reported, run.rows, floor[1] if floor else None)}**", *run.notes]
    if run.split != "test":
        lines.append(f"Numbers are of {run.rows}. " + run.missing("Test was not read.", "test"))
    return lines


def _savings(run: Run) -> list[str]:
    if not run.calibrate:
        return [run.missing("Not calibrated yet: no row leaves early.", "calibrate")]
    adaptive = run.reported.get("adaptive")
    if not adaptive:
        return [
            run.missing(f"No adaptive scores of {run.rows}: they are from before the calibration.", run.verb)
        ]
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    depth = max(run.calibrate.get("layers") or [row["layer"] for row in exits] or [0])
    bullets = [
        _policy_line(run.calibrate),
        *words.savings(adaptive, depth),
        _measured_line(run),
    ]
    return [
        f"**{words.verdict(adaptive)}**",
        f"Of {run.rows}:",
        "\n".join(f"* {line}" for line in bullets if line),
    ]


def _policy_line(calibrate: dict[str, Any]) -> str:
    budget = calibrate.get("budget") or {}
    limits = {"max_auc_drop": "AUC drop", "max_cost": "cost"}
    within = ", ".join(
        f"{name} <= {plain(budget[k])}" for k, name in limits.items() if budget.get(k) is not None
    )
    if calibrate.get("mode") != "budget":
        return f"Policy: `{calibrate.get('chosen')}`, mode {calibrate.get('mode')}."
    stream = f", stream {calibrate['stream']}" if "stream" in calibrate else ""
    return (
        f"Policy: `{calibrate.get('chosen')}`, mode budget{stream}: the step with {within} on the tune fold."
    )


def _measured_line(run: Run) -> str:
    rows = [row for row in run.benchmark_rows if row.get("engine") == "early_exit"]
    speeds = [row["measured_speedup"] for row in rows if row.get("measured_speedup") is not None]
    if not speeds:
        return run.missing("No clock has confirmed these counts.", "benchmark")
    gains = [row["efficiency"] for row in rows if row.get("efficiency") is not None]
    efficiency = f", efficiency {_span(gains)}" if gains else ""
    return f"Measured speed-up over the fastest full depth: x{_span(speeds)}{efficiency} (table below)."


def _span(values: Sequence[float]) -> str:
    low, high = number(min(values), 2), number(max(values), 2)
    return low if low == high else f"{low} to {high}"


def _certificate(run: Run) -> list[str]:
    certificate = run.calibrate.get("certificate")
    if not certificate:
        return [run.calibrate.get("certificate_words", f"Nothing is certified. {UNCALIBRATED}")]
    lines = words.certificate_words(certificate, run.calibrate.get("mode", "budget"))
    if certified := run.calibrate.get("certified"):
        lines.append(words.certified_words(certified))
    if run.split == "test":
        lines.append(words.risk_on_test(certificate, (run.reported.get("adaptive") or {}).get("risk")))
    return [" ".join(lines)]


def _exits(run: Run) -> list[str]:
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    kinds = ", exits before calibration, the adaptive score after it" if run.reported.get("adaptive") else ""
    note = f"Of {run.rows}{kinds if exits else ''}:"
    said = (prior_line, calibrated_line, kept_line)
    lines = [*difference_lines(run.reported), *(line(run.reported) for line in said)]
    return [note, scores_table(run.reported, run.split, run.fold), *filter(None, lines)]


def _slices(run: Run) -> list[str]:
    table = slices_table(run.reported, run.split, run.fold)
    if not table:
        verb = "test" if run.split == "test" else "validate"
        return [run.missing(f"No result has slices of {run.rows}.", verb)]
    note = (
        f"AUC of parts of {run.rows}, exits before calibration. A user is warm who has a target in train; history "
        "counts a user's strictly earlier rows. Exits and floors compare along a line; between lines rows differ."
    )
    return [note, table]


def _policies(run: Run) -> list[str]:
    if not run.calibrate:
        return [UNCALIBRATED]
    note = "On the tune fold, each criterion at the step its budget allows; random and oracle at like cost."
    parts = [note, policies_table(run.calibrate), pareto_table(run.calibrate)]
    if priors := run.calibrate.get("priors"):
        parts += ["With and without counting as exit 0, on the tune fold:", priors_table(priors)]
    return parts


def _calibration(run: Run) -> list[str]:
    policy = chosen_policy(run.calibrate)
    if not policy:
        return [UNCALIBRATED]
    prior = run.calibrate.get("prior", "none")
    exits = rows_of(run.reported.get("exits", []), run.split, run.fold)
    parts = [
        f"Policy `{policy['criterion']}`, prior {prior}; fitted on the tune fold.",
        calibration_table(policy),
    ]
    if any("calibrated" in row for row in exits):
        parts += [f"What it did, {run.rows}:", effect_table(exits)]
    return parts


def _speed(run: Run) -> list[str]:
    parts = []
    if run.benchmark_rows:
        parts.append(render_rows(run.benchmark_rows))
    else:
        parts.append(run.missing("Early exit was not timed.", "benchmark"))
    for packing in (b["packing"] for b in run.benchmarks if "packing" in b):
        packed, pointwise = packing["packed_targets_per_s"], packing["pointwise_targets_per_s"]
        parts.append(
            f"Training, targets a second: packed {packed:,.1f}, one prompt per candidate {pointwise:,.2f}: "
            f"x{packed / pointwise:.1f}."
        )
    others = {_machine(b["machine"]) for b in run.benchmarks} - {_machine(run.reported["machine"])}
    return parts + [f"Timed on another machine: {text}" for text in sorted(others)]


def _protocol(run: Run) -> list[str]:
    protocol = run.reported["protocol"]
    lines = [protocol_line(run.reported) + "."]
    for key, name in (("cold_user_share", "users"), ("cold_item_share", "items")):
        share = protocol.get(key)
        shares = share if isinstance(share, dict) else {"test": share} if share is not None else {}
        if shares:
            parts = ", ".join(f"{split} {percent(value)}" for split, value in shares.items())
            lines.append(f"Targets with {name} unseen in train: {parts}.")
    folds = protocol.get("folds") or {}
    if folds:
        parts = "; ".join(
            f"{name} {f['users']:,} users, {f['targets']:,} targets" for name, f in folds.items()
        )
        lines.append(f"Folds of validation: {parts}.")
    return ["\n".join(f"* {line}" for line in lines)]


def _stages(run: Run) -> list[str]:
    timed = [result for result in run.results.values() if result.get("stage_seconds")]
    if not timed:
        return ["No result file of this run holds stage seconds."]
    return [part for r in timed for part in (f"Verb `{r['verb']}`:", render_stage_seconds(r).rstrip())]


def _machine(machine: dict[str, Any]) -> str:
    hardware = f"{machine.get('device')}, cores {machine.get('cores')}, threads {machine.get('threads')}"
    known = ("device", "cores", "threads", "devices")
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in known)
    devices = f", devices {machine['devices']}" if machine.get("devices") else ""
    return f"{hardware}{devices}; {versions}."


def _commands(run: Run) -> list[str]:
    verbs = [run.command(verb) for verb in ("fit", "calibrate", "test", "benchmark", "report")]
    seed = run.reported.get("seed")
    note = f"exitrec {run.reported.get('version')}, seed {seed}; config.yaml holds every setting of the run."
    return [note, "```sh\n" + "\n".join(verbs) + "\n```"]


def _image(picture: Picture) -> str:
    if picture.figure is None:
        return picture.caption
    return f"![{picture.alt}]({picture.name}.png)\n\n*{picture.caption}*"
