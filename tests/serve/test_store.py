"""Tests the store: what was acknowledged is there once, in one order for everybody, whoever dies."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from fake_ranker import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import SQLAlchemyError

from project.errors import ConfigError
from project.serve.store import Added, Deleted, Event, EventStore

EVENTS, ROUNDS = 1000, int(os.environ.get("KILL_ROUNDS", "2"))  # 20 by hand


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
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcdefgh"), max_size=4)))
)
def test_one_order_for_all(posts: list[tuple[bool, list[str]]]) -> None:
    """Two stores of one file: new events are counted, the first of an id stays, both read them in order of arrival."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"sqlite:///{folder}/x.db"
        with closing(EventStore(address)) as one, closing(EventStore(address)) as other:
            expected, marks = dict[str, Event](), [(0, 0)]
            for number, (first, names) in enumerate(posts):
                new = {
                    name: event(name, number % 2) for name in names if name not in expected
                }
                assert (one if first else other).add(
                    [event(name, number % 2) for name in names]
                ).new == len(new)
                expected |= new
                marks.append((one.arrivals(0)[0], len(expected)))
            for store in (one, other):
                for seq, before in marks:
                    assert store.arrivals(seq) == (
                        marks[-1][0],
                        list(expected.values())[before:],
                    )


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
        assert one.add([event("e7", 0)]).new == 0
        assert one.arrivals(last)[1] == []


def killed(url: str, folder: Path, number: int) -> tuple[list[Event], list[str]]:
    """A server whose processes all get kill -9 amid the posts of 16 threads: all events, and ids acknowledged."""
    rng, acknowledged = random.Random(number), list[str]()
    events = [
        Event(f"{number}/{k}", f"u{k % 7}", "i1", k % 2, float(k)) for k in range(EVENTS)
    ]
    starts = [0, *sorted(rng.sample(range(1, EVENTS), 400))]  # of posts: one event or a few
    enough = rng.randrange(EVENTS // 20, EVENTS * 9 // 10)
    with (
        serving(folder, "--db", url) as (process, address),
        httpx.Client(timeout=60) as http,
    ):

        def post(part: slice) -> None:
            with suppress(httpx.TransportError):
                sent = [event._asdict() | {"context": None} for event in events[part]]
                assert http.post(f"{address}/v1/events", json=sent).status_code == 200
                acknowledged.extend(event.event_id for event in events[part])
                if len(acknowledged) >= enough:
                    os.killpg(process.pid, signal.SIGKILL)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(post, map(slice, starts, [*starts[1:], EVENTS])))
        assert process.wait(30) == -signal.SIGKILL
    assert enough <= len(acknowledged) < EVENTS
    return events, acknowledged


@pytest.mark.slow
def test_a_killed_server_loses_nothing_that_was_acknowledged(
    url: str, tmp_path: Path
) -> None:
    """Server after server on one database: what was acknowledged is there once; posting all again adds the rest."""
    for number in range(ROUNDS):
        events, acknowledged = killed(url, tmp_path, number)
        with closing(EventStore(url)) as store:
            found = [e for e in store.arrivals(0)[1] if isinstance(e, Event)][
                number * EVENTS :
            ]
            assert len(found) == len(set(found)) < EVENTS
            assert set(acknowledged) <= {e.event_id for e in found}
            assert set(found) <= set(events)
            assert store.add(events) == Added(EVENTS - len(found), [])


def test_an_event_id_with_other_content(url: str) -> None:
    """The first stays and the ids of the others are told; the same once more is none of them."""
    with closing(EventStore(url)) as store:
        first, other = event("e1"), event("e1", 0)
        assert store.add([first, first, event("e2")]) == Added(2, [])
        assert store.add([first, event("e3"), other]) == Added(1, ["e1"])
        # the two came together
        assert store.add([event("e4"), event("e4", 0)]) == Added(1, ["e4"])
        assert [e.label for e in store.arrivals(0)[1] if isinstance(e, Event)] == [1] * 4


