"""Headline numbers of several `test` results side by side, a row a run, and the spread over seeds.

Unusual here: rows of different protocol hashes may stand in one table, since each is compared with the best floor of
its own; a spread is taken over one folder and one hash only. With few seeds it is a range, not an interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from project.errors import ConfigError
from project.tables import difference_cell, fewer_layers, markdown_table, number

Result = Mapping[str, Any]

HEADER = (
    "result",
    "configuration",
    "seed",
    "protocol",
    "exit",
    "AUC",
    "minus best floor",
    "with counting",
    "minus best floor ",
    "log loss minus floor's",
    "best floor",
    "early exit",
    "drop",
    "token-layers",
)


def render_headlines(results: Mapping[str, Result]) -> str:
    """Markdown: a row a result; below it a line for every configuration that was trained with several seeds.

    Args:
        results: Name, such as quickstart/test.json, -> result file of `test`.

    Raises:
        ConfigError: A result of another verb.
    """
    for name, result in results.items():
        if result["verb"] != "test" or not result.get("exits"):
            raise ConfigError(f"{name} is a result of {result['verb']}: expected results/test.json of runs.")
    table = markdown_table(HEADER, [_cells(name, result) for name, result in results.items()])
    protocols = {r["protocol"]["hash"]: r["protocol"]["name"] for r in results.values()}
    named = "; ".join(f"{key} is {name}" for key, name in protocols.items())
    lines = [
        table,
        *_spreads(results),
        "AUC: of the exit that tune chose, alone and with counting in its calibration; its log loss is of the latter, "
        f"less the calibrated floor's. Differences: paired, users resampled, 95 %. Protocols: {named}.",
    ]
    return "\n\n".join(lines) + "\n"


def _cells(name: str, result: Result) -> list[str]:
    chosen, counted = _chosen(result), (result.get("chosen_exit_by_prior") or {}).get("counting", {})
    with_counting = counted.get("floor_difference")
    adaptive = result.get("adaptive")
    return [
        name,
        result["config"],
        str(result["seed"]),
        result["protocol"]["hash"],
        str(chosen["layer"]),
        number(chosen["auc"]),
        difference_cell(result["floor_difference"]),
        number(counted["auc"]) if counted else "",
        difference_cell(with_counting) if with_counting else "",
        difference_cell(with_counting["log_loss"]) if with_counting else "",
        result["best_floor"],
        number(adaptive["auc"]) if adaptive else "",
        number(adaptive["auc_drop"], signed=True) if adaptive else "",
        fewer_layers(adaptive) if adaptive else "",
    ]


def _chosen(result: Result) -> Result:
    found: Result = next(row for row in result["exits"] if row["layer"] == result["chosen_exit"])
    return found


def _spreads(results: Mapping[str, Result]) -> list[str]:
    """A line for every group of runs that differ by seed alone, as far as their names and protocols say."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for name, result in results.items():
        groups.setdefault((name.rpartition("/")[0], result["protocol"]["hash"]), []).append(result)
    several = {key: found for key, found in groups.items() if len({result["seed"] for result in found}) > 1}
    return [_spread(folder, found) for (folder, _), found in several.items()]


def _spread(folder: str, results: Sequence[Result]) -> str:
    seeds = ", ".join(str(result["seed"]) for result in results)
    alone = [result["floor_difference"]["value"] for result in results]
    said = f"{folder}, seeds {seeds}: minus the best floor {_range_of(alone)}"
    if all("counting" in (result.get("chosen_exit_by_prior") or {}) for result in results):
        counted = [
            result["chosen_exit_by_prior"]["counting"]["floor_difference"]["value"] for result in results
        ]
        said += f"; with counting {_range_of(counted)}"
    return said + "."


def _range_of(values: Sequence[float]) -> str:
    return (
        f"{number(mean(values), signed=True)} on average, {number(min(values), signed=True)} to "
        f"{number(max(values), signed=True)}, standard deviation {number(stdev(values))}"
    )
