"""Requests of tune and test, scored at every depth: what margins for a list are made on.

Unusual here: scores are kept in the run folder with the checkpoint's digest, so a second benchmark of the same weights
does not score them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from project.artefacts import table_about, write_table
from project.benchmark.cases import TUNED
from project.data.workloads import Workload, catalogue_requests, labelled_requests
from project.engine.every_head import score_every_head
from project.engine.prepared import prepare_requests
from project.errors import ConfigError, DataError
from project.evaluation.scores import labelled_scores
from project.exits.calibration import Calibration
from project.exits.top_k import TopK, fit_margins
from project.model.heads import heads_digest
from project.ranking.judge import LEVELS, ScoredRequests, by_margin, fastest, fixed_depth, policy_row

if TYPE_CHECKING:
    from project.datamodule import InteractionData
    from project.model.module import ExitRecommender

LABELLED = 64  # most candidates of a request over rated items, and the key of its scores
LEAST_LABELLED = 20


@dataclass
class AskedRequests:
    """Scored requests of a run.

    Attributes:
        model: The run.
        data: Its logs.
        folder: Where scores are kept.
        calibration: Of its heads.
    """

    model: ExitRecommender
    data: InteractionData
    folder: Path
    calibration: Calibration

    @cached_property
    def no_tune(self) -> str | None:
        """Why the fold tune has no requests; None where it has."""
        try:
            catalogue_requests(self.data.split, "tune", 1, 2, self.data.seed)
        except ConfigError as error:
            return str(error)
        return None

    def best(self, k: int, candidates: int, overlap: float) -> tuple[TopK, dict[str, Any]] | None:
        """The list policy that is fastest on tune at this overlap, and what it is worth on test; None if none is.

        Args:
            k: Length of the list.
            candidates: Of a request.
            overlap: Least mean overlap@k with full depth on tune.
        """
        tune = self._ranked("tune", candidates)
        layers = tune.outputs.layers
        full = fixed_depth(layers, len(layers) - 1)
        margins = {q: TopK(k, fit_margins(tune.request, tune.outputs, q)) for q in LEVELS}
        chosen = fastest([by_margin(m, q) for q, m in margins.items()], full, tune, k, overlap)
        if chosen.parameter is None:
            return None
        asked, labelled = self._ranked("test", candidates), self._labelled()
        row, whole = (policy_row(policy, full, asked, labelled, k) for policy in (chosen, full))
        worth = {key: row[key] for key in ("k", "overlap", "overlap_interval", "precision", "n_requests")}
        return margins[chosen.parameter], worth | {"precision_full": whole["precision"]}

    def _ranked(self, part: str, candidates: int) -> ScoredRequests:
        """A part's catalogue requests."""
        count = TUNED.get(candidates, TUNED[64])
        drawn = catalogue_requests(self.data.split, part, count, candidates, self.data.seed)
        return ScoredRequests.of(self._scored(f"{part}-{candidates}", drawn), self.calibration)

    def _labelled(self) -> ScoredRequests | None:
        """Requests over what users rated anyway; None where nobody rated enough."""
        try:
            drawn = labelled_requests(self.data.split, "test", LABELLED, LEAST_LABELLED)
        except DataError:
            return None
        return ScoredRequests.of(self._scored("labelled-test", drawn), self.calibration)

    def _scored(self, name: str, workload: Workload) -> pl.DataFrame:
        path = self.folder / "scores" / f"benchmark-{name}.parquet"
        about = {
            "heads": heads_digest(self.model.state_dict()),
            "protocol": self.data.split.hash,
            "requests": str(len(workload.requests.requests)),
            "seed": str(self.data.seed),
        }
        if path.is_file() and about.items() <= table_about(path).items():
            return pl.read_parquet(path, glob=False)
        prepared = prepare_requests(self.model, self.data, workload.requests)
        scores = labelled_scores(score_every_head(self.model, prepared), workload.table)
        write_table(path, scores, about)
        return scores
