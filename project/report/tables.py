"""The report's tables in Markdown, but that of scores: slices, policies, AUC by cost, calibration, speed.

Unusual here: a value that a result file does not hold is an en dash, one that is not defined says "undefined"; and
what random and oracle are worth is read at the step whose cost is nearest to the chosen policy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from project.tables import UNDEFINED, interval, markdown_table, number, times

Row = Mapping[str, Any]

ABSENT = "–"
COSTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def rows_of(rows: Sequence[Row], split: str, fold: str | None) -> list[Row]:
    """Rows of a result file's list that are about one split, or one fold of validation."""
    return [row for row in rows if row["split"] == split and row.get("fold") == fold]


def exit_label(row: Row, result: Row) -> str:
    """An exit's name, with what is special about it."""
    layer = row["layer"]
    name = "exit 0 (counting)" if layer == 0 else f"exit {layer}"
    return f"{name} (chosen)" if layer == result.get("chosen_exit") else name


def slices_table(result: Row, split: str, fold: str | None) -> str:
    """AUC of every exit and of the best floor by slice; of every floor where there are no exits. "" without slices.

    Args:
        result: `slices`, each with `name`, `split`, maybe `fold`, `n`, `users` and `rows`; maybe `chosen_exit`, whose
            interval stands beside it, and `best_floor`.
        split: Which rows.
        fold: Which rows.
    """
    slices = rows_of(result.get("slices", []), split, fold)
    if not slices:
        return ""
    exits = [row["layer"] for row in slices[0]["rows"] if "layer" in row]
    floors = [row["name"] for row in slices[0]["rows"] if "name" in row]
    chosen = result.get("chosen_exit")
    columns = [("layer", layer) for layer in exits]
    columns += [("name", name) for name in floors if not exits or name == result.get("best_floor")]
    header = ["slice", "n", "users"]
    for key, who in columns:
        header.append(exit_label({"layer": who}, result) if key == "layer" else f"floor {who}")
        header += ["95 % interval"] * (key == "layer" and who == chosen)
    lines = []
    for part in slices:
        cells = [slice_words(part["name"]), f"{part['n']:,}", f"{part['users']:,}"]
        for key, who in columns:
            row: Row = next((row for row in part["rows"] if row.get(key) == who), {})
            cells.append(value_cell(row, "auc"))
            if key == "layer" and who == chosen:
                cells.append(interval(row["auc_interval"]) if "auc_interval" in row else ABSENT)
        lines.append(cells)
    return markdown_table(header, lines)


def slice_words(name: str) -> str:
    """A slice's name as text: history_20_99 is "history 20 to 99", history_100_plus "history 100 and more"."""
    first, *rest = name.split("_")
    if rest[-1:] == ["plus"]:
        return f"{first} {rest[0]} and more"
    if rest and all(part.isdigit() for part in rest):
        return f"{first} {' to '.join(rest)}"
    return name.replace("_", " ")


def policies_table(calibrate: Row) -> str:
    """Every criterion at its chosen step, then the controls: each fixed depth, random and oracle at like cost."""
    rows = []
    cost = chosen_step(calibrate).get("cost", 1.0)
    for policy in calibrate.get("policies", []):
        step = step_of(policy)
        marked = " (chosen)" if policy["criterion"] == calibrate.get("chosen") else ""
        rows.append([policy["criterion"] + marked, policy.get("mode", ABSENT), *_step_cells(step)])
    for control in calibrate.get("controls", []):
        if control["name"] == "fixed_depth":
            for step in control["pareto"]:
                rows.append([f"fixed_depth {step.get('layer', '')}".strip(), "control", *_step_cells(step)])
        elif control["pareto"]:
            near = min(control["pareto"], key=lambda step: abs(step["cost"] - cost))
            note = "upper bound" if control["name"] == "oracle" else "control"
            rows.append([control["name"], note, *_step_cells(near)])
    return markdown_table(
        ("criterion", "mode", "cost", "mean depth", "token-layer speed-up", "AUC", "AUC drop"), rows
    )


def pareto_table(calibrate: Row) -> str:
    """AUC that a cost of at most c buys: of each path the costliest step within c, no step picked by its AUC."""
    paths = {p["criterion"]: p["pareto"] for p in calibrate.get("policies", [])}
    paths |= {c["name"]: c["pareto"] for c in calibrate.get("controls", [])}
    rows = []
    for name, steps in paths.items():
        cells = []
        for cost in COSTS:
            within = [step for step in steps if step["cost"] <= cost + 1e-9]
            cells.append(number(max(within, key=lambda s: s["cost"])["auc"]) if within else ABSENT)
        rows.append([name, *cells])
    return markdown_table(("AUC at a cost of at most", *(number(c, 1) for c in COSTS)), rows)


