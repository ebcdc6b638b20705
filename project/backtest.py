"""The command `backtest`: one configuration through time, refitted cold, refitted warm, and never, on the same rows.

A period's test comes after all that a choice of its runs has read: its own validation, and earlier periods.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml  # type: ignore[import-untyped]  # as in project.run

from project.config import WARM_SHARE, open_run, warm_start, with_presets
from project.data.logs import checked
from project.data.protocol import apply_protocol, build_interactions, moment
from project.errors import ConfigError
from project.evaluation.bootstrap import UserBootstrap
from project.report.plots import backtest_figure, png
from project.report.tables import TOLERANCE, render
from project.results import BacktestResult, Estimate, Period, Refitted, ScoredResult
from project.run import (
    read_result,
    read_yaml,
    replace_file,
    result_head,
    sha256_of,
    write_json,
)

DAY = 86_400
MODES = ("cold", "warm", "never")


def run_backtest(arguments: Sequence[str]) -> Path:
    """The command: a run for each period and mode, then runs/backtest-NAME/backtest.json, .md and .png."""
    parser = argparse.ArgumentParser("python -m project backtest", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file or preset, as of fit")
    parser.add_argument("--days", type=float, default=7.0, help="days of a period's test")
    parser.add_argument("--periods", type=int, default=8, help="how many, one each --days")
    given = parser.parse_args(arguments)
    source = Path(with_presets([given.config])[0])
    config = read_yaml(source)
    folder = Path("runs") / f"backtest-{source.stem}"
    # 1. periods, and whether each can be split, before the first run
    replace_file(folder / "config.yaml", lambda part: part.write_bytes(source.read_bytes()))
    data = open_run(folder)[1]
    raw = data.logs.read()
    times: Any = checked(raw).interactions["timestamp"]
    if times.null_count() or times.is_empty():
        raise ConfigError("A backtest needs the time of every row; the log has none.")
    end = floor(times.max()) + 1
    periods = periods_of(times.min(), end, given.days, given.periods)
    if data.protocol.split != "date":
        print(f"data.protocol.split is {data.protocol.split}; here it is date.")
    tests = list[pl.DataFrame]()
    for dates in periods:
        protocol = replace(data.protocol, split="date", dates=dates)
        rows = apply_protocol(build_interactions(raw, protocol), protocol).rows
        tests.append(rows.filter(split="test", role="target"))
    # 2. runs; the first period's is that of all modes
    runs: dict[str, Path] = {}
    found = list[Period]()
    for number, (dates, test) in enumerate(zip(periods, tests, strict=True), start=1):
        modes: dict[str, Refitted] = {}
        for mode in MODES if runs else ("cold",):
            over: dict[str, Any] = {"data": {"protocol": {"split": "date", "dates": dates}}}
            if mode == "warm":
                over |= warm_start(config, runs[mode])
            about = [sha256_of(source), raw.files]
            configs = "--config", source, "--config"
            file = written(folder / f"{number}-{mode}", over, about)
            minutes = 0.0
            if mode != "never":
                runs[mode], minutes = fitted(file, *configs)
            scored = tested(runs[mode], f"period_{number}", *configs, file)
            modes[mode] = refitted(scored, minutes)
        if number == 1:
            runs = dict.fromkeys(MODES, runs["cold"])
            modes = dict.fromkeys(MODES, modes["cold"])
        best = scored["best_baseline"]
        aucs = {row["name"]: row["auc"] for row in scored["baselines"]}
        found.append(
            {
                "begins": dates[1],
                "rows": test.height,
                "users": test["user"].n_unique(),
                "best_baseline": best,
                "baseline": aucs.get(best or ""),
                "modes": modes,
            }
        )
    # 3. table, picture, sentence
    stale = gaps(found, "never")
    every, cost = refit_every(stale)
    result: BacktestResult = {
        **result_head("backtest", scored["protocol"], str(source), scored["seed"]),
        "days": given.days,
        "valid_days": given.days,
        "warm_share": WARM_SHARE,
        "periods": found,
        "minus": {mode: mean_of(gaps(found, mode)) for mode in MODES[1:]},
        "refit_every": every,
        "refit_cost": cost,
    }
    text = render(result)
    replace_file(
        folder / "backtest.md", lambda part: part.write_text(text, encoding="utf-8")
    )
    image = png(backtest_figure(found))
    replace_file(folder / "backtest.png", lambda part: part.write_bytes(image))
    print(f"{text}\nwritten: {write_json(folder / 'backtest.json', result)}")
    return folder


def periods_of(first: float, end: int, days: float, periods: int) -> list[list[str]]:
    """The data.protocol.dates of each period, validation as long as its test.

    The last test ends at second `end`, the log begins at `first`.
    """
    length = round(DAY * days)
    if length < 1 or periods < 2:
        raise ConfigError(
            f"--days is {days:g}, --periods {periods}; expected days above 0, and 2 periods or more."
        )
    # each has train rows before its validation
    room = ceil((end - first) / length) - 2
    if periods > room:
        raise ConfigError(
            f"--periods is {periods}, but between {moment(first)} and {moment(end)} (UTC) are {max(room, 0)} of "
            f"{days:g} days with train rows and as many days of validation before them. Give fewer, or shorter ones."
        )
    begins = range(end - periods * length, end, length)
    return [[moment(b - length), moment(b), moment(b + length)] for b in begins]


def written(place: Path, over: dict[str, Any], about: object) -> Path:
    """What a run has over the configuration; where that or what it is `about` changed, an earlier run is forgotten."""
    where = {"save_dir": str(place.parent), "name": place.name}
    logger = {"class_path": "project.run_folder.RunLogger", "init_args": where}
    over.setdefault("trainer", {})["logger"] = [logger]
    text = f"# of {about}\n{yaml.safe_dump(over, sort_keys=False)}"
    file = place.with_suffix(".yaml")
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        (place / "latest").unlink(missing_ok=True)
        replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))
    return file


def fitted(file: Path, *configs: object) -> tuple[Path, float]:
    """The run of a configuration, fitted unless it is whole, and its minutes of training."""
    latest = file.with_suffix("") / "latest"
    if not (latest / "results" / "fit.json").is_file():
        call("fit", *configs, file)
    run = latest.resolve()
    for checkpoint in (run / "checkpoints").glob("*.ckpt"):
        if checkpoint.name != "last.ckpt":  # many runs fill a disk
            checkpoint.unlink()
    return run, read_result(run / "results" / "fit.json")["stage_seconds"]["train"] / 60


def tested(run: Path, tag: str, *configs: object) -> ScoredResult:
    """The result of a run's test under a configuration, tested unless it is there."""
    path = run / "results" / f"test-{tag}.json"
    if not path.is_file():
        checkpoint = run / "checkpoints" / "last.ckpt"
        call("test", *configs, "--ckpt_path", checkpoint, "--results.tag", tag)
    found: ScoredResult = read_result(path)
    return found


