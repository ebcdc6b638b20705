"""Trains the variants of an ablation list, each by `python -m project fit` in a process of its own.

Unusual here: nothing is overwritten. Every attempt is a new version_<k> of the variant's folder; one that ended well
gets `ablation.json`, its definition, and is taken again instead of being trained a second time, also by other lists.
Whoever ends `ablate` ends the training too.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml  # type: ignore[import-untyped]  # as in project.export

from project.ablations.settings import Variant
from project.artefacts import replace_file, write_json

FINISHED = "ablation.json"
ERROR = re.compile(r"error:|\w+Error\b")
NEEDED = ("results/fit.json", "scores/valid.parquet")


class FitFailed(Exception):
    """A variant's training ended with an error; the text is its last words."""


def finished_run(variant: Variant, folder: Path) -> Path | None:
    """A run of just this definition that ended well, the variant's own newest first; None where there is none.

    Args:
        variant: What is looked for.
        folder: runs/ablation-<list>/<name>; folders of other lists beside it count too.
    """
    definition = variant.definition()
    found = sorted(folder.parent.parent.glob(f"ablation-*/*/version_*/{FINISHED}"), key=_age)
    runs = [path.parent for path in found if json.loads(path.read_text(encoding="utf-8")) == definition]
    whole = [run for run in runs if is_whole(run)]
    own = [run for run in whole if run.parent == folder]
    return [None, *whole, *own][-1]


def is_whole(run: Path) -> bool:
    """Whether a run left all that a table needs."""
    return all((run / name).is_file() for name in NEEDED)


def fit(variant: Variant, folder: Path) -> Path:
    """Train a variant; its output goes to fit.log.

    Args:
        variant: What to train.
        folder: runs/ablation-<list>/<name>.

    Returns:
        The run's folder, folder/version_<k>.

    Raises:
        FitFailed: With the error that the process ended with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overlay = replace_file(folder / "variant.yaml", lambda part: part.write_text(_overlay(variant, folder)))
    configs = [word for path in (*variant.configs, overlay) for word in ("--config", str(path))]
    log, definition = folder / "fit.log", variant.definition()
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "project", "fit", *configs]
        status = exit_status(command, output)
    if status:
        raise FitFailed(f"{_last_words(log.read_text(encoding='utf-8'))} (exit status {status}; {log})")
    run = folder / (folder / "latest").resolve().name
    if not is_whole(run):
        raise FitFailed(f"{run} lacks one of {', '.join(NEEDED)}: was validation switched off? ({log})")
    if variant.definition() != definition:
        raise FitFailed(
            f"a file that defines {folder.name} was changed while it trained; train it again ({run})"
        )
    write_json(run / FINISHED, definition)
    return run


def exit_status(command: Sequence[str], output: IO[str]) -> int:
    """Run a command to its end; SIGTERM or Ctrl-C here ends it as well, and is passed on once it has ended.

    Args:
        command: Program and arguments.
        output: Takes what it prints.

    Raises:
        SystemExit: With status 143, on SIGTERM.
    """

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as child:
            try:
                return child.wait()
            except BaseException:
                child.terminate()  # a training ends after its batch; leaving `with` waits for that
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _overlay(variant: Variant, folder: Path) -> str:
    """YAML of the overrides, and of where the run goes."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder.parent), "name": folder.name},
    }
    content: dict[str, Any] = dict(variant.overrides)
    content["trainer"] = {**content.get("trainer", {}), "logger": [logger]}
    # of many runs' checkpoints, one each is enough
    content["checkpoint"] = {"save_last": "link", **content.get("checkpoint", {})}
    head = "# Written by `ablate`: the overrides of this variant, the last --config of its fit.\n"
    text: str = yaml.safe_dump(content, sort_keys=False)
    return head + text


def _last_words(output: str) -> str:
    """What a process ended with: from its last line that begins as an error does, or its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if ERROR.match(line)]
    return " ".join(lines[errors[-1] if errors else -1 :])[:400] or "no output"


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, str(path)
