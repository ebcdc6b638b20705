"""Scripts of research/ still run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from project.run import read_result

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_compare_overlays(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """An overlay without effect differs by 0 from the base, and one with another seed does not."""
    config = tiny_config()
    for name, text in (("same", "data: {num_workers: 0}"), ("seed", "seed_everything: 1"), ("none", "{}")):
        (tmp_path / f"{name}.yaml").write_text(text)
    variants = [config, "same.yaml+none.yaml", "seed.yaml", "--", "--trainer.limit_train_batches", "2"]
    subprocess.run(
        [sys.executable, ROOT / "research" / "compare_overlays.py", *variants],
        cwd=tmp_path,
        env=os.environ | {"PROJECT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    folder = tmp_path / "runs" / "compare_overlays"
    same, seed = (
        read_result(folder / name / "latest" / "results" / "compare-tune.json")
        for name in ("config-same-none", "config-seed")
    )
    differences = [[row["difference"]["auc"]["value"] for row in result["exits"]] for result in (same, seed)]
    assert differences[0] == [0, 0]
    assert differences[1] != [0, 0]
    assert "limit_train_batches: 2" in (folder / "config-seed" / "latest" / "config.yaml").read_text()
