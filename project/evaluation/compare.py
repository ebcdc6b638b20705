"""Verb `compare RUN BASE`: two runs on the same rows, head by head, with paired intervals.

Unusual here: it reads score tables alone, no model and no logs. On test it is for runs that are frozen, such as the
default against the control that has no neighbours; what is chosen is chosen on tune.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from project.artefacts import read_result, result_head, write_json
from project.errors import DataError
from project.evaluation.paired import Part, head_difference, read_heads
from project.tables import difference_cell, markdown_table, number, protocol_line

Result = Mapping[str, Any]

ABSENT = "–"
HEADER = (
    "exit", "AUC", "base's", "AUC minus base", "with exit 0", "base's ", "with exit 0 minus base",
    "log loss with exit 0 minus base",
)  # fmt: skip


def run_compare(arguments: Sequence[str]) -> None:
    """The verb: writes RUN/results/compare-PART.json and prints it as Markdown.

    Args:
        arguments: RUN, BASE, and maybe --part test.

    Raises:
        DataError: Score tables are missing, or the runs have two protocols.
    """
    parser = argparse.ArgumentParser("python -m project compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("base", type=Path, help="folder of the run it is compared with")
    parser.add_argument("--part", choices=("tune", "test"), default="tune", help="rows that are compared")
    given = parser.parse_args(arguments)
    result = compare(given.run, given.base, given.part)
    path = write_json(given.run / "results" / f"compare-{given.part}.json", result)
    print(f"{render_comparison(result)}\nwritten: {path}")


def compare(run: Path, base: Path, part: Part) -> dict[str, Any]:
    """Every head of a run beside the base's.

    Args:
        run: Folder of a run.
        base: Folder of the run it is compared with, of the same protocol.
        part: Rows: validation's tune fold, or test.

    Returns:
        A result: `base` (its configuration), `part`, and `exits` [{`layer`, `n`, `auc`, `log_loss`, `calibrated`}],
        each with `against`, `base` (the same metrics of the base's head) and `difference` where the base has one.
    """
    mine, theirs = (read_result(folder / "results" / "fit.json") for folder in (run, base))
    hashes = [result["protocol"]["hash"] for result in (mine, theirs)]
    if hashes[0] != hashes[1]:
        raise DataError(
            f"{run} has the protocol hash {hashes[0]}, {base} has {hashes[1]}: expected two runs of one protocol; "
            "give both the same data.protocol and train one of them again."
        )
    heads, other = read_heads(run, part), read_heads(base, part)
    if not np.array_equal(heads.row_id, other.row_id):
        raise DataError(
            f"{run} and {base} have not scored the same rows of {part}: score all of them with both."
        )
    if not np.array_equal(heads.labels, other.labels):
        raise DataError(
            f"{run} and {base} have scored the same rows of {part} under other labels: expected one "
            "data.protocol.label. Score both again with the config.yaml of their runs."
        )
    exits = []
    for layer in sorted(heads.raw):
        found = {"layer": layer, "n": len(heads.labels)} | heads.metrics(layer)
        against = head_difference(heads, layer, other)
        exits.append(found | against | ({"base": other.metrics(against["against"])} if against else {}))
    said = {"base": theirs["config"], "part": part, "exits": exits}
    return result_head("compare", mine["protocol"], mine["config"], mine["seed"]) | said


def render_comparison(result: Result) -> str:
    """Markdown: a line for every head.

    Args:
        result: Of `compare`.
    """
    rows = [[str(row["layer"]), *_cells(row)] for row in result["exits"]]
    n = result["exits"][0]["n"]
    where = "validation's tune fold" if result["part"] == "tune" else "test"
    note = (
        f"{result['config']} minus {result['base']} on {where} ({n:,} rows): paired, users resampled, 95 %. With exit "
        "0: calibrated with counting on tune. The deepest exit stands against the deepest."
    )
    return "\n\n".join([markdown_table(HEADER, rows), note, protocol_line(result)]) + "\n"


def _cells(row: Result) -> list[str]:
    base, difference = row.get("base", {}), row.get("difference", {})
    better, their_better = row.get("calibrated", {}), base.get("calibrated", {})
    return [
        number(row["auc"]),
        number(base["auc"]) if base else ABSENT,
        difference_cell(difference["auc"]) if "auc" in difference else ABSENT,
        number(better["auc"]) if better else ABSENT,
        number(their_better["auc"]) if their_better else ABSENT,
        *(
            difference_cell(difference[name]) if name in difference else ABSENT
            for name in ("calibrated_auc", "calibrated_log_loss")
        ),
    ]
