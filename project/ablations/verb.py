"""Verb `ablate LIST`: train every variant of an ablation list that is not trained yet, then write one table.

Unusual here: a variant that fails is reported and the rest goes on; the table is written anew after every variant, so a
list that takes a night can be read at any time, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from project.ablations.judge import judge
from project.ablations.runs import FitFailed, finished_run, fit
from project.ablations.settings import AblationList, Variant, read_list
from project.artefacts import read_result, replace_file, result_head, write_json
from project.evaluation.paired import Heads, read_heads
from project.report.tables import render


def run_ablate(arguments: Sequence[str]) -> None:
    """The verb; ends with status 1 where a variant failed.

    Args:
        arguments: LIST, a YAML file such as configs/ablations/losses.yaml, and maybe --steps N.

    Raises:
        ConfigError: A list that cannot work, before anything is trained.
    """
    parser = argparse.ArgumentParser("python -m project ablate", description=__doc__, allow_abbrev=False)
    parser.add_argument("list", type=Path, help="YAML file with base, steps and rows")
    parser.add_argument(
        "--steps", type=int, help="train each variant on so many batches, instead of the list's steps"
    )
    given = parser.parse_args(arguments)
    ablation = read_list(given.list, given.steps)
    table, failed = AblationTable(ablation), False
    for number, variant in enumerate(ablation.variants, start=1):
        where = f"{ablation.name} {number}/{len(ablation.variants)} {variant.name}"
        outcome = _train(variant, Path("runs") / f"ablation-{ablation.name}" / variant.name, where)
        failed |= isinstance(outcome, str)
        table.add(variant.name, outcome)
        path = table.write()
    if path:
        print(f"written: {path}\nwritten: {path.with_suffix('.md')}")
    if failed:
        raise SystemExit(1)


def _train(variant: Variant, folder: Path, where: str) -> Path | str:
    """The variant's run, or what went wrong."""
    if run := finished_run(variant, folder):
        print(f"{where}: trained already, {run}", flush=True)
        return run
    print(f"{where}: training, output in {folder / 'fit.log'}", flush=True)
    try:
        return fit(variant, folder)
    except FitFailed as error:
        print(f"{where}: failed: {error}", flush=True)
        return f"failed: {error}"


class AblationTable:
    """The result file of a list, filled variant by variant, the base first.

    Args:
        ablation: The list.
    """

    def __init__(self, ablation: AblationList) -> None:
        self.ablation = ablation
        self.rows: list[dict[str, Any]] = []
        self._first: dict[str, Any] | None = None  # the fit result whose protocol all others must have
        self._base: Heads | None = None

    def add(self, name: str, outcome: Path | str) -> None:
        """Judge a variant.

        Args:
            name: Its name.
            outcome: Folder of its run, or what went wrong: then the row has `error` and no numbers, as one of
                another protocol has.
        """
        if isinstance(outcome, str):
            self.rows.append({"name": name, "error": outcome})
            return
        found = read_result(outcome / "results" / "fit.json")
        self._first = self._first or found
        mine, known = found["protocol"]["hash"], self._first["protocol"]["hash"]
        if mine != known:
            error = (
                f"its protocol hash is {mine}, the others' {known}; results of two protocols do not compare."
            )
            self.rows.append({"name": name, "error": error})
            return
        row = judge(outcome, self._base)
        if not self.rows:
            self._base = read_heads(outcome)
        self.rows.append({"name": name, **row})

    def write(self) -> Path | None:
        """Write results/ablation-<list>.json and .md; nothing while no variant has numbers."""
        if self._first is None:
            return None
        config, seed = str(self.ablation.file), self._first["seed"]
        steps = self.ablation.variants[0].overrides.get("trainer", {}).get("limit_train_batches")
        result = result_head("ablate", self._first["protocol"], config, seed) | {
            "steps": steps,
            "rows": self.rows,
        }
        path = write_json(Path("results") / f"ablation-{self.ablation.name}.json", result)
        text = render(result)
        replace_file(path.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))
        return path
