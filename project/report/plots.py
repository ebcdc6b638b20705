"""The report's pictures; pyplot's global state is never touched, so a callback may draw inside training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from project.report.format import number
from project.results import Adaptive, CalibrateResult, Difference, ExitRow, Period

NamedAUC = tuple[str, float]

COLOURS = {
    "consistency": "#0072B2", "learned": "#D55E00", "ratio": "#E69F00", "ratio_consistency": "#CC79A7",
    "fixed_depth": "#000000", "oracle": "#6A4C93", "plan": "#009E73", "baseline": "#555555",
}  # fmt: skip
"""After Okabe and Ito (2008), for colour-blind readers; other criteria get OTHER_COLOURS in turn."""
OTHER_COLOURS = ("#56B4E9", "#882255", "#44AA99", "#999933", "#332288")
CONTROLS = {"fixed_depth": "static exit (its depth)", "oracle": "oracle (upper bound)"}
STYLES = {"oracle": "--", "fixed_depth": "s-"}
DPI = 160


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def pareto_figure(calibrate: CalibrateResult, baseline: NamedAUC | None = None) -> Figure:
    """AUC on tune by share of full depth's token-layers: criteria, static exits, oracle, plan, best baseline.

    Costs are 0 where everyone leaves at exit 0, 1 at full depth.
    """
    axes = _axes("token-layers / full depth  (left is cheaper)", "AUC, tune fold", 4.6)
    curves = {p["criterion"]: p["pareto"] for p in calibrate["policies"]}
    curves |= calibrate["controls"]
    levels: list[float] = []
    others = iter(OTHER_COLOURS * len(curves))
    # 1. a line a criterion and control
    for name, steps in curves.items():
        known = sorted((s["cost"], s["auc"]) for s in steps if s["auc"] is not None)
        if not known:
            continue
        path, colour = np.array(known), COLOURS.get(name) or next(others)
        stairs = "steps-post" if name == "fixed_depth" else "default"
        axes.plot(*path.T, STYLES.get(name, "-"), color=colour, drawstyle=stairs, lw=1.6, ms=10,
                  label=CONTROLS.get(name, name))  # fmt: skip
        for step in steps if name == "fixed_depth" else []:
            if step["auc"] is not None:  # its depth, in the square
                axes.text(step["cost"], step["auc"], str(step["layer"]), color="white", fontsize=7, ha="center",
                          va="center_baseline", zorder=5)  # fmt: skip
        levels += path[:, 1].tolist()
    # 2. a ring at the plan
    for policy in calibrate["policies"]:
        if policy["criterion"] != calibrate["chosen"]:
            continue
        step = policy["pareto"][policy["chosen_step"]]
        if step["auc"] is not None:
            label = f"plan: {policy['criterion']}, AUC {number(step['auc'])} at {number(step['cost'], 3)}"
            axes.plot(step["cost"], step["auc"], "o", ms=13, mfc="none", mec=COLOURS["plan"], mew=2.6,
                      label=label)  # fmt: skip
    # 3. the best baseline; where it is far below the curves only the legend has it, so that
    # it does not squeeze them
    span = max(levels) - min(levels) if levels else 0.0
    if levels and baseline and baseline[1] < min(levels) - span:
        axes.plot([], [], " ", label=f"{_named(baseline)}: below")
    elif baseline:
        _level(axes, baseline[1], _named(baseline))
        levels.append(baseline[1])
    if levels:
        margin = 0.07 * (max(levels) - min(levels)) or 0.01
        axes.set(xlim=(-0.02, 1.04), ylim=(min(levels) - margin, max(levels) + margin))
    return _finished(axes)


def depth_figure(
    exits: Sequence[ExitRow],
    baseline: NamedAUC | None = None,
    plan: Adaptive | None = None,
    rows: str = "test",
) -> Figure:
    """AUC of `rows` minus the best baseline's by depth, with paired intervals; the plan stands at its mean depth.

    Intervals of an AUC by itself are wide, since users differ; what an exit adds on the same users is much surer.
    """
    axes = _axes("layers run", f"AUC minus best baseline's, {rows}", 3.9)
    # 1. static exits
    paired = {row["layer"]: row["baseline_difference"] for row in exits}
    layers = _bars(axes, paired, "o-", COLOURS["fixed_depth"], "static exit")
    # 2. the plan
    if plan is not None:
        own = {plan["mean_depth"]: plan["baseline_difference"]}
        _bars(axes, own, "D", COLOURS["plan"], "plan, at its mean depth")
    axes.set_xticks(layers)
    # 3. the baseline is 0
    if baseline:
        _level(axes, 0.0, _named(baseline))
    return _finished(axes)


def backtest_figure(periods: Sequence[Period]) -> Figure:
    """AUC of the static exit chosen on tune minus the best baseline's by period, a line for each way to refit."""
    axes = _axes("test begins", "AUC minus best baseline's, test", 3.9)
    for mode, colour in zip(periods[0]["modes"], COLOURS.values(), strict=False):
        known = [
            (np.datetime64(period["begins"]), value - period["baseline"])
            for period in periods
            if (value := period["modes"][mode]["exit"]) is not None
            and period["baseline"] is not None
        ]
        axes.plot(*zip(*known, strict=True), "o-", color=colour, label=mode)
    _level(axes, 0.0)
    axes.tick_params("x", labelrotation=30)
    return _finished(axes)


def _bars(
    axes: Axes,
    rows: Mapping[int, Difference | None] | Mapping[float, Difference | None],
    style: str,
    colour: str,
    label: str,
) -> list[float]:
    """By place a point with its interval where there is one; returns the places of those that are defined."""
    defined = [
        (x, d["value"], d["interval"])
        for x, d in rows.items()
        if d and d["value"] is not None
    ]
    places = [x for x, _, _ in defined]
    if defined:
        values = np.array([value for _, value, _ in defined])
        bounds = np.array([bounds or (value, value) for _, value, bounds in defined])
        axes.errorbar(places, values, np.abs(bounds.T - values), fmt=style, color=colour, ms=5.5, lw=1.5,
                      elinewidth=1.2, capsize=3, label=label)  # fmt: skip
    return places


def _named(baseline: NamedAUC) -> str:
    return f"best baseline {baseline[0]} ({number(baseline[1])})"


def _level(axes: Axes, height: float, label: str | None = None) -> None:
    """A line at the best baseline's AUC."""
    axes.axhline(
        height, color=COLOURS["baseline"], lw=1.2, linestyle=(0, (6, 3)), label=label
    )


def _axes(xlabel: str, ylabel: str, height: float) -> Axes:
    """Axes of a new figure, 8 inches wide; tick labels have as many digits as make them differ."""
    figure = Figure(figsize=(8.0, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    # no box, a pale grid behind the data
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, length=3)
    axes.grid(color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))

    def tick(value: float, _: int) -> str:
        ticks = axes.get_yticks()
        return number(
            value,
            next(
                (d for d in (3, 4, 5) if len({number(t, d) for t in ticks}) == len(ticks)),
                6,
            ),
        )

    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    return axes


def _finished(axes: Axes) -> Figure:
    """The figure with its legend beside the axes; one without data says so."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        # outside: a legend inside covers lines. Names are data: no mathematics between two
        # dollars.
        texts = [label.replace("$", r"\$") for label in labels]
        axes.legend(
            handles,
            texts,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            fontsize=8.5,
            frameon=False,
        )
    if not axes.has_data():
        axes.text(0.5, 0.5, "undefined here", transform=axes.transAxes, ha="center")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure
