"""A run folder as the report reads it: one result per verb, all of one protocol, and which rows are reported.

The reported rows are test where test was read, else the tune fold of validation; select and certify are
never shown. A result whose protocol hash is not the run's is left out and named, since the two must not be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from project.artefacts import read_result
from project.errors import DataError
from project.report.format import code, escape

VERBS = ("fit", "validate", "calibrate", "test", "floors")
"""In the order in which the run's protocol is taken from them."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Args:
        folder: The folder, as given.
        results: Result by verb: fit, validate, calibrate, test, floors.
        benchmarks: Every benchmark result.
        notes: What was left out, a sentence each.
        reported: Result with the reported rows: `exits`, `floors`, `adaptive`, ...
        split: Their split.
        fold: Their fold.
    """

    folder: Path
    results: dict[str, dict[str, Any]]
    benchmarks: list[dict[str, Any]]
    notes: list[str]
    reported: dict[str, Any]
    split: str
    fold: str | None

    @property
    def name(self) -> str:
        """quickstart/version_0, also where the folder is a link."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def rows(self) -> str:
        """The reported rows in words."""
        return "test" if self.split == "test" else "the tune fold of validation"

    @property
    def verb(self) -> str:
        """The verb that writes the reported rows' adaptive score."""
        return "test" if self.split == "test" else "calibrate"

    @property
    def calibrate(self) -> dict[str, Any]:
        """The calibrate result; empty where there is none."""
        return self.results.get("calibrate", {})

    @property
    def benchmark_rows(self) -> list[dict[str, Any]]:
        """Rows of every benchmark result."""
        return [row for result in self.benchmarks for row in result.get("rows", [])]

    def command(self, verb: str) -> str:
        """The command line of a verb for this run."""
        base = f"python -m project {verb}"
        if verb == "report":
            return f"{base} {self.folder}"
        config = f"{base} --config {self.folder}/config.yaml"
        return config if verb == "fit" else f"{config} --ckpt_path {self.folder}/checkpoints/last.ckpt"

    def missing(self, what: str, verb: str) -> Markup:
        """A line of Markdown that says what is missing and the command that makes it."""
        return Markup(f"{escape(what)} Make it: {code(self.command(verb))}")

    def floor(self, split: str, fold: str | None) -> tuple[str, float] | None:
        """Name and AUC of the best baseline on some rows, from whichever result has it."""
        for result in (self.reported, *self.results.values()):
            for row in result.get("floors", []):
                same = (row["split"], row.get("fold")) == (split, fold)
                if same and row["name"] == result.get("best_floor") and row.get("auc") is not None:
                    return row["name"], row["auc"]
        return None


def read_run(folder: Path) -> Run:
    """Read the result files of a run folder.

    Args:
        folder: With results/*.json.

    Raises:
        DataError: There are none, or one is not a result file of this version.
    """
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        raise DataError(
            f"{folder} holds no result files (results/*.json); expected the folder of a run, such as "
            "runs/quickstart/latest. `python -m project fit --config FILE` makes one."
        )
    found = {path: read_result(path) for path in files}
    by_verb: dict[str, list[Path]] = {}
    for path, result in found.items():
        by_verb.setdefault(result["verb"], []).append(path)
    # results/test.json before results/test-a.json: a tag is for keeping several apart
    first = {verb: min(by_verb[verb], key=lambda path: len(path.stem)) for verb in VERBS if verb in by_verb}
    known = [found[path] for path in first.values()] or list(found.values())
    protocol = known[0]["protocol"]["hash"]
    results = {v: found[p] for v, p in first.items() if found[p]["protocol"]["hash"] == protocol}
    benchmarks = [r for r in found.values() if r["verb"] == "benchmark" and r["protocol"]["hash"] == protocol]
    notes = [
        f"Left out: results/{path.name} is of protocol hash {result['protocol']['hash']}, this run of {protocol}."
        for path, result in found.items()
        if result["protocol"]["hash"] != protocol
    ]
    notes += [
        f"Not shown: results/{path.name} (a second result of `{verb}`)."
        for verb, paths in by_verb.items()
        for path in paths
        if verb in first and path != first[verb] and found[path]["protocol"]["hash"] == protocol
    ]
    return Run(folder, results, benchmarks, notes, *_reported(results, known[0]))


def _reported(
    results: dict[str, dict[str, Any]], other: dict[str, Any]
) -> tuple[dict[str, Any], str, str | None]:
    """The result with the rows to report, their split and fold."""
    if "test" in results:
        return results["test"], "test", None
    base = results.get("validate") or results.get("fit") or {}
    if calibrate := results.get("calibrate"):
        newer = {key: calibrate[key] for key in ("exits", "adaptive") if key in calibrate}
        if _same_plan(base.get("adaptive"), newer.get("adaptive")):
            newer["adaptive"] = base["adaptive"]  # which is compared with the best baseline, too
        return _with_shares(calibrate | base | newer), "valid", "tune"
    if base:
        return base, "valid", "tune"
    # counting alone: floors were scored on both splits, exploring shows validation
    return results.get("floors", other), "valid", "tune"


def _same_plan(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    keys = ("criterion", "auc", "mean_depth")
    return bool(one and other and all(one.get(key) == other.get(key) for key in keys))


def _with_shares(result: dict[str, Any]) -> dict[str, Any]:
    """Exit rows of the tune fold with the share that leaves there, where only `adaptive.exit_shares` has it."""
    shares = (result.get("adaptive") or {}).get("exit_shares") or {}
    known = [
        {"exit_share": shares[str(row["layer"])], **row}
        if row.get("fold") == "tune" and str(row["layer"]) in shares
        else row
        for row in result.get("exits", [])
    ]
    return result | {"exits": known}
