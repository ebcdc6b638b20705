"""A user's rows as candidates of one moment: what a request asks and reads, AUCs inside users by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from world import read_split

from project.data.protocol import Protocol
from project.errors import ConfigError
from project.evaluation import moment
from project.evaluation.moment import inside_users, moment_requests

SHARES = [0.6, 0.2, 0.2]


@pytest.mark.parametrize("part", ["test", "tune"])
def test_a_user_asks_once_before_the_first_row(
    part: str, tiny_logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are the earliest rows of the user in that part, each item once; history ends before the first."""
    monkeypatch.setattr(moment, "LEAST", 2)
    monkeypatch.setattr(moment, "CANDIDATES", 4)
    split = read_split(tiny_logs, Protocol(minimum_history=1, shares=SHARES))
    workload = moment_requests(split, part)
    assert workload is not None
    ids = split.interactions.items.select("item", "item_id")
    rows = split.rows.filter(pl.col("role") == "target").join(ids, on="item")
    rows = rows.filter(pl.col("split" if part == "test" else "fold") == part)
    users = dict(split.interactions.users.select("user_id", "user").iter_rows())
    for request in workload.requests.requests:
        own = rows.filter(pl.col("user") == users[request.user_id or ""]).sort("row_id")
        expected = own["item_id"].unique(maintain_order=True)[:4].to_list()
        assert list(request.candidates) == expected
        assert request.time == own["timestamp"].min()
        assert request.history is None
    known = workload.table.join(rows, on="row_id", how="left", suffix="_log")
    assert known["label"].to_list() == known["label_log"].to_list()
    items = rows.group_by("user").agg(pl.col("item").n_unique())
    assert len(workload.requests.requests) == (items["item"] >= 2).sum()


def test_a_fold_that_would_read_test_has_no_requests(tiny_logs: Path) -> None:
    split = read_split(
        tiny_logs, Protocol(split="user_time", minimum_history=1, shares=SHARES)
    )
    with pytest.raises(ConfigError, match="test rows lie before"):
        moment_requests(split, "tune")


def test_inside_users_by_hand() -> None:
    """Users of two and four rows: AUCs 1 and 1/4 of exit 0, 1 and 3/4 of the plan; one label is no AUC."""
    users = np.array([1, 1, 2, 2, 2, 2, 3])
    labels = np.array([1, 0, 1, 0, 1, 0, 1])
    named = {
        "exit 0": np.array([2.0, 1.0, 1.0, 2.0, 3.0, 4.0, 9.0]),
        "plan": np.array([2.0, 1.0, 1.0, 2.0, 4.0, 0.0, 9.0]),
    }
    found = inside_users(named, labels, users)
    assert (found["users"], found["rows"]) == (2, 6)
    first, plan = found["scores"]["exit 0"], found["scores"]["plan"]
    assert first["auc"] == pytest.approx((2 * 1 + 4 * 0.25) / 6)
    assert plan["auc"] == pytest.approx((2 * 1 + 4 * 0.75) / 6)
    assert first["minus_exit_0"] is None
    gain = plan["minus_exit_0"]
    assert gain is not None
    assert gain["value"] == pytest.approx(4 * 0.5 / 6)
    # one of the two users drawn twice: 0 or 1/2
    assert gain["interval"] == pytest.approx([0, 0.5])
    # the ideal order of user 2 is 1 and 1/log2(3); the plan has its likes in places 1 and 3
    best = 1 + 1 / np.log2(3)
    assert plan["ndcg"] == pytest.approx((1 + (1 + 1 / np.log2(4)) / best) / 2)
