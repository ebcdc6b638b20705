"""Verb `compare RUN BASE`: two runs on the same rows, head by head, with paired intervals.

Unusual here: it reads score tables alone, no model and no logs. On test it is for runs that are frozen, such as the
default against the control that has no neighbours; what is chosen is chosen on tune.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from project.artefacts import read_result, result_head, write_json
from project.errors import DataError
from project.evaluation.paired import Part, head_difference, read_heads
from project.report.tables import render


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
    print(f"{render(result)}\nwritten: {path}")


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
