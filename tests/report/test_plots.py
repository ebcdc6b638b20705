import io
from functools import cache

import matplotlib
import numpy as np
import pytest
from example_run import results
from matplotlib.colors import to_hex

from project.metrics import ece
from project.report.plots import (
    COLOURS,
    OTHER_COLOURS,
    depth_figure,
    exit_share_figure,
    pareto_figure,
    png,
    reliability_bins,
    reliability_figure,
)


@cache
def calibrate(seed=0):
    return results(400, (0, 2, 4, 6), seed=seed)[0]["calibrate"]


def axes_of(figure):
    return figure.axes[0]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def lines_by_colour(figure, colour):
    return [line for line in axes_of(figure).lines if to_hex(line.get_color()) == colour.lower()]


def legend(figure):
    return [text.get_text() for text in axes_of(figure).get_legend().get_texts()]


@pytest.mark.parametrize(
    ("low", "high", "first"), [(0.7, 0.78, ".6"), (0.7615, 0.7632, ".761"), (0.76201, 0.76214, ".7620")]
)
def test_ticks_can_be_told_apart(low, high, first):
    """Three digits, and more where two ticks would read the same."""
    figure = depth_figure([{"layer": k, "auc": auc} for k, auc in ((2, low), (4, high))])
    ticks = [tick.get_text() for tick in axes_of(figure).get_yticklabels()]
    assert ticks[0].startswith(first)
    assert len(set(ticks)) == len(ticks)


class TestReliabilityBins:
    def test_golden(self):
        """Four rows in two bins: means .15 and .85, shares 1/2 and 2/2."""
        bins = reliability_bins([0.9, 0.1, 0.8, 0.2], [1, 0, 1, 1], bins=2)
        np.testing.assert_allclose(bins, [[0.15, 0.5, 2], [0.85, 1.0, 2]])

    @pytest.mark.parametrize("bins", [1, 3, 10])
    def test_sum_is_the_ece(self, bins):
        """Sum n_b / n |p_b - y_b| is metrics.ece, ties that cross a cut included."""
        rng = np.random.default_rng(0)
        p, y = rng.integers(1, 20, 333) / 20, rng.integers(0, 2, 333)
        cut = reliability_bins(p, y, bins)
        assert cut[:, 2].sum() == 333
        gap = (cut[:, 2] * np.abs(cut[:, 0] - cut[:, 1])).sum() / 333
        assert gap == pytest.approx(ece(p, y, bins), abs=1e-12)

    def test_few_rows(self):
        """Fewer rows than bins make one bin a row; no rows make none."""
        assert len(reliability_bins([0.3, 0.6], [0, 1], bins=10)) == 2
        assert reliability_bins([], [], bins=10).shape == (0, 3)


class TestColours:
    def test_one_each(self):
        """No two lines of a picture share a colour, criteria of one's own included."""
        own = [{"criterion": f"mine{k}", "pareto": calibrate()["policies"][0]["pareto"]} for k in range(3)]
        figure = pareto_figure(calibrate() | {"policies": own})
        colours = [to_hex(line.get_color()) for line in axes_of(figure).lines]
        assert len(set(colours)) == len(colours)
        assert len(set(COLOURS.values()) | set(OTHER_COLOURS)) == len(COLOURS) + len(OTHER_COLOURS)

    def test_nothing_global(self):
        """Drawing leaves matplotlib's settings as they were."""
        before = dict(matplotlib.rcParams)
        png(pareto_figure(calibrate()))
        assert dict(matplotlib.rcParams) == before


