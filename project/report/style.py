"""How the report's pictures look: one colour per criterion, quiet axes, numbers without a leading zero.

Unusual here: no rcParams and no style sheets, which are global state; every function dresses the axes it is given.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = {
    "consistency": "#0072B2",
    "learned": "#D55E00",
    "ratio": "#E69F00",
    "ratio_consistency": "#CC79A7",
    "item_count": "#009E73",
    "fixed_depth": "#000000",
    "random": "#999999",
    "oracle": "#6A4C93",
}
"""After Okabe and Ito (2008), told apart by colour-blind readers."""

OTHER_COLOURS = ("#882255", "#44AA99", "#999933", "#332288")
FLOOR_COLOUR = "#555555"
CALIBRATED = "#0072B2"
INK = "#333333"
DPI = 160


def colour_of(criterion: str) -> str:
    """The criterion's colour; one that is not in COLOURS gets one that depends on its name alone."""
    return COLOURS.get(criterion) or OTHER_COLOURS[zlib.crc32(criterion.encode()) % len(OTHER_COLOURS)]


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def new_axes(xlabel: str, ylabel: str, height: float) -> Axes:
    """Axes of a new figure, 7.4 inches wide, at a fixed place: labels are placed in pixels before it is drawn."""
    figure = Figure(figsize=(7.4, height), dpi=DPI)
    FigureCanvasAgg(figure)
    low = (0.62 if xlabel else 0.45) / height
    axes = figure.add_axes((0.105, low, 0.875, 1 - low - 0.3 / height))
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, axes.get_yticks())))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    return dress(axes)


def dress(axes: Axes) -> Axes:
    """No box, a pale grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color="#EBEBEB", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def title(axes: Axes, text: str) -> None:
    """A small title at the left."""
    axes.set_title(text, loc="left", fontsize=9.5, color=INK)


def finished(axes: Axes) -> Figure:
    """The axes' figure; one without data says so."""
    if not axes.has_data():
        axes.text(0.5, 0.5, "undefined here", transform=axes.transAxes, ha="center", color=INK)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def short(value: float, digits: int = 3) -> str:
    """.754 and 1.000: three digits, no leading zero."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def tick(value: float, ticks: Iterable[float]) -> str:
    """`short`, with as many digits as it takes to tell all ticks apart."""
    known = [float(other) for other in ticks]
    digits = next((d for d in (3, 4, 5) if len({short(t, d) for t in known}) == len(known)), 6)
    return short(value, digits)


def exit_name(layer: int, name: str = "exit {}") -> str:
    """Tick label of an exit; exit 0 says what it is."""
    return name.format(layer) + ("\n(counting)" if layer == 0 else "")
