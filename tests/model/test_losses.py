import math

import pytest
import torch

from project.model.losses import LossSettings, Weights, exit_loss, exit_weights


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("linear", [1 / 14, 4 / 14, 9 / 14]),
        ("sqrt", [1 / 6, 2 / 6, 3 / 6]),
        ("inverse", [36 / 49, 9 / 49, 4 / 49]),  # 1 + 1/4 + 1/9 = 49/36
    ],
)
def test_shapes(kind: Weights, expected: list[float]) -> None:
    """Weights of heads at 1, 4 and 9 follow their shape and sum to 1."""
    weights = exit_weights(LossSettings(kind), [1, 4, 9], step=0)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_warm_up() -> None:
    """Weights go linearly from uniform to their shape, and stay there."""
    settings = LossSettings("linear", warmup_steps=10)
    found = [exit_weights(settings, [1, 3], step).tolist() for step in (0, 5, 10, 99)]
    expected = [[0.5, 0.5], [0.375, 0.625], [0.25, 0.75], [0.25, 0.75]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_loss_by_hand() -> None:
    """Sums over targets, divided by the global number of targets, weighted by head."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])  # p = 1/2 and 3/4
    loss, per_head = exit_loss(logits, torch.tensor([1, 0]), torch.tensor([0.25, 0.75]), 4.0)
    first, second = math.log(2) * 2 / 4, (math.log(4 / 3) + math.log(4)) / 4
    torch.testing.assert_close(per_head, torch.tensor([first, second]))
    assert loss.item() == pytest.approx(0.25 * first + 0.75 * second)


def test_two_processes_add_up() -> None:
    """Halves of a batch, each normalised by the whole's targets, sum to the loss of the whole."""
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 1] * 5), torch.tensor([0.2, 0.3, 0.5])
    whole = exit_loss(logits, labels, weights, 10)[0]
    first, second = (exit_loss(logits[s], labels[s], weights, 10.0)[0] for s in (slice(3), slice(3, 10)))
    torch.testing.assert_close(whole, first + second)


def test_weight_zero_still_has_a_gradient() -> None:
    """A head of weight 0 gets a gradient of zero, not none: DDP waits for it."""
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exit_loss(logits, torch.tensor([0, 1, 1, 0]), torch.tensor([0.0, 1.0]), 4)[0].backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] == 0).all()
    assert (logits.grad[:, 1] != 0).all()


def test_no_targets() -> None:
    """A process without targets contributes zero and can still call backward."""
    logits = torch.zeros(0, 2, requires_grad=True)
    loss, _ = exit_loss(logits, torch.zeros(0, dtype=torch.int64), torch.tensor([0.5, 0.5]), 7)
    loss.backward()
    assert loss.item() == 0
