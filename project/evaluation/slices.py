"""Slices: the same scores judged on parts of the rows, by how much was known of the user.

Unusual here: a slice is one entry with a row for each floor or exit, since only scores of the same rows compare; a
slice without rows stays in the list, so that files of two protocols have the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import head_metrics
from project.floors.quick import Floats, Floor, targets_of

HISTORY_EDGES = (0, 20, 100)
"""First history length of each bucket: 0 to 19, 20 to 99, 100 and more strictly earlier rows of the user."""

SLICE_DRAWS = 200
"""Resamples of users behind the interval of a slice's AUC: fewer than for a whole split, there are many of them."""


def slice_masks(rows: pl.DataFrame, split: str, fold: str | None = None) -> dict[str, pl.Series]:
    """Which targets of a split each slice holds: warm_users, cold_users and the history buckets.

    Args:
        rows: Rows of a split (user, split, fold, role, hist).
        split: train, valid or test.
        fold: select or tune; None: the whole split.

    Returns:
        Slice name -> Boolean (n,). A user is warm who has a target in train, as in the manifest's cold_user_share;
        history is the protocol's `hist`, the user's strictly earlier rows.
    """
    part = targets_of(rows, split, fold)
    warm = part["user"].is_in(targets_of(rows, "train")["user"].unique().implode())
    masks = {"warm_users": warm, "cold_users": ~warm}
    for low, above in zip(HISTORY_EDGES, [*HISTORY_EDGES[1:], None], strict=True):
        name = f"history_{low}_plus" if above is None else f"history_{low}_{above - 1}"
        masks[name] = part["hist"] >= low if above is None else part["hist"].is_between(low, above - 1)
    return masks


def slice_rows(
    rows: pl.DataFrame,
    scores: Sequence[tuple[Mapping[str, Any], Floats]],
    split: str,
    fold: str | None = None,
    draws: int = SLICE_DRAWS,
) -> list[dict[str, Any]]:
    """The `slices` list of a result file for one split, or one fold of validation.

    Args:
        rows: Rows of a split.
        scores: For each floor or exit what names it ({"name": ...} or {"layer": ...}) and its logits (n,) of the
            targets of the split and fold, in the order of `rows`.
        split: valid or test.
        fold: select or tune; None: the whole split.
        draws: Resamples of users behind `auc_interval`.

    Returns:
        One entry a slice: `name`, `split`, `fold` where given, `n`, `users`, `positives` and `rows`, one for each of
        `scores` with its metrics.
    """
    part = targets_of(rows, split, fold)
    found = []
    for name, mask in slice_masks(rows, split, fold).items():
        inside, chosen = part.filter(mask), mask.to_numpy()
        labels, users = inside["label"].to_numpy(), inside["user"].to_numpy()
        bootstrap = UserBootstrap(users, draws)
        about: dict[str, Any] = {"name": name, "split": split} | ({"fold": fold} if fold else {})
        about |= {
            "n": inside.height,
            "users": inside["user"].n_unique(),
            "positives": int(labels.sum()),
            "rows": [
                dict(who)
                | head_metrics(logits[chosen], labels, users)
                | {"auc_interval": bootstrap.auc_interval(logits[chosen], labels)}
                for who, logits in scores
            ],
        }
        found.append(about)
    return found


def floor_scores_of(
    floors: Sequence[Floor], rows: pl.DataFrame, split: str, fold: str | None = None
) -> list[tuple[dict[str, Any], Floats]]:
    """What `slice_rows` wants of floors."""
    ids = targets_of(rows, split, fold)["row_id"]
    return [({"name": floor.name}, floor.logits(ids)) for floor in floors]


def exit_scores_of(
    scores: pl.DataFrame, rows: pl.DataFrame, layers: Sequence[int], split: str, fold: str | None = None
) -> list[tuple[dict[str, Any], Floats]]:
    """What `slice_rows` wants of the exits of a score table.

    Args:
        scores: A score table that holds the split's targets.
        rows: Rows of a split.
        layers: Which exits; 0 is counting.
        split: valid or test.
        fold: select or tune; None: the whole split.
    """
    ids = targets_of(rows, split, fold).select("row_id")
    ordered = ids.join(scores, on="row_id", how="left", maintain_order="left")
    return [({"layer": k}, ordered[f"logit_{k}"].cast(pl.Float64).to_numpy()) for k in layers]
