"""The command `backtest`: dates of periods, what a warm refit takes, what a killed one keeps, two periods."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from example_logs import CoLikes
from world import Letters, call, read_split, whole_prompts

from project import backtest, config
from project.backtest import gaps, mean_of, periods_of, refit_every, written
from project.config import warm_start
from project.data.prompt import Prompt, PromptEncoder
from project.data.protocol import Protocol
from project.data.stream import build_streams
from project.errors import ConfigError
from project.report.tables import render
from project.retrieval import MatrixFactorisation, RetrievedFeatures
from project.run import read_checkpoint, read_result

SECOND = 1 / 86_400


def test_dates_of_periods() -> None:
    """The last of three periods of a day ends at second 864,000, the 11th of January; a day validates each."""
    assert periods_of(0, 864_000, 1, 3) == [
        [f"1970-01-{day:02}T00:00:00" for day in (first, first + 1, first + 2)]
        for first in (7, 8, 9)
    ]
    # train before the first validation: 10 days, less 1, make 8 with train rows before them
    assert len(periods_of(0, 864_000, 1, 8)) == 8
    for days, periods, words in (
        (1, 9, "--periods is 9, but between 1970-01-01T00:00:00 and .* are 8 of 1 days"),
        (-1, 3, "--days is -1"),
        (1, 1, "--periods 1; expected .* 2 periods"),
    ):
        with pytest.raises(ConfigError, match=words):
            periods_of(0, 864_000, days, periods)


def what_is_read(logs: Path, dates: list[str], cache: Path) -> dict[str, Any]:
    """By part of a period: labels, retrieved features and prompts."""
    split = read_split(logs, Protocol("date", dates=dates, minimum_history=1))
    mf = MatrixFactorisation(dim=2)
    features = RetrievedFeatures(
        split, CoLikes(neighbours=4, item_neighbours=3), 6, cache, mf
    ).tables()
    wording = Prompt(instruction="I", segment="{title} {user_percent} {item_percent}:")
    encoder = PromptEncoder(Letters(), wording, split.interactions.items)
    return {
        part: (
            split.rows.filter(pl.col("split") == part)["label"].to_list(),
            features[part].rows(),
            whole_prompts(build_streams(split.rows, features[part], part, encoder)),
        )
        for part in ("train", "valid", "test")
    }


@pytest.mark.slow
def test_no_choice_of_a_period_reads_its_test(tiny_logs: Path, tmp_path: Path) -> None:
    """Canary: other answers from a test's first second on change nothing of its train and validation.

    Other answers after its last second change nothing of its test either; the next period's train has them.
    """
    periods = periods_of(0, 250, 50 * SECOND, 2)
    log = pl.read_csv(tiny_logs / "interactions.csv")
    found = {}
    for name, first in (("as it is", 251), ("from test on", 150), ("after test", 200)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "items.csv").write_bytes((tiny_logs / "items.csv").read_bytes())
        rating = pl.when(pl.col("timestamp") >= first).then(6 - pl.col("rating"))
        log.with_columns(rating.otherwise("rating").alias("rating")).write_csv(
            folder / "interactions.csv"
        )
        found[name] = [what_is_read(folder, dates, folder / "cache") for dates in periods]
    assert periods[0][1:] == ["1970-01-01T00:02:30", "1970-01-01T00:03:20"]
    before, changed, later = (found[name] for name in found)
    assert all(before[0][part][2] for part in before[0])
    for part in ("train", "valid"):
        assert before[0][part] == changed[0][part]
    assert before[0]["test"] != changed[0]["test"]
    assert before[0] == later[0]
    assert before[1]["valid"] != changed[1]["valid"]
    assert before[1]["test"] != later[1]["test"]


def test_a_warm_refit_has_fewer_and_smaller_steps() -> None:
    """A share of an epoch stays one; numbers are rounded up; no limit of steps stays none; a third of the rate."""
    assert warm_start({}, Path("run")) == {
        "model": {"initial": "run", "optim": {"learning_rate": pytest.approx(1e-4)}},
        "trainer": {"limit_train_batches": 0.25},
    }
    config = {
        "model": {"optim": {"learning_rate": 0.3}},
        "trainer": {"limit_train_batches": 10, "max_steps": 9},
    }
    found = warm_start(config, Path("run"))
    assert found["trainer"] == {"limit_train_batches": 3, "max_steps": 3}
    assert found["model"]["optim"] == {"learning_rate": pytest.approx(0.1)}


def test_how_often_to_refit() -> None:
    """Losses .001, .003, .009 of models 1, 2 and 3 periods old: every 2nd costs .0005, 3rd .0013, 4th .00325."""
    assert refit_every([0.001, 0.003, 0.009]) == (3, pytest.approx(0.004 / 3))
    assert refit_every([0.1]) == (1, 0.0)
    assert refit_every([]) == (1, 0.0)
    found = mean_of([0.01, 0.03])
    assert found["value"] == pytest.approx(0.02)
    assert found["interval"] == pytest.approx([0.01, 0.03])
    rows: Any = [
        {"modes": {m: {"exit": v} for m, v in zip(("cold", "warm"), pair, strict=True)}}
        for pair in ((9, 9), (0.8, 0.5), (None, 0.5))
    ]
    assert gaps(rows, "warm") == [pytest.approx(0.3)]
    assert gaps(rows, "never") == []


def test_a_run_of_another_configuration_is_forgotten(tmp_path: Path) -> None:
    """What is the same keeps `latest`; other settings, or another log, lose it."""
    latest = tmp_path / "1-cold" / "latest"
    latest.parent.mkdir()
    for over, log, kept in (({}, "a", True), ({"model": {}}, "a", False), ({}, "b", False)):
        written(tmp_path / "1-cold", {}, "a")
        latest.symlink_to(tmp_path)
        written(tmp_path / "1-cold", {**over}, log)
        assert latest.exists() == kept
        latest.unlink(missing_ok=True)


def test_bad_input(
    fails: Callable[..., str],
    tiny_config: Any,
    tiny_logs: Path,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """One message each, before the first run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backtest, "call", None)
    config = tiny_config()
    assert "are 0 of 7 days" in fails("backtest", "--config", config)
    undated = tmp_path / "undated.csv"
    pl.read_csv(tiny_logs / "interactions.csv").unique(["user_id", "item_id"]).drop(
        "timestamp"
    ).write_csv(undated)
    config = tiny_config(**{"data.logs.init_args.interactions": str(undated)})
    assert "needs the time of every row" in fails("backtest", "--config", config)


