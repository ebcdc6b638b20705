"""Rotary embeddings of whole numbers, computed once: an exit looks its survivors' up.

Unusual here: the table grows to the farthest position asked for; the trunk refuses rotary types whose angles would
depend on that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from project.data.ragged import IntArray
from project.model.trunk import Trunk


class RotaryTable:
    """Cosines and sines of positions 0, 1, ..., as the trunk makes them.

    Args:
        trunk: Its rotary embedding, device and type.
    """

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._pair: tuple[Tensor, Tensor] | None = None

    def at(self, position: IntArray) -> tuple[Tensor, Tensor]:
        """Those of T positions, (1, T, head dim) each.

        Args:
            position: (T,) at least one, from 0.
        """
        weight = self._trunk.embed_tokens.weight
        farthest = int(position.max())
        if self._pair is None or self._pair[0].shape[0] <= farthest:
            every = torch.arange(2 * (farthest + 1), device=weight.device)
            cos, sin = self._trunk.rotary_emb(weight, position_ids=every[None])
            self._pair = cos[0], sin[0]
        place = torch.from_numpy(position).to(weight.device, non_blocking=True)
        cos, sin = (x.index_select(0, place)[None] for x in self._pair)
        return cos, sin
