"""How a model may be cut over processes; that the cut trains as copies do is in tests/test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from project.errors import ConfigError
from project.model.sharding import shared_mesh


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(torch.device("cpu")), DDPStrategy()])
def test_copies_share_nothing(strategy: Strategy) -> None:
    """One process, or several with a copy each, have no mesh."""
    assert shared_mesh(strategy) is None


@pytest.mark.parametrize(
    "strategy", [FSDPStrategy(), ModelParallelStrategy()], ids=["fsdp", "model_parallel"]
)
def test_other_cuts_are_refused(strategy: Strategy) -> None:
    """Lightning's own ways to cut a model are named, and the one to use."""
    with pytest.raises(
        ConfigError, match=rf"trainer\.strategy is {type(strategy).__name__}, .*FullyShardedStrategy"
    ):
        shared_mesh(strategy)
