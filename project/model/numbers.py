"""Token embeddings that also know numbers: ids below zero, see `project.data.numbers`.

Unusual here: an id is no row of a table. Every kind of evidence has a few trained vectors, one at some log-odds each,
and a number's vector lies on the line between the two nearest: 0.70 and 0.75 mean nearly the same from the first step
on, and what a value means is learned from all values around it. CoLLM (arXiv 2310.19488) puts collaborative
information into an LLM's input like this; here it is numbers that are counted, not trained vectors of users and items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from project.data.numbers import NUMBERS, read_number_ids

FIRST_KNOT, LAST_KNOT = -4.0, 4.0  # log-odds beyond are those
KNOTS = 9  # one at every whole number


class NumberEmbedding(nn.Embedding):
    """Vectors of ids: rows of a table for words, lines between knots for numbers.

    Args:
        words: The LM's token embeddings, whose weights are shared.

    Attributes:
        numbers: (len(NUMBERS), KNOTS, H). At first a random point and a random direction a kind, as large as words'.
    """

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__(
            words.num_embeddings,
            words.embedding_dim,
            padding_idx=words.padding_idx,
            _weight=words.weight,
            _freeze=not words.weight.requires_grad,
        )
        weight = words.weight.detach()
        point, direction = (
            torch.randn(len(NUMBERS), 1, words.embedding_dim, dtype=weight.dtype, device=weight.device)
            * weight.std()
            for _ in range(2)
        )
        at = torch.linspace(FIRST_KNOT, LAST_KNOT, KNOTS, dtype=weight.dtype, device=weight.device)
        self.numbers = nn.Parameter(point + direction * at[:, None] / 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors.

        Args:
            ids: (...) token ids.

        Returns:
            (..., H).
        """
        kind, value = read_number_ids(ids)
        place = (value.clamp(FIRST_KNOT, LAST_KNOT) - FIRST_KNOT) * ((KNOTS - 1) / (LAST_KNOT - FIRST_KNOT))
        below = place.long().clamp(max=KNOTS - 2)
        share = (place - below)[..., None].to(self.numbers.dtype)
        numbers = torch.lerp(self.numbers[kind, below], self.numbers[kind, below + 1], share)
        return torch.where((ids < 0)[..., None], numbers, super().forward(ids.clamp(min=0)))
