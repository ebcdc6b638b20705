"""Heads against one floor on the same rows: how much more than counting an LLM knows, with paired intervals.

Unusual here: the log loss compared is that of a floor whose offset and slope were fitted on `select`, a head's is of
its logits as they are given: a floor that ranks well but sounds too sure is no easy rival. AUCs need no calibration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from project.evaluation.bootstrap import UserBootstrap
from project.floors.quick import Floor


class AgainstFloor:
    """A floor on the rows that heads scored; users are drawn once, for all heads.

    Args:
        floor: Usually the best floor.
        row_ids: (n,) the rows, in the order of every head's logits.
        rows: Rows of the split (row_id, user, label, split, fold, role).
        draws: Resamples of users.
        seed: Seed of the resampling.

    Raises:
        DataError: The floor lacks one of the rows.
    """

    def __init__(
        self, floor: Floor, row_ids: ArrayLike, rows: pl.DataFrame, draws: int = 1000, seed: int = 0
    ) -> None:
        wanted = pl.DataFrame({"row_id": np.asarray(row_ids, dtype=np.int64)})
        part = wanted.join(
            rows.select("row_id", "user", "label"), on="row_id", how="left", maintain_order="left"
        )
        self.name, self.labels, self.users = floor.name, part["label"].to_numpy(), part["user"].to_numpy()
        self.bootstrap = UserBootstrap(self.users, draws, seed)
        self._logits, self._calibration = floor.logits(row_ids), floor.calibration(rows)

    def difference(self, logits: ArrayLike) -> dict[str, Any]:
        """Head minus floor: {`floor`, `value`, `interval`, `log_loss` {`value`, `interval`}}.

        `value` is the difference in AUC; in log loss less is better. Undefined is None: a class is missing here, or in
        `select` for the log loss.

        Args:
            logits: (n,) the head's.
        """
        less: dict[str, Any] = {"value": None, "interval": None}
        if self._calibration is not None:
            mine = self._calibration.apply(self._logits)
            less = self.bootstrap.log_loss_difference_interval(logits, mine, self.labels)
        auc = self.bootstrap.difference_interval(logits, self._logits, self.labels)
        return {"floor": self.name} | auc | {"log_loss": less}
