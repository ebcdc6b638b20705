"""Keeps events, items and users that came after the log: acknowledged is on disk, in one order for all readers.

A row's `seq` rises in the order of commits: whoever writes takes the one row of `clock` first and holds it until the
commit. So `arrivals` never skips an event of a writer that was slower.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import sqlalchemy as sa

from project.errors import ConfigError

AHEAD = 60.0  # seconds that the clock of a client may be fast
TOGETHER = 500  # ids in one look-up; databases limit the parameters of a statement


class Event(NamedTuple):
    """An answer of a user; `label` is 0 or 1 by the run's protocol, `timestamp` seconds since 1970.

    `context` is JSON of names and values, empty where it has none.
    """

    event_id: str
    user_id: str
    item_id: str
    label: int
    timestamp: float
    context: str = ""
    rating: float | None = None


class Deleted(NamedTuple):
    """What a user's rows were deleted by: all dated until `timestamp`, all of this item, or one of label and time."""

    user_id: str
    timestamp: float
    item_id: str | None = None
    label: int | None = None

    def covers(self, item_id: str, label: int, timestamp: float) -> bool:
        """Whether it is about this row of the user."""
        if self.label is None:
            return timestamp <= self.timestamp and self.item_id in (None, item_id)
        return (item_id, label, timestamp) == (self.item_id, self.label, self.timestamp)


Arrived = Event | Deleted | dict[str, Any]
"""What comes to a store; items and users are columns by name."""


class Added(NamedTuple):
    """What became of events."""

    new: int  # were not known
    # event_ids that are known with another user, item, label, time or context: the first stays
    conflict: list[str]


TABLES = sa.MetaData()
CLOCK = sa.Table(
    "clock",
    TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("seq", sa.BigInteger),
)


def _table(name: str, *columns: sa.Column[Any]) -> sa.Table:
    """A table whose rows have a `seq`."""
    seq = sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False)
    return sa.Table(name, TABLES, seq, *columns)


def _text(name: str, **more: Any) -> sa.Column[str]:
    """A column of text that no row lacks."""
    return sa.Column(name, sa.Text, nullable=False, **more)


EVENTS = _table(
    "events",
    _text("event_id", unique=True),
    # a correction looks for the user's rows
    _text("user_id", index=True),
    _text("item_id"),
    sa.Column("label", sa.SmallInteger, nullable=False),
    sa.Column("timestamp", sa.Double, nullable=False),
    _text("context"),
    sa.Column("rating", sa.Double),
)
ITEMS = _table(
    "items",
    _text("digest", unique=True),
    _text("columns"),
)
USERS = _table(
    "users",
    _text("user_id", index=True),
    _text("columns"),
)
DELETED = _table(
    "deleted",
    # of the event that was deleted; 0: rows of the log, too
    sa.Column("event_seq", sa.BigInteger, nullable=False),
    _text("user_id"),
    sa.Column("timestamp", sa.Double, nullable=False),
    sa.Column("item_id", sa.Text),
    sa.Column("label", sa.SmallInteger),
)


