"""Tests the store: what was acknowledged is there once, in one order for everybody, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from project.errors import ConfigError
from project.serve.store import Event, EventStore

POSTS, ROUNDS = 1000, int(os.environ.get("KILL_ROUNDS", "2"))  # 20 is the promise, a few are a test
WRITER = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from project.serve.store import Event, EventStore
url, acknowledged, round = sys.argv[1:]
store, file = EventStore(url), os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def post(k):
    store.add([Event(f"{round}/{k}", f"u{k % 7}", "i1", k % 2, float(k))])
    os.write(file, f"{round}/{k}\\n".encode())
    print(k, flush=True)
list(ThreadPoolExecutor(64).map(post, range(int(os.environ["POSTS"]))))
"""


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """Makes a new database of a server of its own."""
    pgserver = pytest.importorskip("pgserver")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short, since a socket lies in it
    folder.chmod(0o755)  # root's server runs as another user
    try:
        server = pgserver.get_server(folder / "data", cleanup_mode="delete")
    except Exception as error:
        pytest.skip(f"no PostgreSQL server can be started by this user: {error}")
    made = list[str]()

    def database() -> str:
        made.append(f"db{len(made)}")
        server.psql(f"CREATE DATABASE {made[-1]};")
        return str(server.get_uri(database=made[-1]))

    yield database
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/events.db"
    return str(request.getfixturevalue("postgresql")())


def event(name: str, label: int = 1) -> Event:
    return Event(name, f"u{len(name)}", "i1", label, 1.5)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcdefgh"), max_size=4))))
def test_one_order_for_all(posts: list[tuple[bool, list[str]]]) -> None:
    """Two stores of one file: new events are counted, the first of an id stays, both read them in order of arrival."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"sqlite:///{folder}/x.db"
        with closing(EventStore(address)) as one, closing(EventStore(address)) as other:
            expected = dict[str, Event]()
            for number, (first, names) in enumerate(posts):
                events = [event(name, number % 2) for name in names]
                new = [
                    e
                    for k, e in enumerate(events)
                    if e.event_id not in expected and names.index(names[k]) == k
                ]
                assert (one if first else other).add(events) == len(new)
                expected |= {e.event_id: e for e in new}
            for store in (one, other):
                found = store.since(0)
                assert [e for _, e in found] == list(expected.values())
                assert all(a < b for (a, _), (b, _) in pairwise(found))
                for at, _ in found:
                    assert store.since(at) == [pair for pair in found if pair[0] > at]


def test_two_servers(url: str) -> None:
    """Stores see each other's events and items, in the order of their commits; what is put again comes again if new."""
    with closing(EventStore(url)) as one, closing(EventStore(url)) as other:
        item = {"item_id": "i9", "title": "Nine", "year": "1999"}
        one.put_items([item])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda k: (one, other)[k % 2].add([event(f"e{k}")]), range(40)))
        other.put_items([item, item | {"title": "Nine, again"}])
        last, arrived = one.arrivals(0)
        assert (last, arrived) == other.arrivals(0)
        assert arrived[0] == item
        assert arrived[-1] == item | {"title": "Nine, again"}
        assert sorted(e.event_id for e in arrived[1:-1] if isinstance(e, Event)) == sorted(
            f"e{k}" for k in range(40)
        )
        assert one.add([event("e7", 0)]) == 0
        assert one.arrivals(last)[1] == []


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_was_acknowledged(url: str, tmp_path: Path) -> None:
    """By kill -9 in the middle of concurrent posts, round after round; posting all of them again adds the rest."""
    for number in range(ROUNDS):
        acknowledged = tmp_path / f"acknowledged{number}"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(acknowledged), str(number)],
            stdout=subprocess.PIPE,
            env=os.environ | {"POSTS": str(POSTS)},
        )
        assert writer.stdout is not None
        for _ in range(1 + POSTS * (number + 1) // (ROUNDS + 1)):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        told = set(acknowledged.read_text().split())
        with closing(EventStore(url)) as store:
            found = [e.event_id for _, e in store.since(0) if e.event_id.startswith(f"{number}/")]
            assert len(found) == len(set(found)) < POSTS
            assert told <= set(found)
            again = [Event(f"{number}/{k}", f"u{k % 7}", "i1", k % 2, float(k)) for k in range(POSTS)]
            assert store.add(again) == POSTS - len(found)
            assert len(store.since(0)) == POSTS * (number + 1)


def test_an_address_that_is_none() -> None:
    for wrong in ("events.db", "nosuch://x", "sqlite:////no/such/folder/x.db"):
        with pytest.raises(ConfigError, match="--db is"):
            EventStore(wrong)
