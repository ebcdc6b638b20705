"""results/rank.json as a table, Markdown and terminal: what a shorter way to the best k loses and saves.

Unusual here: pure functions of the result file, so every quoted number comes from a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from project.tables import interval, markdown_table, number, protocol_line

Result = Mapping[str, Any]

HEADER = (
    "k", "policy", "overlap@k", "95 % interval", "mean depth", "share of full", "cost cold", "cost warm",
    "precision@k", "GAUC",
)  # fmt: skip


def render_rank(result: Result, split: str = "test") -> str:
    """Markdown: a row for every list length and policy, the certificates and the protocol.

    Args:
        result: results/rank.json.
        split: test, or valid for the tune fold, where the policies were chosen.
    """
    return "\n\n".join([markdown_table(HEADER, _rows(result, split)), *_notes(result, split)]) + "\n"


def rank_table(result: Result, split: str = "test") -> Table:
    """The table of `render_rank` for a terminal. Arguments as there."""
    table = Table(caption=Text("\n".join(_notes(result, split))), caption_justify="left")
    for title in HEADER:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for cells in _rows(result, split):
        table.add_row(*map(Text, cells), style="bold" if cells[1] == "top_k" else None)
    return table


def _rows(result: Result, split: str) -> list[list[str]]:
    return [
        [
            str(row["k"]),
            row["policy"],
            number(row["overlap"], 3),
            interval(row["overlap_interval"], 3),
            number(row["mean_depth"], 2),
            *(number(row[column], 3) for column in ("depth_share", "cost_cold", "cost_warm", "precision")),
            number(row["gauc"]),
        ]
        for row in result["requests"]
        if row["split"] == split
    ]


def _notes(result: Result, split: str) -> list[str]:
    shown = [row for row in result["requests"] if row["split"] == split]
    first, settings = shown[0], result["settings"]
    scores = "calibrated" if result["calibrated"] else "uncalibrated"
    fold = "" if split == "test" else f", fold {first['fold']}"
    asked = first["candidates"]
    fewest, most = asked if isinstance(asked, list) else (asked, asked)  # a number in files of before
    candidates = str(most) if fewest == most else f"{fewest} to {most}"
    return [
        f"{split}{fold}: {first['n_requests']} requests of {candidates} catalogue candidates for overlap, "
        f"depth and cost (token-layers as a share of full depth's); {first['n_labelled']} requests over rated items "
        f"for precision and GAUC; {scores} scores. Policies with a parameter are the fastest whose overlap on tune is "
        f">= {settings['overlap']:g}.",
        *(f"Certificate at k = {c['k']}: {c['words']}" for c in result["certificate"]),
        protocol_line(result),
    ]
