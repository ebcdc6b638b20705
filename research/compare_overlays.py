"""Fit a base configuration and overlays on it, and compare each with the base on validation's tune fold.

    python research/compare_overlays.py configs/quickstart.yaml OVERLAY... -- --trainer.limit_train_batches 60

A variant of several files joins them by a plus: `bf16.yaml+lora.yaml`. What stands behind `--` goes to every fit. Each
run is in runs/compare_overlays/NAME/latest, with its comparison in results/compare-tune.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from project.compare import run_compare

RUNS = Path("runs") / "compare_overlays"


def fit(configs: list[str], extra: list[str]) -> Path:
    """Train one variant in a process of its own; returns its run."""
    name = "-".join(Path(config).stem for config in configs)
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(RUNS), "name": name},
    }
    given = [word for config in configs for word in ("--config", config)]
    command = [
        sys.executable,
        "-m",
        "project",
        "fit",
        *given,
        "--trainer.logger",
        json.dumps([logger]),
    ]
    subprocess.run([*command, *extra], check=True)
    return (RUNS / name / "latest").resolve()


def main(arguments: list[str]) -> None:
    """Fit the base and every overlay, and print each overlay's comparison with the base."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="configuration")
    parser.add_argument(
        "overlays",
        nargs="+",
        help="YAML on top of it; several files of one variant joined by +",
    )
    given, extra = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    base = fit([given.base], extra)
    for overlay in given.overlays:
        run_compare([str(fit([given.base, *overlay.split("+")], extra)), str(base)])


if __name__ == "__main__":
    main(sys.argv[1:])
