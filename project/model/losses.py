"""The loss of all exit heads together, normalised by the number of targets of all processes.

Every term is a sum over targets divided by the targets of all processes, so processes with uneven batches add up to one
process with all of them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def exit_loss(logits: Tensor, labels: Tensor, global_targets: Tensor | float) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, the mean of all heads.

    Args:
        logits: (n, K).
        labels: (n,) 0 or 1.
        global_targets: What the sums over targets are divided by.

    Returns:
        The loss, a scalar with gradient; and the loss of each head, (K,), detached.
    """
    expected = labels[:, None].expand_as(logits).to(logits.dtype)
    per_head = F.binary_cross_entropy_with_logits(logits, expected, reduction="none").sum(0) / global_targets
    return per_head.mean(), per_head.detach()