def test_users_are_as_they_were_put_last(url: str) -> None:
    """Whoever reads all gets every change in order; the same once more is none."""
    one, other = ({"user_id": "u", "country": c} for c in ("de", "fr"))
    with closing(EventStore(url)) as store:
        for user in (one, one, other, one):
            store.put_users([user, {"user_id": "v", "age": 3}])
        arrived = store.arrivals(0)[1]
        assert [a for a in arrived if a != {"user_id": "v", "age": 3}] == [one, other, one]
        assert len(arrived) == 4


def test_deletions(url: str) -> None:
    """A user's events and attributes, or one event: gone, and told to whoever may have read them, in order."""
    with closing(EventStore(url)) as store:
        store.add([event("a"), event("b"), event("cc"), event("dd", 0)])
        store.put_users([{"user_id": "u1", "age": 3}])
        read = store.arrivals(0)[0]
        assert [store.delete("u1"), store.delete(event_id="cc")] == [2, 1]
        assert [store.delete("u1"), store.delete(event_id="cc")] == [0, 0]
        assert store.add([event("a"), event("cc", 0)]) == Added(2, [])  # a correction
        everything, later = store.arrivals(0)[1], store.arrivals(read)[1]
        user, one = later[:2]
        assert isinstance(user, Deleted)
        assert [user.covers("any", 0, t) for t in (0.0, time.time(), 1e10)] == [1, 1, 0]
        assert one == Deleted("u2", 1.5, "i1", 1)
        assert later[3:] == [event("a"), event("cc", 0)]
        assert [e for e in everything if isinstance(e, Event)] == [
            *(event("dd", 0), event("a"), event("cc", 0)),
        ]
        # of "cc" nobody has read who begins now
        assert [d.item_id for d in everything if isinstance(d, Deleted)] == [None, None]


def test_an_event_replaces_earlier_ones_of_its_item(url: str) -> None:
    """As dated, of the user alone, those sent with it, too; once more it changes nothing, and it deletes log rows."""
    with closing(EventStore(url)) as store:
        first, other = event("a"), event("b")._replace(item_id="i2")
        later = event("c")._replace(timestamp=9.0)
        store.add([first, other, later, event("dd")])
        read = store.arrivals(0)[0]
        twice = [event("e", 0), event("f", 0)]
        for _ in range(2):
            store.add(twice, replacing={"f", "b"})
        gone = Deleted("u1", 1.5, "i1")
        assert store.arrivals(read)[1] == [gone, twice[1]]
        assert store.arrivals(0)[1] == [other, later, event("dd"), gone, twice[1]]
        assert [gone.covers("i1", 1, t) for t in (1.0, 1.5, 2.0)] == [True, True, False]
        assert not gone.covers("i2", 1, 1.0)
        # one that was replaced is known, and deleting it touches no other
        assert store.add([event("a")]) == Added(0, [])
        last = store.arrivals(0)[0]
        assert (store.delete(event_id="a"), store.arrivals(last)[1]) == (1, [])


def test_a_database_that_cannot_be_used(tmp_path: Path) -> None:
    """One sentence each, without the password."""
    (tmp_path / "text.db").write_text("no database, however long it is" * 50)
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE events (name TEXT)")
    wrong = {
        "events.db": "expected an address",
        "nosuch://x": "nosuch",
        "mysql://u:secret@h/x": "MySQLdb",
        "postgresql://u:secret@127.0.0.1:port/x": "port",
        "postgresql://u:secret@127.0.0.1:1/x": "cannot be opened",
        "sqlite:////no/such/folder/x.db": "cannot be opened",
        f"sqlite:///{tmp_path}/text.db": "not a database",
        f"sqlite:///{tmp_path}/other.db": "a table events of another kind",
    }
    for address, found in wrong.items():
        with pytest.raises(ConfigError, match="--db is") as error:
            EventStore(address)
        assert found in str(error.value)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)


def test_errors_of_the_database_do_not_show_what_was_sent(tmp_path: Path) -> None:
    with closing(EventStore(f"sqlite:///{tmp_path}/x.db")) as store:
        with sqlite3.connect(tmp_path / "x.db") as connection:
            connection.execute("DROP TABLE events")
        with pytest.raises(SQLAlchemyError) as error:
            store.add([Event("private", "u", "i", 1, 0.0)])
    assert "private" not in str(error.value)
