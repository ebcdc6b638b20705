"""Tests folders that are named by their content: whole or absent, made once, also by several at a time."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import polars as pl
import pytest

from project.cache import cached_folder, content_key, restore
from project.errors import DataError


def write(folder: Path) -> None:
    """What a cached folder holds in these tests."""
    (folder / "x").write_text("1")


def test_a_folder_is_written_once_and_found_again(tmp_path: Path) -> None:
    first = cached_folder(tmp_path / "c", {"a": 1}, write)
    assert cached_folder(tmp_path / "c", {"a": 1}, pytest.fail) == first
    assert cached_folder(tmp_path / "c", {"a": 2}, write) != first
    assert (first / "x").read_text() == "1"
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path, {"a": 1}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        other = tmp_path / content_key({"a": 1})
        other.mkdir()
        (other / "theirs").write_text("1")

    folder = cached_folder(tmp_path, {"a": 1}, slow)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_who_comes_second_waits(tmp_path: Path) -> None:
    """And finds what the first has made."""
    begun, go_on = Event(), Event()

    def slow(folder: Path) -> None:
        begun.set()
        go_on.wait()
        write(folder)

    first, second = (
        Thread(target=cached_folder, args=(tmp_path, {"a": 1}, f))
        for f in (slow, pytest.fail)
    )
    first.start()
    begun.wait()
    second.start()
    second.join(0.1)
    assert second.is_alive()
    go_on.set()
    second.join()
    assert [path.name for path in tmp_path.iterdir()] == [content_key({"a": 1})]


@pytest.mark.parametrize("kind", ["polars", "numpy"])
def test_a_full_disk_is_one_sentence_and_keeps_what_is_there(
    tmp_path: Path, kind: str
) -> None:
    """Files of more than 4,096 bytes cannot be written."""
    old = cached_folder(tmp_path, {"a": 1}, write)
    numbers = np.random.default_rng(0).random(10_000)

    def large(folder: Path) -> None:
        if kind == "polars":
            pl.DataFrame({"x": numbers}).write_parquet(folder / "x.parquet")
        else:
            np.savez(folder / "x.npz", x=numbers)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(
            DataError,
            match=f"{tmp_path} cannot be written to: File too large.*PROJECT_CACHE",
        ):
            cached_folder(tmp_path, {"a": 2}, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [old]
    assert (old / "x").read_text() == "1"


def test_restore_copies_what_is_absent(tmp_path: Path) -> None:
    made = cached_folder(tmp_path / "bundle", {"a": 1}, write)
    for _ in range(2):
        restore(tmp_path / "bundle", tmp_path / "cache")
    assert (tmp_path / "cache" / made.name / "x").read_text() == "1"


def test_orphans_of_killed_runs_are_removed_after_a_day(tmp_path: Path) -> None:
    """A younger one may still be written."""
    made = cached_folder(tmp_path, {"a": 1}, write)
    old, young = tmp_path / f"{made.name}.old.tmp", tmp_path / f"{made.name}.young.tmp"
    for folder in (old, young):
        folder.mkdir()
        write(folder)
    for folder in (old, made):
        os.utime(folder, (time.time() - 25 * 3600,) * 2)
    assert cached_folder(tmp_path, {"a": 1}, pytest.fail) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [made.name, young.name]
    )
