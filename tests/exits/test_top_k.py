"""Exits for lists of the best k: who leaves, the margins, and overlap and precision of a list."""

import pytest
import torch

from project.exits.criteria import HeadOutputs
from project.exits.top_k import TopK, fit_margins, overlap_at_k


def ragged(requests=60, seed=0, most=64):
    """Requests of 1 to 64 candidates in mixed order; heads 0, 2, 4, 6 with noise 1, .5, .2, 0 and a shift each."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, most + 1, (requests,), generator=generator)
    request = torch.arange(requests).repeat_interleave(sizes)
    request = request[torch.randperm(request.numel(), generator=generator)]
    noise = torch.randn(request.numel(), 4, generator=generator) * torch.tensor(
        [1.0, 0.5, 0.2, 0.0]
    )
    shift = 5 * torch.randn(requests, 4, generator=generator)
    logits = (
        torch.randn(request.numel(), 1, generator=generator) * 1.5 + noise + shift[request]
    )
    return request, HeadOutputs.of((0, 2, 4, 6), logits)


def overlap(request, outputs, exits, k):
    """Overlap@k of the list that `rank` makes: those that stay longer first, then by score."""
    scores = outputs.logits.gather(1, exits[:, None]).squeeze(1)
    reach = 1 + outputs.logits.max() - outputs.logits.min()
    return overlap_at_k(request, scores + reach * exits, outputs.logits[:, -1], k)


class TestPolicy:
    def test_golden(self):
        """Lists of 2, margin .5: of 3, 2, 1.6, 1 the second best is 2, so 1.6 stays and 1 leaves.

        At the next head, 2, 3, 2.6 with margin .2: the second best is 2.6, so 2 leaves. Another request's high
        scores change nothing, and its two candidates both stay to the end.
        """
        request = torch.tensor([0, 0, 9, 0, 0, 9])
        logits = torch.tensor(
            [[3.0, 2, 0], [2, 3, 0], [50, 9, 9], [1.6, 2.6, 0], [1, 9, 9], [60, 9, 9]]
        )
        policy = TopK(2, torch.tensor([0.5, 0.2, 0.0]))
        assert policy.exits(request, HeadOutputs.of((2, 4, 6), logits)).tolist() == [
            1,
            2,
            2,
            2,
            0,
            2,
        ]

    @pytest.mark.parametrize("k", [1, 5, 10])
    def test_infinite_margins_are_the_full_list(self, k):
        request, outputs = ragged()
        exits = TopK(k, torch.full((4,), torch.inf)).exits(request, outputs)
        assert (exits == 3).all()
        assert (overlap(request, outputs, exits, k) == 1).all()

    def test_largest_move_twice_as_margin_loses_nobody(self):
        """Margins of twice the largest centred move cannot drop a member of the full list, yet most leave early."""
        request, outputs = ragged(seed=1)
        exits = TopK(3, 2 * fit_margins(request, outputs, 1.0)).exits(request, outputs)
        assert (overlap(request, outputs, exits, 3) == 1).all()
        assert (exits < 3).double().mean() > 0.3

    def test_requests_do_not_see_each_other(self):
        request, outputs = ragged(seed=3)
        policy = TopK(4, torch.tensor([1.0, 0.6, 0.3, 0.0]))
        exits = policy.exits(request, outputs)
        for r in (0, 17, 59):
            mine = (request == r).nonzero()[:, 0].flip(0)
            assert torch.equal(policy.exits(request[mine], outputs.rows(mine)), exits[mine])

    def test_reads_no_later_head(self):
        """What leaves at head 0 or 1 does not depend on heads 2 and 3."""
        request, outputs = ragged(seed=4)
        policy = TopK(4, torch.tensor([1.0, 0.6, 0.3, 0.0]))
        exits = policy.exits(request, outputs)
        logits = outputs.logits.clone()
        logits[:, 2:] = -logits[:, 2:]
        again = policy.exits(request, HeadOutputs.of(outputs.layers, logits))
        assert torch.equal(again[exits < 2], exits[exits < 2])
        assert ((again < 2) == (exits < 2)).all()


class TestMargins:
    def test_golden(self):
        """Deviations 1, 3 and -1, 1: centred per request -1, 1 and -1, 1: all margins 1; the last head moves by 0."""
        request = torch.tensor([0, 1, 0, 1])
        logits = torch.tensor([[1.0, 0.0], [4.0, 5.0], [3.0, 0.0], [6.0, 5.0]])
        for quantile in (0.0, 0.5, 1.0):
            assert fit_margins(
                request, HeadOutputs.of((2, 4), logits), quantile
            ).tolist() == [1.0, 0.0]

    def test_share(self):
        """Nine of ten candidates move less than the margins of quantile .9; a shift of a request changes nothing."""
        request, outputs = ragged(200, seed=7)
        margins = fit_margins(request, outputs, 0.9)
        shifted = HeadOutputs.of(
            outputs.layers,
            outputs.logits + request[:, None] * torch.tensor([1.0, -1, 2, 0]),
        )
        torch.testing.assert_close(
            fit_margins(request, shifted, 0.9), margins, atol=1e-4, rtol=1e-4
        )
        assert margins.tolist() == sorted(margins.tolist(), reverse=True)
        assert 1.3 < margins[0] < 1.9  # |N(0, 1)| is below 1.645 in nine of ten cases


def test_lists_golden() -> None:
    """Ties go to the first; a score of minus infinity is no member, even of a list that is not full.

    The best of the first scores is candidate 1, that of the second candidate 1, too; of all four the first has three.
    """
    request = torch.zeros(4, dtype=torch.long)
    scores = torch.tensor([-torch.inf, 1.0, 1.0, 1.0])
    full = torch.tensor([0.0, 3.0, 2.0, 1.0])
    assert overlap_at_k(request, scores, full, 1).tolist() == [1.0]
    assert overlap_at_k(request, scores, full, 4).tolist() == [0.75]
