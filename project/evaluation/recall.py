"""Whether candidates of recommendations hold what users will like: users of a part, frozen before its first second.

Truth are the items of the part that a user liked and had not answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from project.arrays import Bool
from project.data.protocol import answered, known_at
from project.errors import ConfigError
from project.results import Recall, UserMean
from project.retrieval.candidates import CandidateFinder, CandidateSettings
from project.retrieval.own_text import item_vectors

if TYPE_CHECKING:
    from project.datamodule import InteractionData

MOST = 1000  # users; of more so many are drawn


@dataclass
class Frozen:
    """The users of a part before its first second."""

    before: float
    pasts: dict[
        int, list[tuple[int, int]]
    ]  # items and labels; users without any are in it, too
    truth: dict[int, set[int]]
    known: Bool  # (items,) has a row before


def frozen(data: InteractionData, part: str, most: int = MOST) -> Frozen:
    """At most `most` users of `part` with a truth; the split is by time, or rows before would be of test."""
    rows = data.split.rows.filter(answered(data.split.rows))
    of = rows.filter(pl.col("split") == part)
    before = float(of["timestamp"].min())  # type: ignore[arg-type]
    past = rows.filter(known_at(rows) < before)
    if part == "test" and past.height + of.height < rows.height:
        raise ConfigError(
            "data.protocol.split: test does not lie after everything; expected global_time."
        )
    liked = of.filter(pl.col("label") == 1).unique(["user", "item"])
    liked = liked.join(
        past.select("user", "item").unique(), on=["user", "item"], how="anti"
    )
    named = liked["user"].unique().sort()
    if named.len() > most:
        liked = liked.filter(pl.col("user").is_in(named.sample(most, seed=0).implode()))
    truth = dict[int, set[int]]()
    for user, item in liked.select("user", "item").sort("user", "item").iter_rows():
        truth.setdefault(user, set()).add(item)
    pasts: dict[int, list[tuple[int, int]]] = {user: [] for user in truth}
    own = past.filter(pl.col("user").is_in([*truth])).select("user", "item", "label")
    for user, item, label in own.iter_rows():
        pasts[user].append((item, label))
    known = np.zeros(data.split.interactions.items.height, np.bool_)
    known[past["item"].unique().to_numpy()] = True
    return Frozen(before, pasts, truth, known)


def found_by(
    data: InteractionData, at: Frozen, texts: Any, settings: CandidateSettings
) -> dict[int, dict[int, str]]:
    """Candidates and their sources by user."""
    snapshots = data.features.snapshots()
    finder = CandidateFinder(data.split, snapshots, settings, at.before)
    found = {}
    for user, past in at.pasts.items():
        allowed = np.ones(at.known.size, np.bool_)
        allowed[[item for item, _ in past]] = False
        items, labels = np.array(past, np.int64).reshape(-1, 2).T
        by_text = texts @ np.asarray(texts[items[labels == 1]].sum(axis=0)).ravel()
        found[user] = finder.find(items, labels, allowed, by_text)
    return found


def recalls(found: dict[int, dict[int, str]], at: Frozen) -> dict[str, UserMean]:
    """Mean share of a user's truth among the candidates, over users with such items; and how many these are."""
    shares: dict[str, list[float]] = {
        name: [] for name in ("all", "known", "new", "users_with_history")
    }
    for user, truth in at.truth.items():
        known = [item for item in truth if at.known[item]]
        parts = {"all": [*truth], "known": known, "new": [*truth - {*known}]}
        if at.pasts[user]:
            parts["users_with_history"] = [*truth]
        for name, items in parts.items():
            if items:
                hits = [item in found[user] for item in items]
                shares[name].append(float(np.mean(hits)))
    return {
        name: {"value": float(np.mean(of)) if of else None, "users": len(of)}
        for name, of in shares.items()
    }


def candidate_recall(data: InteractionData) -> Recall:
    """Recall of the candidates of test's users; `ConfigError` where nothing can be recommended to them."""
    if data.split.protocol.answer_delay:
        raise ConfigError("data.protocol.answer_delay: recommendations know no delay.")
    at = frozen(data, "test")
    items = data.split.interactions.items
    found = found_by(data, at, item_vectors(items, items)[:-1], data.candidates)
    return {"candidates": data.candidates.number, "recall": recalls(found, at)}
