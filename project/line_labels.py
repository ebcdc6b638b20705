"""Names at the lines of a plot instead of a legend: each label goes where it covers least and belongs most clearly.

Unusual here: places are searched in pixels on the axes' final limits, so set limits before calling; no font is
measured (a label's width is estimated from its length), which keeps the search deterministic and without a renderer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LETTER = 0.58  # width of a letter over the font size, an upper middle value of DejaVu Sans
PAD = 3.0  # pixels kept free around a label
ANCHORS = 36  # places tried along a line
GAPS = (5.0, 14.0, 26.0, 42.0)  # pixels between a line and its label
DIRECTIONS = np.array(
    [(0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0)], dtype=np.float64
)
LEADER_FROM = 20.0  # labels farther than this from their line get a thin leader


def label_lines(
    axes: Axes,
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    colours: Mapping[str, str],
    avoid: ArrayLike = (),
    size: float = 9.0,
) -> None:
    """Write every line's name beside it.

    Args:
        axes: Final limits and position; `lines` are already drawn.
        lines: Label -> (x (m,), y (m,)) in data coordinates, the corners of the drawn line.
        colours: Label -> colour of the line; the text is drawn a little darker.
        avoid: (k, 2) points in data coordinates that no label should cover, such as markers.
        size: Font size in points.
    """
    paths = {name: _dense(axes, x, y) for name, (x, y) in lines.items()}
    marks = np.asarray(avoid, dtype=np.float64).reshape(-1, 2)
    crowd = np.concatenate([*paths.values(), np.repeat(axes.transData.transform(marks), 30, axis=0)])
    placed: list[Floats] = []
    scale = axes.figure.dpi / 72
    # short lines have the fewest places to choose from: they choose first
    for name in sorted(paths, key=lambda key: len(paths[key])):
        half = np.array([LETTER * size * len(name) / 2, 0.6 * size]) * scale
        others = np.concatenate([np.zeros((0, 2)), *(path for key, path in paths.items() if key != name)])
        found = _best_place(axes, paths[name], others, crowd, placed, half)
        if found is not None:
            anchor, centre = found
            placed.append(np.concatenate([centre - half, centre + half]))
            _write(axes, name, colours[name], anchor, centre, half, size)


def _dense(axes: Axes, x: ArrayLike, y: ArrayLike, step: float = 3.0) -> Floats:
    """Pixels (m, 2) along a line, about every `step`, those outside the axes left out."""
    corners = axes.transData.transform(np.column_stack([np.asarray(x, float), np.asarray(y, float)]))
    length = np.r_[0.0, np.cumsum(np.hypot(*np.diff(corners, axis=0).T))]
    at = np.linspace(0.0, length[-1], max(2, int(length[-1] / step)))
    points = np.column_stack([np.interp(at, length, corners[:, i]) for i in (0, 1)])
    return points[_inside(axes, points, points)]


def _inside(axes: Axes, low: Floats, high: Floats) -> NDArray[np.bool_]:
    box = axes.bbox.extents
    return np.asarray(np.all(low >= box[:2], axis=-1) & np.all(high <= box[2:], axis=-1))


def _best_place(
    axes: Axes, own: Floats, others: Floats, crowd: Floats, placed: list[Floats], half: Floats
) -> tuple[Floats, Floats] | None:
    """Anchor on the line and centre of the label (pixels), None where the line has no visible part."""
    if not len(own):
        return None
    anchor = own[np.unique(np.linspace(0, len(own) - 1, ANCHORS).astype(int))]
    gaps = np.array(GAPS)
    shift = DIRECTIONS[:, None, :] * (half + gaps[None, :, None])  # (directions, gaps, 2)
    centre = (anchor[:, None, None, :] + shift).reshape(-1, 2)
    start = np.repeat(anchor, shift.shape[0] * shift.shape[1], axis=0)
    low, high = centre - half - PAD, centre + half + PAD
    penalty = _points_inside(low, high, crowd) + np.tile(0.15 * gaps, len(anchor) * len(DIRECTIONS))
    penalty += 1e4 * ~_inside(axes, low, high)
    for box in placed:
        penalty += 1e3 * (np.all(low < box[2:], axis=1) & np.all(high > box[:2], axis=1))
    if len(others):  # a label nearer to another line than to its own misleads
        ambiguous = _distance(low, high, others) < 1.5 * _distance(low, high, own)
        penalty += 60.0 * ambiguous
    best = int(np.argmin(penalty))
    return start[best], centre[best]


def _points_inside(low: Floats, high: Floats, points: Floats) -> Floats:
    """How many points (m, 2) lie in each of the boxes (k, 2), (k, 2)."""
    hit = np.all((points[None] >= low[:, None]) & (points[None] <= high[:, None]), axis=2)
    return np.asarray(hit.sum(axis=1), dtype=np.float64)


def _distance(low: Floats, high: Floats, points: Floats) -> Floats:
    """Distance of each box to the nearest of the points, 0 where one is inside."""
    nearest = np.clip(points[None], low[:, None], high[:, None])
    return np.asarray(np.hypot(*np.moveaxis(points[None] - nearest, 2, 0)).min(axis=1), dtype=np.float64)


def _write(
    axes: Axes, name: str, colour: str, anchor: Floats, centre: Floats, half: Floats, size: float
) -> None:
    back = axes.transData.inverted()
    edge = np.clip(anchor, centre - half, centre + half)
    if np.hypot(*(anchor - edge)) > LEADER_FROM:
        ends = back.transform(np.stack([anchor, edge]))
        axes.plot(ends[:, 0], ends[:, 1], color=colour, linewidth=0.6, zorder=4)
    x, y = back.transform(centre)
    red, green, blue = (0.8 * part for part in to_rgb(colour))  # pale hues stay readable as text
    text = axes.text(
        x, y, name, color=(red, green, blue), fontsize=size, ha="center", va="center", zorder=6, clip_on=True
    )
    text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
