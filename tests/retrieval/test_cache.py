"""Content folders: whole or absent, found again, copied from a bundle."""

import os
import time
from pathlib import Path

import pytest

from project.retrieval.walk import cached_folder, content_key, restore


def test_written_once_and_found_again(tmp_path: Path):
    """The second call does not write; another content is another folder; no temporary folder stays."""
    calls = []

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").write_text("1")

    first = cached_folder(tmp_path / "c", {"a": 1}, write)
    assert cached_folder(tmp_path / "c", {"a": 1}, write) == first
    assert cached_folder(tmp_path / "c", {"a": 2}, write) != first
    assert len(calls) == 2
    assert (first / "x").read_text() == "1"
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    """An interrupted write is not mistaken for a result."""

    def fail(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path, {"a": 1}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path: Path):
    """Where the folder appears while writing, it is kept and ours is dropped."""

    def write(folder: Path) -> None:
        other = tmp_path / content_key({"a": 1})
        other.mkdir()
        (other / "theirs").write_text("1")

    folder = cached_folder(tmp_path, {"a": 1}, write)
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [folder]


def test_restore_copies_what_is_absent(tmp_path: Path):
    """A bundle's folders reach the cache under their names; what is there already stays."""
    made = cached_folder(tmp_path / "bundle", {"a": 1}, lambda folder: (folder / "x").write_text("1"))
    restore(tmp_path / "bundle", tmp_path / "cache")
    restore(tmp_path / "bundle", tmp_path / "cache")
    assert (tmp_path / "cache" / made.name / "x").read_text() == "1"


def test_orphans_of_killed_runs_are_removed_after_a_day(tmp_path: Path):
    """What a killed run left is removed by the next run that asks, found or not; the young may still be written."""
    made = cached_folder(tmp_path, {"a": 1}, lambda folder: (folder / "x").write_text("1"))
    old, young = tmp_path / f"{made.name}.old.tmp", tmp_path / f"{made.name}.young.tmp"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_text("1")
    yesterday = time.time() - 25 * 3600
    for folder in (old, made):
        os.utime(folder, (yesterday, yesterday))
    assert cached_folder(tmp_path, {"a": 1}, pytest.fail) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([made.name, young.name])
