"""Makes one world for all tests of the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from example_engine import World, make_module, random_request, raw_outputs


@pytest.fixture(scope="session")
def world() -> World:
    """Ten requests of 0 to 9 stream segments and 1 to 12 candidates."""
    rng = np.random.default_rng(0)
    module = make_module()
    sizes = [(0, 3), (1, 1), (9, 12), (5, 1), (3, 8), (7, 6), (2, 2), (6, 9), (4, 4), (8, 5)]
    requests = [random_request(rng, f"r{i}", *size) for i, size in enumerate(sizes)]
    with torch.no_grad():
        return World(module, requests, [raw_outputs(module, r) for r in requests])
