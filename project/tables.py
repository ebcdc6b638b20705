"""Result files as tables: Markdown for README and reports, the same cells as rich tables for a terminal.

Unusual here: pure functions, a result file's dictionary in and text out, so every quoted number comes from a
file. Numbers below one lose their zero (.7423), what is undefined says so, and heads and floors stand in one
table: a head is only worth its difference to the best floor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from project.floors.peers import PEERS

Result = Mapping[str, Any]

UNDEFINED = "undefined"
HEADER = ("scores", "AUC", "95 % interval", "log loss", "Brier", "ECE", "user-AUC", "n")
BRIEF = ("scores", "AUC", "95 % interval", "log loss", "user-AUC")  # of HEADER, in a table for the first page
MINUS, CALIBRATED = "minus best floor", "calibrated log loss"  # shown where a row has them
STAGE_HEADER = ("stage", "seconds", "share")
REPORTED_SPLIT = {"test": "test", "validate": "valid", "fit": "valid"}
REPORTED_FOLD = {
    "validate": "tune",
    "fit": "tune",
}  # select chose the checkpoint, certify is for certificates alone


def render_exits(result: Result, split: str | None = None, brief: bool = False) -> str:
    """Markdown: a row for every exit and floor, the difference to the best floor, protocol and counts.

    Args:
        result: A result file of `fit`, `validate`, `test` or `floors`; only `protocol` must be there.
        split: Which rows; None takes test for `test`, the tune fold of valid for `validate` and `fit`, else all.
        brief: Of the floors only those that the lines below compare with, and fewer columns.
    """
    header, rows = _scores(_brief(result) if brief else result, split, (MINUS, CALIBRATED))
    if brief:
        shown = [k for k, name in enumerate(header) if name in (*BRIEF, MINUS)]
        header, *rows = ([cells[k] for k in shown] for cells in (header, *rows))
    lines = [markdown_table(header, rows)]
    lines += [
        line for line in (*difference_lines(result), adaptive_line(result), protocol_line(result)) if line
    ]
    return "\n\n".join(lines) + "\n"


def exits_table(result: Result, split: str | None = None) -> Table:
    """The table of `render_exits` for a terminal, differences and protocol below it. Arguments as there.

    120 columns hold one more: the difference to the best floor, without its interval, or else the calibrated log loss.
    """
    lines = (*difference_lines(result), adaptive_line(result), kept_line(result), protocol_line(result))
    caption = "\n".join(line for line in lines if line)
    more = MINUS if any("floor_difference" in row for row in result.get("exits", [])) else CALIBRATED
    header, rows = _scores(result, split, (more,), intervals=False)
    broken = [title if title in HEADER else title.replace(" ", "\n", 1) for title in header]
    return _terminal(broken, rows, caption)


def render_stage_seconds(result: Result) -> str:
    """Markdown: where the seconds of a run went, longest first, with their sum.

    Args:
        result: A result file with `stage_seconds` {stage: seconds}.
    """
    return markdown_table(STAGE_HEADER, _stage_rows(result)) + "\n"


def stage_seconds_table(result: Result) -> Table:
    """The table of `render_stage_seconds` for a terminal."""
    return _terminal(STAGE_HEADER, _stage_rows(result), "")


def difference_lines(result: Result) -> list[str]:
    """The headline, "LLM exit 6 minus best floor (lr_evidence): +.0110 [...]", then other floors worth naming."""
    known = result.get("floor_differences") or [result.get("floor_difference")]
    return [difference_line(d, best=d["floor"] == result.get("best_floor", d["floor"])) for d in known if d]


def difference_line(difference: Result, best: bool = True) -> str:
    """One of `difference_lines`.

    Args:
        difference: {`layer`, `floor`, `value`, `interval`, maybe `log_loss` {`value`, `interval`}}.
        best: Whether the floor is the best one.
    """
    kind = "best floor" if best else "floor"
    subject = f"LLM exit {difference['layer']} minus {kind} ({difference['floor']})"
    if difference["value"] is None:
        return f"{subject}: {UNDEFINED}"
    less = difference.get("log_loss")
    log_loss = f", log loss {difference_cell(less)}" if less else ""
    return f"{subject}: AUC {difference_cell(difference)}{log_loss} (paired, users resampled)"


def kept_line(result: Result) -> str:
    """Which floors the verb `floors` had made before, and the command that makes more where networks lack."""
    if "kept_floors" not in result:
        return ""
    kept = result["kept_floors"]
    said = f"Floors kept from before: {', '.join(kept)}." if kept else "No floors kept from before."
    if PEERS.keys() <= set(kept):
        return said
    config = f" --config {result['config']}" if result.get("config") else ""
    return f"{said} `python -m project floors{config} --peers true` adds more."


def adaptive_line(result: Result) -> str:
    """What early exit did: AUC, drop, depth, speed-ups and the certificate; empty before calibration."""
    adaptive = result.get("adaptive")
    if not adaptive:
        return ""
    drop = (
        f"{number(adaptive['auc_drop'], signed=True)} {interval(adaptive['auc_drop_interval'], signed=True)}"
    )
    saved, rival = adaptive["token_layer_speedup"], adaptive["speedup_over_rival"]["value"]
    cost = (
        f"token-layer speed-up {times(saved)}, over the static exit {adaptive['rival']['layer']} {times(rival)}"
        if adaptive["mean_depth"] > 0
        else "no layer runs: everyone leaves at counting"
    )
    passed: bool | None = (result.get("certificate") or {}).get("passed")
    said = "" if passed is None else "; certificate passed" if passed else "; certificate not passed"
    return (
        f"Early exit by {adaptive['criterion']}: AUC {number(adaptive['auc'])}, drop {drop}, mean depth "
        f"{adaptive['mean_depth']:.2f}, {cost}{said}"
    )


def times(value: float | None) -> str:
    """x2.31, or "undefined" (nothing was spent)."""
    return UNDEFINED if value is None else f"x{value:.2f}"


def fewer_layers(row: Mapping[str, Any]) -> str:
    """What leaving early saves in token-layers, in words where the trunk never runs.

    Args:
        row: `token_layer_speedup` and `mean_depth` of a policy.
    """
    return times(row["token_layer_speedup"]) if row["mean_depth"] > 0 else "no layer runs"


def protocol_line(result: Result) -> str:
    """Protocol name, hash and targets of each split: tables of different hashes must not be compared."""
    protocol = result["protocol"]
    counts = ", ".join(f"{split} {count:,}" for split, count in protocol.get("counts", {}).items())
    return f"Protocol {protocol['name']} (hash {protocol['hash']})" + (
        f"; targets: {counts}" if counts else ""
    )


def number(value: float | None, digits: int = 4, signed: bool = False) -> str:
    """.7423, 1.0312, -.0020, +.0110 where signed; "undefined" for None."""
    if value is None:
        return UNDEFINED
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    sign, digits_only = (text[0], text[1:]) if text[0] in "+-" else ("", text)
    return sign + (digits_only[1:] if digits_only.startswith("0.") else digits_only)


def difference_cell(difference: Result) -> str:
    """A difference with its interval, +.0110 [-.0020, +.0200]."""
    value, bounds = difference["value"], difference["interval"]
    return UNDEFINED if value is None else f"{number(value, signed=True)} {interval(bounds, signed=True)}"


def interval(bounds: Sequence[float] | None, digits: int = 4, signed: bool = False) -> str:
    """[.7156, .7627], or "undefined"."""
    if bounds is None:
        return UNDEFINED
    return "[" + ", ".join(number(bound, digits, signed) for bound in bounds) + "]"


def _brief(result: Result) -> Result:
    """The result with the best floor and those that `difference_lines` names."""
    named = {d["floor"] for d in result.get("floor_differences", [])} | {result.get("best_floor")}
    return {**result, "floors": [row for row in result.get("floors", []) if row["name"] in named]}


def _scores(
    result: Result, split: str | None, more: Sequence[str], intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Header and cells, with those columns of `more` that there is something to say in."""
    wanted = split or REPORTED_SPLIT.get(result.get("verb", ""))
    fold = None if split else REPORTED_FOLD.get(result.get("verb", ""))
    heads, floors = (
        [row for row in result.get(key, []) if row.get("fold") == fold and wanted in (None, row["split"])]
        for key in ("exits", "floors")
    )
    cells = [_cells(_head_name(row, result), row, wanted) for row in heads]
    cells += [_cells(_floor_name(row, result), row, wanted) for row in floors]
    # a result from before floors were calibrated has only exits to say it of
    here = {
        MINUS: any("floor_difference" in r for r in heads),
        CALIBRATED: any("calibrated" in r for r in floors),
    }
    known = [name for name in more if here[name]]
    for line, row in zip(cells, (*heads, *floors), strict=True):
        line += [_more_cell(name, row, intervals) for name in known]
    return [*HEADER, *known], cells


