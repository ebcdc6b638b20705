import pytest
import torch

from project.errors import DataError
from project.exits.criteria import HeadOutputs
from project.exits.policy import FixedDepth
from project.exits.search import (
    ScoredRows,
    control_curves,
    cost_matched_auc,
    curve,
    equal_accuracy_depth,
)
from project.metrics import auc


def small():
    """Four rows of which head 0 orders 3 of 4 pairs and head 1 all; tokens 1 + 1, 1 + 3, 1 + 1, 1 + 3."""
    outputs = HeadOutputs.of((2, 4), torch.tensor([[0.1, 0.0], [0.4, 1.0], [0.2, 2.0], [0.5, 3.0]]))
    return ScoredRows(outputs, [0, 0, 1, 1], torch.ones(4), torch.tensor([1, 3, 1, 3]))


def test_golden():
    """Rows 2 and 4 leave at layer 2: cost (4*2 + 2*4 + 4*2 + 2*4) / (4 * 12) = 2/3, mean depth 3.

    Scores 0, .4, 2, .5 against labels 0, 0, 1, 1: all four pairs in order, AUC 1, as at full depth.
    """
    rows = small()

    class Some:
        def exits(self, outputs):
            return torch.tensor([1, 0, 1, 0])

    assert curve(rows, [Some()]) == [
        {"cost": pytest.approx(2 / 3), "mean_depth": 3.0, "auc": 1.0, "auc_drop": 0.0}
    ]
    assert curve(rows, [FixedDepth(0)]) == [{"cost": 0.5, "mean_depth": 2.0, "auc": 0.75, "auc_drop": 0.25}]


def test_controls(world, outputs):
    """Static depths are the heads' own AUCs at cost layer / 12; all controls start or end at full depth."""
    controls = {c["name"]: c["pareto"] for c in control_curves(outputs, world.labels, *world.tokens)}
    assert list(controls) == ["fixed_depth", "random", "oracle"]
    for k, p in enumerate(controls["fixed_depth"]):
        assert p["layer"] == p["mean_depth"] == world.layers[k]
        assert p["cost"] == pytest.approx(world.layers[k] / 12)
        assert p["auc"] == auc(outputs.logits[:, k], world.labels)
    assert controls["random"][0]["cost"] == 1
    assert controls["oracle"][0]["auc_drop"] == pytest.approx(0, abs=1e-3)
    assert controls["oracle"][-1]["cost"] == 0
    only = control_curves(outputs, world.labels, *world.tokens, only="oracle")
    assert only == [{"name": "oracle", "pareto": controls["oracle"]}]


def test_one_class_is_undefined(outputs, world):
    """Without negatives AUC and drop are None, cost is still known."""
    point = curve(ScoredRows(outputs, world.labels * 0 + 1, *world.tokens), [FixedDepth(3)])[0]
    assert (point["auc"], point["auc_drop"], point["mean_depth"]) == (None, None, 6.0)
    assert cost_matched_auc([point], 0.5) is None


def test_rival_golden():
    """Static AUCs .75, 1, 1: the static exit is head 1; a tolerance of .25 admits head 0; one class is an error."""
    scores = torch.tensor([[0.1, 0.0, 0.0], [0.4, 1.0, 1.0], [0.2, 2.0, 2.0], [0.5, 3.0, 3.0]])
    assert equal_accuracy_depth(scores, [0, 0, 1, 1]) == 1
    assert equal_accuracy_depth(scores, [0, 0, 1, 1], tolerance=0.25) == 0
    with pytest.raises(DataError, match="one class in 4 rows"):
        equal_accuracy_depth(scores, [1, 1, 1, 1])


def test_cost_matched_golden():
    """AUC .7 at cost .5 and .8 at 1: .74 at cost .7, .7 below .5."""
    points = [{"cost": 1.0, "auc": 0.8}, {"cost": 0.5, "auc": 0.7}]
    assert cost_matched_auc(points, 0.7) == pytest.approx(0.74)
    assert cost_matched_auc(points, 0.1) == pytest.approx(0.7)
