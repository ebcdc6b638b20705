import torch

from project.model.equilibrium import equilibrium_branch


def test_mean_of_the_heads_above() -> None:
    """Three stages that each add their weight, heads with slopes 3, 6, 12: stage gradients are means 7, 9 and 12.

    Without it they would be sums: 21, 18 and 12. The heads' own gradients are what they were.
    """
    slopes = torch.tensor([3.0, 6.0, 12.0], requires_grad=True)
    stages = [torch.zeros(1, requires_grad=True) for _ in range(3)]

    def gradients(scaled: bool) -> tuple[list[float], list[float]]:
        for parameter in (slopes, *stages):
            parameter.grad = None
        hidden, loss = torch.ones(1), torch.zeros(1)
        for i, stage in enumerate(stages):
            hidden = hidden + stage
            read = hidden
            if scaled:
                read, hidden = equilibrium_branch(hidden, i, 3)
            loss = loss + slopes[i] * read
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.item() == 21  # the forward pass is as it was
        assert slopes.grad is not None
        return [float(s.grad) for s in stages if s.grad is not None], slopes.grad.tolist()

    assert gradients(scaled=False) == ([21.0, 18.0, 12.0], [1.0, 1.0, 1.0])
    assert gradients(scaled=True) == ([7.0, 9.0, 12.0], [1.0, 1.0, 1.0])
