"""The part of the retrieved features cache's key that a retriever of one's own adds, and what it has to keep for it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from project.errors import ConfigError
from project.retrieval import LightGCN, NoRetriever, RandomRetriever, Retriever, retrieved_tables
from project.retrieval.walk import content_key

SOURCE = """
import numpy as np
from project.retrieval.base import Neighbours, Retriever

class Mine(Retriever):
{init}
    def begin(self, num_users, items):
        pass

    def select(self, user, item, timestamp, raters):
        rows = raters.row{which}[:1]
        return Neighbours(rows, np.ones(rows.size, np.float32))
"""
KEEPS = "    def __init__(self, k=5):\n        super().__init__()\n        self.k = k\n"

Write = Callable[..., type[Retriever]]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """Writes and imports a module with a retriever of one's own, again and again."""

    def write(which: str = "", init: str = KEEPS) -> type[Retriever]:
        file = tmp_path / "mine.py"
        file.write_text(SOURCE.format(which=which, init=init))
        module = ModuleType("mine")
        module.__file__ = str(file)
        sys.modules["mine"] = module  # where inspect looks for a class's file
        exec(compile(file.read_text(), file, "exec"), module.__dict__)
        kind: type[Retriever] = module.Mine
        return kind

    yield write
    sys.modules.pop("mine", None)


def test_an_edited_retriever_is_asked_again(
    written: Write, log_of: Callable, split_of: Callable, tmp_path: Path
):
    """First rater, then latest: another source is another key, and the cache gives the new one's answers."""
    rows = log_of(0)
    split = split_of(rows, np.zeros(rows.height, int))

    def neighbours(which: str) -> list[list[int]]:
        tables = retrieved_tables(split, written(which)(), 3, tmp_path / "cache")
        found: list[list[int]] = tables["train"]["neighbours"].to_list()
        return found

    first, latest = neighbours(""), neighbours("[::-1]")
    assert first != latest
    assert neighbours("") == first
    assert len(list((tmp_path / "cache" / "retrieved").iterdir())) == 2


def test_a_base_in_another_file_counts(written: Write):
    """A subclass defined here, of a class written there, has another key when that file changes."""
    keys = []
    for which in ("", "[::-1]"):
        kind = type("Child", (written(which),), {"__module__": __name__})
        keys.append(kind().settings()["source"])
    assert keys[0] != keys[1]


def test_a_class_without_a_file(written: Write):
    """Typed into a notebook, a class counts by what its methods do: other code is another key, the same code is not."""

    def typed(which: str) -> str:
        names: dict[str, type[Retriever]] = {"__name__": "notebook"}
        exec(SOURCE.format(which=which, init=KEEPS), names)
        found: str = names["Mine"]().settings()["source"]
        return found

    assert typed("") == typed("") != typed("[::-1]")


def test_keys_of_our_own_retrievers_stay():
    """No source in them: these are the keys that caches and published results have."""
    assert "source" not in LightGCN().settings()
    assert content_key(LightGCN().settings()) == "572e340a8d15a10e"
    assert content_key(RandomRetriever(seed=3).settings()) == "3db602d4bad9635e"
    assert content_key(NoRetriever().settings()) == "aad8095932071cee"


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("    def __init__(self, k=5):\n        self.k = k\n", r"no attribute neighbours.*Write super\(\)"),
        (
            "    def __init__(self, k=5):\n        super().__init__()\n        self._k = k\n",
            r"Write self\.k = k",
        ),
    ],
)
def test_what_must_be_kept(
    written: Write, log_of: Callable, split_of: Callable, tmp_path: Path, init: str, words: str
):
    """Without the base's constructor, or with an argument under another name, the error says what to write."""
    rows = log_of(0)
    split = split_of(rows, np.zeros(rows.height, int))
    with pytest.raises(ConfigError, match=rf"data\.retriever is Mine.*{words}"):
        retrieved_tables(split, written(init=init)(), 3, tmp_path)
