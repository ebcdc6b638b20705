"""results/ablation-<list>.json as Markdown: a line for every head of every variant.

Unusual here: a pure function of the result file, so every quoted number comes from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from project.tables import difference_cell, fewer_layers, markdown_table, number, protocol_line

Result = Mapping[str, Any]

ABSENT = "–"
HEADER = (
    "variant", "exit", "AUC", "log loss", "AUC with exit 0", "log loss with exit 0", "AUC minus base",
    "AUC with exit 0 minus base", "early exit", "seconds",
)  # fmt: skip


def render_ablation(result: Result) -> str:
    """Markdown: every head of every variant, what failed, how to read it, and the protocol.

    Args:
        result: results/ablation-<list>.json.
    """
    rows = [cells for row in result["rows"] for cells in _variant_rows(row)]
    lines = [markdown_table(HEADER, rows)]
    lines += [f"No numbers of {row['name']}: {row['error']}" for row in result["rows"] if "error" in row]
    return "\n\n".join([*lines, *_notes(result), protocol_line(result)]) + "\n"


def _variant_rows(row: Result) -> list[list[str]]:
    """A line an exit; what is about the whole run stands beside its deepest exit."""
    exits = row.get("exits", [])
    if not exits:
        return [[row["name"], *[ABSENT] * (len(HEADER) - 1)]]
    lines = []
    for head in exits:
        last = head is exits[-1]
        better, found = head.get("calibrated") or {}, head.get("difference") or {}
        seconds = row["seconds"]["train"]
        lines.append(
            [
                row["name"],
                str(head["layer"]),
                *(number(head[name]) for name in ("auc", "log_loss")),
                *(number(better[name]) if name in better else ABSENT for name in ("auc", "log_loss")),
                *(_difference(found.get(name)) for name in ("auc", "calibrated_auc")),
                _early_exit(row) if last else "",
                f"{seconds:,.0f}" if last and seconds is not None else "",
            ]
        )
    return lines


def _difference(found: Result | None) -> str:
    return difference_cell(found) if found else ABSENT


def _early_exit(row: Result) -> str:
    found = row.get("early_exit")
    if not found:
        return ABSENT
    return f"{fewer_layers(found)} at {number(found['auc'])}"


def _notes(result: Result) -> list[str]:
    base, steps = result["rows"][0]["name"], result["steps"]
    length = "as many batches as its configuration says" if steps is None else f"{steps} batches"
    heads = sum(len(row.get("exits", [])) for row in result["rows"])
    n = max((head["n"] for row in result["rows"] for head in row.get("exits", [])), default=0)
    return [
        f"Validation's tune fold ({n:,} rows); test is not read. Each variant is trained once, on {length}. "
        f"Differences are to `{base}`: the deepest exit minus its deepest, others minus its exit of the same layer, "
        "paired, users resampled; they do not hold the chance of another seed. With exit 0: calibrated with counting, "
        "fitted on these rows. Early exit: token-layer speed-up of the run's own plan and the AUC it has then. "
        f"Seconds: training alone. With {heads} heads compared, some differences leave 0 out by chance."
    ]
