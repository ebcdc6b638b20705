"""Keeps events, items and users that came after the log: acknowledged is on disk, in one order for all readers.

A row's `seq` rises in the order of commits: whoever writes takes the one row of `clock` first and holds it until the
commit. So `arrivals` never skips an event of a writer that was slower.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

from project.errors import ConfigError
from project.run import SEEN

TOGETHER = 500  # ids in one look-up; databases limit the parameters of a statement


def seen(run: Path) -> int:
    """The `seq` up to which a run's log has a store's events."""
    file = run / SEEN
    return int(json.loads(file.read_text(encoding="utf-8"))["seq"]) if file.exists() else 0


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
EVENTS = sa.Table(
    "events",
    TABLES,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("event_id", sa.Text, unique=True, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("label", sa.SmallInteger, nullable=False),
    sa.Column("timestamp", sa.Double, nullable=False),
    sa.Column("context", sa.Text, nullable=False, server_default=""),
    sa.Column("rating", sa.Double),
)
LATER = {
    "context": "context TEXT DEFAULT '' NOT NULL",
    "rating": "rating DOUBLE PRECISION",
}
ITEMS = sa.Table(
    "items",
    TABLES,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.Text, unique=True, nullable=False),
    sa.Column("columns", sa.Text, nullable=False),
)
USERS = sa.Table(
    "users",
    TABLES,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("user_id", sa.Text, index=True, nullable=False),
    sa.Column("columns", sa.Text, nullable=False),
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
            lacks = set(table.c.keys()) - found
            # a database that was made when events had no context, or no rating
            if table is EVENTS and lacks <= LATER.keys():
                with self._engine.begin() as connection:
                    for name in lacks:
                        connection.execute(sa.text(f"ALTER TABLE events ADD {LATER[name]}"))
                found |= lacks
            if found != set(table.c.keys()):
                text = f"which has a table {table.name} of another kind (columns {', '.join(sorted(found))})"
                raise ConfigError(
                    f"--db is {shown}, {text}; expected a database of its own."
                )

    def add(self, events: Sequence[Event], items: Sequence[dict[str, str]] = ()) -> Added:
        """Keep items, then events. An event whose event_id is known changes nothing."""
        self.put_items(items)
        rows = dict[str, Event]()
        conflict = list[str]()
        # 1. the first of an event_id among these
        for event in events:
            if rows.setdefault(event.event_id, event) != event:
                conflict.append(event.event_id)
        # 2. and among all
        new, known = self._write(
            EVENTS.c.event_id, {name: event._asdict() for name, event in rows.items()}
        )
        conflict += [name for _, name, *rest in known if rows[name] != Event(name, *rest)]
        return Added(new, sorted(set(conflict)))

    def put_items(self, items: Sequence[dict[str, str]]) -> None:
        """Keep items: item_id, title and other columns of the items table. The same once more changes nothing."""
        texts = [json.dumps(item, sort_keys=True) for item in items]
        rows = [
            {"digest": hashlib.sha256(t.encode()).hexdigest(), "columns": t} for t in texts
        ]
        self._write(ITEMS.c.digest, {row["digest"]: row for row in rows})

    def put_users(self, users: Sequence[dict[str, Any]]) -> None:
        """Keep users: user_id and attributes, in place of those put before. The same once more changes nothing."""
        rows = {
            user["user_id"]: {
                "user_id": user["user_id"],
                "columns": json.dumps(user, sort_keys=True),
            }
            for user in users
        }
        self._write(USERS.c.user_id, rows)

    def _write(
        self, key: sa.Column[str], rows: dict[str, dict[str, Any]]
    ) -> tuple[int, list[Any]]:
        """Insert the rows whose key is new: how many they are, and the rows of the table that had the others' keys."""
        known = list[Any]()
        if not rows:
            return 0, known
        with self._writing, self._engine.begin() as connection:
            # 1. room in the order of commits: waits for other writers
            tick = (
                sa.update(CLOCK).values(seq=CLOCK.c.seq + len(rows)).returning(CLOCK.c.seq)
            )
            last = connection.execute(tick).scalar_one()
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
                {"seq": last - len(rows) + 1 + k, **row}
                for k, row in enumerate(rows.values())
            ]
            if new:
                connection.execute(sa.insert(key.table), new)
        return len(new), known

    def arrivals(self, seq: int) -> tuple[int, list[Event | dict[str, Any]]]:
        """The latest `seq`, and events, items and users behind the one given, in the order in which they came.

        An item or a user that was put again with other columns comes again.
        """
        with self._engine.connect() as connection:
            last = int(connection.execute(sa.select(CLOCK.c.seq)).scalar_one())
            rows = list[Any]()
            for table in (EVENTS, ITEMS, USERS) if last > seq else ():
                rows += connection.execute(
                    sa.select(table).where(table.c.seq.between(seq + 1, last))
                )
        rows.sort(key=lambda row: row[0])
        return last, [
            Event(*rest) if len(rest) > 2 else json.loads(rest[1]) for _, *rest in rows
        ]

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _durable(connection: Any, record: Any) -> None:
    """Of a new SQLite connection: a commit returns when it is on disk, readers do not wait for it."""
    for setting in ("journal_mode = WAL", "synchronous = FULL", "busy_timeout = 60000"):
        connection.execute(f"PRAGMA {setting}")