def calibration_table(policy: Row) -> str:
    """The chosen policy's calibration and threshold of each exit.

    Args:
        policy: One of `policies`: `calibration` by layer {`logit`, `prior`, `offset`}, `thresholds` by layer (a
            number, "never" or "everyone").
    """
    thresholds = policy.get("thresholds") or {}
    calibration = policy.get("calibration") or {}
    layers = sorted({int(k) for k in (*thresholds, *calibration)})
    rows = []
    for layer in layers:
        terms = calibration.get(str(layer), {})
        threshold = thresholds.get(str(layer))
        cells = [value_cell(terms, key, 3) for key in ("logit", "prior", "offset")]
        rule = threshold if threshold is None or isinstance(threshold, str) else number(threshold)
        rows.append([f"exit {layer}", *cells, rule or ABSENT])
    return markdown_table(
        ("exit", "slope of its logit", "weight of exit 0", "offset", "leaves at safety from"), rows
    )


def effect_table(exits: Sequence[Row]) -> str:
    """Each head before and after calibration, on the same rows.

    Args:
        exits: Rows with `auc`, `log_loss`, `brier`, `ece` of the raw logits, and the same under `calibrated`.
    """
    names = {"auc": "AUC", "log_loss": "log loss", "brier": "Brier", "ece": "ECE"}
    header = ["exit"] + [f"{name} {kind}" for name in names.values() for kind in ("raw", "calibrated")]
    rows = [
        [f"exit {row['layer']}"]
        + [value_cell(kind, key) for key in names for kind in (row, row.get("calibrated") or {})]
        for row in exits
    ]
    return markdown_table(header, rows)


def priors_table(priors: Mapping[str, Row]) -> str:
    """Counting as exit 0 against none: what the best criterion reached, and the AUC of every calibrated exit.

    Args:
        priors: `priors` of a calibrate result: by name `criterion`, `chosen` step, `never_enter_trunk`, `exits`.
    """
    lines: dict[str, list[str]] = {}
    for row in priors.values():
        cost, depth, _, value, drop = _step_cells(row["chosen"])
        cells = {
            "best criterion": row["criterion"],
            "its cost": cost,
            "its mean depth": depth,
            "its AUC": value,
        }
        cells |= {"its AUC drop": drop, "never enter the trunk": percent(row["never_enter_trunk"])}
        for key, cell in cells.items():
            lines.setdefault(key, []).append(cell)
    for layer in sorted({step["layer"] for row in priors.values() for step in row["exits"]}):
        by_prior = [{s["layer"]: s for s in row["exits"]}.get(layer, {}) for row in priors.values()]
        lines[f"AUC of exit {layer} for every row"] = [value_cell(step, "auc") for step in by_prior]
    return markdown_table(["prior", *priors], [[key, *cells] for key, cells in lines.items()])


def step_of(policy: Row) -> Row:
    """The step a policy was set to; empty where none was."""
    index = policy.get("chosen_step")
    return policy["pareto"][index] if index is not None else {}


def chosen_policy(calibrate: Row) -> Row:
    """The policy that is used; empty where there is none."""
    found = (p for p in calibrate.get("policies", []) if p["criterion"] == calibrate.get("chosen"))
    return next(found, {})


def chosen_step(calibrate: Row) -> Row:
    """The step that is used: `cost`, `mean_depth`, `auc`, `auc_drop`; empty where there is none."""
    return step_of(chosen_policy(calibrate))


def value_cell(row: Row, key: str, digits: int = 4, signed: bool = False) -> str:
    """A number, "undefined" for null, an en dash where the row has no such key."""
    return number(row[key], digits, signed) if key in row else ABSENT


def plain(value: float) -> str:
    """A setting as a person wrote it: .05, .0005, 2."""
    return f"{value:g}".removeprefix("0") if 0 < value < 1 else f"{value:g}"


def percent(value: float | None) -> str:
    """A share, 85.4 %."""
    return UNDEFINED if value is None else f"{100 * value:.1f} %"


def _step_cells(step: Row) -> list[str]:
    speedup = times(1 / step["cost"]) if step.get("cost") else ABSENT  # no layer runs at a cost of 0
    return [
        value_cell(step, "cost", 3),
        value_cell(step, "mean_depth", 2),
        speedup,
        value_cell(step, "auc"),
        value_cell(step, "auc_drop", signed=True),
    ]
