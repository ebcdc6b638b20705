"""Lists of the best k: the margins that are fitted, what they cost and promise, and where a run keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world import given

from project.exits.criteria import HeadOutputs
from project.exits.plan import plans_of
from project.exits.ranking import (
    LENGTHS,
    LEVELS,
    Lists,
    ScoredRequests,
    certify_lists,
    fit_lists,
    list_keys,
)
from project.exits.top_k import TopK, fit_margins
from project.run import read_checkpoint


def scored(requests: list[int], logits: list[list[float]]) -> ScoredRequests:
    """Candidates at layers 0, 2 and 6; two tokens each after a stream of ten; a user a request."""
    n = len(requests)
    return ScoredRequests(
        torch.tensor(requests),
        np.unique(requests),
        HeadOutputs.of((0, 2, 6), torch.tensor(logits, dtype=torch.float64).T),
        torch.full((n,), 2),
        torch.full((n,), 10),
        np.full(n, -1, dtype=np.int8),
    )


GOLDEN = scored(
    [0] * 4 + [1] * 3,
    [[4, 3, 2, 1, 0, 0, 9], [4, 1, 2, 3, 5, 6, 8], [1, 2, 4, 3, 7, 6, 5]],
)
"""Best 2 at layer 0: {0, 1}, {2, 0}; at layer 2: {0, 3}, {2, 1}; at layer 6: {2, 3}, {0, 1}."""


def test_golden() -> None:
    """Overlap@2 at layer 0: 0 and 1 of 2; at layer 2: 1 of 2 both. A token runs as many layers as its exit's.

    Margins 1 and 4: candidate 3 of the first request, whose second best is 3, leaves at layer 0, since 1 < 3 - 1. The
    second's second best is 0, and all stay; so they do at layer 2. The first list is {2, 1}, not full depth's {2, 3}.
    """
    static = [torch.full((7,), head) for head in range(3)]
    overlaps = [
        GOLDEN.overlaps(list_keys(GOLDEN.outputs, exits), 2).tolist() for exits in static
    ]
    assert overlaps == [[0, 0.5], [0.5, 0.5], [1, 1]]
    costs = [GOLDEN.costs(exits, True).tolist() for exits in static]
    assert costs == [[0, 0], [16, 12], [48, 36]]
    exits = TopK(2, torch.tensor([1.0, 4.0, 0.0])).exits(GOLDEN.request, GOLDEN.outputs)
    assert exits.tolist() == [2, 2, 2, 0, 2, 2, 2]
    assert GOLDEN.overlaps(list_keys(GOLDEN.outputs, exits), 2).tolist() == [0.5, 1]
    assert GOLDEN.costs(exits, True).tolist() == [36, 36]
    assert GOLDEN.costs(exits, False).tolist() == [96, 96]
    # further than 9 - 0, the largest distance of two logits
    assert list_keys(GOLDEN.outputs, exits).tolist() == [21, 22, 24, 1, 27, 26, 25]


def test_quality_by_labels() -> None:
    """A liked candidate stands third of its list of two: no hit; another second, behind its tie: 1 / log2(3)."""
    label = np.array([-1, 1, -1, -1, -1, 1, 0], dtype=np.int8)
    keys = torch.tensor([3.0, 1, 2, 0, 5, 5, 1], dtype=torch.float64)
    found = replace(GOLDEN, label=label).quality(keys, 2)
    # full depth's {2, 3} and {0, 1} against {0, 2} and {0, 1}
    assert found == {"overlap": 0.75, "ndcg": pytest.approx(0.5 / np.log2(3)), "hits": 0.5}
    assert GOLDEN.quality(keys, 2) == {"overlap": 0.75, "ndcg": None, "hits": None}


def drifting(
    requests: int, candidates: int, seed: int, noise: float = 0.3
) -> ScoredRequests:
    """Scores of layers 0, 2, 6 whose distance from the last head shrinks with depth."""
    rng = np.random.default_rng(seed)
    n = requests * candidates
    last = rng.normal(size=n)
    shallow = [last + noise * (6 - k) * rng.normal(size=n) for k in (0, 2)]
    owners = np.repeat(np.arange(requests), candidates)
    return scored(owners.tolist(), [*(x.tolist() for x in shallow), last.tolist()])


def test_fitted_margins() -> None:
    """Of lists shorter than 30 candidates each length keeps its overlap on tune, and no cheaper level does."""
    tune = drifting(60, 30, 0, noise=0.1)
    lists = fit_lists(tune)
    assert [*lists.margins] == [1, 5, 10, 20]
    whole = tune.costs(torch.full_like(tune.request, 2), True).sum()
    for row in lists.document["lengths"]:
        assert row["overlap"] >= 0.97
        assert row["cost"] < 0.9
        assert row["certificate"] is None
        for level in LEVELS:
            margins = fit_margins(tune.request, tune.outputs, level)
            exits = TopK(row["k"], margins).exits(tune.request, tune.outputs)
            cost = tune.costs(exits, True).sum() / whole
            enough = tune.overlaps(list_keys(tune.outputs, exits), row["k"]).mean() >= 0.97
            assert cost >= row["cost"] - 1e-9 or not enough


def test_lengths_between_take_the_next_longer() -> None:
    lists = fit_lists(drifting(60, 30, 0))
    for k, length in ((1, 1), (2, 5), (5, 5), (7, 10), (11, 20)):
        found = lists.top_k(k)
        assert found.k == k
        assert torch.equal(found.margins, lists.margins[length])
    assert (lists.longest, Lists().longest) == (20, 0)
    again = Lists.from_state(lists.state())
    assert again.document == lists.document
    assert torch.equal(again.margins[5], lists.margins[5])


def test_where_no_margin_is_enough_nobody_leaves() -> None:
    """Two candidates, of whom the first heads say the opposite of the last: whoever leaves is of the list."""
    tune = scored([0, 0], [[0, 9], [0, 9], [9, 0]])
    lists = fit_lists(replace(tune, user=np.array([0])))
    (row,) = lists.document["lengths"]
    assert (row["k"], row["level"], row["cost"]) == (1, None, 1)
    assert (lists.margins[1] == torch.inf).all()


def promises(lists: Lists, certify: ScoredRequests) -> list[dict[str, Any]]:
    """Certificates by length at delta .1."""
    certify_lists(lists, len(np.unique(certify.user)), 0.1, lambda: certify)
    return [row["certificate"] for row in lists.document["lengths"]]


def test_certificate() -> None:
    """Delta is shared out among four lengths; a user counts once; of 8 users there are too few, and none is scored.

    ln 40 / ln(1 + .99 * .05 / .95) = 72.6 users are needed where nothing is lost.
    """
    lists = fit_lists(drifting(60, 30, 0))
    certify = drifting(400, 30, 9)
    uneven = np.random.default_rng(0).integers(0, 80, 400)
    for owners in (np.arange(400), uneven):
        users = np.unique(owners)
        found = promises(lists, replace(certify, user=owners))
        for k, promise in zip(lists.margins, found, strict=True):
            exits = lists.top_k(k).exits(certify.request, certify.outputs)
            lost = 1 - certify.overlaps(list_keys(certify.outputs, exits), k)
            means = [lost[owners == user].mean() for user in users]
            assert promise["estimate"] == pytest.approx(np.mean(means))
            assert (promise["n"], promise["delta"]) == (len(users), 0.025)
            assert promise["passed"] == (promise["bound"] <= 0.05)
    certify_lists(lists, 8, 0.1, lambda: pytest.fail("was scored"))
    few = {
        tuple(row["certificate"][key] for key in ("passed", "users_needed"))
        for row in lists.document["lengths"]
    }
    assert few == {(None, 73)}


@pytest.mark.slow
def test_a_run_keeps_its_lists(run: Callable[..., None], fitted: Path) -> None:
    """`fit` and `calibrate` fit the same margins; both are in the checkpoint, and in results/calibrate.json."""
    checkpoint = fitted / "checkpoints" / "last.ckpt"
    found = plans_of(read_checkpoint(checkpoint))
    assert found is not None
    assert [*found.lists.margins] == [k for k in LENGTHS if k <= found.lists.longest] != []
    run("calibrate", *given(fitted))
    again = plans_of(read_checkpoint(checkpoint))
    assert again is not None
    for k, margins in found.lists.margins.items():
        torch.testing.assert_close(again.lists.margins[k], margins, atol=1e-4, rtol=0)
    result = json.loads((fitted / "results" / "calibrate.json").read_text())
    assert result["lists"] == again.lists.document
    run("calibrate", *given(fitted), "--exits.lists", 0)
    without = plans_of(read_checkpoint(checkpoint))
    assert without is not None
    assert without.lists.longest == 0
