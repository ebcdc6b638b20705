"""`python -m project.benchmark.full_depth --run RUN ...`: `serve` as after a drift alarm, where nobody leaves early."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from project.serve.ranker import Ranker
from project.serve.server import run_serve


def load(run: Path, **options: Any) -> Ranker:
    """What `serve` loads, at full depth."""
    ranker = Ranker.load(run, **options)
    ranker.full_depth = True
    return ranker


if __name__ == "__main__":
    run_serve(sys.argv[1:], load)
