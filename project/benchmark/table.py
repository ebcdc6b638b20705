"""results/benchmark.json as tables, Markdown and terminal: how fast, at which loss, against whom.

Unusual here: pure functions of the result file, so every quoted number comes from a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from project.tables import interval, markdown_table, number, protocol_line, times

Result = Mapping[str, Any]
Row = Mapping[str, Any]

HEADER = (
    "N", "stream", "engine", "requests/s", "p50 ms", "p95 ms", "AUC or overlap", "depth", "token-layers", "measured",
    "95 % interval", "over rival", "efficiency", "GFLOP/s",
)  # fmt: skip
SHORT = {"pointwise": "transformers, a prompt per candidate", "shared_prefix": "transformers, history shared"}


HEADLINE = 64  # candidates of the requests that a short table shows
ASIDE = (
    "leave at each exit",
    "cost mean depth",
    "without exit 0",
)  # policies that answer a question of their own


def render_benchmark(result: Result) -> str:
    """Markdown for a README: requests of 64 candidates, one at a time, the rival alone of all static depths.

    Args:
        result: A result file of `benchmark`, with requests of that size or of one size only.
    """
    sizes = {row["candidates"] for row in result["rows"]}
    size = HEADLINE if HEADLINE in sizes else max(sizes)
    rows = [
        row for row in result["rows"] if row["candidates"] == size and row["at_once"] == 1 and _leads(row)
    ]
    return "\n\n".join([render_rows(rows), protocol_line(result)]) + "\n"


def render_rows(rows: Sequence[Row]) -> str:
    """Markdown: a row a side, then what the columns mean.

    Args:
        rows: Of a result file.
    """
    return "\n\n".join([markdown_table(HEADER, [_cells(row) for row in rows]), *_notes(rows)])


def _leads(row: Row) -> bool:
    static = row["engine"].startswith("fixed_depth_")
    return row["rival"] if static else not any(word in row["policy"] for word in ASIDE)


def benchmark_table(rows: Sequence[Row]) -> Table:
    """What a person waits for.

    Args:
        rows: Of a result file.
    """
    table = Table(
        title="requests of the test split", caption=Text("\n".join(_notes(rows))), caption_justify="left"
    )
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("stream", "engine") else "right")
    for row in rows:
        table.add_row(*map(Text, _cells(row)))
    return table


def _cells(row: Row) -> list[str]:
    low, high = row["measured_speedup_interval"]
    return [
        str(row["candidates"]) + (f", {row['at_once']} requests at once" if row["at_once"] > 1 else ""),
        row["stream"] + ("" if row["history"] is None else f", {row['history']} items"),
        _name(row),
        number(row["requests_per_s"], 2),
        *(number(row[key], 0) for key in ("p50_ms", "p95_ms")),
        _worth(row),
        number(row["mean_depth"], 2),
        "" if row["token_layer_speedup"] is None else times(row["token_layer_speedup"]),
        times(row["measured_speedup"]),
        interval((low, high), 2),
        times(row["speedup_over_rival"]["value"]),
        "" if row["efficiency"] is None else number(row["efficiency"], 2),
        f"{row['gflops']:.0f} of {row['gflops_ceiling']:.0f}",
    ]


def _name(row: Row) -> str:
    if row["engine"] in SHORT:
        return SHORT[row["engine"]]
    weights = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    if row["engine"] == "packed":
        return f"packed, full depth{weights}"
    if row["engine"].startswith("fixed_depth_"):
        return (
            f"static depth {row['engine'].removeprefix('fixed_depth_')}{' (rival)' if row['rival'] else ''}"
        )
    return f"{row['engine']}, {row['policy']}{weights}"


def _worth(row: Row) -> str:
    if row.get("overlap") is not None:
        precise = "" if row["precision"] is None else f", {number(row['precision'], 3)} precision"
        return f"{number(row['overlap'], 3)} overlap{precise}"
    return "" if row["auc"] is None else number(row["auc"])


def _notes(rows: Sequence[Row]) -> list[str]:
    sizes = {(r["candidates"], r["requests"]) for r in rows if r["engine"] == "packed"}
    samples = ", ".join(f"{requests} of {size} candidates" for size, requests in sorted(sizes))
    about = (
        f"Timed on requests of the test split filled up from the catalogue ({samples}), sides in turn; AUC on all test "
        "rows. measured: wall time of packed full depth over this side's, on the same requests (interval: requests "
        "resampled); over rival: the same against the shallowest static depth that is within .002 AUC of the best on "
        "tune; efficiency: time saved in the trunk over token-layers saved; N: candidates of a request; stream: the "
        "history's keys and values are cached (warm) or not (cold)."
    )
    return [about]
