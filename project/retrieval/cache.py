"""A folder per content hash: made once, moved into place whole, found again afterwards."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from project.data.sources import remove_orphans

FORMAT = 1  # raise it when the same settings would give other evidence or other files


def content_key(content: dict[str, Any]) -> str:
    """Hex digest of what the stored files depend on, and of their format."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cached_folder(parent: Path, content: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """The folder of this content; where it is absent, `write` fills it under a temporary name beside it.

    Args:
        parent: folder of folders, made where absent.
        content: JSON-able description of everything the files depend on; stored beside them as content.json.
        write: fills an empty folder.
    """

    def write_with_content(made: Path) -> None:
        write(made)
        stored = json.dumps({"format": FORMAT, **content}, indent=2, sort_keys=True)
        (made / "content.json").write_text(stored)

    folder = parent / content_key(content)
    _make_whole(folder, write_with_content)
    return folder


def restore(source: Path, target: Path) -> None:
    """Copy the content folders that `target` lacks, as from a run's bundle to the cache.

    Args:
        source: folder of content folders; absent: there is nothing to copy.
        target: folder of content folders, made where absent.
    """
    for folder in sorted(path for path in source.glob("*") if path.is_dir()):
        _make_whole(target / folder.name, partial(shutil.copytree, folder, dirs_exist_ok=True))


def _make_whole(folder: Path, write: Callable[[Path], object]) -> None:
    remove_orphans(folder.parent)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        write(made)
        try:
            os.replace(made, folder)
        except OSError:
            # another process was faster: its folder has the same content
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
