"""Names at the lines of a plot instead of a legend: each label goes where it covers least and belongs most clearly.

Unusual here: places are searched in pixels on the axes' final limits, so set limits before calling; no font is
measured (a label's width is estimated from its length), which keeps the search deterministic and without a renderer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LETTER = 0.53  # width of a letter over the font size, a little above the mean of DejaVu Sans
PAD = 3.0  # pixels kept free around a label
ANCHORS = 28  # places tried along a line
GAPS = (4.0, 10.0, 18.0, 30.0, 48.0)  # pixels between a line and its label
DIRECTIONS = np.array(
    [(0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0)], dtype=np.float64
)
MARK = 9.0  # pixels from the middle of a marker to its corner
COVERED, AMBIGUOUS, MEETING = (
    6.0,
    60.0,
    80.0,
)  # penalties: a covered point, nearer to another line, where lines meet
CROWDED = 16.0  # pixels: an anchor nearer than this to another line is a poor one
LEADER_FROM = 20.0  # labels farther than this from their line get a thin leader


@dataclass
class Labels:
    """What `label_lines` needs, gathered while drawing.

    Attributes:
        lines: Label -> corners of its line, in data coordinates.
        colours: Label -> colour.
        avoid: Points that no label should cover.
    """

    lines: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    colours: dict[str, str] = field(default_factory=dict)
    avoid: list[tuple[float, float]] = field(default_factory=list)

    def add(self, name: str, x: ArrayLike, y: ArrayLike, colour: str) -> None:
        """One line (m,), (m,) and its name; a single point is a line of two equal corners."""
        self.lines[name], self.colours[name] = (np.asarray(x, float), np.asarray(y, float)), colour

    def write(self, axes: Axes) -> None:
        """Write all names."""
        label_lines(axes, self.lines, self.colours, self.avoid)


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
        lines: Label (may hold line breaks) -> (x (m,), y (m,)) in data coordinates, the corners of the drawn line.
        colours: Label -> colour of the line; the text is drawn a little darker.
        avoid: (k, 2) points in data coordinates that no label should cover, such as markers.
        size: Font size in points.
    """
    paths = {name: _dense(axes, x, y) for name, (x, y) in lines.items()}
    marks = axes.transData.transform(np.asarray(avoid, dtype=np.float64).reshape(-1, 2))
    corners = (marks[:, None] + MARK * np.array([(0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])).reshape(-1, 2)
    crowd = np.concatenate([*paths.values(), np.repeat(corners, 4, axis=0)])
    placed: list[Floats] = []
    scale = axes.figure.dpi / 72
    # points, then long names, have the fewest places to choose from: they choose first
    for name in sorted(paths, key=lambda key: (len(paths[key]) > 2, -len(key), key)):
        written = name.split("\n")
        half = np.array([LETTER * max(map(len, written)), 1.25 * len(written)]) * size * scale / 2
        others = np.concatenate([np.zeros((0, 2)), *(path for key, path in paths.items() if key != name)])
        found = _best_place(axes, paths[name], others, crowd, placed, half)
        if found is not None:
            anchor, centre = found
            placed.append(np.concatenate([centre - half, centre + half]))
            _write(axes, name, colours[name], anchor, centre, half, size)


def _dense(axes: Axes, x: ArrayLike, y: ArrayLike, step: float = 6.0) -> Floats:
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
    penalty = COVERED * _points_inside(low, high, crowd) + np.tile(0.3 * gaps, len(anchor) * len(DIRECTIONS))
    penalty += 1e4 * ~_inside(axes, low, high)
    for box in placed:
        penalty += 1e3 * (np.all(low < box[2:], axis=1) & np.all(high > box[:2], axis=1))
    if len(others):  # a label as near to another line as to its own misleads, so do anchors where lines meet
        near = np.flatnonzero(penalty <= penalty.min() + AMBIGUOUS + MEETING)  # others cannot win any more
        ours, theirs = (_distance(low[near], high[near], path) for path in (own, others))
        alone = np.repeat(_distance(anchor, anchor, others), len(DIRECTIONS) * len(gaps))[near]
        misleading = AMBIGUOUS * (theirs < 1.5 * ours) + MEETING * np.clip(1.0 - alone / CROWDED, 0.0, 1.0)
        penalty[near] += misleading
        penalty[near] -= AMBIGUOUS + MEETING  # stays below all that were left out
    best = int(np.argmin(penalty))
    return start[best], centre[best]


def _points_inside(low: Floats, high: Floats, points: Floats) -> Floats:
    """How many points (m, 2) lie in each of the boxes (k, 2), (k, 2)."""
    hit = np.ones((len(low), len(points)), dtype=bool)
    for axis in (0, 1):
        hit &= (points[:, axis] >= low[:, axis, None]) & (points[:, axis] <= high[:, axis, None])
    return np.asarray(hit.sum(axis=1), dtype=np.float64)


def _distance(low: Floats, high: Floats, points: Floats) -> Floats:
    """Distance of each box to the nearest of the points, 0 where one is inside."""
    square = np.zeros((len(low), len(points)))
    for axis in (0, 1):
        below, above = low[:, axis, None] - points[:, axis], points[:, axis] - high[:, axis, None]
        square += np.maximum(np.maximum(below, above), 0.0) ** 2
    return np.asarray(np.sqrt(square.min(axis=1)), dtype=np.float64)


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
