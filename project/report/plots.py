"""The report's pictures: result-file dictionaries and arrays in, matplotlib figures out.

Unusual here: figures are made from `matplotlib.figure.Figure` alone, pyplot and its global state are never touched, so
a callback may draw inside training. Lines carry their names; there is no legend to look up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import ArrayLike, NDArray

from project.evaluation.metrics import ece
from project.report.line_labels import Labels
from project.report.style import (
    CALIBRATED,
    COLOURS,
    DPI,
    FLOOR_COLOUR,
    INK,
    colour_of,
    dress,
    exit_name,
    finished,
    new_axes,
    short,
    title,
)

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
NamedAUC = tuple[str, float]

BINS = 10
LINE_NAMES = {
    "oracle": "oracle (upper bound,\nnot a policy)",
    "fixed_depth": "fixed_depth\n(layers in squares)",
}
LINE_STYLES = {"oracle": "--", "random": ":"}


def pareto_figure(calibrate: Row, floor: NamedAUC | None = None, rows: str = "tune fold") -> Figure:
    """AUC against token-layers relative to full depth: every criterion, fixed depth, random, oracle, best floor.

    Args:
        calibrate: A `calibrate` result: `policies`, `controls`, `chosen`; each `pareto` a list of steps with `cost`
            (0 where everyone leaves at exit 0, 1 at full depth) and `auc`.
        floor: Name and AUC of the best floor on the same rows.
        rows: What the AUC is of, for the axis.
    """
    axes, labels = new_axes("token-layers / full depth  (left is cheaper)", f"AUC, {rows}", 4.9), Labels()
    curves = {p["criterion"]: _path(p["pareto"]) for p in calibrate.get("policies", [])}
    curves |= {c["name"]: _path(c["pareto"]) for c in calibrate.get("controls", [])}
    curves = {name: path for name, path in curves.items() if len(path)}
    for name, path in curves.items():
        corners = _stairs(path) if name == "fixed_depth" else path
        chosen, colour = name == calibrate.get("chosen"), colour_of(name)
        axes.plot(
            *corners.T, LINE_STYLES.get(name, "-"), color=colour, linewidth=2.6 if chosen else 1.5, zorder=3
        )
        labels.add(LINE_NAMES.get(name, name), corners[:, 0], corners[:, 1], colour)
    axes.set_xlim(-0.02, 1.04)
    axes.set_ylim(*_pareto_limits(curves, floor))
    _fixed_marks(axes, calibrate, labels)
    _chosen_mark(axes, calibrate, labels)
    if floor:
        _floor_line(axes, floor, labels)
    labels.write(axes)
    return finished(axes)


def exit_share_figure(exits: Sequence[Row], mean_depth: float | None = None) -> Figure:
    """Share of rows that leave at each exit.

    Args:
        exits: Rows with `layer` and `exit_share` (rows without a share are left out).
        mean_depth: Mean layers run, for the title.
    """
    rows = [row for row in exits if row.get("exit_share") is not None]
    axes = new_axes("", "", 3.0)
    shares = [row["exit_share"] for row in rows]
    bars = axes.bar(
        [exit_name(row["layer"]) for row in rows], shares, width=0.7, color=COLOURS["consistency"]
    )
    texts = ["< 1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %" for share in shares]
    axes.bar_label(bars, texts, padding=2, fontsize=9.5, color=INK)
    axes.set_ylim(0, 1.12 * max([*shares, 0.01]))
    axes.grid(visible=False)
    axes.yaxis.set_visible(False)  # the bars say their numbers
    axes.spines["left"].set_visible(False)
    depth = f", mean depth {mean_depth:.2f} of {rows[-1]['layer']} layers" if mean_depth and rows else ""
    title(axes, "share of rows that leave at each exit" + depth)
    return finished(axes)


def reliability_bins(probability: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Floats:
    """Equal-mass bins as in `metrics.ece`: (bins, 3) mean probability, share of positives, rows.

    Rows of equal probability share their mean label, so sum_b n_b / n * |column 0 - column 1| is the ECE.

    Args:
        probability: (n,) of label 1.
        labels: (n,) 0 or 1.
        bins: Number of bins; fewer rows than bins make one bin a row.
    """
    values, positive = np.asarray(probability, np.float64), np.asarray(labels, np.float64)
    level, code, size = np.unique(values, return_inverse=True, return_counts=True)
    shared = np.repeat(np.bincount(code, weights=positive, minlength=size.size) / size, size)
    count = max(1, min(bins, values.size))
    cut = zip(np.array_split(np.repeat(level, size), count), np.array_split(shared, count), strict=True)
    return np.array([(p.mean(), y.mean(), p.size) for p, y in cut if p.size]).reshape(-1, 3)


def reliability_figure(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], bins: int = BINS) -> Figure:
    """Reliability diagrams side by side: observed share of positives against emitted probability, one panel each.

    Args:
        scores: Panel title ("exit 4", "adaptive") -> (probabilities (n,), labels (n,)).
        bins: Equal-mass bins.
    """
    columns = min(4, max(1, len(scores)))
    lines = -(-max(1, len(scores)) // columns)
    figure = Figure(figsize=(2.15 * columns + 0.5, 2.35 * lines + 0.4), dpi=DPI)
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, (probability, labels)) in zip(panels, scores.items(), strict=False):
        points, error = reliability_bins(probability, labels, bins), ece(probability, labels, bins)
        colour = COLOURS["learned"] if name == "adaptive" else COLOURS["consistency"]
        dress(axes).plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=1)
        axes.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=3.5, linewidth=1.2, zorder=3)
        title(axes, f"{name}   ECE {'undefined' if error is None else short(error)}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    figure.supxlabel("emitted probability", fontsize=10, color=INK)
    figure.supylabel("observed share of positives", fontsize=10, color=INK)
    figure.tight_layout(pad=0.6)
    return figure


def depth_figure(
    exits: Sequence[Row], floor: NamedAUC | None = None, adaptive: Row | None = None, rows: str = "test"
) -> Figure:
    """AUC by depth with interval bars, the adaptive score at its mean depth, and the best floor as a line.

    Args:
        exits: Rows with `layer`, `auc`, `auc_interval` and maybe `calibrated.auc`; an undefined AUC is left out.
        floor: Name and AUC of the best floor on the same rows.
        adaptive: `auc`, `mean_depth` and maybe `auc_interval` of the adaptive score.
        rows: What the AUC is of, for the axis.
    """
    axes, labels = new_axes("layers run", f"AUC, {rows}", 3.9), Labels()
    shown = [row for row in exits if row.get("auc") is not None]
    layers = [row["layer"] for row in shown]
    if shown:
        _bars(axes, layers, shown, COLOURS["fixed_depth"], "o-", labels)
        labels.add("same depth for every row", layers, [r["auc"] for r in shown], COLOURS["fixed_depth"])
    fitted = [(r["layer"], r["calibrated"]["auc"]) for r in shown if (r.get("calibrated") or {}).get("auc")]
    if fitted:
        x, y = np.array(fitted).T
        axes.plot(
            x, y, "o--", color=CALIBRATED, markerfacecolor="white", markersize=5.5, linewidth=1.2, zorder=3
        )
        labels.add("the same, calibrated", x, y, CALIBRATED)
        labels.avoid += fitted
    last = max(layers, default=1) or 1
    axes.set_xlim(-0.06 * last, 1.06 * last)
    axes.set_xticks(layers, [exit_name(k, "{}") for k in layers])
    if adaptive and adaptive.get("auc") is not None and adaptive.get("mean_depth") is not None:
        at = adaptive["mean_depth"]
        _bars(axes, [at], [adaptive], COLOURS["learned"], "D", labels)
        labels.add("adaptive", [at] * 2, [adaptive["auc"]] * 2, COLOURS["learned"])
    axes.margins(y=0.12)
    if floor:
        axes.plot([0], [floor[1]], alpha=0)  # takes part in the limits
    axes.set_ylim(axes.get_ylim())
    if floor:
        _floor_line(axes, floor, labels)
    labels.write(axes)
    return finished(axes)


def _path(steps: Sequence[Row]) -> Floats:
    """(m, 2) cost and AUC by rising cost; steps of undefined AUC are left out."""
    pairs = [(step["cost"], step["auc"]) for step in steps if step.get("auc") is not None]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _stairs(path: Floats) -> Floats:
    """What a budget buys in fixed depths: level until the next depth is paid for."""
    corners = np.repeat(path, 2, axis=0)[:-1]
    corners[1::2, 0] = path[1:, 0]
    return corners


def _pareto_limits(curves: Mapping[str, Floats], floor: NamedAUC | None) -> tuple[float, float]:
    """Fixed depths and criteria fill the picture; random may leave it, the floor too where it is far below."""
    if not curves:
        return (floor[1] - 0.01, floor[1] + 0.01) if floor else (0.0, 1.0)
    top, low = max(c[:, 1].max() for c in curves.values()), min(c[:, 1].min() for c in curves.values())
    if "fixed_depth" in curves:
        static = curves["fixed_depth"][:, 1].min()
        low = max(low, static - 0.5 * (top - static))
    span = top - low or 0.01
    if floor and low - span < floor[1]:
        low, top = min(low, floor[1]), max(top, floor[1])
    return float(low - 0.07 * span), float(top + 0.13 * span)


def _floor_line(axes: Axes, floor: NamedAUC, labels: Labels) -> None:
    name = f"best floor: {floor[0]} ({short(floor[1])})"
    if not axes.get_ylim()[0] < floor[1] < axes.get_ylim()[1]:
        axes.text(
            0.99,
            0.02,
            f"{name}, below this picture",
            transform=axes.transAxes,
            ha="right",
            fontsize=9,
            color=FLOOR_COLOUR,
        )
        return
    axes.axhline(floor[1], color=FLOOR_COLOUR, linewidth=1.2, linestyle=(0, (6, 3)), zorder=2)
    labels.add(name, axes.get_xlim(), [floor[1]] * 2, FLOOR_COLOUR)


def _fixed_marks(axes: Axes, calibrate: Row, labels: Labels) -> None:
    """Squares that say their depth."""
    controls = [c for c in calibrate.get("controls", []) if c["name"] == "fixed_depth"]
    for step in (s for c in controls for s in c["pareto"] if s.get("auc") is not None):
        place = (step["cost"], step["auc"])
        labels.avoid.append(place)
        axes.plot(*place, "s", color=COLOURS["fixed_depth"], markersize=10, zorder=5)
        axes.text(
            *place,
            str(step.get("layer", "")),
            color="white",
            fontsize=7,
            ha="center",
            va="center_baseline",
            zorder=5,
        )


def _chosen_mark(axes: Axes, calibrate: Row, labels: Labels) -> None:
    """A ring at the chosen policy's step, with its numbers."""
    for policy in calibrate.get("policies", []):
        index = policy.get("chosen_step")
        step = policy["pareto"][index] if index is not None else {}
        if policy["criterion"] != calibrate.get("chosen") or step.get("auc") is None:
            continue
        place, colour = (step["cost"], step["auc"]), colour_of(policy["criterion"])
        axes.plot(*place, "o", ms=12, mfc="none", mec="white", mew=4.5, zorder=6)
        axes.plot(*place, "o", ms=12, mfc="none", mec=colour, mew=2.4, zorder=6)
        text = f"chosen: AUC {short(place[1])}\nat cost {short(place[0])}"
        labels.add(text, [place[0]] * 2, [place[1]] * 2, colour)
        labels.avoid.append(place)


def _bars(
    axes: Axes, x: Sequence[float], rows: Sequence[Row], colour: str, style: str, labels: Labels
) -> None:
    """Points at `auc` with their `auc_interval` where there is one; labels keep off the bars."""
    values = np.array([row["auc"] for row in rows], dtype=np.float64)
    bounds = np.array([row.get("auc_interval") or (row["auc"], row["auc"]) for row in rows], dtype=np.float64)
    axes.errorbar(
        x,
        values,
        yerr=np.abs(bounds.T - values),
        fmt=style,
        color=colour,
        markersize=5.5,
        linewidth=1.5,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )
    labels.avoid += [
        (a, y) for a, (low, high) in zip(x, bounds, strict=True) for y in np.linspace(low, high, 25)
    ]