@pytest.mark.slow
def test_two_periods(
    run: Callable[..., None],
    tiny_config: Any,
    session_cache: Path,
    tmp_path: Path,
    monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three modes on the same rows; killed in the fourth command it goes on there, and again runs nothing."""
    monkeypatch.chdir(tmp_path)
    calls = list[Any]()

    def killed(*arguments: object) -> None:
        calls.append(arguments[0])
        if len(calls) == 4:
            raise KeyboardInterrupt
        call(session_cache, *arguments)

    monkeypatch.setattr(backtest, "call", killed)
    start = partial(
        run, "backtest", "--config", tiny_config(), "--periods", 2, "--days", 50 * SECOND
    )
    monkeypatch.setattr(config, "WARM_SHARE", 0.5)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert "data.protocol.split is global_time" in capsys.readouterr().out
    start()
    assert calls == ["fit", "test", "fit", "test", "test", "fit", "test", "test"]
    calls.clear()
    start()
    assert calls == []
    folder = tmp_path / "runs" / "backtest-config"
    found = read_result(folder / "backtest.json")
    first, second = found["periods"]
    assert first["modes"]["cold"] == first["modes"]["never"]
    assert second["modes"]["never"]["exit_0"] != second["modes"]["cold"]["exit_0"]
    assert second["modes"]["warm"]["exit_0"] == second["modes"]["cold"]["exit_0"]
    assert found["minus"]["never"]["value"] == pytest.approx(
        second["modes"]["cold"]["exit"] - second["modes"]["never"]["exit"]
    )
    steps = {
        mode: read_checkpoint(
            folder / f"2-{mode}" / "latest" / "checkpoints" / "last.ckpt"
        )["global_step"]
        for mode in ("cold", "warm")
    }
    assert steps["warm"] == steps["cold"] // 2 > 0
    # what the never refitted run is tested on has its own protocol, and later rows
    results = (folder / "1-cold" / "latest" / "results").glob("test-*.json")
    assert len({json.loads(path.read_text())["protocol"]["hash"] for path in results}) == 2
    text = (folder / "backtest.md").read_text()
    assert render(found) == text
    assert [line.count("|") for line in text.splitlines()[:4]] == [8] * 4
    assert "a model that is never refitted loses" in text
    assert (folder / "backtest.png").stat().st_size > 0
