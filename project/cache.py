"""Keeps what is computed once in folders that are named by a hash of their content; a folder is whole or absent.

A folder is filled under a temporary name beside its own and renamed. Processes that want the same one wait for the
first. What killed processes left is removed after a day.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from project.errors import DataError

FORMAT = 1  # raise it when the same settings would give other retrieved features or other files
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]  # of a full disk


def default_cache() -> Path:
    """Folder for everything fetched or computed once: $PROJECT_CACHE, else ~/.cache/exitrec."""
    return Path(os.environ.get("PROJECT_CACHE") or Path.home() / ".cache" / "exitrec")


def content_key(content: dict[str, Any]) -> str:
    """Hex digest of what the stored files depend on, and of their format."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(parent: Path, content: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of this content in `parent`; where it is absent, `write` fills it, beside content.json."""

    def write_with_content(made: Path) -> None:
        write(made)
        stored = json.dumps({"format": FORMAT, **content}, indent=2, sort_keys=True)
        (made / "content.json").write_text(stored)

    folder = parent / content_key(content)
    whole_folder(folder, write_with_content)
    return folder


def restore(source: Path, target: Path) -> None:
    """Copy the content folders that `target` lacks, as from a run's bundle to the cache; `source` may be absent."""
    for folder in sorted(path for path in source.glob("*") if path.is_dir()):
        whole_folder(target / folder.name, partial(shutil.copytree, folder, dirs_exist_ok=True))


def whole_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder, if it is absent; an error leaves it absent."""
    remove_orphans(folder.parent)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if folder.exists():  # another process made it while this one waited
            return
        made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            write(made)
            try:
                os.replace(made, folder)
            except OSError:
                # without locks another process was faster: its folder has the same content
                if not folder.exists():
                    raise
        except Exception as error:
            # libraries wrap the operating system's error, but keep its text
            full = next((text for text in FULL if text in str(error)), None)
            if full is None:
                raise
            raise DataError(
                f"{folder.parent} cannot be written to: {full}. Free space there, or set PROJECT_CACHE to a folder "
                "on another disk."
            ) from error
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait while another process makes the folder. A killed one's lock is gone; without locks both make it."""
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def remove_orphans(parent: Path) -> None:
    """Remove the unfinished folders (`.KEY-*`, `HASH.*.tmp`) that killed processes left in a folder of the cache.

    A folder younger than a day may be another process's, also of another machine.
    """
    for folder in (*parent.glob(".*"), *parent.glob("*.tmp")):
        with suppress(FileNotFoundError):  # another process was faster
            if folder.is_dir() and time.time() - folder.stat().st_mtime > 86_400:
                shutil.rmtree(folder, ignore_errors=True)
