"""The report's pictures: result-file dictionaries and arrays in, matplotlib figures out.

Unusual here: figures are made from `matplotlib.figure.Figure` alone, pyplot and its global state are never touched, so
a callback may draw inside training. A criterion has one colour in every picture of every run (colour-blind safe,
after Okabe and Ito 2008), and lines carry their names.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from project.line_labels import label_lines
from project.metrics import ece

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

COLOURS = {
    "consistency": "#0072B2",
    "learned": "#D55E00",
    "ratio": "#E69F00",
    "ratio_consistency": "#CC79A7",
    "neighbour_depth": "#009E73",
    "drift_head": "#56B4E9",
    "fixed_depth": "#000000",
    "random": "#999999",
    "oracle": "#6A4C93",
}
OTHER_COLOURS = ("#882255", "#44AA99", "#999933", "#332288")
FLOOR_COLOUR = "#555555"
INK = "#333333"
DPI = 160
BINS = 10
CONTROLS = ("fixed_depth", "random", "oracle")
ORACLE_NOTE = "oracle (upper bound, not a policy)"


def colour_of(criterion: str) -> str:
    """The criterion's colour; one that is not in COLOURS gets one that depends on its name alone."""
    return COLOURS.get(criterion) or OTHER_COLOURS[zlib.crc32(criterion.encode()) % len(OTHER_COLOURS)]


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def pareto_figure(calibrate: Row, floor: tuple[str, float] | None = None, rows: str = "tune fold") -> Figure:
    """AUC against token-layers relative to full depth: every criterion, fixed depth, random, oracle, best floor.

    Args:
        calibrate: A `calibrate` result: `policies`, `controls`, `chosen`; each `pareto` a list of steps with `cost`
            in (0, 1] (0 where everyone leaves at exit 0) and `auc`.
        floor: Name and AUC of the best floor on the same rows.
        rows: What the AUC is of, for the axis.
    """
    axes = _axes("token-layers / full depth  (left is cheaper)", f"AUC, {rows}")
    curves = {p["criterion"]: p["pareto"] for p in calibrate.get("policies", [])}
    curves |= {c["name"]: c["pareto"] for c in calibrate.get("controls", [])}
    paths = {name: path for name, steps in curves.items() if len(path := _path(steps))}
    lines: dict[str, tuple[Floats, Floats]] = {}
    colours: dict[str, str] = {}
    for name, path in paths.items():
        label = ORACLE_NOTE if name == "oracle" else name
        corners = _steps(path) if name == "fixed_depth" else path
        style = {"oracle": "--", "random": ":"}.get(name, "-")
        width = 2.4 if name == calibrate.get("chosen") else 1.5
        axes.plot(corners[:, 0], corners[:, 1], style, color=colour_of(name), linewidth=width, zorder=3)
        lines[label], colours[label] = (corners[:, 0], corners[:, 1]), colour_of(name)
    axes.set_xlim(-0.02, 1.04)
    axes.set_ylim(*_pareto_limits(paths, floor))
    if floor:
        _floor_line(axes, floor, lines, colours)
    marks = _fixed_marks(axes, calibrate) + _chosen_mark(axes, calibrate, lines, colours)
    label_lines(axes, lines, colours, marks)
    return _finished(axes)


