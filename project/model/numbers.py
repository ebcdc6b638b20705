"""Token embeddings that also know numbers: ids below zero, see `project.data.numbers`.

Unusual here: an id is no row of a table. Every kind of evidence has a few trained vectors, one at some values each,
and a number's vector lies on the line between the two nearest: 0.70 and 0.75 mean nearly the same from the first step
on, and what a value means is learned from all values around it. A token that tells several numbers is the sum of their
vectors, a generalised additive model's input. CoLLM (arXiv 2310.19488) puts collaborative information into an LLM's
input like this; here it is numbers that are counted, not trained vectors of users and items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from project.data.numbers import NUMBERS, read_number_ids

FIRST_KNOT, LAST_KNOT = -4.0, 4.0  # values beyond are those
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
        told, values = read_number_ids(ids)
        place = (values.clamp(FIRST_KNOT, LAST_KNOT) - FIRST_KNOT) * ((KNOTS - 1) / (LAST_KNOT - FIRST_KNOT))
        knots = torch.arange(KNOTS, device=ids.device)
        shares = (1 - (place[..., None] - knots).abs()).clamp(min=0) * told[..., None]
        numbers = shares.flatten(-2).to(self.numbers.dtype) @ self.numbers.flatten(0, 1)
        words = super().forward(ids.clamp(min=0))
        return torch.where((ids < 0)[..., None], numbers.to(words.dtype), words)