def call(*arguments: object) -> None:
    """Run a command of this package in a process of its own."""
    command = [sys.executable, "-m", "project", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise ConfigError(
            f"`{' '.join(command[3:])}` failed, as said above. Mend it and start again: what is whole is kept."
        )


def refitted(scored: ScoredResult, minutes: float) -> Refitted:
    """What stands of a test in the table: exit 0, the static exit chosen on tune (else the deepest), the plan."""
    aucs = {row["layer"]: row["auc"] for row in scored["exits"]}
    plan = scored["adaptive"]
    return {
        "exit_0": aucs[0],
        "exit": aucs[scored["chosen_exit"] or max(aucs)],
        "plan": None if plan is None else plan["auc"],
        "minutes": minutes,
    }


def gaps(periods: Sequence[Period], mode: str) -> list[float]:
    """AUC of cold minus that of a mode, of every period but the first whose AUCs are defined."""
    rows = [period["modes"] for period in periods[1:]]
    pairs = [(row["cold"]["exit"], row[mode]["exit"]) for row in rows if mode in row]
    return [cold - other for cold, other in pairs if cold is not None and other is not None]


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean over periods, which are resampled."""
    return UserBootstrap(np.arange(len(values))).ratio_interval(
        values, np.ones(len(values))
    )


def refit_every(stale: Sequence[float]) -> tuple[int, float]:
    """The longest interval, in periods, whose mean loss is within TOLERANCE, and that loss.

    A model that is k periods old loses `stale[k - 1]`; one that is refitted every m periods is 0 to m - 1 old.
    """
    every, cost = 1, 0.0
    for m in range(2, len(stale) + 2):
        loss = sum(stale[: m - 1]) / m
        if loss > TOLERANCE:
            break
        every, cost = m, loss
    return every, cost
