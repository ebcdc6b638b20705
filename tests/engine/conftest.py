"""Makes one world for all tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from example_engine import EXITS, LAYERS, World, make_module, random_request, raw_outputs


def make_world(exits: Sequence[int]) -> World:
    """Ten requests of 0 to 9 stream segments and 1 to 12 candidates."""
    rng = np.random.default_rng(0)
    module = make_module(exits=exits)
    sizes = [
        (0, 3),
        (1, 1),
        (9, 12),
        (5, 1),
        (3, 8),
        (7, 6),
        (2, 2),
        (6, 9),
        (4, 4),
        (8, 5),
    ]
    requests = [random_request(rng, f"r{i}", *size) for i, size in enumerate(sizes)]
    with torch.no_grad():
        return World(module, requests, [raw_outputs(module, r) for r in requests])


@pytest.fixture(scope="session")
def world() -> World:
    """Exits at layers 1, 2, 3 and 5."""
    return make_world(EXITS)


@pytest.fixture(scope="session")
def world_of_every_layer() -> World:
    """An exit at every layer: streams can wait in front of each, the last included."""
    return make_world(range(1, LAYERS + 1))
