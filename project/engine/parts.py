"""What an engine and its batches share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from project.engine.decisions import Decision
from project.engine.rotary import RotaryTable
from project.engine.stream_cache import StreamCache
from project.model.trunk import Trunk


@dataclass(frozen=True, eq=False)
class Parts:
    """Of one engine.

    Attributes:
        trunk: In eval mode.
        heads: Modules by layer, as text.
        decision: Who leaves where.
        cache: Users' streams; None: every stream runs anew.
        rotary: Of the trunk.
        read_tokens: Tokens of a row from which the layer of an exit is read before it runs whole.
    """

    trunk: Trunk
    heads: nn.ModuleDict
    decision: Decision
    cache: StreamCache | None
    rotary: RotaryTable
    read_tokens: float

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        found: torch.device = self.trunk.embed_tokens.weight.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        found: torch.dtype = self.trunk.embed_tokens.weight.dtype
        return found
