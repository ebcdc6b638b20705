"""results/benchmark*.json as tables, Markdown and terminal: how fast, at which loss, against whom.

Unusual here: pure functions of the result file, so every quoted number comes from a file. Which of the three kinds of
benchmark it holds is read from its keys.
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
    "N", "stream", "engine", "requests/s", "p50 ms", "p95 ms", "p99 ms", "AUC or overlap", "depth", "token-layers",
    "measured", "95 % interval", "over rival", "efficiency", "GFLOP/s", "of limit",
)  # fmt: skip
RETRIEVAL_HEADER = ("retriever", "query", "ms a request", "over LightGCN", "vote AUC", "95 % interval")
PACKING_HEADER = ("training", "targets/s")
SHORT = {"pointwise": "transformers, a prompt per candidate", "shared_prefix": "transformers, history shared"}


HEADLINE = 64  # candidates of the requests that a short table shows
ASIDE = (
    "leave at each exit",
    "cost mean depth",
    "without exit 0",
)  # policies that answer a question of their own


def render_benchmark(result: Result) -> str:
    """Markdown of any result file of `benchmark`, for a README.

    Args:
        result: With `rows` (the engine), `retrieval` or `packing`.
    """
    renderers = {"retrieval": render_retrieval, "packing": render_packing}
    render = next((renderers[kind] for kind in renderers if kind in result), render_engine)
    return "\n\n".join([render(result), protocol_line(result)]) + "\n"


def render_engine(result: Result) -> str:
    """Markdown: requests of 64 candidates, one at a time, the rival alone of all static depths.

    Args:
        result: With requests of that size or of one size only.
    """
    sizes = {row["candidates"] for row in result["rows"]}
    size = HEADLINE if HEADLINE in sizes else max(sizes)
    rows = [
        row for row in result["rows"] if row["candidates"] == size and row["at_once"] == 1 and _leads(row)
    ]
    return render_rows(rows)


def render_retrieval(result: Result) -> str:
    """Markdown: what finding similar users costs a request, and what their vote is worth.

    Args:
        result: Its `retrieval` has a row a side.
    """
    rows = result["retrieval"]
    cells = [
        [
            row["retriever"],
            "item vectors summed" if row["cached"] else "history encoded",
            number(row["ms_per_request"], 3),
            times(row["total_ratio_to_lightgcn"]),
            number(row["vote_auc"]),
            interval(row["vote_auc_interval"]),
        ]
        for row in rows
    ]
    about = (
        f"Timed on {rows[0]['requests']} requests of the test split for one candidate, {rows[0]['history_rows']:.0f} "
        "earlier rows on average, sides in turn: the query's vector, the nearest raters and their vote. Vote AUC: of "
        "that vote alone, on all test rows (users resampled); a query that encodes the history has its retriever's."
    )
    return "\n\n".join([markdown_table(RETRIEVAL_HEADER, cells), about])


def render_packing(result: Result) -> str:
    """Markdown: training targets a second, packed against one prompt per candidate.

    Args:
        result: Its `packing` has both rates.
    """
    packing = result["packing"]
    cells = [
        ["packed", f"{packing['packed_targets_per_s']:.1f}"],
        ["one prompt per candidate", f"{packing['pointwise_targets_per_s']:.1f}"],
    ]
    about = (
        f"{times(packing['ratio'])}, median of {packing['rounds']} rounds ({interval(packing['spread'], 2)}), "
        f"{packing['layers']} layers, windows of {packing['context_tokens']:,} tokens."
    )
    return "\n\n".join([markdown_table(PACKING_HEADER, cells), about])


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
        *(number(row[key], 0) for key in ("p50_ms", "p95_ms", "p99_ms")),
        _worth(row),
        number(row["mean_depth"], 2),
        "" if row["token_layer_speedup"] is None else times(row["token_layer_speedup"]),
        times(row["measured_speedup"]),
        interval((low, high), 2),
        times(row["speedup_over_rival"]["value"]),
        _efficiency(row),
        f"{row['gflops']:.0f} of {row['gflops_ceiling']:.0f}",
        number(row["of_limit"], 2) if "of_limit" in row else "",
    ]


def _efficiency(row: Row) -> str:
    """With what the machine would allow beside it, where the file knows that."""
    if row["efficiency"] is None:
        return ""
    most = row.get("efficiency_at_limit") if row["token_layer_speedup"] >= 1 else None
    return number(row["efficiency"], 2) + ("" if most is None else f" of {number(most, 2)}")


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
    if any(r["dtype"] == "bfloat16" for r in rows):
        about += (
            " Rows with weights of another type: efficiency is over full depth with the same weights, and GFLOP/s has "
            "these weights' own ceiling."
        )
    if any("of_limit" in r for r in rows):
        about += (
            " of limit: the least time that the exits' layers can take here, by arithmetic or by reading their weights "
            "for a single row, whichever is longer, over the trunk's time; efficiency .60 of .65: .65 is what it "
            "would be if both sides took that least time, since a layer of few tokens costs its weights all the same."
        )
    return [about]