class TestPareto:
    def test_curves_are_the_steps(self):
        """The line of a criterion holds exactly its steps, by cost, in its colour; the oracle's is dashed."""
        figure = pareto_figure(calibrate())
        for policy in calibrate()["policies"]:
            (line,) = (line for line in axes_of(figure).lines if line.get_label() == policy["criterion"])
            steps = sorted((step["cost"], step["auc"]) for step in policy["pareto"])
            np.testing.assert_allclose(line.get_xydata(), steps)
        assert lines_by_colour(figure, COLOURS["oracle"])[0].get_linestyle() == "--"

    def test_fixed_depth_is_a_stair(self):
        """A budget between two depths buys the shallower; squares say the depth."""
        steps = [{"cost": c, "auc": a, "layer": k} for c, a, k in ((0, 0.7, 0), (0.5, 0.72, 2), (1, 0.75, 4))]
        figure = pareto_figure({"controls": [{"name": "fixed_depth", "pareto": steps}]})
        (line,) = lines_by_colour(figure, COLOURS["fixed_depth"])
        np.testing.assert_allclose(line.get_xydata(), [(0, 0.7), (0.5, 0.72), (1, 0.75)])
        assert line.get_drawstyle() == "steps-post"
        assert {"0", "2", "4"} <= set(texts(figure))

    def test_plan_is_marked(self):
        """The ring stands at the step of the plan's criterion; the legend calls it the plan."""
        policy = next(p for p in calibrate()["policies"] if p["criterion"] == "consistency")
        step = policy["pareto"][policy["chosen_step"]]
        figure = pareto_figure(calibrate())
        (ring,) = (line for line in axes_of(figure).lines if str(line.get_label()).startswith("plan: "))
        np.testing.assert_allclose(ring.get_xydata(), [(step["cost"], step["auc"])])
        assert not any("chosen" in text for text in legend(figure))

    @pytest.mark.parametrize(("auc", "inside"), [(0.75, True), (0.30, False)])
    def test_baseline(self, auc, inside):
        """A line at the baseline's AUC; a baseline far below is told in words and does not squeeze the curves."""
        figure = pareto_figure(calibrate(), ("lr_rates", auc))
        low, high = axes_of(figure).get_ylim()
        assert (low < auc < high) == inside
        level = [line for line in axes_of(figure).lines if list(line.get_ydata()) == [auc, auc]]
        assert bool(level) == inside
        assert any("lr_rates" in text and ("below" in text) != inside for text in legend(figure))

    def test_legend_names_every_line_beside_the_axes(self):
        """No name lies on a line: the legend is right of the axes, and lists every criterion and control."""
        figure = pareto_figure(calibrate(), ("a$b$c", 0.75))
        figure.canvas.draw()
        axes = axes_of(figure)
        assert axes.get_legend().get_window_extent().x0 >= axes.bbox.x1
        found = " ".join(legend(figure))
        assert all(policy["criterion"] in found for policy in calibrate()["policies"])
        assert all(name in found for name in ("static exit", "random", "oracle", "plan", r"a\$b\$c"))

    def test_undefined(self):
        """Steps without an AUC are left out; with none left the picture says so instead of failing."""
        step = {"cost": 0.5, "auc": None}
        policy = {"criterion": "ratio", "pareto": [step], "chosen_step": 0}
        assert "undefined here" in texts(pareto_figure({"policies": [policy], "chosen": "ratio"}))


class TestOthers:
    def test_depth(self):
        """Bars reach from low to high of each interval, the adaptive score stands at its mean depth."""
        exits = [
            {"layer": 0, "auc": 0.70, "auc_interval": [0.68, 0.71]},
            {"layer": 2, "auc": None, "auc_interval": None},
            {"layer": 4, "auc": 0.75, "auc_interval": [0.74, 0.77], "calibrated": {"auc": 0.76}},
        ]
        adaptive = {"auc": 0.74, "mean_depth": 1.5}
        axes = axes_of(depth_figure(exits, ("item_rate", 0.69), adaptive))
        bars = [path for c in axes.containers[0].lines[2] for path in c.get_segments()]
        np.testing.assert_allclose(bars, [[(0, 0.68), (0, 0.71)], [(4, 0.74), (4, 0.77)]])
        np.testing.assert_allclose(axes.containers[1].lines[0].get_xydata(), [(1.5, 0.74)])
        assert next(x.get_xydata().tolist() for x in axes.lines if x.get_linestyle() == "--") == [[4, 0.76]]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "4"]

    def test_depth_undefined(self):
        """One class everywhere: a picture that says so."""
        assert "undefined here" in texts(depth_figure([{"layer": 2, "auc": None}]))

    def test_exit_share(self):
        """Bar heights are the shares; a share that rounds to 0 % is not called 0."""
        exits = [{"layer": k, "exit_share": s} for k, s in ((0, 0.5), (2, 0.004), (4, 0.496))]
        figure = exit_share_figure(exits, 1.99)
        heights = [bar.get_height() for bar in axes_of(figure).patches]
        assert heights == [0.5, 0.004, 0.496]
        assert texts(figure) == ["50 %", "< 1 %", "50 %"]
        assert "1.99 of 4" in axes_of(figure).get_title(loc="left")

    def test_reliability(self):
        """One panel a score, points are the bins, spare panels are hidden."""
        rng = np.random.default_rng(1)
        scores = {f"exit {k}": (rng.random(60), rng.integers(0, 2, 60)) for k in range(5)}
        figure = reliability_figure(scores)
        assert sum(axes.get_visible() for axes in figure.axes) == 5
        p, y = scores["exit 1"]
        np.testing.assert_allclose(figure.axes[1].lines[1].get_xydata(), reliability_bins(p, y)[:, :2])
        assert figure.axes[1].get_title(loc="left").startswith("exit 1")

    def test_png(self):
        """A figure is a PNG of a readable size, the same bytes every time."""
        exits = [{"layer": 0, "exit_share": 0.2}, {"layer": 2, "exit_share": 0.8}]
        content = png(exit_share_figure(exits))
        assert content == png(exit_share_figure(exits))
        height, width, _ = matplotlib.image.imread(io.BytesIO(content), format="png").shape
        assert width > height > 300
