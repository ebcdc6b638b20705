"""Keeps what is computed once: in folders that are named by a hash of their content, and in a bounded memory.

A folder is whole or absent: it is filled under a temporary name beside its own and renamed. Processes that want the
same folder wait for the first. What killed processes left is removed after a day.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from project.errors import DataError

Value = TypeVar("Value")

# raise it when the same settings would give other retrieved features or other files
FORMAT = 2
# of a full disk
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


def default_cache() -> Path:
    """Folder for everything fetched or computed once: $PROJECT_CACHE, else ~/.cache/exitrec."""
    return Path(os.environ.get("PROJECT_CACHE") or Path.home() / ".cache" / "exitrec")


def content_key(content: Mapping[str, object]) -> str:
    """Hex digest of what the stored files depend on, and of their format."""
    # sorted keys: equal content is equal text
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(
    parent: Path, content: Mapping[str, object], write: Callable[[Path], None]
) -> Path:
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
        whole_folder(
            target / folder.name, partial(shutil.copytree, folder, dirs_exist_ok=True)
        )


def whole_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder, if it is absent; an error leaves it absent."""
    remove_orphans(folder.parent)
    # found: the usual case takes no lock
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if folder.exists():  # another process made it while this one waited
            return
        # a temporary name beside the folder's own: renaming works inside one file system only
        made = Path(
            tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent)
        )
        try:
            # fill it, then rename, which is all or nothing
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


class Recent(Generic[Value]):
    """Values in memory by key, at most `mib` MiB of them: the least recently used is forgotten first.

    One thread at a time.
    """

    def __init__(self, mib: float) -> None:
        self.capacity = mib * 2**20  # bytes
        self.bytes = 0  # of all kept values
        # values and their bytes
        self._kept: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def look(self, key: Hashable) -> Value | None:
        """The value of a key, which does not count as a use."""
        return self._kept[key][0] if key in self._kept else None

    def pop(self, key: Hashable) -> Value | None:
        """The value of a key, taken out."""
        if key not in self._kept:
            return None
        # values and bytes stay in step
        value, size = self._kept.pop(key)
        self.bytes -= size
        return value

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keep a value of so many bytes; forget others, at last itself, while there are more than `capacity`."""
        self.pop(key)
        self._kept[key] = value, size
        self.bytes += size
        while self.bytes > self.capacity:
            _, (_, freed) = self._kept.popitem(last=False)
            self.bytes -= freed

    def of_texts(
        self,
        texts: Sequence[str],
        make: Callable[[list[str]], Sequence[Value]],
        size: Callable[[Value], int],
    ) -> list[Value]:
        """Values of texts, in their order; `make` makes those that are absent, all at once."""
        # each text once, in the order of first use
        distinct = list(dict.fromkeys(texts))
        known: dict[str, Value] = {}
        for text in distinct:
            value = self.pop(text)
            if value is not None:
                known[text] = value
        absent = [text for text in distinct if text not in known]
        if absent:
            known |= zip(absent, make(absent), strict=True)
        # put back at the end: texts of this call were used last
        for text, value in known.items():
            self.put(text, value, size(value) + sys.getsizeof(text))
        return [known[text] for text in texts]