def exit_share_figure(exits: Sequence[Row], mean_depth: float | None = None) -> Figure:
    """Share of rows that leave at each exit.

    Args:
        exits: Rows with `layer` and `exit_share` (rows without a share are left out).
        mean_depth: Mean layers run, for the title.
    """
    rows = [row for row in exits if row.get("exit_share") is not None]
    axes = _axes("", "share of rows that leave here", height=3.6)
    shares = [row["exit_share"] for row in rows]
    bars = axes.bar(
        [_exit_name(row["layer"]) for row in rows], shares, width=0.7, color=COLOURS["consistency"]
    )
    axes.bar_label(bars, [f"{100 * s:.0f} %" for s in shares], padding=2, fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, min(1.12 * max(shares, default=1.0), 1.12))
    axes.grid(axis="x", visible=False)
    if mean_depth is not None and rows:
        _title(axes, f"mean depth {mean_depth:.2f} of {max(row['layer'] for row in rows)} layers")
    return _finished(axes)


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
    shared = np.repeat(np.bincount(code, weights=positive, minlength=len(size)) / size, size)
    pairs = zip(
        *(np.array_split(x, max(1, min(bins, values.size))) for x in (np.repeat(level, size), shared)),
        strict=True,
    )
    return np.array([(p.mean(), y.mean(), len(p)) for p, y in pairs if len(p)]).reshape(-1, 3)


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
        _styled(axes)
        points = reliability_bins(probability, labels, bins)
        colour = COLOURS["learned"] if name == "adaptive" else COLOURS["consistency"]
        axes.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, zorder=1)
        axes.plot(points[:, 0], points[:, 1], "o-", color=colour, markersize=3.5, linewidth=1.2, zorder=3)
        error = ece(probability, labels, bins)
        _title(axes, f"{name}   ECE {'undefined' if error is None else _short(error)}")
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    figure.supxlabel("emitted probability", fontsize=10, color=INK)
    figure.supylabel("observed share of positives", fontsize=10, color=INK)
    figure.tight_layout(pad=0.6)
    return figure


def depth_figure(
    exits: Sequence[Row],
    floor: tuple[str, float] | None = None,
    adaptive: Row | None = None,
    rows: str = "test",
) -> Figure:
    """AUC by depth with interval bars, the adaptive score at its mean depth, and the best floor as a line.

    Args:
        exits: Rows with `layer`, `auc`, `auc_interval`; those whose AUC is undefined are left out.
        floor: Name and AUC of the best floor on the same rows.
        adaptive: `auc`, `mean_depth` and maybe `auc_interval` of the adaptive score.
        rows: What the AUC is of, for the axis.
    """
    axes = _axes("layers run", f"AUC, {rows}", height=3.8)
    shown = [row for row in exits if row.get("auc") is not None]
    layers = [row["layer"] for row in shown]
    _bars(axes, layers, shown, COLOURS["fixed_depth"], "o-")
    lines = (
        {"every row to this exit": (np.array(layers), np.array([row["auc"] for row in shown]))}
        if shown
        else {}
    )
    colours = dict.fromkeys(lines, COLOURS["fixed_depth"])
    marks = [(row["layer"], y) for row in shown for y in (row.get("auc_interval") or [row["auc"]])]
    last = max(layers, default=1) or 1
    axes.set_xlim(-0.06 * last, 1.06 * last)
    axes.set_xticks(layers, [_exit_name(k, "{}") for k in layers])
    if adaptive and adaptive.get("auc") is not None and adaptive.get("mean_depth") is not None:
        at, value = adaptive["mean_depth"], adaptive["auc"]
        _bars(axes, [at], [adaptive], COLOURS["learned"], "D")
        lines["adaptive"], colours["adaptive"] = (np.full(2, at), np.full(2, value)), COLOURS["learned"]
        marks.append((at, value))
    axes.margins(y=0.12)
    if floor:
        axes.axhline(floor[1], alpha=0)  # takes part in the limits
        axes.set_ylim(axes.get_ylim())
        _floor_line(axes, floor, lines, colours)
    axes.set_ylim(axes.get_ylim())
    label_lines(axes, lines, colours, marks)
    return _finished(axes)


def _axes(xlabel: str, ylabel: str, height: float = 4.7) -> Axes:
    figure = Figure(figsize=(7.4, height), dpi=DPI)
    FigureCanvasAgg(figure)
    low = 0.62 / height
    axes = figure.add_axes((0.105, low, 0.875, 1 - low - 0.3 / height))
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    return _styled(axes)


def _styled(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _finished(axes: Axes) -> Figure:
    if not axes.has_data():
        axes.text(0.5, 0.5, "undefined here", transform=axes.transAxes, ha="center", color=INK)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9.5, color=INK)


