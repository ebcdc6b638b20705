import math

import pytest
import torch

from project.model.losses import exit_loss


def test_loss_by_hand() -> None:
    """Sums over targets, divided by the global number of targets; the mean of the heads."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])  # p = 1/2 and 3/4
    loss, per_head = exit_loss(logits, torch.tensor([1, 0]), 4.0)
    first, second = math.log(2) * 2 / 4, (math.log(4 / 3) + math.log(4)) / 4
    torch.testing.assert_close(per_head, torch.tensor([first, second]))
    assert loss.item() == pytest.approx((first + second) / 2)


def test_two_processes_add_up() -> None:
    """Halves of a batch, each normalised by the whole's targets, sum to the loss of the whole."""
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1] * 5)
    whole = exit_loss(logits, labels, 10)[0]
    first, second = (exit_loss(logits[s], labels[s], 10.0)[0] for s in (slice(3), slice(3, 10)))
    torch.testing.assert_close(whole, first + second)


def test_no_targets() -> None:
    """A process without targets contributes zero and can still call backward."""
    logits = torch.zeros(0, 2, requires_grad=True)
    loss, _ = exit_loss(logits, torch.zeros(0, dtype=torch.int64), 7)
    loss.backward()
    assert loss.item() == 0
