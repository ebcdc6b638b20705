"""Slices: the same scores on parts of the rows, by how much was known of the user and of the item.

Only scores of the same rows compare, so a slice is one entry with a row for each baseline, exit and plan. A slice
without rows stays in the list: files of two protocols have the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from project.evaluation.bootstrap import UserBootstrap
from project.evaluation.metrics import head_metrics
from project.floors.quick import Floor, targets_of

EDGES = {"history": (0, 5, 21), "item": (0, 1, 6, 21)}
"""First value of each bucket: strictly earlier rows of the user (0 to 4, 5 to 20, more) and of the item."""

SLICE_DRAWS = 200
"""Resamples of users behind the interval of a slice's AUC: fewer than for a whole split, there are many of them."""


def slice_masks(
    rows: pl.DataFrame, evidence: Mapping[str, pl.DataFrame], split: str, fold: str | None = None
) -> dict[str, pl.Series]:
    """Which targets of a split each slice holds.

    Args:
        rows: Rows of a split (row_id, user, split, fold, role, hist).
        evidence: Evidence tables by split (row_id, item_count: strictly earlier readable rows of the item).
        split: train, valid or test.
        fold: select or tune; None: the whole split.

    Returns:
        Slice name (warm_users, cold_users, history_0_4, ..., item_21_plus) -> Boolean (n,). A user is warm who has a
        target in train, as in the manifest's cold_user_share; history is the protocol's `hist`.
    """
    part = targets_of(rows, split, fold)
    warm = part["user"].is_in(targets_of(rows, "train")["user"].unique().implode())
    masks = {"warm_users": warm, "cold_users": ~warm}
    counts = evidence[split].select("row_id", "item_count")
    with_counts = part.join(counts, on="row_id", how="left", maintain_order="left")
    known = {"history": part["hist"], "item": with_counts["item_count"]}
    for kind, edges in EDGES.items():
        for low, above in zip(edges, [*edges[1:], None], strict=True):
            if above is None:
                masks[f"{kind}_{low}_plus"] = known[kind] >= low
            else:
                name = f"{kind}_{low}" if above == low + 1 else f"{kind}_{low}_{above - 1}"
                masks[name] = known[kind].is_between(low, above - 1)
    return masks


def slice_rows(
    rows: pl.DataFrame,
    evidence: Mapping[str, pl.DataFrame],
    scores: Sequence[tuple[Mapping[str, Any], Floats]],
    split: str,
    fold: str | None = None,
    draws: int = SLICE_DRAWS,
    depth: Floats | None = None,
) -> list[dict[str, Any]]:
    """The `slices` list of a result file for one split, or one fold of validation.

    Args:
        rows: Rows of a split.
        evidence: Evidence tables by split.
        scores: For each baseline, exit or plan what names it ({"name": ...}, {"layer": ...} or {"plan": True}) and its
            logits (n,) of the targets of the split and fold, in the order of `rows`.
        split: valid or test.
        fold: select or tune; None: the whole split.
        draws: Resamples of users behind `auc_interval`.
        depth: Layers (n,) that the plan runs for each target.

    Returns:
        One entry a slice: `name`, `split`, `fold` where given, `n`, `users`, `positives` and `rows`, one for each of
        `scores` with its metrics; the plan's has `mean_depth`, None without rows.
    """
    part = targets_of(rows, split, fold)
    found = []
    for name, mask in slice_masks(rows, evidence, split, fold).items():
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
        if depth is not None:
            run = float(np.mean(depth[chosen])) if chosen.any() else None
            about["rows"] = [row | ({"mean_depth": run} if row.get("plan") else {}) for row in about["rows"]]
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


def plan_scores_of(
    scores: pl.DataFrame,
    logits: Floats,
    layer: ArrayLike,
    rows: pl.DataFrame,
    split: str,
    fold: str | None = None,
) -> tuple[Floats, Floats]:
    """A plan's logits and layers run, both (n,), in the order that `slice_rows` wants.

    Args:
        scores: The n rows that the plan decided on (row_id).
        logits: (n,) emitted.
        layer: (n,) where each row leaves.
        rows: Rows of a split.
        split: valid or test.
        fold: select or tune; None: the whole split.
    """
    run = np.asarray(layer, np.float64)
    decided = scores.select("row_id").with_columns(logit=pl.Series(logits), layer=pl.Series(run))
    ids = targets_of(rows, split, fold).select("row_id")
    ordered = ids.join(decided, on="row_id", how="left", maintain_order="left")
    return ordered["logit"].to_numpy(), ordered["layer"].to_numpy()