class EventStore:
    """Events, items and users that came after the log: acknowledged is durable. Thread-safe.

    Args:
        url: SQLAlchemy's address of the database, such as sqlite:///events.db or postgresql+psycopg://user@host/name.
    """

    def __init__(self, url: str) -> None:
        try:
            address = sa.make_url(url)
            if address.drivername == "postgresql":
                address = address.set(drivername="postgresql+psycopg")
            self._engine = sa.create_engine(
                address, pool_pre_ping=True, hide_parameters=True
            )
        except (sa.exc.ArgumentError, ImportError, ValueError) as error:
            text = f"--db is no address of a database that can be used ({error}); expected an address such as"
            raise ConfigError(
                f"{text} sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME."
            ) from None
        shown = address.render_as_string(hide_password=True)
        # SQLite has one writer, and those that wait for it sleep in long steps
        self._writing = threading.Lock()
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _durable)
        try:
            with self._engine.begin() as connection:
                TABLES.create_all(connection)
                if connection.scalar(sa.select(CLOCK.c.seq)) is None:
                    connection.execute(sa.insert(CLOCK).values(id=0, seq=0))
        except sa.exc.IntegrityError:  # another server made them in the same moment
            pass
        except sa.exc.DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            raise ConfigError(
                f"--db is {shown}, which cannot be opened: {reason}."
            ) from None
        for table in TABLES.sorted_tables:
            found = {
                column["name"]
                for column in sa.inspect(self._engine).get_columns(table.name)
            }
            if found != set(table.c.keys()):
                text = f"which has a table {table.name} of another kind (columns {', '.join(sorted(found))})"
                raise ConfigError(
                    f"--db is {shown}, {text}; expected a database of its own."
                )

    def add(
        self,
        events: Sequence[Event],
        items: Sequence[dict[str, str]] = (),
        replacing: Set[str] = frozenset(),
    ) -> Added:
        """Keep items, then events. An event whose event_id is known changes nothing.

        New ones of the event_ids `replacing` replace the user's rows of their items dated until then.
        """
        self.put_items(items)
        rows = dict[str, Event]()
        conflict = set[str]()
        # 1. the first of an event_id among these
        for event in events:
            if rows.setdefault(event.event_id, event) != event:
                conflict.add(event.event_id)
        # 2. and among all
        new, known = self._write(
            EVENTS.c.event_id, [event._asdict() for event in rows.values()], replacing
        )
        conflict |= {name for _, name, *rest in known if rows[name] != Event(name, *rest)}
        return Added(new, sorted(conflict))

    def put_items(self, items: Sequence[dict[str, str]]) -> None:
        """Keep items: item_id, title and other columns of the items table. The same once more changes nothing."""
        texts = [json.dumps(item, sort_keys=True) for item in items]
        rows = [
            {"digest": hashlib.sha256(t.encode()).hexdigest(), "columns": t} for t in texts
        ]
        self._write(ITEMS.c.digest, rows)

    def put_users(self, users: Sequence[dict[str, Any]]) -> None:
        """Keep users: user_id and attributes, in place of those put before. The same once more changes nothing."""
        rows = [
            {"user_id": user["user_id"], "columns": json.dumps(user, sort_keys=True)}
            for user in users
        ]
        self._write(USERS.c.user_id, rows)

    def _write(
        self,
        key: sa.Column[str],
        given: Sequence[dict[str, Any]],
        replacing: Set[str] = frozenset(),
    ) -> tuple[int, list[Any]]:
        """Insert the rows whose key is new: how many they are, and the rows of the table that had the others' keys.

        Of given rows of the same key the last counts.
        """
        known = list[Any]()
        rows = {row[key.name]: row for row in given}
        if not rows:
            return 0, known
        with self._writing, self._engine.begin() as connection:
            # 1. room in the order of commits
            last = _tick(connection, len(rows))
            # 2. known keys; a user is known as the latest row has them
            names = list(rows)
            for start in range(0, len(names), TOGETHER):
                asked = sa.select(key.table).where(key.in_(names[start : start + TOGETHER]))
                known += connection.execute(asked.order_by("seq"))
            latest = {row._mapping[key]: row for row in known}
            for name, row in latest.items():
                if key.table is not USERS or row.columns == rows[name]["columns"]:
                    del rows[name]
            # 3. the others
            new = [
                {"seq": seq, **row}
                for seq, row in enumerate(rows.values(), last - len(rows) + 1)
            ]
            if new:
                connection.execute(sa.insert(key.table), new)
            # 4. what they replace; a deletion comes before the event of its `seq`
            for row in new:
                if row.get("event_id") in replacing:
                    what = Deleted(row["user_id"], row["timestamp"], row["item_id"])
                    earlier = (
                        EVENTS.c.user_id == what.user_id,
                        EVENTS.c.item_id == what.item_id,
                        EVENTS.c.timestamp <= what.timestamp,
                        EVENTS.c.seq.between(1, row["seq"] - 1),
                    )
                    # below 0: it does not come any more, but its event_id stays known
                    taken = sa.update(EVENTS).where(*earlier).values(seq=-EVENTS.c.seq)
                    connection.execute(taken)
                    gone = {"seq": row["seq"], "event_seq": 0, **what._asdict()}
                    connection.execute(sa.insert(DELETED).values(gone))
        return len(new), known

    def delete(self, user_id: str | None = None, event_id: str | None = None) -> int:
        """Delete a user's events and attributes, or an event; how many events these were.

        A record of it stays, by which whoever has read the rows leaves them out.
        """
        of = EVENTS.c.event_id == event_id
        if user_id is not None:
            of = EVENTS.c.user_id == user_id
        with self._writing, self._engine.begin() as connection:
            seq = _tick(connection, 1)
            gone = connection.execute(sa.delete(EVENTS).where(of).returning(EVENTS)).all()
            event_seq = 0
            if user_id is not None:
                connection.execute(sa.delete(USERS).where(USERS.c.user_id == user_id))
                # events may be dated ahead
                what = Deleted(user_id, time.time() + AHEAD)
            elif gone and gone[0].seq > 0:
                (event,) = gone
                event_seq = event.seq
                what = Deleted(event.user_id, event.timestamp, event.item_id, event.label)
            else:
                return len(gone)
            row = {"seq": seq, "event_seq": event_seq, **what._asdict()}
            connection.execute(sa.insert(DELETED).values(row))
        return len(gone)

    def arrivals(self, seq: int) -> tuple[int, list[Arrived]]:
        """The latest `seq`, and events, items, users and deletions behind the one given, in the order they came.

        An item or a user that was put again with other columns comes again. An event that was deleted does not come,
        and its deletion comes to those alone who may have read it.
        """
        with self._engine.connect() as connection:
            last = int(connection.execute(sa.select(CLOCK.c.seq)).scalar_one())
            rows = list[tuple[int, Any]]()
            for table in TABLES.sorted_tables if last > seq else ():
                if table is CLOCK:
                    continue
                came = sa.select(table).where(table.c.seq.between(seq + 1, last))
                if table is DELETED:
                    came = came.where(table.c.event_seq <= seq)
                for number, key, *rest in connection.execute(came):
                    what: Arrived
                    if table is EVENTS:
                        what = Event(key, *rest)
                    elif table is DELETED:
                        what = Deleted(*rest)
                    else:
                        what = json.loads(rest[0])
                    rows.append((number, what))
        rows.sort(key=lambda row: row[0])
        return last, [what for _, what in rows]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _tick(connection: sa.Connection, rows: int) -> int:
    """The `seq` of the last of so many new rows: waits for other writers, who wait until this one commits."""
    later = sa.update(CLOCK).values(seq=CLOCK.c.seq + rows).returning(CLOCK.c.seq)
    return int(connection.execute(later).scalar_one())


def _durable(connection: Any, record: Any) -> None:
    """Of a new SQLite connection: a commit returns when it is on disk, readers do not wait for it."""
    for setting in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 60000"):
        connection.execute(f"PRAGMA {setting}")
