"""Trains a model that is cut over processes: FSDP2, each decoder layer a unit of its own.

A checkpoint is the one file that one process alone would have written, and any checkpoint can be loaded, however many
processes trained. Lightning's own loading takes an optimizer's state for one in the order of the model's parameters;
ours is in the order of its groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from project.errors import ConfigError
from project.run import Checkpoint, read_checkpoint

# rank 0 has everything, the others what they are sent
WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)


class FullyShardedStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer state are cut over all processes (FSDP2); checkpoints are single files.

    Args:
        process_group_backend: gloo or nccl; default: what the accelerator needs.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Restored after the model, as with one process."""
        return True

    def setup_environment(self) -> None:
        """All processes share the data; none shares a layer's computation."""
        # Lightning's defaults would share the layers' computation between processes
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> Checkpoint:
        """The file as it is, read where it is needed; nothing is loaded before the module has accepted it."""
        return read_checkpoint(self.broadcast(str(checkpoint_path)), mmap=True)

    def load_model_state_dict(
        self, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Every process gets its part; what the checkpoint lacks stays, the module has accepted that."""
        assert self.model is not None
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=WHOLE)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every process gets its part."""
        assert self.model is not None
        for optimizer, state in zip(
            self.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            # torch.optim's numbers become FSDP's names
            named = _relabelled(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=WHOLE)
            for group, saved in zip(
                optimizer.param_groups, state["param_groups"], strict=True
            ):
                # as they were: on its way to the other processes a tuple became a list
                group.update(saved | {"params": group["params"]})

    def optimizer_state(self, optimizer: Optimizer) -> Checkpoint:
        """Whole, on rank 0, as `optimizer.state_dict()` of one process; empty on the others."""
        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        # whole, on the CPU: a GPU may lack the room for all of it
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = get_optimizer_state_dict(self.model, optimizer, options=options)
        # and back: names become the numbers that one process would have written
        numbers = {name: k for k, name in enumerate(self._names(optimizer))}
        return _relabelled(named, numbers) if named else {}

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Names of an optimizer's parameters, in its order."""
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [names[p] for group in optimizer.param_groups for p in group["params"]]


def _relabelled(state: Mapping[str, Any], labels: Mapping[Any, Any]) -> Checkpoint:
    """An optimizer's state with other keys for its parameters: torch.optim numbers them, FSDP names them."""
    groups = [
        group | {"params": [labels[p] for p in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {labels[p]: dict(v) for p, v in state["state"].items()},
        "param_groups": groups,
    }


def shared_mesh(strategy: Strategy) -> DeviceMesh | None:
    """The processes that share one model, as a mesh of one dimension; None where each process has its own."""
    if isinstance(strategy, FullyShardedStrategy):
        return strategy.device_mesh["data_parallel"]
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        raise ConfigError(
            f"trainer.strategy is {type(strategy).__name__}, which cuts the model in a way that is not supported. Use "
            "project.model.sharding.FullyShardedStrategy, as configs/overlays/fsdp.yaml does."
        )
    return None
