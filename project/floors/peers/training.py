"""A short training loop: Adam on log loss, stopped by the AUC of the fold `select`.

Unusual here: some rows' user and item are hidden in each step, so that the unknown id, which nearly all users of a
later split have, is one the network has been trained on; one thread, so the same seed gives the same numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from project.evaluation.metrics import auc
from project.floors.peers.features import IDS, UNKNOWN, Table
from project.floors.quick import Floats
from project.retrieval.lightgcn import one_thread

BATCH_ROWS = 1024
LEARNING_RATE = 1e-3
EPOCHS = 10
PATIENCE = 2
"""Epochs without a better AUC on `select` before training ends; the best epoch's weights are kept."""

HIDDEN_SHARE = 0.2
"""Share of rows whose user, and of rows whose item, is hidden in a step."""


@dataclass(frozen=True)
class Labelled:
    """Features and answers of the same rows.

    Attributes:
        table: Field -> (n, ...).
        labels: (n,) Float32, 0 or 1.
    """

    table: Table
    labels: Tensor


def train(network: nn.Module, rows: Labelled, select: Labelled, weight_decay: float, seed: int) -> int:
    """Train in place; returns the epoch (from 1) whose weights were kept.

    Args:
        network: Gives probabilities (n,) of a table.
        rows: Train targets.
        select: Targets of the fold that stops training, both classes.
        weight_decay: Adam's.
        seed: Of order and hidden ids.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    best, best_epoch, kept = -1.0, 0, network.state_dict()
    with one_thread():
        for epoch in range(1, EPOCHS + 1):
            _one_epoch(network, rows, optimizer, generator)
            value = auc(score(network, select.table), select.labels.numpy()) or 0.0
            if value > best:
                best, best_epoch, kept = value, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= PATIENCE:
                break
    network.load_state_dict(kept)
    return best_epoch


def score(network: nn.Module, table: Table, batch_rows: int = 4096) -> Floats:
    """Logits (n,) of a table; the network gives probabilities, which stay 1e-7 from 0 and 1.

    Args:
        network: Trained.
        table: Field -> (n, ...).
        batch_rows: Rows of one call.
    """
    network.eval()
    count = len(next(iter(table.values())))
    with torch.no_grad():
        parts = [
            network({name: values[start : start + batch_rows] for name, values in table.items()})
            for start in range(0, count, batch_rows)
        ]
    probability = torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64)
    logits: Floats = torch.logit(probability, eps=1e-7).numpy()
    return logits


def _one_epoch(
    network: nn.Module, rows: Labelled, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    network.train()
    order = torch.randperm(len(rows.labels), generator=generator)
    # chunks of equal size: batch normalisation cannot take a last batch of one row
    for batch in order.tensor_split(-(-len(order) // BATCH_ROWS)):
        table = {name: values[batch] for name, values in rows.table.items()}
        for name in IDS:
            hidden = torch.rand(len(batch), generator=generator) < HIDDEN_SHARE
            table[name] = table[name].masked_fill(hidden, UNKNOWN)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy(network(table), rows.labels[batch])
        torch.autograd.backward(loss)
        optimizer.step()