def _short(value: float) -> str:
    """.754 and 1.000: three digits, no leading zero."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _exit_name(layer: int, name: str = "exit {}") -> str:
    return name.format(layer) + ("\n(counting)" if layer == 0 else "")


def _path(steps: Sequence[Row]) -> Floats:
    """(m, 2) cost and AUC by rising cost; steps of undefined AUC are left out."""
    pairs = [(step["cost"], step["auc"]) for step in steps if step.get("auc") is not None]
    return np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)


def _steps(path: Floats) -> Floats:
    """What a budget buys in fixed depths: level until the next depth is paid for."""
    corners = np.repeat(path, 2, axis=0)[:-1] if len(path) else path
    corners[1::2, 0] = path[1:, 0]
    return corners


def _pareto_limits(paths: Mapping[str, Floats], floor: tuple[str, float] | None) -> tuple[float, float]:
    """Fixed depths, floor and criteria fill the picture; what falls far below them (random) may leave it."""
    values = [path[:, 1] for path in paths.values()] + ([np.array([floor[1]])] if floor else [])
    if not values:
        return 0.0, 1.0
    top, low = max(v.max() for v in values), min(v.min() for v in values)
    if "fixed_depth" in paths:
        reference = min(paths["fixed_depth"][:, 1].min(), floor[1] if floor else 1.0)
        low = max(low, reference - 0.35 * (top - reference))
    margin = 0.06 * (top - low) or 0.01
    return float(low - margin), float(top + margin)


def _floor_line(
    axes: Axes,
    floor: tuple[str, float],
    lines: dict[str, tuple[Floats, Floats]],
    colours: dict[str, str],
) -> None:
    label = f"best floor: {floor[0]} ({_short(floor[1])})"
    axes.axhline(floor[1], color=FLOOR_COLOUR, linewidth=1.2, linestyle=(0, (6, 3)), zorder=2)
    lines[label] = (np.array(axes.get_xlim()), np.full(2, floor[1]))
    colours[label] = FLOOR_COLOUR


def _fixed_marks(axes: Axes, calibrate: Row) -> list[tuple[float, float]]:
    steps = next((c["pareto"] for c in calibrate.get("controls", []) if c["name"] == "fixed_depth"), [])
    marks = [(step["cost"], step["auc"]) for step in steps if step.get("auc") is not None]
    for step in steps:
        if step.get("auc") is None:
            continue
        axes.plot(step["cost"], step["auc"], "s", color=COLOURS["fixed_depth"], markersize=5, zorder=5)
        if "layer" in step:
            axes.annotate(
                str(step["layer"]),
                (step["cost"], step["auc"]),
                (4, -11),
                textcoords="offset points",
                fontsize=8,
                color=INK,
                zorder=5,
            )
    return marks


def _chosen_mark(
    axes: Axes,
    calibrate: Row,
    lines: dict[str, tuple[Floats, Floats]],
    colours: dict[str, str],
) -> list[tuple[float, float]]:
    """A ring at the chosen policy's step, with its numbers."""
    for policy in calibrate.get("policies", []):
        step = policy.get("chosen_step")
        if policy["criterion"] != calibrate.get("chosen") or step is None:
            continue
        point = policy["pareto"][step]
        if point.get("auc") is None:
            continue
        colour = colour_of(policy["criterion"])
        axes.plot(
            point["cost"],
            point["auc"],
            "o",
            markersize=11,
            markerfacecolor="white",
            markeredgecolor=colour,
            markeredgewidth=2.2,
            zorder=5,
        )
        label = f"chosen: {_short(point['auc'])} at {_short(point['cost'])} of the cost"
        lines[label] = (np.full(2, point["cost"]), np.full(2, point["auc"]))
        colours[label] = colour
        return [(point["cost"], point["auc"])]
    return []


def _bars(axes: Axes, x: Sequence[float], rows: Sequence[Row], colour: str, style: str) -> None:
    """Points at `auc` with their `auc_interval` where there is one."""
    values = np.array([row["auc"] for row in rows], dtype=np.float64)
    bounds = np.array([row.get("auc_interval") or (row["auc"], row["auc"]) for row in rows], dtype=np.float64)
    error = np.abs(bounds.reshape(-1, 2).T - values)
    axes.errorbar(
        x,
        values,
        yerr=error,
        fmt=style,
        color=colour,
        markersize=5.5,
        linewidth=1.5,
        elinewidth=1.2,
        capsize=3,
        zorder=3,
    )
