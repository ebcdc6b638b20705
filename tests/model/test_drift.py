from __future__ import annotations

import math

import torch
from torch import nn

from project.model.heads import ExitHead
from project.model.losses import drift_loss


def test_drift_leaves_the_rest_alone() -> None:
    """The loss of the drift moves the drift's own weights and nothing else: neither norm nor logit nor trunk."""
    torch.manual_seed(0)
    hidden = torch.randn(6, 16, requires_grad=True)
    first, last = (ExitHead(nn.RMSNorm(16), torch.linspace(-1, 1, 16), last=k) for k in (False, True))
    outputs = [first(hidden), last(hidden * 2)]
    logits, drift = (torch.stack(part, dim=1) for part in zip(*outputs, strict=True))
    drift_loss(logits, drift, 6).backward()
    moved = {name for name, p in first.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"drift.weight", "drift.bias"}
    assert hidden.grad is None
    assert last.drift is None
    assert torch.isneginf(drift[:, 1]).all()  # the last head is the last word: expected drift 0


def test_drift_loss_arithmetic() -> None:
    """With p = (.5, .75): target |.75 - .5| = .25; at drift .5 the cross-entropy is log 2, at .25 it is smallest."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    at_half = drift_loss(logits, torch.tensor([[0.0, -torch.inf]]), 1)
    torch.testing.assert_close(at_half, torch.tensor(math.log(2.0)))
    values = [
        drift_loss(logits, torch.tensor([[math.log(q / (1 - q)), -torch.inf]]), 1) for q in (0.2, 0.25, 0.3)
    ]
    assert values[1] < min(values[0], values[2])
    assert (
        drift_loss(torch.zeros(3, 1), torch.full((3, 1), -torch.inf), 3) == 0
    )  # one head: nothing to foresee
