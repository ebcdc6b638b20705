"""The Python API: fit or open a run, score requests or recommend, get a table back. docs/python.md shows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import ExitCalibration, ResultFiles
from project.datamodule import InteractionData
from project.engine.predict import Run as Run
from project.errors import NotCalibratedError
from project.exits.plan import ExitSettings
from project.loading import open_run as open_run
from project.model.module import ExitRecommender
from project.request import HistoryRow as HistoryRow
from project.request import Item as Item
from project.request import RankRequest as RankRequest
from project.run_folder import RunLogger, run_folder
from project.trainer import CHECKPOINTS, DEFAULTS, ProjectTrainer


def fit(
    model: ExitRecommender,
    data: InteractionData,
    folder: str | Path,
    exits: ExitSettings | None = None,
    **trainer: Any,
) -> Run:
    """Train and calibrate, as the command `fit` does; objects are of the classes that YAML names.

    Checkpoints, score tables, results and report go into a new folder below `folder`. There is no config.yaml of it, so
    that other commands and `open_run` cannot open it.

    Args:
        model: The model; its backbone is that of `data.tokenizer`.
        data: The log and how it is read.
        folder: Where runs go.
        exits: How exits are calibrated.
        trainer: Arguments of Lightning's Trainer, such as max_epochs.
    """
    calibration = ExitCalibration(exits or ExitSettings())
    runs = Path(folder)
    made = ProjectTrainer(
        logger=RunLogger(runs.parent, runs.name),
        callbacks=[calibration, ResultFiles(), ModelCheckpoint(**CHECKPOINTS)],
        **(DEFAULTS | trainer),
    )
    made.fit(model, datamodule=data)
    plans = calibration.plans
    if plans is None:
        raise NotCalibratedError(f"the exits are not calibrated: {calibration.refused}")
    return Run(model, data, plans.plan, plans.lists, plans.certificate, run_folder(made))


def recommend(run: Run, users: Sequence[str] | None = None, **asked: Any) -> pl.DataFrame:
    """The best items of users after all of the log, as the server and `predict --recommend` list them.

    Args:
        run: An open run.
        users: Their ids, all in one call: each makes an index anew. None: all users of the log.
        asked: `top_n` (10), `filter`, `allow`, `deny`, `at_most` and `include_answered`, as POST /v1/recommend has
            them; a condition of `filter` is a list of values or {"min": ..., "max": ...}.

    Returns:
        One row a listed item: user_id, rank (from 1), item_id, probability, exit_layer, source.
    """
    # imported here: it needs an extra
    from project.serve.recommend import recommendations

    return recommendations(run, users, **({"top_n": 10} | asked))
