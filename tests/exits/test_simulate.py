import pytest
import torch

from project.exits.criteria import HeadOutputs
from project.exits.search import control_curves, equal_accuracy_exit, point, static_curve
from project.metrics import auc


def small():
    """Four rows of which head 0 orders 3 of 4 pairs and head 1 all; tokens 1 + 1, 1 + 3, 1 + 1, 1 + 3."""
    outputs = HeadOutputs.of((2, 4), torch.tensor([[0.1, 0.0], [0.4, 1.0], [0.2, 2.0], [0.5, 3.0]]))
    return outputs, [0, 0, 1, 1], torch.tensor([2, 4, 2, 4])


def test_golden():
    """Rows 2 and 4 leave at layer 2: cost (4*2 + 2*4 + 4*2 + 2*4) / (4 * 12) = 2/3, mean depth 3.

    Scores 0, .4, 2, .5 against labels 0, 0, 1, 1: all four pairs in order, AUC 1, as at full depth.
    """
    rows = small()
    some = {"cost": pytest.approx(2 / 3), "mean_depth": 3.0, "auc": 1.0, "auc_drop": 0.0}
    assert point(*rows, torch.tensor([1, 0, 1, 0])) == some
    shallow = {"cost": 0.5, "mean_depth": 2.0, "auc": 0.75, "auc_drop": 0.25}
    assert point(*rows, torch.zeros(4, dtype=torch.int64)) == shallow


def test_controls(world, outputs):
    """Static depths are the heads' own AUCs at cost layer / 12; all controls start or end at full depth."""
    controls = {c["name"]: c["pareto"] for c in control_curves(outputs, world.labels, world.tokens)}
    assert list(controls) == ["fixed_depth", "random", "oracle"]
    for k, p in enumerate(controls["fixed_depth"]):
        assert p["layer"] == p["mean_depth"] == world.layers[k]
        assert p["cost"] == pytest.approx(world.layers[k] / 12)
        assert p["auc"] == auc(outputs.logits[:, k], world.labels)
    assert controls["random"][0]["cost"] == 1
    assert controls["oracle"][0]["auc_drop"] == pytest.approx(0, abs=1e-3)
    assert controls["oracle"][-1]["cost"] == 0


def test_one_class_is_undefined(outputs, world):
    """Without negatives AUC and drop are None, cost is still known."""
    found = point(outputs, world.labels * 0 + 1, world.tokens, torch.full((600,), 3))
    assert (found["auc"], found["auc_drop"], found["mean_depth"]) == (None, None, 6.0)


def test_equal_accuracy_golden():
    """Static AUCs .75, 1, 1 at layers 2, 4, 6: layer 4; exactly .002 below the best is near enough."""
    logits = torch.tensor([[0.1, 0.0, 0.0], [0.4, 1.0, 1.0], [0.2, 2.0, 2.0], [0.5, 3.0, 3.0]])
    static = static_curve(HeadOutputs.of((2, 4, 6), logits), [0, 0, 1, 1], torch.ones(4))
    assert equal_accuracy_exit(static)["layer"] == 4
    assert equal_accuracy_exit([{"layer": 2, "auc": 0.998}, {"layer": 4, "auc": 1.0}])["layer"] == 2
