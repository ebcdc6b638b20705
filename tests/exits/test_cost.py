import pytest
import torch

from project.exits.cost import request_cost, row_cost

LAYER, TARGET, STREAM = torch.tensor([4, 12, 0]), torch.tensor([10, 20, 30]), torch.tensor([100, 50, 70])


def test_row_golden():
    """Cold: 4 (10 + 100) = 440, 12 (20 + 50) = 840, 0 at exit 0; warm: 4 * 10 = 40, 12 * 20 = 240, 0."""
    assert row_cost(LAYER, TARGET, STREAM).tolist() == [440, 840, 0]
    assert row_cost(LAYER, TARGET, STREAM, True).tolist() == [40, 240, 0]


def test_request_golden():
    """Request 7: candidates at layers 2 and 6, 10 and 20 tokens, stream 100, which runs to layer 6: 600 + 20 + 120.

    Request 3: one candidate at layer 4, 5 tokens, stream 50: 200 + 20. Warm, the streams' 600 and 200 are gone.
    """
    request = torch.tensor([7, 3, 7])
    layer, target, stream = torch.tensor([2, 4, 6]), torch.tensor([10, 5, 20]), torch.tensor([100, 50, 100])
    assert request_cost(request, layer, target, stream).tolist() == [220, 740]
    assert request_cost(request, layer, target, stream, True).tolist() == [20, 140]


def test_request_of_one_candidate_is_a_row():
    """With one candidate each, both definitions of cost agree, prefix cached or not."""
    for cached in (False, True):
        rows = row_cost(LAYER, TARGET, STREAM, cached)
        assert torch.equal(request_cost(torch.arange(3), LAYER, TARGET, STREAM, cached), rows)


def test_the_stream_is_part_of_the_price():
    """64 candidates of 25 tokens, stream 750; two run 12 layers, 62 run 3.4: x3.3 by candidate, under x2 in all.

    Mean depth (2 * 12 + 62 * 3.4) / 64 = 3.67; tokens 12 * 750 + 25 * 234.8 = 14,870 of 28,200: x1.90.
    """
    layer = torch.full((64,), 3.4)
    layer[:2] = 12
    request, target, stream = torch.zeros(64, dtype=torch.long), torch.full((64,), 25), torch.full((64,), 750)
    full = request_cost(request, torch.full((64,), 12.0), target, stream)
    policy = request_cost(request, layer, target, stream)
    assert full.tolist() == [28200]
    assert policy.tolist() == [14870]
    assert float(full / policy) == pytest.approx(1.896, abs=1e-3)
