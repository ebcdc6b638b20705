"""Every head's logit for every candidate of prepared requests: the score table that thresholds are made of.

Unusual here: it is the engine with a decision that lets nobody leave and listens at the last head. The table is the
one that `predict` writes, without its dense attention: one stream serves all candidates of a request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import torch
from torch import Tensor

from project.engine.engine import Engine
from project.engine.prepared import PreparedRequest
from project.errors import DataError
from project.evaluation.scores import scores_of_candidates
from project.exits.calibration import Calibration
from project.exits.outputs import HeadOutputs

if TYPE_CHECKING:
    from project.model.module import ExitRecommender


class EveryHead:
    """A decision (`project.engine.decisions.Decision`): nobody leaves before the last head, raw outputs are kept.

    Args:
        exit_layers: The k layers that have a head; exit 0 is not asked.

    Attributes:
        layers: (k,) layers of the heads.
        calibration: The identity.
        heard: Outputs of the candidates of every batch, in the order they were asked.
    """

    def __init__(self, exit_layers: Sequence[int]) -> None:
        identity = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(len(exit_layers), 1)
        self.layers = tuple(exit_layers)
        self.calibration = Calibration(self.layers, identity)
        self.heard: list[HeadOutputs] = []

    def known(self, head: int) -> bool | None:
        """Nobody leaves before the last head, which wants to be asked: it hears the outputs."""
        return None if head == len(self.layers) - 1 else False

    def leaves(self, request: Tensor, outputs: HeadOutputs) -> Tensor:
        """(m,) all True, at the last head."""
        self.heard.append(outputs)
        return torch.ones_like(request, dtype=torch.bool)


def score_every_head(
    model: ExitRecommender,
    requests: Sequence[PreparedRequest],
    batch_tokens: int = 16_384,
    candidates: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Score table of all candidates of requests, as `predict` writes it (to rounding).

    Args:
        model: With trunk, heads and exit 0; is put into eval mode.
        requests: As `prepare_requests` made them.
        batch_tokens: Tokens of a batch at most; one request may be more.
        candidates: `Requests.table()` of the same requests, for the column item_id; None leaves it empty.

    Raises:
        DataError: A request that cannot be scored; names it.
    """
    decision = EveryHead(model.exit_layers)
    scores = Engine(model, decision, batch_tokens=batch_tokens).score(requests)
    failed = next((s for s in scores.requests if s.error is not None), None)
    if failed is not None:
        raise DataError(f"request {failed.request_id!r} cannot be scored: {failed.error}.")
    nothing = torch.zeros(0, len(model.exit_layers))
    said = [o.logits.cpu() for o in decision.heard]
    counts = np.array([len(r) for r in requests], dtype=np.int64)
    own, stream, counting = (
        np.concatenate([np.zeros(0, dtype=kind), *parts])
        for kind, parts in (
            (np.int64, [r.candidates.lengths for r in requests]),
            (np.int64, [np.repeat([len(r.stream) for r in requests], counts)]),
            (np.float64, [r.prior for r in requests]),
        )
    )
    ids = torch.from_numpy(np.stack([np.arange(len(own)), own, stream], axis=1))
    known = _candidates(requests) if candidates is None else candidates
    return scores_of_candidates(ids, torch.cat([nothing, *said]), known, counting, model.exit_layers)


def _candidates(requests: Sequence[PreparedRequest]) -> pl.DataFrame:
    rows = [(r.request_id, k, None) for r in requests for k in range(len(r))]
    schema = {"request_id": pl.String, "candidate_index": pl.Int64, "item_id": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")
