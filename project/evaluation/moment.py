"""Ranks the rows of a user as candidates of one moment: does a model order what one person likes?

A test row reads the answers before it, those of seconds ago included. Of a liked and a disliked row of one user the
later has read the other's answer and leans towards it, so a model that learns from the last answer loses such pairs: a
user-AUC of rows as tested says little of a ranking. Here the history ends before the user's first test row, as that of
a request does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from project.arrays import F64
from project.data.context import CONTEXT, as_given
from project.data.requests import SCHEMA, Requests, Workload, targets_for_requests
from project.evaluation.baselines import Baseline
from project.evaluation.bootstrap import UserBootstrap
from project.metrics import aucs_by_user, session_metrics
from project.request import RankRequest
from project.results import MomentRow, MomentRows
from project.run import exit_layers_of

if TYPE_CHECKING:
    from project.data.protocol import SplitInteractions
    from project.exits.plan import Plans

CANDIDATES = 64  # of a user: the earliest so many targets, each item once
LEAST = 6  # users with fewer are left out
USERS = 1000  # drawn by lot where there are more


def moment_requests(
    split: SplitInteractions, part: str, users: int = USERS
) -> Workload | None:
    """One request a user over the user's own targets of test or a fold; None without users.

    All candidates have the time and the context of the first of them.

    Raises:
        ConfigError: A fold's requests would read rows of test.
        DataError: There are no targets.
    """
    targets = targets_for_requests(split, part)
    targets = targets.unique(["user", "item"], keep="first", maintain_order=True)
    items = split.interactions.items
    ids = items["item_id"].to_list()
    user_ids = dict(split.interactions.users.select("user", "user_id").iter_rows())
    # 1. users with enough rows
    enough = targets["user"].value_counts().filter(pl.col("count") >= LEAST)
    drawn = np.random.default_rng(0).permutation(enough["user"].sort())[:users]
    if not drawn.size:
        return None
    chosen = targets.filter(pl.col("user").is_in(drawn))
    # 2. a request each
    requests = list[RankRequest]()
    rows = list[tuple[Any, ...]]()  # as `SCHEMA`
    for (user,), own in chosen.group_by("user", maintain_order=True):
        first = own.head(CANDIDATES)
        name = f"moment/{user}"
        listed = tuple(ids[item] for item in first["item"])
        asked = first.row(0, named=True)
        context = as_given(asked, CONTEXT, split.interactions.texts) or None
        requests.append(
            RankRequest(
                user_ids[user],
                None,
                listed,
                context=context,
                time=asked["timestamp"],
                request_id=name,
            )
        )
        answers = first.select("label", "row_id").iter_rows()
        rows += [(name, k, user, *answer) for k, answer in enumerate(answers)]
    table = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    return Workload(Requests(requests, items), table)


def moment_rows(
    scores: pl.DataFrame,
    features: F64,
    plans: Plans | None,
    baselines: Sequence[Baseline],
    own_scores: str | None,
) -> MomentRows:
    """Exits, baselines and the plan inside users, from scores and features (n, F) of `moment_requests`' candidates.

    Baselines have scored them as further rows. Networks have not, so they are left out.
    """
    # 1. logits (n,) by name, of exits and the plan
    named = {
        f"exit {k}": scores[f"logit_{k}"].to_numpy().astype(np.float64)
        for k in (0, *exit_layers_of(scores))
    }
    if plans is not None:
        outputs = plans.plan.outputs(scores, features)
        named["plan"] = plans.plan.emitted(outputs)[1].double().numpy()
    # 2. of baselines; the ranker that runs today scored rows as tested, and only those
    for baseline in baselines:
        logits = baseline.further
        if baseline.name == own_scores:
            logits = baseline.logits(scores["row_id"])
        if logits is not None:
            named[f"baseline {baseline.name}"] = logits
    return inside_users(named, scores["label"], scores["user"])


def inside_users(named: dict[str, F64], labels: ArrayLike, users: ArrayLike) -> MomentRows:
    """AUC and NDCG@10 inside users of named logits (n,), with paired differences to exit 0."""
    # AUCs (u,) of users with both labels, and their rows
    aucs = {name: aucs_by_user(logits, labels, users) for name, logits in named.items()}
    first, rows = aucs["exit 0"]
    bootstrap = UserBootstrap(np.arange(rows.size))
    found = dict[str, MomentRow]()
    for name, logits in named.items():
        means = session_metrics(logits, labels, users)
        gains = rows * (aucs[name][0] - first)
        found[name] = {
            "auc": means["gauc"],
            "ndcg": means["ndcg"],
            "minus_exit_0": None
            if name == "exit 0"
            else bootstrap.ratio_interval(gains, rows),
        }
    return {"users": int(rows.size), "rows": int(rows.sum()), "scores": found}
