"""Tests the serve benchmark on a tiny run: every answer is checked, nothing fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from project.benchmark import serve
from project.benchmark.load import wrong_order
from project.benchmark.serve import load_row
from project.serve.settings import ServeSettings
from research import hostile


def test_wrong_orders() -> None:
    """Best first; ties within rounding in any order; every candidate once."""
    expected: list[float | None] = [0.2, 0.9, 0.50001, 0.5]

    def wrong(*order: int) -> bool:
        return wrong_order([{"index": k} for k in order], expected)

    assert not wrong(1, 2, 3, 0)
    assert not wrong(1, 3, 2, 0)
    assert wrong(2, 1, 3, 0)
    assert wrong(1, 2, 3)
    assert wrong(1, 2, 3, 3)
    expected = [0.2, 0.9, None, 0.5]  # of a list of three
    assert not wrong_order([{"index": k} for k in (1, 3, 0)], expected)
    assert wrong_order([{"index": k} for k in (1, 2, 3)], expected)


def test_a_row() -> None:
    """Two rounds of 2 s: 4 and 2 answers, so 2 and 1 a second, 1.5 in the median; 2.5 of the ranker: .4 are lost."""
    clean: dict[str, Any] = {"errors": 0, "error": None, "wrong": 0}
    rounds = [
        (clean | {"ms": [10.0] * 4, "at": [0.5, 1.0, 1.5, 2.0]}, 2.0),
        (clean | {"ms": [20.0] * 2, "at": [1.0, 2.0], "wrong": 1}, 3.0),
    ]
    row = load_row(8, "full", rounds)
    assert row["requests_per_s"] == 1.5
    assert (row["p95_ms"], row["wrong_orders"]) == (20, 1)
    assert row["overhead"] == pytest.approx(0.4)
    nothing = load_row(
        8, "full", [(clean | {"ms": [], "at": [], "errors": 3, "error": "503"}, 2.0)]
    )
    assert (nothing["p95_ms"], nothing["errors"], nothing["error"]) == (None, 3, "503")


def test_what_requests_cost() -> None:
    """Two rounds of 10 requests, 5 and 3 CPU seconds, 2 seconds each: 400 and 200 of 1,000; of none it is undefined."""
    counts = [(5.0, 1.0, 1.0), (15.0, 6.0, 3.0), (0.0, 0.0, 0.0), (10.0, 3.0, 2.0)]
    assert serve.cost_of(counts) == {"cpu_seconds": 400.0, "busy_seconds": 200.0}
    assert serve.cost_of(counts[:1] * 2)["cpu_seconds"] is None


@pytest.mark.slow
def test_a_tiny_run_under_load(
    served_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two servers, one and four users: no error, no wrong order."""
    monkeypatch.setattr(serve, "USERS", (1, 4))
    monkeypatch.setattr(serve, "ROUNDS", 1)
    monkeypatch.setattr(serve, "LISTED", 4)  # the tiny run's longest list is of five
    result = serve.run_load(served_run, seconds=8.0)
    measured = [(row["users"], row["depth"]) for row in result["serve"]]
    assert measured == [(k, d) for k in (1, 4) for d in ("full", "plan", "list")]
    for row in result["serve"]:
        assert row["requests"] > 0
        assert (row["errors"], row["error"], row["wrong_orders"]) == (0, None, 0)
        assert row["cpu_seconds"]
    assert json.loads((served_run / "results/benchmark-serve.json").read_text()) == result
    assert "wrong orders" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hostile_texts_cost_others_no_answer(served_run: Path) -> None:
    """Users of known items get every answer, and right ones; each hostile body is an error, done, or told to wait."""
    found = hostile.measure(served_run, seconds=4.0, rounds=1)
    for phase in ("calm", "hostile"):
        assert (found[phase]["errors"], found[phase]["wrong_orders"]) == (0, 0)
    statuses = {kind: set(one["statuses"]) for kind, one in found["kinds"].items()}
    assert [*statuses.values()][:2] == [{"413"}] * 2
    assert statuses["1,000 long titles to rank"] == {"422"}
    assert set.union(*statuses.values()) <= {"200", "413", "422", "429"}
    # 16 times max_new_characters, and what one body may bring
    most = 16 * ServeSettings.max_new_characters + 4 * 2**20
    assert 0 < found["memory"][0]["waiting_characters"] <= most
