import math

import pytest
import torch

from project.errors import ConfigError
from project.model.losses import (
    DistillSettings,
    LossSettings,
    Weights,
    distill_loss,
    exit_loss,
    exit_weights,
    extra_losses,
    pairwise_loss,
)


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


def test_distillation_by_hand() -> None:
    """p_last = 3/4, p_first = 1/2: cross-entropy log 2, weighted .25, over 2 targets. At T = 2 by the softened last."""
    logits = torch.tensor([[0.0, math.log(3)]])
    weights = torch.tensor([0.25, 0.75])
    assert distill_loss(logits, weights, 1.0, 2).item() == pytest.approx(0.25 * math.log(2) / 2)
    three = torch.tensor([[math.log(3), math.log(9)]])  # halved: odds sqrt(3) and 3, p = .634 and .75
    p, q = 3**0.5 / (1 + 3**0.5), 0.75
    softened = -(q * math.log(p) + (1 - q) * math.log(1 - p))
    assert distill_loss(three, weights, 2.0, 1).item() == pytest.approx(4 * 0.25 * softened)


def test_the_teacher_does_not_learn() -> None:
    """Earlier heads are pulled to the last head's probability, the last head gets no gradient."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]], requires_grad=True)
    distill_loss(logits, torch.full((3,), 1 / 3), 1.0, 2).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 2] == 0).all()
    assert torch.sign(logits.grad[:, :2]).tolist() == [[-1.0, -1.0], [1.0, -1.0]]


def test_pairs_by_hand() -> None:
    """Window 5: liked 1, disliked 0 and 3, gaps 1 and -2, mean of both times 3 targets. Window 2 has one class: 0."""
    logits = torch.tensor([[1.0], [0.0], [3.0], [9.0]])
    sequence, labels = torch.tensor([5, 5, 5, 2]), torch.tensor([1, 0, 0, 1])
    gaps = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    found = pairwise_loss(logits, labels, sequence, torch.ones(1), 4)
    assert found.item() == pytest.approx(3 * gaps / 4)


def test_pairs_are_of_one_window() -> None:
    """A liked and a disliked target of two windows are no pair, and a batch without pairs can call backward."""
    logits = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = pairwise_loss(logits, torch.tensor([1, 0]), torch.tensor([0, 1]), torch.ones(1), 2)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_extras_are_off() -> None:
    """By default the loss has nothing beside the answers; each switch adds its term with its weight."""
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    labels, sequence = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    given = (logits, labels, sequence, torch.tensor([0.5, 0.5]), 6.0)
    assert extra_losses(LossSettings(), *given) == {}
    once, twice = (
        extra_losses(LossSettings(distill=DistillSettings(weight=w), pairwise=w), *given) for w in (1.0, 2.0)
    )
    assert set(once) == {"distill_loss", "pairwise_loss"}
    for name, value in once.items():
        assert value > 0
        torch.testing.assert_close(twice[name], 2 * value)


def test_extras_of_two_processes_add_up() -> None:
    """Windows dealt to two processes, each normalised by all targets, sum to the extras of one with all windows."""
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    labels, sequence = torch.tensor([0, 1] * 5), torch.tensor([0] * 3 + [1] * 4 + [2] * 3)
    settings = LossSettings(distill=DistillSettings(temperature=2.0), pairwise=0.5)
    weights = torch.tensor([0.2, 0.3, 0.5])

    def extras(part: slice) -> dict[str, torch.Tensor]:
        return extra_losses(settings, logits[part], labels[part], sequence[part], weights, 10.0)

    whole, first, second = extras(slice(10)), extras(slice(3)), extras(slice(3, 10))
    for name, value in whole.items():
        torch.testing.assert_close(value, first[name] + second[name])


def test_refuses_settings() -> None:
    """A negative weight or number of steps, or a temperature of 0, names the key."""
    with pytest.raises(ConfigError, match=r"model\.loss\.distill.*temperature 0"):
        DistillSettings(temperature=0)
    with pytest.raises(ConfigError, match=r"model\.loss\.pairwise is -1"):
        LossSettings(pairwise=-1)
    with pytest.raises(ConfigError, match=r"model\.loss\.warmup_steps is -1"):
        LossSettings(warmup_steps=-1)