def _more_cell(name: str, row: Result, intervals: bool) -> str:
    if name == MINUS and "floor_difference" in row:
        difference = row["floor_difference"]
        return difference_cell(difference) if intervals else number(difference["value"], signed=True)
    if name == CALIBRATED and "calibrated" in row:
        return number(row["calibrated"]["log_loss"])
    return ""


def _head_name(row: Result, result: Result) -> str:
    layer = row["layer"]
    name = "exit 0 (counting)" if layer == 0 else f"exit {layer}"
    return f"{name} (chosen)" if layer == result.get("chosen_exit") else name


def _floor_name(row: Result, result: Result) -> str:
    name = f"floor {row['name']}"
    return f"{name} (best floor)" if row["name"] == result.get("best_floor") else name


def _cells(name: str, row: Result, split: str | None) -> list[str]:
    users = row.get("uauc")
    return [
        name if split else f"{name}, {row['split']}",
        number(row.get("auc")),
        interval(row.get("auc_interval")),
        *(number(row.get(metric)) for metric in ("log_loss", "brier", "ece")),
        number(users["value"] if users else None),
        f"{row['n']:,}",
    ]


def _stage_rows(result: Result) -> list[list[str]]:
    seconds: Mapping[str, float] = result.get("stage_seconds", {})
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    share = [f"{100 * value / total:.0f} %" if total else "" for _, value in ordered]
    rows = [[stage, f"{value:,.1f}", part] for (stage, value), part in zip(ordered, share, strict=True)]
    return [*rows, ["total", f"{total:,.1f}", ""]]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _terminal(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    table = Table(caption=Text(caption) if caption else None, caption_justify="left")
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left")
    for cells in rows:
        marked = "(chosen)" in cells[0] or "(best floor)" in cells[0]
        # Text: brackets of an interval are no style tags
        table.add_row(*map(Text, cells), style="bold" if marked else None)
    return table
