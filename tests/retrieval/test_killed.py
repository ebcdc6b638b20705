"""Preparing retrieved features survives SIGKILL, and two processes that prepare the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from world import read_split

from project.data.protocol import Protocol
from project.retrieval import LightGCN, MatrixFactorisation, RetrievedFeatures

pytestmark = pytest.mark.slow

# imports once, then forks before any library starts a thread: a process costs milliseconds,
# not seconds
DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
import scipy.optimize, sklearn.feature_extraction.text, sklearn.preprocessing, sklearn.pipeline
from test_killed import prepare

logs, cache, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def start():
    child = os.fork()
    if child == 0:
        prepare(logs, cache)
        os._exit(0)
    return child

clock, seed = time.perf_counter(), random.Random(0)
assert os.waitpid(start(), 0)[1] == 0
whole = time.perf_counter() - clock
for k in range(kills):
    cache = cache.parent / f"killed{k // 5}"  # five kills, then one that is left alone
    child = start()
    time.sleep(whole * seed.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if k % 5 == 4:
        assert os.waitpid(start(), 0)[1] == 0
cache = cache.parent / "both"
assert [os.waitpid(child, 0)[1] for child in (start(), start())] == [0, 0]
"""


def prepare(logs: Path, cache: Path) -> None:
    split = read_split(logs, Protocol(minimum_history=1, shares=[0.6, 0.2, 0.2]))
    RetrievedFeatures(
        split, LightGCN(dim=8, item_neighbours=5), 5, cache, MatrixFactorisation(dim=4)
    ).tables()


def files(cache: Path) -> dict[str, bytes]:
    """Of the folders that are whole."""
    paths = [
        p
        for p in cache.rglob("*")
        if p.is_file() and ".tmp" not in str(p) and p.suffix != ".lock"
    ]
    return {str(path.relative_to(cache)): path.read_bytes() for path in paths}


def test_killed_at_random_points(tiny_logs: Path, tmp_path: Path) -> None:
    """Twenty kills; what the runs after them complete, and what two at once make, equals an undisturbed run's bytes."""
    tests = Path(__file__).parents[1]
    driver = [sys.executable, "-c", DRIVER, str(tiny_logs), str(tmp_path / "calm"), "20"]
    paths = ":".join(map(str, (tests, Path(__file__).parent, tests.parent)))
    subprocess.run(driver, check=True, env={**os.environ, "PYTHONPATH": paths}, timeout=600)
    calm = files(tmp_path / "calm")
    assert len([name for name in calm if name.endswith(".parquet")]) == 9
    for name in ("killed0", "killed1", "killed2", "killed3", "both"):
        assert files(tmp_path / name) == calm
